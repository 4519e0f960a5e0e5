"""The effect of a pair against the effects of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scvi_sams.tl.summaries import summarize_effects

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAIR_CLASSES = ("additive", "synergistic", "buffering", "epistatic", "neomorphic")
_RIDGE = 0.01
_LEAST_ADDITIVE = 0.01  # of |A|^2 + |B|^2: parts that cancel have no additive direction


class PairRegression(NamedTuple):
    """How a pair compares with its parts, each field of shape ``(...)``."""

    coefficient_1: NDArray[np.float64]
    coefficient_2: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    dominance: NDArray[np.float64]
    fit: NDArray[np.float64]
    similarity: NDArray[np.float64]
    interaction_score: NDArray[np.float64]
    deviation: NDArray[np.float64]
    relative_deviation: NDArray[np.float64]


class PairThresholds(NamedTuple):
    """Where one kind of interaction ends and the next begins, see :func:`classify_pairs`."""

    relative_deviation: float = 0.2
    """A pair that deviates by less from the sum of its parts is additive."""
    fit: float = 0.5
    """A pair of which the parts explain less is neomorphic."""
    dominance_ratio: float = 3.0
    """Ratio of the coefficients from which one part masks the other ..."""
    masked_coefficient: float = 0.5
    """... if that of the other is at most this."""


DEFAULT_THRESHOLDS = PairThresholds()


def regress_pair(
    first: NDArray[np.floating], second: NDArray[np.floating], pair: NDArray[np.floating]
) -> PairRegression:
    r"""Regress the effect of a pair on the effects of its parts, each of shape ``(..., n_genes)``.

    :math:`\delta_{AB} = c_1 \delta_A + c_2 \delta_B + \text{rest}` by least squares over genes,
    shrunk towards additivity (:math:`c_1 = c_2 = 1`) by a ridge of 1% of :math:`|\delta_A|^2 +
    |\delta_B|^2`. Without it the coefficients of two parts that do the same, or of a part that
    does nothing, would be arbitrary. Without any effect at all the pair is additive.

    Regression, magnitude and dominance are those of the genetic interaction map of Norman et al.
    (Science 365, 786, 2019), who use Theil and Sen's robust slopes and distance correlation for
    fit and similarity. Effects of a model have no outliers of measurement.
    """
    a, b, y = (np.asarray(effect, dtype=np.float64) for effect in (first, second, pair))
    additive = a + b
    residual = y - additive
    aa, bb, ab = (a * a).sum(-1), (b * b).sum(-1), (a * b).sum(-1)
    ar, br = (a * residual).sum(-1), (b * residual).sum(-1)
    ridge = _RIDGE * (aa + bb)
    saa, sbb = aa + ridge, bb + ridge
    determinant = saa * sbb - ab**2
    c1 = 1 + ratio(sbb * ar - ab * br, determinant)
    c2 = 1 + ratio(saa * br - ab * ar, determinant)
    rest = y - c1[..., None] * a - c2[..., None] * b
    squared, sum_squared = (y * y).sum(-1), (additive * additive).sum(-1)
    larger = np.maximum(squared, sum_squared)
    deviation = np.sqrt((residual * residual).sum(-1))
    sizes = np.abs(np.stack([c1, c2])).clip(min=1e-12)
    return PairRegression(
        coefficient_1=c1,
        coefficient_2=c2,
        magnitude=np.hypot(c1, c2),
        dominance=np.abs(np.log10(sizes[0] / sizes[1])),
        fit=1 - ratio((rest * rest).sum(-1), larger),
        similarity=ratio((y * additive).sum(-1), np.sqrt(squared * sum_squared), empty=1.0),
        interaction_score=ratio((residual * additive).sum(-1), squared_length_of_sum(a, b)),
        deviation=deviation,
        relative_deviation=ratio(deviation, np.sqrt(larger)),
    )


def squared_length_of_sum(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Squared length of the sum of two parts, by which scores are divided; bounded from below."""
    squared = np.square(first).sum(-1) + np.square(second).sum(-1)
    return np.asarray(np.maximum(np.square(first + second).sum(-1), _LEAST_ADDITIVE * squared))


