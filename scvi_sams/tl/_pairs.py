"""Pairs of perturbations against the sum of their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import profile_frame
from scvi_sams.tl._gene_programs import summarize_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = [
    "PAIR_CLASSES",
    "PairRegression",
    "PairThresholds",
    "Surprise",
    "classify_pairs",
    "expected_surprise",
    "pair_class",
    "pair_summary",
    "regress_pair",
]


_RIDGE = 0.01
_LEAST_ADDITIVE = 0.01  # of |A|^2 + |B|^2: parts that cancel have no additive direction


class PairRegression(NamedTuple):
    """How a pair compares with its parts, each field of shape ``(...)``."""

    coefficient_1: NDArray[np.float64]
    """Coefficient of the first part; 1 if additive."""
    coefficient_2: NDArray[np.float64]
    """Coefficient of the second part; 1 if additive."""
    magnitude: NDArray[np.float64]
    """Length of the two coefficients; the square root of 2 if additive."""
    dominance: NDArray[np.float64]
    """Absolute log10 ratio of the sizes of the coefficients; 0 if additive."""
    fit: NDArray[np.float64]
    """1 less the part of the pair that the coefficients do not explain; 1 if additive."""
    similarity: NDArray[np.float64]
    """Cosine of the pair and the sum of its parts; 1 if additive."""
    interaction_score: NDArray[np.float64]
    """Deviation along the sum of the parts, in units of that sum; 0 if additive."""
    deviation: NDArray[np.float64]
    """Length of the deviation from the sum of the parts, in the units of the effects."""
    relative_deviation: NDArray[np.float64]
    """The same over the length of the sum or of the pair, whichever is longer."""


def regress_pair(
    first: NDArray[np.floating], second: NDArray[np.floating], pair: NDArray[np.floating]
) -> PairRegression:
    r"""Regress the effect of a pair on the effects of its parts.

    .. math:: \delta_{AB} = c_1 \delta_A + c_2 \delta_B + \text{rest}

    by least squares over genes, shrunk towards additivity (:math:`c_1 = c_2 = 1`) by a ridge of
    1% of :math:`|\delta_A|^2 + |\delta_B|^2`. Without it the coefficients of two parts that do
    the same, or of a part that does nothing, would be arbitrary.

    Parameters
    ----------
    first, second, pair
        Effects of the parts and of the pair against no perturbation, shape ``(..., n_genes)``.

    Returns
    -------
    Coefficients and what follows from them, of shape ``(...)``. Without any effect at all the pair
    is additive.

    Notes
    -----
    Regression, magnitude and dominance are those of the genetic interaction map of Norman et al.
    (Science 365, 786, 2019), who use Theil and Sen's robust slopes and distance correlation for
    fit and similarity. Effects of a model have no outliers of measurement, and least squares is
    vectorised; on observed effects expect differences where a few genes dominate.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import regress_pair
    >>> first, second = np.eye(2)
    >>> found = regress_pair(first, second, first + second)
    >>> found.coefficient_1.item(), found.dominance.item(), found.relative_deviation.item()
    (1.0, 0.0, 0.0)
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
        interaction_score=ratio(
            (residual * additive).sum(-1),
            squared_length_of_sum(a, b),
        ),
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


PAIR_CLASSES = ("additive", "synergistic", "buffering", "epistatic", "neomorphic")
"""Kinds of interactions, see :func:`classify_pairs`."""


class PairThresholds(NamedTuple):
    """Where one kind of interaction ends and the next begins."""

    relative_deviation: float = 0.2
    """A pair that deviates by less from the sum of its parts is additive."""
    fit: float = 0.5
    """A pair of which the parts explain less is neomorphic."""
    dominance_ratio: float = 3.0
    """Ratio of the coefficients from which one part masks the other ..."""
    masked_coefficient: float = 0.5
    """... if that of the other is at most this."""


_DEFAULT_THRESHOLDS = PairThresholds()


