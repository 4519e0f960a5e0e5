"""Average treatment effects that were observed, and how sure they are."""

from __future__ import annotations

__all__ = ["observed_average_treatment_effect"]

from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._profiles import dense

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_CELLS_PER_CHUNK = 20_000  # bounds the normalised copy of the counts; backed files work as well


def observed_average_treatment_effect(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None = None,
    size_factor_key: str | None = None,
    conditions: Sequence[str] | None = None,
    scale: float = 1e4,
    min_cells: int = 1,
) -> ad.AnnData:
    r"""Mean difference in log expression between the cells of a condition and the controls.

    With :math:`C_c` the cells of condition :math:`c` and :math:`C_0` the control cells,

    .. math::

        \mathrm{ATE}_{cg} = \frac{1}{|C_c|} \sum_{i \in C_c} y_{ig}
            - \frac{1}{|C_0|} \sum_{i \in C_0} y_{ig}, \qquad
        y_{ig} = \log_2 \left( 1 + \mathrm{scale} \cdot x_{ig} / l_i \right).

    Parameters
    ----------
    adata
        Cells x genes, with counts. A matrix that is sparse stays so, and one that is backed by a
        file is read in pieces.
    perturbation_key
        Column of ``adata.obs`` with the condition of each cell. Cells without one are left out.
    control
        Label, or labels, of the control cells.
    layer
        Layer of the counts; ``X`` by default.
    size_factor_key
        Column of ``adata.obs`` with the library size :math:`l_i`, where the genes in ``adata``
        are a panel of those measured. By default the sum of the cell's counts.
    conditions
        Conditions, in the order wanted. By default all but the controls.
    scale
        Counts per cell to which libraries are scaled.
    min_cells
        Conditions with fewer cells are left out.

    Returns
    -------
    AnnData (conditions x genes; log2 units, float32):

    * ``X``: the effects
    * ``layers["standard_error"]``: :math:`\sqrt{s_{cg}^2 / |C_c| + s_{0g}^2 / |C_0|}`, with
      :math:`s^2` the variance over cells; NaN for a single cell
    * ``var["control_mean"]`` and ``var["control_standard_error"]``: mean :math:`y` of the
      controls, and their part of the error, which all conditions share
    * ``obs["n_cells"]`` and ``uns["n_control_cells"]``

    Raises
    ------
    ScreenError
        If a column, layer or label is not there, no cell is a control, a condition asked for by
        name has fewer than ``min_cells`` cells, or a library size is not a positive number.

    Notes
    -----
    The estimand is that of Bereket and Karaletsos (NeurIPS 2023), which they compare between
    model and data by Pearson correlation; see :func:`effect_correlation`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> observed = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> observed["P001"].shape
    (1, 500)
    """
    groups = _condition_groups(adata, perturbation_key, control, conditions, min_cells)
    mean, variance = _group_moments(adata, groups, layer, size_factor_key, scale)
    squared_error = variance / np.maximum(groups.n_cells, 1)[:, None]
    effects = slice(1, len(groups.conditions) + 1)
    return ad.AnnData(
        (mean[effects] - mean[0]).astype(np.float32),
        obs=pd.DataFrame({"n_cells": groups.n_cells[effects]}, index=groups.conditions),
        var=pd.DataFrame(
            {"control_mean": mean[0], "control_standard_error": np.sqrt(squared_error[0])},
            index=adata.var_names,
            dtype=np.float32,
        ),
        layers={
            "standard_error": np.sqrt(squared_error[effects] + squared_error[0]).astype(np.float32)
        },
        uns={"n_control_cells": int(groups.n_cells[0])},
    )


class _ConditionGroups(NamedTuple):
    """Cells by condition: row 0 the controls, row k the k-th condition, last all other labels."""

    conditions: pd.Index
    row: NDArray[np.int64]
    """Row of each cell, -1 for cells without a label."""
    n_cells: NDArray[np.int64]
    """Cells of each row."""


