"""How far pairs are from what a model says of them, learned from pairs that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import brentq, nnls
from scipy.stats import t as student_t

from scvi_sams.tl._pairs import ratio, squared_length_of_sum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = [
    "LEAST_PAIRS",
    "PairCalibration",
    "PairResiduals",
    "ScoreGradient",
    "calibrate_pairs",
    "calibrated_summary",
    "score_gradient",
    "widen_interval",
]


LEAST_PAIRS = 8
"""Pairs from which a variance is learned, at least."""
_MAX_UPDATES = 20
_TOLERANCE = 1e-6


class PairResiduals(NamedTuple):
    """Measured pairs against a model's posterior means, pairs x genes or a number a pair."""

    deviation: NDArray[np.float64]
    r"""Observed less modelled :math:`\varepsilon_{AB}`, ``(n_pairs, n_genes)``."""
    deviation_error: NDArray[np.float64]
    """Standard error of the observed, likewise."""
    squared_parts: NDArray[np.float64]
    r"""Modelled :math:`\delta_A^2 + \delta_B^2`, likewise."""
    score: NDArray[np.float64]
    """Observed less modelled interaction score, ``(n_pairs,)``."""
    score_error: NDArray[np.float64]
    """Standard error of the observed, likewise."""

    def without(self, pair: int) -> PairResiduals:
        """All pairs but one."""
        return PairResiduals(*(np.delete(values, pair, axis=0) for values in self))


