"""Posterior and calibrated error rates of calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.model.read_outs import check_level

if TYPE_CHECKING:
    from numpy.typing import NDArray


def local_false_sign_rate(
    inclusion_probability: pd.DataFrame, slab_mean: pd.DataFrame, slab_std: pd.DataFrame
) -> pd.DataFrame:
    r"""Probability that the sign of an effect is not what it seems, or that it is zero.

    The posterior of the effect is zero with probability :math:`1 - q` and otherwise
    :math:`\mathrm{Normal}(\mu, \sigma^2)`, so that :math:`\mathrm{lfsr} = 1 - q\, \Phi(|\mu| /
    \sigma)` (Stephens, Biostatistics 18, 275, 2017), which is never below :math:`1 - q`. A
    standard deviation of zero is a point.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (slab_mean.abs() / slab_std).fillna(0.0)  # no effect of no width has no sign
    return 1 - inclusion_probability * norm.cdf(ratio)


def effect_interval(
    inclusion_probability: pd.DataFrame,
    slab_mean: pd.DataFrame,
    slab_std: pd.DataFrame,
    credible_level: float = 0.95,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Central credible interval of an effect that may be zero, lower and upper ends.

    Quantiles of the mixture of a point at zero and a normal, in closed form. An end is exactly
    zero where the point covers it, so an interval without zero says that the effect is not zero.
    """
    check_level(credible_level)
    tail = 0.5 - credible_level / 2
    lower = _quantile(inclusion_probability, slab_mean, slab_std, tail)
    # By symmetry: the upper quantile is the lower one of the negated effect, negated.
    upper = -_quantile(inclusion_probability, -slab_mean, slab_std, tail)
    return lower, upper


def _quantile(
    probability: pd.DataFrame, mean: pd.DataFrame, std: pd.DataFrame, level: float
) -> pd.DataFrame:
    """Quantile of the mixture."""
    slab_below_zero = norm.cdf(0.0, mean, np.maximum(std, np.finfo(float).tiny))
    below_zero = probability * slab_below_zero
    up_to_zero = below_zero + 1 - probability
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(level < below_zero, level, level - (1 - probability)) / probability
    # Levels that the point at zero takes are overwritten below.
    values = mean + std * norm.ppf(np.clip(np.nan_to_num(share, nan=0.5), 1e-300, 1 - 1e-16))
    at_zero = (level >= below_zero) & (level <= up_to_zero)
    return values.mask(at_zero, 0.0)


def bayesian_q_value(inclusion_probability: pd.DataFrame) -> pd.DataFrame:
    r"""Posterior expected share of false calls, were this entry the last one called.

    With the entries in the order of falling inclusion probability :math:`q_{(1)} \ge q_{(2)}
    \ge \dots`, the first :math:`k` are false with an expected share of :math:`\frac1k \sum_{j \le
    k} (1 - q_{(j)})`; entries that tie are called together. Calling all entries of at most
    :math:`\alpha` is the step-up rule of Newton, Noueiry, Sarkar and Ahlquist (Biostatistics 5,
    155, 2004). It is an error rate if the probabilities are right.
    """
    probability = inclusion_probability.to_numpy(dtype=np.float64)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(
            "inclusion_probability holds values that are not between 0 and 1: give "
            "probabilities, as from model.get_perturbation_mask()."
        )
    # Every distinct value at once, so that ties are called together.
    value, inverse, count = np.unique(
        1 - probability.ravel(), return_inverse=True, return_counts=True
    )
    mean = np.cumsum(value * count) / np.cumsum(count)
    return _like(inclusion_probability, mean[inverse].reshape(probability.shape))


def calibrated_q_value(score: pd.DataFrame, null_score: pd.DataFrame) -> pd.DataFrame:
    r"""Estimated share of false calls, were this entry the last one called, against a null.

    Among :math:`T` perturbations of which :math:`R(s)` have an entry of score :math:`s` or more
    (larger for more evidence), against :math:`D(s)` of :math:`n` perturbations that are known to
    do nothing and went through the same fit,

    .. math:: \mathrm{FDR}(s) = \frac{1 + D(s)}{n + 1} \cdot \frac{T}{R(s)},

    and the same with the numbers of entries in place of perturbations; the larger of the two
    counts. The q-value is the least of it over all thresholds that call the entry.

    With the best entry of each perturbation as its score, the first is the Benjamini-Hochberg
    procedure on conformal p-values :math:`(1 + D) / (n + 1)`, which controls the false discovery
    rate in finite samples if the perturbations that do nothing are exchangeable with the null
    (Bates, Candes, Lei, Romano and Sesia, Annals of Statistics 51, 149, 2023; for decoys added
    one: Levitsky et al., Journal of Proteome Research 16, 393, 2017): a plain ratio of shares, as
    :math:`D / n` in place of the first factor would give, does not where there are few. That of
    the entries counts those that are called together because a perturbation has noise in common.
    No perturbation is assumed to do anything (:math:`\pi_0 = 1`).
    """
    real, null = score.to_numpy(np.float64), null_score.to_numpy(np.float64)
    if len(null) == 0:
        raise ScreenError(
            "There are no null perturbations to calibrate with: add some by "
            "scvi_sams.tl.add_control_null before the fit."
        )
    if real.shape[1] != null.shape[1]:
        raise ScreenError(
            f"The null perturbations have {null.shape[1]} latents and the others "
            f"{real.shape[1]}: take the null from fits with the same n_latent."
        )
    if np.isnan(real).any() or np.isnan(null).any():
        raise ScreenError("A score is NaN: calls need finite scores.")
    if real.size == 0:
        return score.copy()
    threshold, inverse = np.unique(real, return_inverse=True)
    by_perturbation = _estimated_rate(threshold, real.max(1), null.max(1), len(real), len(null))
    by_entry = _estimated_rate(threshold, real.ravel(), null.ravel(), len(real), len(null))
    # Thresholds rise: an entry is called by its own value and by all below.
    q_value = np.minimum.accumulate(np.maximum(by_perturbation, by_entry))
    return _like(score, q_value[inverse].reshape(real.shape))


def _estimated_rate(
    threshold: NDArray[np.float64],
    real: NDArray[np.float64],
    null: NDArray[np.float64],
    n_real: int,
    n_null: int,
) -> NDArray[np.float64]:
    """Estimated false discovery rate of calling what reaches each threshold, at most 1."""
    n_called, n_false = (
        len(values) - np.searchsorted(np.sort(values), threshold, side="left")
        for values in (real, null)
    )
    return np.minimum((1 + n_false) / (n_null + 1) * n_real / np.maximum(n_called, 1), 1.0)


def _like(frame: pd.DataFrame, values: NDArray[np.float64]) -> pd.DataFrame:
    return pd.DataFrame(values, index=frame.index, columns=frame.columns)