def pair_class(
    regression: PairRegression, thresholds: PairThresholds = _DEFAULT_THRESHOLDS
) -> NDArray[np.int64]:
    """Kind of interaction, as positions in `PAIR_CLASSES`.

    Parameters
    ----------
    regression
        Pairs against their parts, of any shape, from :func:`regress_pair`.
    thresholds
        Where the kinds end.

    Returns
    -------
    Codes of the shape of the fields of `regression`, see :func:`classify_pairs` for the rules.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import PAIR_CLASSES, pair_class, regress_pair
    >>> first, second = np.eye(2)
    >>> PAIR_CLASSES[pair_class(regress_pair(first, second, 1.1 * first)).item()]
    'epistatic'
    """
    c1, c2 = np.abs(regression.coefficient_1), np.abs(regression.coefficient_2)
    is_masked = (np.minimum(c1, c2) <= thresholds.masked_coefficient) & (
        regression.dominance >= np.log10(thresholds.dominance_ratio)
    )
    conditions = [
        regression.relative_deviation < thresholds.relative_deviation,
        regression.fit < thresholds.fit,
        is_masked,
        regression.interaction_score > 0,
    ]
    names = ["additive", "neomorphic", "epistatic", "synergistic"]
    codes = [PAIR_CLASSES.index(name) for name in names]
    return np.asarray(np.select(conditions, codes, PAIR_CLASSES.index("buffering")))


def classify_pairs(
    effects: ProfileTable,
    pairs: Sequence[str] | None = None,
    thresholds: PairThresholds = _DEFAULT_THRESHOLDS,
    combination_delimiter: str = "+",
) -> pd.DataFrame:
    r"""Compare the effects of pairs with those of their parts, and name the kind of interaction.

    With :math:`\delta_{AB} = c_1 \delta_A + c_2 \delta_B + \text{rest}` (:func:`regress_pair`),
    the first rule that holds gives the kind:

    * *additive*: the pair deviates from :math:`\delta_A + \delta_B` by less than a fifth
      (``relative_deviation``)
    * *neomorphic*: the parts explain less than half of the pair (``fit``)
    * *epistatic*: one part masks the other: the coefficients differ by a factor of 3 or more and
      the smaller is at most one half (``dominance``)
    * *synergistic*: more than the sum, along the sum (``interaction_score`` above 0)
    * *buffering*: less than the sum

    Parameters
    ----------
    effects
        Conditions x genes, effects against the controls, predicted or observed, with the parts of
        each pair.
    pairs
        Pairs wanted; by default all whose parts are in `effects` too.
    thresholds
        Where the kinds end.
    combination_delimiter
        What joins the parts.

    Returns
    -------
    A row a pair: ``first``, ``second``, the fields of :class:`PairRegression`, and ``class``
    (categorical).

    Raises
    ------
    ScreenError
        If a pair is not in `effects` with its parts, or has more than two.

    Notes
    -----
    The kinds and the coefficients they rest on are from Norman et al. (Science 365, 786, 2019).
    The thresholds are this package's: the paper orders pairs along a continuum. Observed effects
    of few cells deviate by noise alone and come out as neomorphic:
    :func:`~scvi_sams.evaluation.interaction_residuals` has standard errors.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import classify_pairs
    >>> effects = pd.DataFrame(
    ...     {"GATA1": [1.0, 0.0, 1.6], "MYC": [0.0, 1.0, 1.5]}, index=["A", "B", "A+B"]
    ... )
    >>> classify_pairs(effects)[["magnitude", "interaction_score", "class"]].round(2)
         magnitude  interaction_score        class
    A+B       2.18               0.55  synergistic
    """
    frame = profile_frame(effects, "effects")
    parts = _parts_of_pairs(frame.index, pairs, combination_delimiter)
    first, second = (list(side) for side in zip(*parts.values(), strict=True))
    rows = (first, second, list(parts))
    regression = regress_pair(*(frame.loc[names].to_numpy() for names in rows))
    table = pd.DataFrame(
        {"first": first, "second": second} | regression._asdict(), index=pd.Index(parts)
    )
    table["class"] = pd.Categorical.from_codes(pair_class(regression, thresholds), PAIR_CLASSES)
    return table


