"""Conditions as users write them, measured or not, as rows of a dosage matrix."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._exceptions import ScreenError

from ._dosage import align_dosage, dosage_from_matrix, stack_rows
from ._labels import as_labels, split_label
from ._messages import listed, unknown_perturbations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ._dosage import Dosage

__all__ = ["ConditionDosage", "Conditions", "dosage_from_conditions"]

Conditions: TypeAlias = (
    "str | Mapping[str, float] | Sequence[str | Mapping[str, float]] "
    "| np.ndarray | sparse.spmatrix | sparse.sparray | pd.DataFrame"
)
"""One condition or several: labels, ``{name: dose}`` dicts, or a dosage matrix."""


class ConditionDosage(NamedTuple):
    """Doses and labels of conditions."""

    matrix: sparse.csr_matrix
    """Doses, conditions x perturbations, float32."""
    labels: list[str]
    """Label of each condition."""


def dosage_from_conditions(
    conditions: Conditions,
    names: Sequence[str],
    control_labels: str | Iterable[str] | None = None,
    delimiter: str | None = "+",
) -> ConditionDosage:
    """Read conditions, whether or not any cell was measured under them.

    Parameters
    ----------
    conditions
        One condition or a sequence of them, each either a label as in `perturbation_key`
        (``"A"``, ``"A+B"``, a control label), or a dict of doses such as ``{"A": 1.0, "B": 0.5}``
        (an empty one is a control). Or a dosage matrix, conditions x `names`; a DataFrame may
        have fewer columns than `names`, in any order, and its index, unless it is only numbers,
        labels the conditions.
    names
        Perturbations of the model.
    control_labels
        Label or labels that mean no perturbation.
    delimiter
        What joins the parts of a label.

    Returns
    -------
    Doses, conditions x `names`, and a label for each condition: the one given, else one made from
    the doses, such as ``"A+B"``, or ``"A:1+B:0.5"`` where a dose is not 1.

    Raises
    ------
    UnknownPerturbationError
        If a condition names a perturbation that is not in `names`.
    ScreenError
        If there is no condition, one is of another type, a dose is negative or not finite, or a
        matrix does not have one column for each name.

    Examples
    --------
    >>> conditions = ["control", "A+B", {"A": 1.0, "B": 0.5}]
    >>> matrix, labels = dosage_from_conditions(conditions, ["A", "B"], "control")
    >>> labels
    ['control', 'A+B', 'A:1+B:0.5']
    >>> matrix.toarray().tolist()
    [[0.0, 0.0], [1.0, 1.0], [1.0, 0.5]]
    """
    names = list(names)
    controls = as_labels(control_labels)
    if _is_matrix(conditions):
        dosage = _read_matrix(conditions, names)
        labels = _index_labels(conditions)
        if labels is None:
            labels = [_label_doses(row, controls, delimiter) for row in _row_doses(dosage)]
        return ConditionDosage(dosage.matrix, labels)

    if isinstance(conditions, str | Mapping):
        conditions = [conditions]
    doses, labels = [], []
    for condition in conditions:
        if isinstance(condition, str):
            parts = split_label(condition.strip(), delimiter, {*controls, *names})
            doses.append([(part, 1.0) for part in parts if part not in controls])
            labels.append(condition)
        elif isinstance(condition, Mapping):
            row = {str(name): float(dose) for name, dose in condition.items()}
            row = {name: dose for name, dose in row.items() if name not in controls}
            _check_doses(row)
            doses.append(list(row.items()))
            labels.append(_label_doses(row, controls, delimiter))
        else:
            raise ScreenError(
                f"{condition!r} is no condition. Write a label such as 'A+B', a dict such as "
                "{'A': 1.0}, or all conditions as one matrix (conditions x perturbations)."
            )
    if not labels:
        raise ScreenError("There is no condition: name at least one, such as 'A' or 'A+B'.")

    column_of = {name: index for index, name in enumerate(names)}
    if unknown := sorted({name for row in doses for name, _ in row}.difference(column_of)):
        raise unknown_perturbations(unknown, names)
    rows = [[(column_of[name], dose) for name, dose in row] for row in doses]
    return ConditionDosage(stack_rows(rows, len(names)), labels)


def _is_matrix(conditions: Conditions) -> bool:
    return (
        isinstance(conditions, pd.DataFrame)
        or sparse.issparse(conditions)
        or (isinstance(conditions, np.ndarray) and conditions.dtype.kind in "biuf")
    )


def _read_matrix(matrix: Conditions, names: list[str]) -> Dosage:
    source = "the matrix of conditions"
    if isinstance(matrix, pd.DataFrame):
        matrix = align_dosage(dosage_from_matrix(matrix, source=source), names)
    elif isinstance(matrix, np.ndarray):
        matrix = np.atleast_2d(matrix)
    return dosage_from_matrix(matrix, names, source=source)


def _index_labels(matrix: Conditions) -> list[str] | None:
    if isinstance(matrix, pd.DataFrame) and not pd.api.types.is_numeric_dtype(matrix.index):
        return [str(label) for label in matrix.index]
    return None


def _row_doses(dosage: Dosage) -> Iterator[dict[str, float]]:
    matrix, names = dosage
    for start, stop in pairwise(matrix.indptr):
        columns, doses = matrix.indices[start:stop], matrix.data[start:stop]
        yield {names[column]: float(dose) for column, dose in zip(columns, doses, strict=True)}


def _label_doses(doses: Mapping[str, float], controls: list[str], delimiter: str | None) -> str:
    """Write doses as a label; a dose is shown only where one of them is not 1."""
    given = {name: dose for name, dose in doses.items() if dose}
    if not given:
        return controls[0] if controls else "control"
    plain = all(dose == 1 for dose in given.values())
    return (delimiter or "+").join(
        name if plain else f"{name}:{dose:g}" for name, dose in given.items()
    )


def _check_doses(doses: Mapping[str, float]) -> None:
    if faulty := [f"{name}: {dose:g}" for name, dose in doses.items() if not 0 <= dose < np.inf]:
        raise ScreenError(
            f"Doses must be finite numbers, 0 or more, but the condition has {listed(faulty)}."
        )
