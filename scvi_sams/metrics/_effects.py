"""Average treatment effects that were observed, and how well predicted ones agree with them."""

from __future__ import annotations

__all__ = [
    "effect_correlation",
    "effect_correlation_by_condition",
    "observed_average_treatment_effect",
    "relative_squared_error",
]

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError

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
    AnnData (conditions x genes) with the effects (log2 units, float32) in ``X``, the number of
    cells in ``obs["n_cells"]`` and that of the controls in ``uns["n_control_cells"]``.

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
    labels = _obs_column(adata, perturbation_key).astype("category")
    controls = [control] if isinstance(control, str) else list(control)
    n_cells = labels.value_counts()
    if not (n_control := int(n_cells.reindex(controls, fill_value=0).sum())):
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

    # Row 0 averages the controls, row k the k-th condition; other labels have no row.
    row_of = {label: row for row, label in enumerate(kept, start=1)} | dict.fromkeys(controls, 0)
    row = labels.astype(object).map(row_of)
    cells = np.flatnonzero(row.notna())
    rows = row.iloc[cells].to_numpy(dtype=int)
    average = sp.csc_matrix(
        (1.0 / np.bincount(rows)[rows], (rows, cells)), shape=(kept.size + 1, adata.n_obs)
    )
    library = None if size_factor_key is None else _obs_column(adata, size_factor_key)
    mean = np.zeros((kept.size + 1, adata.n_vars))
    for chunk, log_expression in _log_expression(adata, layer, library, scale):
        mean += _dense(average[:, chunk] @ log_expression)
    return ad.AnnData(
        (mean[1:] - mean[0]).astype(np.float32),
        obs=pd.DataFrame({"n_cells": n_cells[kept].to_numpy()}, index=kept.astype(str)),
        var=pd.DataFrame(index=adata.var_names),
        uns={"n_control_cells": n_control},
    )


def effect_correlation(predicted: ad.AnnData, observed: ad.AnnData) -> float:
    r"""Pearson correlation of predicted and observed effects, over all conditions and genes.

    .. math::

        r = \mathrm{cor}\bigl( (\hat\Delta_{cg})_{c,g},\ (\Delta_{cg})_{c,g} \bigr)

    Parameters
    ----------
    predicted
        Conditions x genes, predicted average treatment effects in ``X``.
    observed
        Conditions x genes, for instance from :func:`observed_average_treatment_effect`. Must
        have every condition and gene of ``predicted``, in any order; others are not used.

    Returns
    -------
    Correlation between -1 and 1; NaN if either side is constant.

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``.

    Notes
    -----
    The measure of Bereket and Karaletsos (NeurIPS 2023). Large effects dominate it; see
    :func:`effect_correlation_by_condition`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> round(scvi_sams.metrics.effect_correlation(effect[["P002", "P001"]], effect), 6)
    1.0
    """
    values, truth = _aligned(predicted, observed)
    return float(_row_correlation(values.reshape(1, -1), truth.reshape(1, -1))[0])


def relative_squared_error(predicted: ad.AnnData, observed: ad.AnnData) -> float:
    r"""Squared error of predicted effects, as a share of the squared observed effects.

    .. math::

        \frac{\sum_{cg} (\hat\Delta_{cg} - \Delta_{cg})^2}{\sum_{cg} \Delta_{cg}^2}

    Predicting no effect at all scores 1. Unlike a correlation it sees the size of the effects.

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.

    Returns
    -------
    Error of 0 or more; NaN if all observed effects are 0.

    Raises
    ------
    ScreenError
        As :func:`effect_correlation`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> scvi_sams.metrics.relative_squared_error(effect, effect)
    0.0
    """
    values, truth = _aligned(predicted, observed)
    return float(_row_relative_error(values.reshape(1, -1), truth.reshape(1, -1))[0])


def effect_correlation_by_condition(predicted: ad.AnnData, observed: ad.AnnData) -> pd.DataFrame:
    """Correlation and error of predicted effects, one condition at a time.

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.

    Returns
    -------
    Table indexed by the conditions of ``predicted``, with ``pearson`` (over genes; NaN if either
    side is constant), ``relative_squared_error`` (NaN if all observed effects are 0) and, where
    ``observed.obs`` has it, ``n_cells``.

    Raises
    ------
    ScreenError
        As :func:`effect_correlation`.

    Notes
    -----
    Formulas as in :func:`effect_correlation` and :func:`relative_squared_error`, within one row.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> table = scvi_sams.metrics.effect_correlation_by_condition(effect, effect)
    >>> list(table.columns)
    ['pearson', 'relative_squared_error', 'n_cells']
    """
    values, truth = _aligned(predicted, observed)
    table = pd.DataFrame(
        {
            "pearson": _row_correlation(values, truth),
            "relative_squared_error": _row_relative_error(values, truth),
        },
        index=predicted.obs_names.copy(),
    )
    if "n_cells" in observed.obs:
        table["n_cells"] = observed.obs["n_cells"].loc[table.index]
    return table


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


def _aligned(
    predicted: ad.AnnData, observed: ad.AnnData
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both effects as matrices, in the order of ``predicted``."""
    for what, names, known in (
        ("conditions", predicted.obs_names, observed.obs_names),
        ("genes", predicted.var_names, observed.var_names),
    ):
        if (missing := names.difference(known)).size:
            raise ScreenError(
                f"{missing.size} {what} of `predicted` are not in `observed`, the first "
                f"{missing[0]!r}: leave them out of `predicted`."
            )
    observed = observed[predicted.obs_names, predicted.var_names]
    return _dense(predicted.X), _dense(observed.X)


def _dense(matrix: Any) -> NDArray[np.float64]:
    return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float64)


def _row_correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of each row with its counterpart, NaN where one is constant."""
    left = left - left.mean(axis=1, keepdims=True)
    right = right - right.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return _ratio((left * right).sum(axis=1), norm)


def _row_relative_error(
    predicted: NDArray[np.float64], observed: NDArray[np.float64]
) -> NDArray[np.float64]:
    return _ratio(((predicted - observed) ** 2).sum(axis=1), (observed**2).sum(axis=1))


def _ratio(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Quotient, NaN where the denominator is 0."""
    nan = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=nan, where=denominator > 0)