def _parts_of_pairs(
    conditions: pd.Index, pairs: Sequence[str] | None, delimiter: str
) -> dict[str, list[str]]:
    """The two parts of each pair, by its label."""
    known = set(conditions)
    if pairs is None:
        parts = {str(name): split_label(str(name), delimiter) for name in conditions}
        parts = {n: of_n for n, of_n in parts.items() if len(of_n) == 2 and known.issuperset(of_n)}
        if not parts:
            raise ScreenError(
                f"No condition of `effects` joins two parts by {delimiter!r} that are both among "
                "its conditions: add the single perturbations."
            )
        return parts
    parts = {str(name): split_label(str(name), delimiter) for name in pairs}
    for name, of_name in parts.items():
        if len(of_name) != 2:
            raise ScreenError(f"{name!r} is no pair joined by {delimiter!r}.")
        if lacking := [each for each in (name, *of_name) if each not in known]:
            raise ScreenError(f"{name!r} needs {lacking[0]!r}, which is not in `effects`.")
    return parts


_DEFAULT_THRESHOLDS = PairThresholds()


class Surprise(NamedTuple):
    """How far a pair is expected to be from the sum of its parts, lengths over genes."""

    surprise: float
    """Root of the expected squared deviation: the error to expect of the additive prediction."""
    expected_deviation: float
    """Length of the expected deviation."""
    uncertainty: float
    """Root of the variance of the deviation, summed over genes."""


def expected_surprise(residuals: NDArray[np.floating]) -> Surprise:
    r"""How surprising a pair would be to somebody who adds up its parts.

    With the deviation :math:`\varepsilon` from additivity, a vector over genes,

    .. math:: \mathrm E\,|\varepsilon|^2 = |\mathrm E\,\varepsilon|^2
        + \operatorname{tr} \operatorname{Cov} \varepsilon,

    what is expected and what is unknown, each estimated from the draws without bias.

    Parameters
    ----------
    residuals
        Draws of the deviation, shape ``(n_draws, n_genes)``, two draws at least.

    Returns
    -------
    Square roots of the three terms; an expected deviation below what so few draws can tell from
    0 is 0.

    Raises
    ------
    ValueError
        If there are fewer than two draws.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import expected_surprise
    >>> expected_surprise(np.array([[3.0, 4.0], [3.0, 4.0]]))
    Surprise(surprise=5.0, expected_deviation=5.0, uncertainty=0.0)
    """
    draws = np.asarray(residuals, dtype=np.float64)
    if len(draws) < 2:
        raise ValueError(f"{len(draws)} draws: at least two are needed to know a variance.")
    total = float(np.square(draws).sum(-1).mean())
    variance = float(draws.var(axis=0, ddof=1).sum())
    expected = max(total - variance, 0.0)
    return Surprise(*(float(np.sqrt(value)) for value in (total, expected, variance)))


def pair_summary(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    pair: NDArray[np.floating],
    credible_level: float = 0.95,
    thresholds: PairThresholds = _DEFAULT_THRESHOLDS,
) -> dict[str, float | str]:
    """Kind and size of the interaction of a pair, with what the draws leave open.

    Parameters
    ----------
    first, second, pair
        Draws of the effects of the parts and of the pair, shape ``(n_draws, n_genes)``, the same
        draw in the same row; a part that is certain may have one row.
    credible_level
        Level of the interval of the interaction score.
    thresholds
        Where the kinds of interaction end.

    Returns
    -------
    Posterior means of the fields of :class:`PairRegression`, ``interaction_score_lower`` and
    ``interaction_score_upper``, the probability of each kind (``probability_<kind>``), the most
    probable kind as ``class`` with its ``class_probability``, and the fields of
    :class:`Surprise`.

    Raises
    ------
    ValueError
        If there are fewer than two draws, or `credible_level` is not between 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import pair_summary
    >>> first, second = np.eye(2)[:, None].repeat(3, axis=1)
    >>> pair_summary(first, second, 1.5 * (first + second))["class"]
    'synergistic'
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
    return summary | expected_surprise(residuals)._asdict()
