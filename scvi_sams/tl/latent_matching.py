"""Latents of two fits (or of a fit and the truth), matched one to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def matched_correlation(
    true: NDArray[np.float64], predicted: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], float]:
    """Matched true and predicted columns, their absolute correlations, and the mean of these."""
    true, predicted = standardised(true), standardised(predicted)
    correlation = np.minimum(np.abs(true.T @ predicted), 1.0)  # rounding can exceed 1
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    matched = correlation[rows, columns]
    n_varying = int(true.any(axis=0).sum())
    return rows, columns, matched, float(matched.sum() / n_varying) if n_varying else float("nan")


def paired(
    true: Any, predicted: Any, rows: str = "perturbations"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both tables as finite matrices with the rows in the same order."""
    if isinstance(true, pd.DataFrame) and isinstance(predicted, pd.DataFrame):
        if missing := list(true.index.symmetric_difference(predicted.index)):
            raise ScreenError(
                f"{len(missing)} {rows} are in one table only, the first {missing[0]!r}: "
                f"give both the same {rows}."
            )
        predicted = predicted.loc[true.index]
    matrices = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    for name, matrix in zip(("true", "predicted"), matrices, strict=True):
        if matrix.ndim != 2:
            raise ScreenError(
                f"The {name} table has shape {matrix.shape}: it must be {rows} x latents."
            )
        if not np.isfinite(matrix).all():
            raise ScreenError(f"The {name} table holds values that are not finite.")
    if matrices[0].shape[0] != matrices[1].shape[0]:
        raise ScreenError(
            f"The true table has {matrices[0].shape[0]} {rows} and the predicted one "
            f"{matrices[1].shape[0]}: give both the same {rows}, in the same order."
        )
    return matrices


def standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns centred and of unit length; constant ones become zero."""
    centred = values - values.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    # The mean of equal numbers is off by rounding, which must not be blown up to unit length.
    constant = norm <= 1e-12 * np.linalg.norm(values, axis=0)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, norm))