class PairCalibration(NamedTuple):
    """Variance of a model's errors about pairs, see :func:`calibrate_pairs`."""

    n_pairs: int
    """Pairs that it was learned from."""
    absolute_variance: float
    r""":math:`\alpha^2`, in squared units of the effects."""
    relative_variance: float
    r""":math:`\beta^2`, a share of the squared effects of the parts."""
    score_variance: float
    r""":math:`\tau^2` of the interaction score."""

    def deviation_variance(
        self, first: NDArray[np.floating], second: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Variance of the deviation of each gene, given the effects of the parts, by gene."""
        squared = np.square(first, dtype=np.float64) + np.square(second, dtype=np.float64)
        return np.asarray(self.absolute_variance + self.relative_variance * squared)


class ScoreGradient(NamedTuple):
    """Derivatives of the interaction score, each of shape ``(..., n_genes)``."""

    pair: NDArray[np.float64]
    """By the effect of the pair."""
    parts: NDArray[np.float64]
    """By the effect of either part."""


def score_gradient(
    first: NDArray[np.floating], second: NDArray[np.floating], pair: NDArray[np.floating]
) -> ScoreGradient:
    r"""How the interaction score of :func:`regress_pair` answers to small changes of effects.

    With :math:`a = \delta_A + \delta_B` and the score
    :math:`f = \langle \delta_{AB} - a, a \rangle / |a|^2`,

    .. math::
        \frac{\partial f}{\partial \delta_{AB}} = \frac{a}{|a|^2}, \qquad
        \frac{\partial f}{\partial \delta_A} = \frac{\partial f}{\partial \delta_B}
            = \frac{\delta_{AB} - 2 (1 + f)\, a}{|a|^2}.

    Where parts cancel, the denominator of the score is not :math:`|a|^2` and is taken as given.

    Parameters
    ----------
    first, second, pair
        Effects of the parts and of the pair, shape ``(..., n_genes)``.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl._pair_calibration import score_gradient
    >>> first, second = np.eye(2)
    >>> score_gradient(first, second, first + second).pair
    array([0.5, 0.5])
    """
    a, b, y = (np.asarray(effect, dtype=np.float64) for effect in (first, second, pair))
    additive = a + b
    squared, length = (additive * additive).sum(-1), squared_length_of_sum(a, b)
    score = ratio(((y - additive) * additive).sum(-1), length)
    coefficient = np.where(squared >= length, 2 * (1 + score), 2.0)[..., None]
    length = length[..., None]
    return ScoreGradient(ratio(additive, length), ratio(y - coefficient * additive, length))


def calibrate_pairs(residuals: PairResiduals) -> PairCalibration:
    r"""Learn the variance of a model's errors about pairs, beyond noise of sampling cells.

    The observed deviation of gene :math:`g` in pair :math:`p` differs from the modelled one by
    :math:`r_{pg}`, of which :math:`s_{pg}` is the standard error of the observed. The error of the
    model is taken as a part that is the same for all and one in proportion to the effects,

    .. math::
        \mathrm E\, r_{pg}^2 = s_{pg}^2 + \alpha^2 + \beta^2 (\delta_{Ag}^2 + \delta_{Bg}^2),

    with :math:`\alpha^2, \beta^2 \ge 0` by least squares, weighted by the inverse variance of
    :math:`r_{pg}^2` under the fit of the round before. The score of a pair has one variance
    :math:`\tau^2` for all, such that

    .. math:: \sum_p \frac{r_p^2}{s_p^2 + \tau^2} = P

    (the estimator of Paule and Mandel, 1982), 0 if sampling explains the residuals. All are
    second moments about 0: an error that all pairs share counts too.

    Parameters
    ----------
    residuals
        Measured pairs against the model, :data:`LEAST_PAIRS` at least.

    Raises
    ------
    ValueError
        If there are too few pairs.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl._pair_calibration import PairResiduals, calibrate_pairs
    >>> rng = np.random.default_rng(0)
    >>> genes, ones = rng.normal(0, [[0.5]], (40, 500)), np.ones((40, 500))
    >>> scores = rng.normal(0, 0.2, 40)
    >>> found = calibrate_pairs(
    ...     PairResiduals(genes, 0.3 * ones, 0 * ones, scores, np.full(40, 0.1))
    ... )
    >>> round(found.absolute_variance, 2)  # 0.5 ** 2 - 0.3 ** 2
    0.16
    """
    n_pairs = len(residuals.score)
    if n_pairs < LEAST_PAIRS:
        raise ValueError(f"{n_pairs} pairs: at least {LEAST_PAIRS} are needed.")
    absolute, relative = _deviation_variances(residuals)
    return PairCalibration(
        n_pairs, absolute, relative, _extra_variance(residuals.score, residuals.score_error)
    )


def widen_interval(
    mean: NDArray[np.floating] | float,
    lower: NDArray[np.floating] | float,
    upper: NDArray[np.floating] | float,
    variance: NDArray[np.floating] | float,
    n_pairs: int,
    credible_level: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Add an independent error to an interval.

    Either half :math:`h` becomes :math:`\sqrt{h^2 + q^2 \tau^2}`, with :math:`\tau^2` the variance
    of the error and :math:`q` the quantile of Student's t with as many degrees of freedom as
    pairs that the variance was learned from.

    Parameters
    ----------
    mean, lower, upper
        Middle and ends of the interval, of one shape.
    variance
        Variance of the error.
    n_pairs
        Pairs that it was learned from.
    credible_level
        Level of the interval.

    Returns
    -------
    The ends.

    Examples
    --------
    >>> from scvi_sams.tl._pair_calibration import widen_interval
    >>> lower, upper = widen_interval(0.0, -3.0, 3.0, 4.0, 10_000_000, 0.9545)
    >>> round(float(upper), 3)
    5.0
    """
    q = student_t.ppf((1 + credible_level) / 2, n_pairs)
    error = q * np.sqrt(np.asarray(variance, dtype=np.float64))
    below, above = np.maximum(mean - lower, 0), np.maximum(upper - mean, 0)
    return np.asarray(mean - np.hypot(below, error)), np.asarray(mean + np.hypot(above, error))


def calibrated_summary(
    summary: Mapping[str, float | str],
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    calibration: PairCalibration,
    credible_level: float,
) -> dict[str, float | str]:
    r"""Let a pair's summary know the errors of the model.

    Parameters
    ----------
    summary
        From :func:`pair_summary`.
    first, second
        Expected effects of the parts, shape ``(n_genes,)``.
    calibration
        Variances of the model's errors.
    credible_level
        Level of the interval of the interaction score, as in `summary`.

    Returns
    -------
    The summary with a wider interval of the score, and with the variance of the errors, summed
    over genes, in ``uncertainty`` and ``surprise``. Classes and their probabilities stay.
    """
    names = ("interaction_score", "interaction_score_lower", "interaction_score_upper")
    score, lower, upper = (np.array(summary[name], dtype=np.float64) for name in names)
    lower, upper = widen_interval(
        score, lower, upper, calibration.score_variance, calibration.n_pairs, credible_level
    )
    error = float(np.sqrt(calibration.deviation_variance(first, second).sum()))
    return dict(summary) | {
        "interaction_score_lower": float(lower),
        "interaction_score_upper": float(upper),
        "surprise": float(np.hypot(float(summary["surprise"]), error)),
        "uncertainty": float(np.hypot(float(summary["uncertainty"]), error)),
    }


def _deviation_variances(residuals: PairResiduals) -> tuple[float, float]:
    """The same variance for all, and the one in proportion to the squared effects of the parts."""
    sampling = np.square(residuals.deviation_error).ravel()
    excess = np.square(residuals.deviation).ravel() - sampling
    size = residuals.squared_parts.ravel()
    design = np.column_stack([np.ones_like(size), size])
    found = np.array([max(float(excess.mean()), 0.0), 0.0])
    for _ in range(_MAX_UPDATES):
        total = sampling + design @ found
        # The square of a Normal deviate varies by its variance; what cannot vary tells nothing.
        weight = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        before, found = found, nnls(design * weight[:, None], excess * weight)[0]
        if np.allclose(found, before, rtol=_TOLERANCE, atol=0):
            break
    return float(found[0]), float(found[1])


def _extra_variance(residuals: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    """Variance beyond that of the errors, by Paule and Mandel's estimator with mean 0."""
    squared, sampling = np.square(residuals), np.square(errors)
    most = float(squared.max())

    def surplus(variance: float) -> float:
        return float(ratio(squared, sampling + variance).sum()) - len(squared)

    least = most * 1e-12
    if most == 0 or surplus(least) <= 0:
        return 0.0
    return float(brentq(surplus, least, most))
