"""Kinds of genetic interactions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.data._labels import split_label
from scvi_sams.interpretation._pair_regression import regress_pair
from scvi_sams.metrics._profiles import profile_frame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.interpretation._pair_regression import PairRegression
    from scvi_sams.metrics._profiles import ProfileTable

__all__ = ["PAIR_CLASSES", "PairThresholds", "classify_pairs", "pair_class"]

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


_DEFAULT = PairThresholds()


def pair_class(
    regression: PairRegression, thresholds: PairThresholds = _DEFAULT
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
    >>> from scvi_sams.interpretation import PAIR_CLASSES, pair_class, regress_pair
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
    thresholds: PairThresholds = _DEFAULT,
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
    :func:`~scvi_sams.metrics.interaction_residuals` has standard errors.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.interpretation import classify_pairs
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
