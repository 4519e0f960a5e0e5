"""How large the effects of a screen are, learned from noisy estimates of all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


_RATIO = 2**0.5  # of neighbouring scales: a mixture of them is close to any scale in between
_NULL_COUNTS = 10.0  # that favour zero, as in Stephens (2017)
_N_STEPS = 150
_EXCESS = np.arange(1.0, 3.01, 0.1)


class EffectMixture(NamedTuple):
    """Posterior of effects, a mixture of normals on the last axis, rows x columns x scales.

    Attributes
    ----------
    share, mean, std
        Of each component.
    excess
        Variance of the estimates about effects, in units of the variance that they claim.
    """

    share: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    excess: float

    def sample(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw effects, rows x columns."""
        below = np.cumsum(self.share, -1)
        scale = (rng.random((*below.shape[:-1], 1)) > below).sum(-1, keepdims=True)
        scale = np.minimum(scale, below.shape[-1] - 1)  # shares add up to one but for rounding
        mean, std = (np.take_along_axis(v, scale, -1)[..., 0] for v in (self.mean, self.std))
        return mean + std * rng.standard_normal(mean.shape)


def learn_effects(
    estimate: NDArray[np.float64], error: NDArray[np.float64], least: float
) -> EffectMixture:
    r"""Learn the distribution of effects from estimates, by empirical Bayes.

    :math:`\hat e_{tl} \sim \mathrm{Normal}(e_{tl}, \phi s_{tl}^2)` and
    :math:`e_{tl} \sim \sum_k \pi_k \mathrm{Normal}(0, \sigma_k^2)` with :math:`\sigma_0 = 0`
    and a grid of scales (Stephens, Biostatistics 18, 275, 2017). The weights follow by expectation
    maximisation, the excess :math:`\phi \ge 1` of the noise by the marginal likelihood: an
    empirical null (Efron, Journal of the American Statistical Association 99, 96, 2004).

    Parameters
    ----------
    estimate, error
        Estimates and the standard errors that they claim, rows x columns.
    least
        Smallest scale but zero.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> effect = np.where(rng.random((100, 10)) < 0.2, 2.0, 0.0)
    >>> noise = rng.standard_normal(effect.shape)
    >>> found = learn_effects(effect + 0.5 * noise, np.full(effect.shape, 0.5), 0.1)
    >>> bool(abs((np.abs(found.sample(rng)) > 1).mean() - 0.2) < 0.03)
    True
    """
    largest = 2 * float(np.abs(estimate).max())
    n_beyond = max(1, math.ceil(math.log(max(largest / least, 1.0), _RATIO)) + 1)
    scales = np.append(0.0, least * _RATIO ** np.arange(n_beyond))
    fits = [_fit(estimate, error * math.sqrt(excess), scales) for excess in _EXCESS]
    best = int(np.argmax([evidence for evidence, _ in fits]))
    weights, error = fits[best][1], error * math.sqrt(_EXCESS[best])
    likelihood, _ = _likelihood(estimate, error, scales)
    share = likelihood * weights
    share /= share.sum(-1, keepdims=True)
    kept = scales**2 / (error[..., None] ** 2 + scales**2)
    std = np.sqrt(kept) * error[..., None]
    return EffectMixture(share, kept * estimate[..., None], std, float(_EXCESS[best]))


def _likelihood(
    estimate: NDArray[np.float64], error: NDArray[np.float64], scales: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Of each component, up to a factor of each estimate, and the sum of the factors' logs."""
    variance = error[..., None] ** 2 + scales**2
    log = -0.5 * (np.log(variance) + estimate[..., None] ** 2 / variance)
    top = log.max(-1, keepdims=True)
    return np.exp(log - top), float(top.sum())


def _fit(
    estimate: NDArray[np.float64], error: NDArray[np.float64], scales: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Logarithm of the evidence, and weights of the components."""
    likelihood, constant = _likelihood(estimate, error, scales)
    likelihood = likelihood.reshape(-1, len(scales))
    weights = np.full(len(scales), 1 / len(scales))
    for _ in range(_N_STEPS):
        of_each = likelihood @ weights
        count = weights * (likelihood / of_each[:, None]).sum(0)
        count[0] += _NULL_COUNTS
        weights = count / count.sum()
    evidence = constant + np.log(likelihood @ weights).sum() + _NULL_COUNTS * np.log(weights[0])
    return float(evidence), weights
