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

__all__ = [
    "EffectRecovery",
    "MaskRecovery",
    "effect_recovery",
    "linear_r2",
    "mask_recovery",
    "mean_correlation_coefficient",
]


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


class EffectRecovery(NamedTuple):
    """Agreement of effects after their latents were matched; see :func:`effect_recovery`."""

    mean_correlation: float
    """Mean of ``correlation`` over the true latents that vary (0 for those without a match)."""
    correlation: NDArray[np.float64]
    """Absolute correlation of each matched pair."""
    true_latents: NDArray[np.int64]
    """Matched columns of the true effects ..."""
    predicted_latents: NDArray[np.int64]
    """... and the column of the predicted effects that each is matched with."""


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

    so that the entries of an unmatched predicted latent count as false and those of an unmatched
    true latent as missed. A true latent that is split in two is therefore paid for.

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
    F1, precision, recall, the mean F1 of the true latents, and the matching. Where nothing could
    go wrong (no entry to predict, or none predicted) a share is 1.

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


def effect_recovery(
    true_effect: ArrayLike | pd.DataFrame, predicted_effect: ArrayLike | pd.DataFrame
) -> EffectRecovery:
    r"""Mean correlation coefficient between true and predicted effects of matched latents.

    With :math:`\rho_{kl}` the Pearson correlation over perturbations of column :math:`k` of the
    true and column :math:`l` of the predicted effects, and :math:`\sigma` the one-to-one matching
    that maximises it,

    .. math:: \mathrm{MCC} = \frac{1}{K} \sum_k |\rho_{k \sigma(k)}|,

    over the :math:`K` true latents that vary. Sign and scale of a latent are not identified, and
    do not count. A constant predicted column has correlation 0.

    Parameters
    ----------
    true_effect
        Perturbations x latents, mask times embedding.
    predicted_effect
        Perturbations x latents; the number of latents may differ. If both are DataFrames, the
        perturbations are matched by name.

    Returns
    -------
    The mean, the correlation of each matched pair, and the matching. The mean is NaN if no true
    latent varies.

    Raises
    ------
    ScreenError
        If the perturbations do not match, or values are not finite.

    Notes
    -----
    The measure of Hyvarinen and Morioka (NeurIPS 2016), used for SVAE+ by Lopez, Tagasovska et
    al. (CLeaR 2023).

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.evaluation import effect_recovery
    >>> effect = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(effect_recovery(effect, -2 * effect[:, [2, 0, 1]]).mean_correlation, 6)
    1.0
    """
    true, predicted = paired(true_effect, predicted_effect)
    rows, columns, matched, mean = matched_correlation(true, predicted)
    return EffectRecovery(
        mean_correlation=mean, correlation=matched, true_latents=rows, predicted_latents=columns
    )


def mean_correlation_coefficient(
    true: ArrayLike | pd.DataFrame,
    inferred: ArrayLike | pd.DataFrame,
    method: Literal["pearson", "spearman"] = "pearson",
) -> float:
    r"""Mean correlation of true latents with the inferred ones they are matched with.

    With :math:`\rho_{kl}` the correlation over cells of true latent :math:`k` and inferred latent
    :math:`l`, and :math:`\sigma` the one-to-one matching that maximises the sum (Hungarian
    method),

    .. math:: \mathrm{MCC} = \frac{1}{K} \sum_k |\rho_{k \sigma(k)}|,

    over the :math:`K` true latents that vary. It is 1 if latents are recovered up to order, sign
    and scale (with ``"spearman"``: up to any monotone function each). A rotation of the latents
    lowers it; see :func:`linear_r2` for a measure that does not mind.

    Parameters
    ----------
    true
        Cells (or perturbations) x latents.
    inferred
        Cells x latents; the number of latents may differ. If both are DataFrames, the rows are
        matched by name.
    method
        ``"pearson"``, or ``"spearman"`` for the correlation of ranks.

    Returns
    -------
    Value between 0 and 1; a true latent without a match counts as 0. NaN if no true latent varies.

    Raises
    ------
    ScreenError
        If the rows do not match, or values are not finite.
    ValueError
        If ``method`` is unknown.

    Notes
    -----
    Hyvarinen and Morioka (NeurIPS 2016), used for SVAE+ by Lopez, Tagasovska et al. (CLeaR 2023).
    For tables of effects :func:`effect_recovery` returns the matching as well.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.evaluation import mean_correlation_coefficient
    >>> latents = np.random.default_rng(0).normal(size=(100, 3))
    >>> round(mean_correlation_coefficient(latents, -2 * latents[:, [2, 0, 1]]), 6)
    1.0
    """
    if method not in {"pearson", "spearman"}:
        raise ValueError(f"method={method!r} is unknown; use 'pearson' or 'spearman'.")
    matrices = paired(true, inferred, rows="cells")
    if method == "spearman":
        matrices = rankdata(matrices[0], axis=0), rankdata(matrices[1], axis=0)
    return matched_correlation(*matrices)[-1]


def linear_r2(
    true: ArrayLike | pd.DataFrame,
    inferred: ArrayLike | pd.DataFrame,
    test_share: float = 0.2,
    seed: int = 0,
) -> float:
    r"""How much of the true latents a linear function of the inferred ones explains.

    Each true latent is regressed on all inferred ones in a part of the cells; in the others,

    .. math::

        R^2 = \frac1K \sum_k \left( 1 - \frac{\sum_i (z_{ik} - \hat z_{ik})^2}
            {\sum_i (z_{ik} - \bar z_k)^2} \right)

    over the :math:`K` true latents that vary. It asks whether the information is there, whatever
    the rotation; :func:`mean_correlation_coefficient` asks whether it is one latent each.

    Parameters
    ----------
    true
        Cells x latents.
    inferred
        Cells x latents; the number of latents may differ. If both are DataFrames, the cells are
        matched by name.
    test_share
        Share of the cells that are held out.
    seed
        Seed of the choice of these cells.

    Returns
    -------
    At most 1, without bound below. NaN if no true latent varies.

    Raises
    ------
    ScreenError
        If the cells do not match, or values are not finite.

    Notes
    -----
    The linear form of the informativeness of Eastwood and Williams (ICLR 2018), by least squares.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.evaluation import linear_r2
    >>> rng = np.random.default_rng(0)
    >>> latents = rng.normal(size=(100, 3))
    >>> round(linear_r2(latents, latents @ rng.normal(size=(3, 3))), 6)
    1.0
    """
    true_values, inferred_values = paired(true, inferred, rows="cells")
    fitted_true, held_true, fitted_inferred, held_inferred = train_test_split(
        true_values, inferred_values, test_size=test_share, random_state=seed
    )
    varies = standardised(held_true).any(axis=0)
    if not varies.any():
        return float("nan")
    regression = LinearRegression().fit(fitted_inferred, fitted_true[:, varies])
    return float(r2_score(held_true[:, varies], regression.predict(held_inferred)))


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0
