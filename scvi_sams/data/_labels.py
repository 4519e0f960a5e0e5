"""The dosage matrix of cells that are labelled with what they received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError

from ._dosage import Dosage, checked_names, stack_rows
from ._messages import listed, nearest, unknown_perturbations

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

__all__ = ["as_labels", "dosage_from_labels", "split_label"]

# What a missing value has become once a column went through `astype(str)`.
_MISSING_TEXT = frozenset({"nan", "<NA>"})


def as_labels(labels: str | Iterable[str] | None) -> list[str]:
    """Make a list of one label, several or none.

    Examples
    --------
    >>> as_labels("control"), as_labels(["NT", "safe"]), as_labels(None)
    (['control'], ['NT', 'safe'], [])
    """
    if labels is None:
        return []
    return [str(label).strip() for label in ([labels] if isinstance(labels, str) else labels)]


def dosage_from_labels(
    labels: pd.Series | Sequence[str],
    control: str | Iterable[str] | None,
    delimiter: str | None = "+",
    doses: pd.Series | Sequence[float | str] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> Dosage:
    """Read the dosage matrix from one label a cell, such as ``"control"`` or ``"KLF1+CEBPA"``.

    Parameters
    ----------
    labels
        One label a cell: perturbations joined by `delimiter`, in any number and order. A part that
        is a control label counts as nothing, a repeated part counts twice. The name and index of a
        Series (an obs column) appear in error messages.
    control
        Label or labels of unperturbed cells, or None where no label means that.
    delimiter
        What joins the parts of a label; None takes every label as one perturbation.
    doses
        One dose a cell: a number, or text with one number for each part in the order of the label
        (``"1.0+0.5"``; control parts may be left out). The default is a dose of 1 for each part.
        Doses of control cells are not read.
    names
        Columns of the matrix, as known to a model. The default is every part that occurs, sorted.

    Returns
    -------
    The dosage matrix, one row a label, and its names.

    Raises
    ------
    ScreenError
        If a label is missing or has an empty part, no cell has a control label, every cell is a
        control (unless `names` are given), or a dose is negative, not finite, or does not match
        the parts of its label.
    UnknownPerturbationError
        If a part is not in `names`.

    Examples
    --------
    >>> dosage = dosage_from_labels(["NT", "A", "A+B"], "NT", doses=["", "2", "1.0+0.5"])
    >>> dosage.matrix.toarray().tolist()
    [[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]]
    """
    labels = pd.Series(labels)
    controls = as_labels(control)
    column = "the labels" if labels.name is None else f"column {labels.name!r}"

    # Everything below works on the distinct labels (thousands), never on the cells (millions).
    categorical = labels.astype("category").cat.remove_unused_categories()
    codes = categorical.cat.codes.to_numpy()
    texts = [str(category).strip() for category in categorical.cat.categories]
    _check_present(labels.index, codes, texts, controls, column)

    whole = {*controls, *(names or ())}
    parts = [split_label(text, delimiter, whole) for text in texts]
    if faulty := [text for text, pieces in zip(texts, parts, strict=True) if "" in pieces]:
        raise ScreenError(
            f"Labels with an empty part in {column}: {listed(faulty)}. Correct them, or set the "
            f"delimiter, which is {delimiter!r}; None takes every label as one perturbation."
        )
    occurring = {part for pieces in parts for part in pieces}
    if names is None:
        _check_controls(controls, occurring, labels, column)
        names = sorted(occurring.difference(controls))
        if not names:
            raise ScreenError(
                f"No perturbation in {column}: the labels are all control ({listed(controls)})."
            )
    else:
        names = checked_names(names)
        if unknown := sorted(occurring.difference(controls, names)):
            raise unknown_perturbations(unknown, names)

    column_of: dict[str, int] = {name: index for index, name in enumerate(names)}
    if doses is None:
        row_of_cell = codes
        rows = [[(column_of[p], 1.0) for p in pieces if p in column_of] for pieces in parts]
    else:
        doses = pd.Series(doses)
        if len(doses) != len(labels):
            raise ScreenError(f"There are {len(labels)} labels but {len(doses)} doses.")
        row_of_cell, pairs = _distinct_pairs(codes, doses)
        rows = _dosed_rows(pairs, parts, column_of, delimiter, texts, labels.index, row_of_cell)
    return Dosage(stack_rows(rows, len(names))[row_of_cell], list(names))


def split_label(label: str, delimiter: str | None, whole: Collection[str] = ()) -> list[str]:
    """Split a label into its parts, unless it is, as it stands, one of the names in `whole`.

    Examples
    --------
    >>> split_label("KLF1 + CEBPA", "+"), split_label("HLA+B", "+", whole={"HLA+B"})
    (['KLF1', 'CEBPA'], ['HLA+B'])
    """
    if not delimiter or label in whole:
        return [label]
    return [part.strip() for part in label.split(delimiter)]


def _distinct_pairs(
    codes: NDArray[Any], doses: pd.Series
) -> tuple[NDArray[np.intp], list[tuple[int, Any]]]:
    """Find the distinct (label code, dose) pairs, and which of them each cell has."""
    dose_codes, values = pd.factorize(doses)
    dose_of = [*values, np.nan]  # factorize codes a missing dose as -1
    pair_codes = codes.astype(np.int64) * len(dose_of) + dose_codes % len(dose_of)
    distinct, pair_of_cell = np.unique(pair_codes, return_inverse=True)
    labels, dose_codes = np.divmod(distinct, len(dose_of))
    return pair_of_cell, [
        (int(label), dose_of[dose]) for label, dose in zip(labels, dose_codes, strict=True)
    ]


def _dosed_rows(
    pairs: Sequence[tuple[int, Any]],
    parts: Sequence[Sequence[str]],
    column_of: dict[str, int],
    delimiter: str | None,
    texts: Sequence[str],
    cells: pd.Index,
    pair_of_cell: NDArray[np.intp],
) -> list[list[tuple[int, float]]]:
    """Give each distinct (label, dose) pair its row of (column, dose)."""
    rows, uneven, invalid = [], [], []
    for index, (label, dose) in enumerate(pairs):
        columns = [column_of.get(part) for part in parts[label]]
        active = [column for column in columns if column is not None]
        values = _split_doses(dose, delimiter) if active else []
        if len(values) == len(columns):  # one dose for each part, control parts among them
            values = [v for v, column in zip(values, columns, strict=True) if column is not None]
        rows.append(list(zip(active, values, strict=False)))
        if len(values) != len(active):
            uneven.append(index)
        elif not all(0 <= value < np.inf for value in values):
            invalid.append(index)
    if uneven:
        label, dose = pairs[uneven[0]]
        raise ScreenError(
            f"The number of doses is not the number of parts in cells "
            f"{listed(cells[np.isin(pair_of_cell, uneven)])}: label {texts[label]!r} has "
            f"{len(parts[label])} part(s), but its dose is {str(dose)!r}. Give one dose for each "
            f"part, as in {(delimiter or '+').join(['1.0'] * len(parts[label]))!r}."
        )
    if invalid:
        faulty = [f"{pairs[i][1]} of {texts[pairs[i][0]]}" for i in invalid]
        raise ScreenError(
            f"Doses must be finite numbers, 0 or more, but cells "
            f"{listed(cells[np.isin(pair_of_cell, invalid)])} have {listed(faulty)}. Correct "
            "them or drop the cells."
        )
    return rows


def _split_doses(dose: object, delimiter: str | None) -> list[float]:
    """Read the doses of a label; what is no number becomes NaN."""
    whole = _number(str(dose))  # first, so that "1e+3" is one number
    if delimiter and np.isnan(whole):
        return [_number(piece) for piece in str(dose).split(delimiter)]
    return [whole]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _check_present(
    cells: pd.Index,
    codes: NDArray[Any],
    texts: Sequence[str],
    controls: Collection[str],
    column: str,
) -> None:
    text_missing = [t in _MISSING_TEXT and t not in controls for t in texts]
    missing = (codes == -1) | np.isin(codes, np.flatnonzero(text_missing))
    if missing.any():
        raise ScreenError(
            f"Cells without a label in {column} ({missing.sum()}): {listed(cells[missing])}. "
            "Drop them, or give them the control label if that is what they are."
        )


def _check_controls(
    controls: Sequence[str], occurring: Collection[str], labels: pd.Series, column: str
) -> None:
    for control in controls:
        if control not in occurring:
            counts = labels.value_counts().head(10).items()
            frequent = ", ".join(f"{str(label)!r} ({count})" for label, count in counts if count)
            close = nearest(control, occurring)
            hint = f" Did you mean {listed(close)}?" if close else ""
            raise ScreenError(
                f"No cell has the control label {control!r} in {column}. Its most "
                f"frequent labels (and their cells) are {frequent}.{hint} Pass the label of its "
                "control cells as `control`."
            )
