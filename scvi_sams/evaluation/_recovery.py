"""How much of a known mechanism a fit has found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from scvi_sams.tl.latent_matching import matched_correlation, paired, standardised

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


class MaskRecovery(NamedTuple):
    """Agreement of two masks after their latents were matched; see :func:`mask_recovery`."""

    f1: float
    """F1 over all entries."""
    precision: float
    """Share of the predicted entries that are true."""
    recall: float
    """Share of the true entries that are predicted."""
    macro_f1: float
    """Mean over the true latents, each of its match's F1 (0 without a match)."""
    true_latents: NDArray[np.int64]
    """Matched columns of the true mask ..."""
    predicted_latents: NDArray[np.int64]
    """... and the column of the predicted mask that each is matched with."""


class LatentRecovery(NamedTuple):
    """Agreement of latents, matched and as a whole; see :func:`latent_recovery`."""

    mean_correlation: float
    """Mean of ``correlation`` over the true latents that vary (0 for those without a match)."""
    linear_r2: float
    """Share of the true latents that a linear function of the inferred ones explains."""
    correlation: NDArray[np.float64]
    """Absolute correlation of each matched pair."""
    true_latents: NDArray[np.int64]
    """Matched columns of the true latents ..."""
    inferred_latents: NDArray[np.int64]
    """... and the column of the inferred latents that each is matched with."""


def mask_recovery(
    true_mask: ArrayLike | pd.DataFrame,
    predicted_mask: ArrayLike | pd.DataFrame,
    threshold: float = 0.5,
) -> MaskRecovery:
    r"""Compare predicted masks with the true ones, whatever the order of the latents.

    Latents are matched one to one so that the sum of the F1 of matched columns is largest
    (Hungarian method). With :math:`n` entries in the true mask, :math:`\hat n` in the predicted
    one and :math:`c` common to matched columns,

    .. math::

        \mathrm{precision} = c / \hat n, \qquad \mathrm{recall} = c / n, \qquad
        F_1 = 2 c / (n + \hat n),

    so that entries of an unmatched predicted latent are false and those of an unmatched true one
    missed.

    Parameters
    ----------
    true_mask
        Perturbations x latents, boolean or probabilities.
    predicted_mask
        Perturbations x latents, boolean or probabilities; the number of latents may differ. If
        both masks are DataFrames, the perturbations are matched by name.
    threshold
        An entry is on if it is above this value.

    Returns
    -------
    MaskRecovery
        ``f1``, ``precision``, ``recall``, ``macro_f1`` (shares of nothing are 1), and the matching
        in ``true_latents`` and ``predicted_latents``.

    Raises
    ------
    ScreenError
        If the perturbations do not match, or values are not finite.

    Notes
    -----
    Matching: Kuhn, Naval Research Logistics Quarterly 2, 83 (1955).

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.evaluation import mask_recovery
    >>> truth = np.array([[1, 0], [1, 0], [0, 1]])
    >>> mask_recovery(truth, truth[:, ::-1]).f1
    1.0
    """
    true_values, predicted_values = paired(true_mask, predicted_mask)
    true, predicted = true_values > threshold, predicted_values > threshold
    common = true.T.astype(float) @ predicted
    sizes = np.add.outer(true.sum(axis=0), predicted.sum(axis=0))
    column_f1 = 2 * common / np.maximum(sizes, 1)
    rows, columns = linear_sum_assignment(column_f1, maximize=True)
    n_common, n_true, n_predicted = common[rows, columns].sum(), true.sum(), predicted.sum()
    matched_f1 = np.zeros(true.shape[1])
    matched_f1[rows] = column_f1[rows, columns]
    used = true.any(axis=0)
    return MaskRecovery(
        f1=_share(2 * n_common, n_true + n_predicted),
        precision=_share(n_common, n_predicted),
        recall=_share(n_common, n_true),
        macro_f1=_share(matched_f1[used].sum(), used.sum()),
        true_latents=rows,
        predicted_latents=columns,
    )


def latent_recovery(
    true: ArrayLike | pd.DataFrame,
    inferred: ArrayLike | pd.DataFrame,
    method: Literal["pearson", "spearman"] = "pearson",
    test_share: float = 0.2,
    seed: int = 0,
) -> LatentRecovery:
    r"""Compare inferred with true latents: one with one, and as a whole.

    With :math:`\rho_{kl}` the correlation over rows of true latent :math:`k` and inferred latent
    :math:`l`, and :math:`\sigma` the one-to-one matching that maximises its sum (Hungarian
    method), the **mean correlation coefficient** is

    .. math:: \mathrm{MCC} = \frac{1}{K} \sum_k |\rho_{k \sigma(k)}|,

    over the :math:`K` true latents that vary. It is 1 if latents are recovered up to order, sign
    and scale. A rotation lowers it, but not the **linear** :math:`R^2`, which asks whether the
    information is there: each true latent is regressed on all inferred ones in a part of the rows,
    and :math:`R^2` is the mean of their coefficients of determination in the others.

    Parameters
    ----------
    true
        Latent states of cells (cells x latents), or effects of perturbations, mask times embedding
        (perturbations x latents).
    inferred
        The same rows; the number of latents may differ. If both are DataFrames, the rows are
        matched by name.
    method
        ``"pearson"``, or ``"spearman"`` for the correlation of ranks, which allows for any
        monotone function of each latent.
    test_share
        Share of the rows that the linear :math:`R^2` is computed on.
    seed
        Seed of the choice of these rows.

    Returns
    -------
    LatentRecovery
        ``mean_correlation`` (MCC; a latent without a match counts as 0), ``linear_r2``, the
        ``correlation`` of each matched pair, and the matching in ``true_latents`` and
        ``inferred_latents``. NaN if no true latent varies.

    Raises
    ------
    ScreenError
        If the rows do not match, or values are not finite.
    ValueError
        If ``method`` is unknown.

    Notes
    -----
    MCC: Hyvarinen and Morioka (NeurIPS 2016), used for SVAE+ by Lopez, Tagasovska et al. (CLeaR
    2023). Linear :math:`R^2`: the informativeness of Eastwood and Williams (ICLR 2018), by least
    squares.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.evaluation import latent_recovery
    >>> rng = np.random.default_rng(0)
    >>> latents = rng.normal(size=(100, 3))
    >>> round(latent_recovery(latents, -2 * latents[:, [2, 0, 1]]).mean_correlation, 6)
    1.0
    >>> round(latent_recovery(latents, latents @ rng.normal(size=(3, 3))).linear_r2, 6)
    1.0
    """
    if method not in {"pearson", "spearman"}:
        raise ValueError(f"method={method!r} is unknown; use 'pearson' or 'spearman'.")
    values, other = paired(true, inferred, rows="rows")
    linear = _linear_r2(values, other, test_share, seed)
    if method == "spearman":
        values, other = rankdata(values, axis=0), rankdata(other, axis=0)
    rows, columns, correlation, mean = matched_correlation(values, other)
    return LatentRecovery(mean, linear, correlation, rows, columns)


def _linear_r2(
    true: NDArray[np.float64], inferred: NDArray[np.float64], test_share: float, seed: int
) -> float:
    fitted_true, held_true, fitted_inferred, held_inferred = train_test_split(
        true, inferred, test_size=test_share, random_state=seed
    )
    varies = standardised(held_true).any(axis=0)
    if not varies.any():
        return float("nan")
    regression = LinearRegression().fit(fitted_inferred, fitted_true[:, varies])
    return float(r2_score(held_true[:, varies], regression.predict(held_inferred)))


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0