def ratio(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], empty: float = 0.0
) -> NDArray[np.float64]:
    """Quotient, `empty` where there is nothing to divide by."""
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), empty)
    return np.asarray(np.divide(numerator, denominator, out=out, where=denominator > 0))


def pair_class(
    regression: PairRegression, thresholds: PairThresholds = DEFAULT_THRESHOLDS
) -> NDArray[np.int64]:
    """Kind of interaction, as positions in ``PAIR_CLASSES``, of the shape of the fields."""
    c1, c2 = np.abs(regression.coefficient_1), np.abs(regression.coefficient_2)
    is_masked = (np.minimum(c1, c2) <= thresholds.masked_coefficient) & (
        regression.dominance >= np.log10(thresholds.dominance_ratio)
    )
    kinds = {
        "additive": regression.relative_deviation < thresholds.relative_deviation,
        "neomorphic": regression.fit < thresholds.fit,
        "epistatic": is_masked,
        "synergistic": regression.interaction_score > 0,
    }
    codes = [PAIR_CLASSES.index(name) for name in kinds]
    return np.asarray(np.select(list(kinds.values()), codes, PAIR_CLASSES.index("buffering")))


def expected_surprise(residuals: NDArray[np.floating]) -> dict[str, float]:
    r"""How far a pair is expected to be from the sum of its parts, lengths over genes.

    With draws x genes of the deviation :math:`\varepsilon` from additivity,
    :math:`\mathrm E\,|\varepsilon|^2 = |\mathrm E\,\varepsilon|^2 + \operatorname{tr}
    \operatorname{Cov} \varepsilon`, each term estimated without bias: the squares of
    ``surprise``, ``expected_deviation`` and ``uncertainty``. An expected deviation below what so
    few draws can tell from 0 is 0.
    """
    draws = np.asarray(residuals, dtype=np.float64)
    if len(draws) < 2:
        raise ValueError(f"{len(draws)} draws: at least two are needed to know a variance.")
    total = float(np.square(draws).sum(-1).mean())
    variance = float(draws.var(axis=0, ddof=1).sum())
    squares = {"surprise": total, "expected_deviation": max(total - variance, 0.0)}
    return {name: float(np.sqrt(x)) for name, x in (squares | {"uncertainty": variance}).items()}


def pair_summary(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    pair: NDArray[np.floating],
    credible_level: float = 0.95,
    thresholds: PairThresholds = DEFAULT_THRESHOLDS,
) -> dict[str, float | str]:
    """Kind and size of the interaction of a pair, with what the draws leave open.

    Draws x genes of both parts and the pair, the same draw in the same row; a part that is certain
    may have one row. See :func:`~scvi_sams.tl.pair_interactions` for the columns.
    """
    first, second, pair = np.broadcast_arrays(first, second, pair)
    regression = regress_pair(first, second, pair)
    summary: dict[str, float | str] = {
        name: float(values.mean()) for name, values in regression._asdict().items()
    }
    score = summarize_effects(regression.interaction_score[:, None], credible_level)
    summary["interaction_score_lower"] = float(score.lower[0])
    summary["interaction_score_upper"] = float(score.upper[0])
    codes = pair_class(regression, thresholds)
    probability = np.bincount(codes, minlength=len(PAIR_CLASSES)) / len(codes)
    for name, value in zip(PAIR_CLASSES, probability, strict=True):
        summary[f"probability_{name}"] = float(value)
    most = int(probability.argmax())
    summary |= {"class": PAIR_CLASSES[most], "class_probability": float(probability[most])}
    residuals = np.asarray(pair, dtype=np.float64) - first - second
    return summary | expected_surprise(residuals)