def _condition_groups(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    conditions: Sequence[str] | None,
    min_cells: int,
) -> _ConditionGroups:
    labels = _obs_column(adata, perturbation_key).astype("category")
    controls = [control] if isinstance(control, str) else list(control)
    n_cells = labels.value_counts()
    if not n_cells.reindex(controls, fill_value=0).sum():
        raise ScreenError(
            f"No cell of obs[{perturbation_key!r}] is a control: `control` is "
            f"{', '.join(map(repr, controls))}, the labels begin with "
            f"{', '.join(map(repr, labels.cat.categories[:5]))}."
        )
    min_cells = max(min_cells, 1)  # no cell, no mean
    if conditions is None:
        kept = labels.cat.categories.difference(controls, sort=False)
        kept = kept[n_cells[kept] >= min_cells]
    else:
        kept = pd.Index(conditions)
        if kept.has_duplicates or kept.isin(controls).any():
            raise ScreenError("`conditions` names one twice, or a control: leave that out.")
        n_kept = n_cells.reindex(kept, fill_value=0)
        if (few := n_kept[n_kept < min_cells]).size:
            raise ScreenError(
                f"{few.size} of `conditions` have fewer than {min_cells} cells, the first "
                f"{few.index[0]!r} with {few.iloc[0]}: leave them out or lower `min_cells`."
            )
    row_of = {label: row for row, label in enumerate(kept, start=1)} | dict.fromkeys(controls, 0)
    category_row = [row_of.get(label, kept.size + 1) for label in labels.cat.categories]
    row = np.array([*category_row, -1], dtype=np.int64)[labels.cat.codes]  # code -1: no label
    return _ConditionGroups(
        kept.astype(str), row, np.bincount(row[row >= 0], minlength=kept.size + 2)
    )


def _group_moments(
    adata: ad.AnnData,
    groups: _ConditionGroups,
    layer: str | None,
    size_factor_key: str | None,
    scale: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of log expression over the cells of each row, rows x genes."""
    cells = np.flatnonzero(groups.row >= 0)
    shape = (groups.n_cells.size, adata.n_obs)
    member = sp.csc_matrix((np.ones(cells.size), (groups.row[cells], cells)), shape=shape)
    library = None if size_factor_key is None else _obs_column(adata, size_factor_key)
    total, squares = np.zeros((2, groups.n_cells.size, adata.n_vars))
    for chunk, log_expression in _log_expression(adata, layer, library, scale):
        total += dense(member[:, chunk] @ log_expression)
        squared = log_expression.power(2) if sp.issparse(log_expression) else log_expression**2
        squares += dense(member[:, chunk] @ squared)
    n_cells = groups.n_cells[:, None]
    mean = total / np.maximum(n_cells, 1)
    deviations = np.maximum(squares - n_cells * mean**2, 0)  # rounding can go below 0
    # What is left of equal values is rounding.
    deviations[deviations <= 1e-12 * squares] = 0
    variance = np.where(n_cells > 1, deviations / np.maximum(n_cells - 1, 1), np.nan)
    return mean, variance


def _log_expression(
    adata: ad.AnnData, layer: str | None, library: pd.Series | None, scale: float
) -> Iterator[tuple[slice, Any]]:
    """Chunks of log2(1 + scale x / library), sparse if the counts are, with their rows."""
    if layer is not None and layer not in adata.layers:
        raise ScreenError(f"There is no layer {layer!r}, only {', '.join(adata.layers) or 'X'}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    for start in range(0, adata.n_obs, _CELLS_PER_CHUNK):
        cells = slice(start, min(start + _CELLS_PER_CHUNK, adata.n_obs))
        counts = matrix[cells]
        size = np.asarray(counts.sum(axis=1), dtype=float).ravel()
        if library is not None:
            size = library.iloc[cells].to_numpy(dtype=float, na_value=np.nan)
        if not (valid := np.isfinite(size) & (size > 0)).all():
            first = int(np.argmin(valid))
            raise ScreenError(
                f"Cell {adata.obs_names[start + first]!r} has library size {size[first]:g}: leave "
                f"out cells without counts."
            )
        if sp.issparse(counts):
            log_expression = sp.csr_matrix(counts, dtype=np.float64, copy=True)
            log_expression.data *= np.repeat(scale / size, np.diff(log_expression.indptr))
            np.log1p(log_expression.data, out=log_expression.data)
            log_expression.data /= np.log(2)
        else:
            log_expression = np.log2(1 + np.asarray(counts) * (scale / size)[:, None])
        yield cells, log_expression


def _obs_column(adata: ad.AnnData, key: str) -> pd.Series:
    if key not in adata.obs:
        raise ScreenError(
            f"There is no obs[{key!r}], only {', '.join(map(repr, adata.obs)) or 'no column'}."
        )
    return adata.obs[key]
