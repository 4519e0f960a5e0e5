"""Tables of expression, conditions x genes, and log-normalised expression of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ProfileTable: TypeAlias = ad.AnnData | pd.DataFrame
"""Conditions x genes: effects or mean expression, in ``X`` of an AnnData or as a DataFrame."""

CELLS_PER_CHUNK = 20_000  # bounds the normalised copy of the counts; backed files work as well

# Tables are often in single precision: a difference below this share of the value is rounding.
_SINGLE_PRECISION = 1e-6


def dense(matrix: Any) -> NDArray[np.float64]:
    """Array in double precision, whatever the storage."""
    return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix, dtype=np.float64)


def layer_names(adata: ad.AnnData) -> list[str]:
    """Names of the layers. Since anndata 0.13 ``X`` is one of them, of the key None."""
    return [name for name in adata.layers if name is not None]


def _take(frame: pd.DataFrame, like: pd.DataFrame, lacking: str, mend: str) -> pd.DataFrame:
    """Conditions and genes of `frame` in the order of `like`, which must all be there."""
    for what, names, known in (
        ("conditions", like.index, frame.index),
        ("genes", like.columns, frame.columns),
    ):
        if (missing := names.difference(known)).size:
            head = lacking.format(f"{missing.size} {what} of `predicted`")
            raise ScreenError(f"{head}, the first {missing[0]!r}{mend}")
    return frame.loc[like.index, like.columns]


def profile_frame(table: ProfileTable, name: str, layer: str | None = None) -> pd.DataFrame:
    """Table as a DataFrame in double precision; `name` is what error messages call it."""
    if isinstance(table, ad.AnnData):
        if layer is not None and layer not in table.layers:
            raise ScreenError(
                f"`{name}` has no layer {layer!r}, only {', '.join(layer_names(table)) or 'X'}."
            )
        values = dense(table.X if layer is None else table.layers[layer])
        frame = pd.DataFrame(values, index=table.obs_names, columns=table.var_names)
    elif isinstance(table, pd.DataFrame):
        if layer is not None:
            raise ScreenError(f"`{name}` is a DataFrame, which has no layer {layer!r}.")
        frame = table.astype(np.float64)
    else:
        raise TypeError(f"`{name}` must be an AnnData or a DataFrame, not {type(table).__name__}.")
    for what, names in (("condition", frame.index), ("gene", frame.columns)):
        if names.has_duplicates:
            raise ScreenError(
                f"`{name}` has the {what} {names[names.duplicated()][0]!r} twice: keep one."
            )
    return frame


def aligned_profiles(
    predicted: ProfileTable, observed: ProfileTable, other: str = "observed"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables as DataFrames with the conditions and genes of `predicted`, in its order."""
    values, truth = profile_frame(predicted, "predicted"), profile_frame(observed, other)
    mend = ": leave them out of `predicted`."
    return values, _take(truth, values, f"{{}} are not in `{other}`", mend)


def row_of_genes(row: pd.Series, genes: pd.Index, name: str) -> NDArray[np.float64]:
    """Values of one profile (a Series named by genes) in the order of `genes`."""
    if (missing := genes.difference(row.index)).size:
        raise ScreenError(
            f"`{name}` lacks {missing.size} genes of `predicted`, the first {missing[0]!r}."
        )
    return row.loc[genes].to_numpy(dtype=np.float64)


def relative_to(
    frame: pd.DataFrame, reference: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Difference from a profile; exactly 0 where nothing but rounding is left."""
    values = frame.to_numpy()
    difference = values - reference
    return np.where(np.abs(difference) <= _SINGLE_PRECISION * np.abs(reference), 0.0, difference)


def row_correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of each row with its counterpart, NaN where one is constant."""
    centred, norms = [], []
    for values in (left, right):
        deviation = values - values.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(deviation, axis=1)
        # The mean of equal numbers is off by rounding, which is no variation.
        norms.append(np.where(norm > 1e-12 * np.linalg.norm(values, axis=1), norm, 0.0))
        centred.append(deviation)
    return ratio((centred[0] * centred[1]).sum(axis=1), norms[0] * norms[1])


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient, NaN where the denominator is not positive."""
    nan = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=nan, where=denominator > 0)


def standard_error_frames(
    observed: ProfileTable, standard_error: ProfileTable | str, like: pd.DataFrame
) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Standard errors in the order of `like`, and the part that the controls have in each gene."""
    if isinstance(standard_error, str):
        if not isinstance(observed, ad.AnnData):
            raise ScreenError(
                "`observed` is a DataFrame: pass `standard_error` as one as well, or None."
            )
        errors = profile_frame(observed, "observed", layer=standard_error)
    else:
        errors = profile_frame(standard_error, "standard_error")
    errors = _take(errors, like, "`standard_error` lacks {}", ".")
    control = np.zeros(errors.shape[1])
    if isinstance(observed, ad.AnnData) and "control_standard_error" in observed.var:
        control = row_of_genes(observed.var["control_standard_error"], errors.columns, "observed")
    if (bad := errors.isna().any(axis=1) | (errors < 0).any(axis=1)).any():
        raise ScreenError(
            f"Condition {bad.index[bad.argmax()]!r} has no standard error, as it has one cell, or "
            f"a negative one: leave it out, or pass standard_error=None."
        )
    return errors, control


def log_expression_chunks(
    adata: ad.AnnData, layer: str | None, library: pd.Series | None = None, scale: float = 1e4
) -> Iterator[tuple[slice, Any]]:
    """Chunks of log2(1 + scale x / library), sparse if the counts are, with their rows."""
    if layer is not None and layer not in adata.layers:
        raise ScreenError(
            f"There is no layer {layer!r}, only {', '.join(layer_names(adata)) or 'X'}."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    for start in range(0, adata.n_obs, CELLS_PER_CHUNK):
        cells = slice(start, min(start + CELLS_PER_CHUNK, adata.n_obs))
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
        yield cells, log_expression(counts, size, scale)


def log_expression(counts: Any, library: NDArray[np.float64], scale: float = 1e4) -> Any:
    """log2(1 + scale x / library) of cells (cells x genes), sparse if the counts are."""
    if not sp.issparse(counts):
        return np.log2(1 + np.asarray(counts) * (scale / library)[:, None])
    expression = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    expression.data *= np.repeat(scale / library, np.diff(expression.indptr))
    np.log1p(expression.data, out=expression.data)
    expression.data /= np.log(2)
    return expression
