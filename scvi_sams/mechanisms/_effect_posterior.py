"""Sign and interval of an effect that may be exactly zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["effect_interval", "local_false_sign_rate"]


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
    >>> from scvi_sams.mechanisms import local_false_sign_rate
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
    >>> from scvi_sams.mechanisms import effect_interval
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
