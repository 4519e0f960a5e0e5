"""The effect of a pair as a combination of those of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PairRegression", "regress_pair"]

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
    >>> from scvi_sams.interpretation import regress_pair
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
