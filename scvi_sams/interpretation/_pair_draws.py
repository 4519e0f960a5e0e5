"""Pairs summarised from posterior draws of their effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scvi_sams.interpretation._gene_programs import summarize_effects
from scvi_sams.interpretation._pair_classes import PAIR_CLASSES, PairThresholds, pair_class
from scvi_sams.interpretation._pair_regression import regress_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Surprise", "expected_surprise", "pair_summary"]

_DEFAULT = PairThresholds()


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
    >>> from scvi_sams.interpretation import expected_surprise
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
    thresholds: PairThresholds = _DEFAULT,
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
    >>> from scvi_sams.interpretation import pair_summary
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
