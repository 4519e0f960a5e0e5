"""The condition of each cell, written in one way however its label was."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError

from ._labels import as_labels, dosage_from_labels, split_label
from ._messages import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = ["CellConditions", "cell_conditions", "find_conditions", "obs_column"]


class CellConditions(NamedTuple):
    """Distinct conditions of a screen, and which of them each cell has."""

    codes: NDArray[np.intp]
    """One a cell: the row of the lists below."""
    doses: list[dict[str, float]]
    """Of each condition, its perturbations in alphabetical order with their doses; empty for
    control."""
    names: list[str]
    """Of each condition: ``"A+B"``, or ``"A:1+B:0.5"`` if there is a column of doses."""

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """One a cell: whether it is a control."""
        return np.array([not doses for doses in self.doses])[self.codes]


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Take a column of `adata.obs`.

    Raises
    ------
    ScreenError
        If there is none of that name.
    """
    if key not in adata.obs:
        close = nearest(key, map(str, adata.obs.columns))
        raise ScreenError(
            f"There is no column {key!r} in adata.obs. "
            + (f"Did you mean {listed(close)}?" if close else f"It has {listed(adata.obs)}.")
        )
    return adata.obs[key]


def cell_conditions(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None = "+",
    dosage_key: str | None = None,
) -> CellConditions:
    """Read the condition of each cell.

    Labels that mean the same are one condition: ``"A+B"``, ``"B+A"`` and ``"A+B+control"``.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    dosage_key
        Column of `adata.obs` with doses, which then tell conditions apart.

    Returns
    -------
    The conditions, sorted by name.

    Raises
    ------
    ScreenError
        If a column is absent, or labels or doses cannot be read.

    Examples
    --------
    >>> import anndata
    >>> obs = pd.DataFrame({"guide": ["NT", "B+A", "A+B", "A"]}, index=list("abcd"))
    >>> conditions = cell_conditions(anndata.AnnData(obs=obs), "guide", "NT")
    >>> [conditions.names[code] for code in conditions.codes]
    ['NT', 'A+B', 'A+B', 'A']
    """
    labels = obs_column(adata, perturbation_key)
    doses = None if dosage_key is None else obs_column(adata, dosage_key)
    matrix, names = dosage_from_labels(labels, control, combination_delimiter, doses)
    # From here on distinct labels only: a screen has thousands of them and millions of cells.
    columns = [labels.astype(str).rename("label")]
    if doses is not None:
        columns.append(doses.astype(str).rename("dose"))
    groups = pd.concat(columns, axis=1).groupby(
        [column.name for column in columns], sort=False, observed=True, dropna=False
    )
    group_of_cell = groups.ngroup().to_numpy()
    _, first_cells = np.unique(group_of_cell, return_index=True)
    control_name = next(iter(as_labels(control)), "control")
    delimiter = combination_delimiter or "+"
    found: dict[str, dict[str, float]] = {}
    name_of_group = []
    for cell in first_cells:
        row = matrix[[cell]]
        given = dict(sorted(zip((names[i] for i in row.indices), row.data.tolist(), strict=True)))
        parts = given if doses is None else [f"{name}:{dose:g}" for name, dose in given.items()]
        name = delimiter.join(parts) or control_name
        found.setdefault(name, given)
        name_of_group.append(name)
    ordered = sorted(found)
    code_of = {name: code for code, name in enumerate(ordered)}
    codes = np.array([code_of[name] for name in name_of_group], dtype=np.intp)[group_of_cell]
    return CellConditions(codes, [found[name] for name in ordered], ordered)


def find_conditions(
    wanted: Sequence[str],
    conditions: CellConditions,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None,
) -> list[int]:
    """Find the codes of conditions that a user names, in any order of their parts.

    Raises
    ------
    ScreenError
        If one has no cells, or is a control.
    """
    controls = as_labels(control)
    perturbations = {part for doses in conditions.doses for part in doses}
    code_of = {frozenset(doses): code for code, doses in enumerate(conditions.doses)}
    codes, unknown = [], []
    for label in map(str, wanted):
        parts = split_label(label.strip(), combination_delimiter, {*controls, *perturbations})
        key = frozenset(part for part in parts if part not in controls)
        if not key:
            raise ScreenError(
                f"{label!r} is the control, which is needed for training: name conditions with a "
                "perturbation."
            )
        if key in code_of:
            codes.append(code_of[key])
        else:
            unknown.append(label)
    if unknown:
        close = nearest(unknown[0], conditions.names)
        raise ScreenError(
            f"No cell has the conditions {listed(unknown)}."
            + (f" Did you mean {listed(close)}?" if close else "")
        )
    return sorted(set(codes))
