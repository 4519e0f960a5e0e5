"""Mechanisms called with error control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bayesian_q_value", "calibrated_q_value", "effect_interval", "local_false_sign_rate"]


def local_false_sign_rate(
    inclusion_probability: pd.DataFrame, slab_mean: pd.DataFrame, slab_std: pd.DataFrame
) -> pd.DataFrame:
    r"""Probability that the sign of an effect is not what it seems, or that it is zero.

    The posterior of the effect is zero with probability :math:`1 - q` and otherwise
    :math:`\mathrm{Normal}(\mu, \sigma^2)`, so that

    .. math:: \mathrm{lfsr} = 1 - q\, \Phi(|\mu| / \sigma).

    It is never below :math:`1 - q`, the probability that there is no effect at all.

    Parameters
    ----------
    inclusion_probability
        Probability that each effect is not zero, perturbations x latents.
    slab_mean, slab_std
        Posterior mean and standard deviation of the effect where it is not zero, labelled alike;
        a standard deviation of zero is a point.

    Returns
    -------
    Values between 0 and 1, labelled as the input.

    Notes
    -----
    Stephens, Biostatistics 18, 275 (2017).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import local_false_sign_rate
    >>> table = pd.DataFrame({"latent_0": [1.0, 0.5]}, index=["A", "B"])
    >>> local_false_sign_rate(table, 0 * table, table)["latent_0"].tolist()
    [0.5, 0.75]
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
    r"""Central credible interval of an effect that may be zero.

    Quantiles of the mixture of a point at zero, of weight :math:`1 - q`, and
    :math:`\mathrm{Normal}(\mu, \sigma^2)`, in closed form. An end is exactly zero where the point
    covers it, so an interval without zero says that the effect is not zero.

    Parameters
    ----------
    inclusion_probability
        Probability that each effect is not zero, perturbations x latents.
    slab_mean, slab_std
        Posterior mean and standard deviation of the effect where it is not zero, labelled alike.
    credible_level
        Level of the interval.

    Returns
    -------
    Lower and upper ends, each labelled as the input.

    Raises
    ------
    ValueError
        If ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import effect_interval
    >>> one = pd.DataFrame({"latent_0": [1.0]}, index=["A"])
    >>> lower, upper = effect_interval(one, 3 * one, one)
    >>> lower.round(2).loc["A", "latent_0"], upper.round(2).loc["A", "latent_0"]
    (np.float64(1.04), np.float64(4.96))
    """
    if not 0 < credible_level < 1:
        raise ValueError(f"credible_level={credible_level!r} must be between 0 and 1.")
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
    \ge \dots`, the first :math:`k` are false with an expected share of

    .. math:: \mathrm{BFDR}_k = \frac1k \sum_{j \le k} (1 - q_{(j)}).

    Calling all entries of at most :math:`\alpha` is the step-up rule of Newton et al. (2004).

    It is an error rate if the inclusion probabilities are right, and those of a variational
    posterior are too sure of the latents. On simulated screens with weak effects
    (``python -m benchmarks mechanism_fdr``), calls of (perturbation, latent) at a nominal 0.05
    were false with a rate of 0.10 (standard error 0.02, twelve seeds), all on perturbations
    that do something; with ``mask_evidence_cells=None`` at a nominal 0.1 with one of 0.24 (six
    seeds). The claim that a perturbation does anything held its rate.
    :func:`calibrated_q_value` does not rely on the probabilities; use both, as
    ``model.get_mechanisms`` does, and :func:`mechanism_stability`.

    Parameters
    ----------
    inclusion_probability
        Probability that each entry is not zero, perturbations x latents.

    Returns
    -------
    Values between 0 and 1, labelled as the input; entries that tie have the same.

    Raises
    ------
    ValueError
        If a value is not a probability.

    Notes
    -----
    Newton, Noueiry, Sarkar and Ahlquist, Biostatistics 5, 155 (2004); Muller, Parmigiani and Rice,
    Bayesian Statistics 8 (2007).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import bayesian_q_value
    >>> bayesian_q_value(pd.DataFrame({"latent_0": [0.9, 1.0, 0.5]}, index=["A", "B", "C"]))
       latent_0
    A      0.05
    B      0.00
    C      0.20
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

    The null are perturbations that are known to do nothing and went through the same fit
    (:func:`add_control_null`). Among :math:`T` perturbations of which :math:`R(s)` have an entry
    of score :math:`s` or more, against :math:`D(s)` of :math:`n` null perturbations,

    .. math:: \mathrm{FDR}(s) = \frac{1 + D(s)}{n + 1} \cdot \frac{T}{R(s)},

    and the same with the numbers of entries in place of perturbations; the larger of the two
    counts. The q-value is the least of it over all thresholds that call the entry.

    With the best entry of each perturbation as its score, the first is the Benjamini-Hochberg
    procedure on conformal p-values :math:`(1 + D) / (n + 1)`, which controls the false discovery
    rate in finite samples if the perturbations that do nothing are exchangeable with the null
    (Bates et al. 2023): a plain ratio of shares, as :math:`D / n` in place of the first factor
    would give, does not where there are few. That of the entries counts those that are called
    together because a perturbation has noise in common. In simulations the rate of entries holds
    up to correlations of 0.5 between the scores of a perturbation; at 0.9 it is 0.13 at a nominal
    0.1.

    Few null perturbations cannot speak of small rates: without any call among them,
    :math:`T / ((n + 1) R)` is what remains. As many null as real perturbations are a good number.
    No perturbation is assumed to do anything (:math:`\pi_0 = 1`), so the estimate is high where
    most of them do.

    What it cannot see: latents that are wrong themselves. Null perturbations hardly share in a
    mechanism that was split in two, or in one that stands for two; see
    :func:`mechanism_stability`.

    Parameters
    ----------
    score
        What calls are made by, larger for more evidence, perturbations x latents (or one column,
        for claims about whole perturbations).
    null_score
        The same of null perturbations; rows of several fits may be stacked.

    Returns
    -------
    Values between 0 and 1, labelled as ``score``.

    Raises
    ------
    ScreenError
        If there are no null perturbations, their number of latents differs, or a score is NaN.

    Notes
    -----
    Bates, Candes, Lei, Romano and Sesia, Annals of Statistics 51, 149 (2023); for decoys added
    one: Levitsky et al., Journal of Proteome Research 16, 393 (2017).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import calibrated_q_value
    >>> score = pd.DataFrame({"latent_0": [5.0, 4.0, 0.5, -1.0]}, index=list("ABCD"))
    >>> null = pd.DataFrame({"latent_0": [1.0, 0.6, -3.0]}, index=["n1", "n2", "n3"])
    >>> calibrated_q_value(score, null)["latent_0"].round(2).tolist()
    [0.5, 0.5, 0.75, 0.75]
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
    n_called = np.maximum(_n_reaching(threshold, real), 1)
    rate = (1 + _n_reaching(threshold, null)) / (n_null + 1) * n_real / n_called
    return np.minimum(rate, 1.0)


def _n_reaching(threshold: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    return len(values) - np.searchsorted(np.sort(values), threshold, side="left")


def _like(frame: pd.DataFrame, values: NDArray[np.float64]) -> pd.DataFrame:
    return pd.DataFrame(values, index=frame.index, columns=frame.columns)
