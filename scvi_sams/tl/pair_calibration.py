"""How far pairs are from what a model says of them, learned from pairs that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import brentq, nnls
from scipy.stats import t as student_t

from scvi_sams.tl.pair_statistics import ratio, squared_length_of_sum

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from scvi_sams.data import Conditions

LEAST_PAIRS = 8  # from which a variance is learned
_LEAST_CELLS = 10  # of a pair, of either part and of controls; with fewer no standard error
_MOST_PAIRS = 100  # a variance gains little from more, and each is decoded
_MAX_UPDATES = 20
_TOLERANCE = 1e-6


class MeasuredPairs(NamedTuple):
    """Pairs measured at doses at which both parts were measured alone."""

    perturbation: NDArray[np.int32]  # their positions, increasing, pairs x 2
    dose: NDArray[np.float32]  # pairs x 2
    groups: NDArray[np.int64]  # of cells of the pair and of its parts, in that order, pairs x 3
    group: NDArray[np.int64]  # of each cell, 0 for controls and -1 for none of these
    n_cells: NDArray[np.int64]  # of each group


class PairResiduals(NamedTuple):
    """Measured pairs against a model's posterior means, pairs x genes or a number a pair."""

    deviation: NDArray[np.float64]  # observed less modelled, pairs x genes
    deviation_error: NDArray[np.float64]  # standard error of the observed, likewise
    squared_parts: NDArray[np.float64]  # sum of the squared modelled effects of both, likewise
    score: NDArray[np.float64]  # observed less modelled interaction score, one a pair
    score_error: NDArray[np.float64]  # standard error of the observed, likewise

    def without(self, pair: int) -> PairResiduals:
        """All pairs but one."""
        return PairResiduals(*(np.delete(values, pair, axis=0) for values in self))


class PairCalibration(NamedTuple):
    """Variance of a model's errors about pairs, see :func:`calibrate_pairs`."""

    n_pairs: int  # that it was learned from
    absolute_variance: float  # in squared units of the effects
    relative_variance: float  # a share of the squared effects of the parts
    score_variance: float  # of the interaction score

    def deviation_variance(
        self, first: NDArray[np.floating], second: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Variance of the deviation of each gene, given the effects of the parts, by gene."""
        squared = np.square(first, dtype=np.float64) + np.square(second, dtype=np.float64)
        return np.asarray(self.absolute_variance + self.relative_variance * squared)


class ScoreGradient(NamedTuple):
    """Derivatives of the interaction score, each of shape ``(..., n_genes)``."""

    pair: NDArray[np.float64]  # by the effect of the pair
    parts: NDArray[np.float64]  # by the effect of either part


def score_gradient(
    first: NDArray[np.floating], second: NDArray[np.floating], pair: NDArray[np.floating]
) -> ScoreGradient:
    r"""How the interaction score answers to small changes of effects of shape ``(..., n_genes)``.

    With :math:`a = \delta_A + \delta_B` and the score
    :math:`f = \langle \delta_{AB} - a, a \rangle / |a|^2`,

    .. math::
        \frac{\partial f}{\partial \delta_{AB}} = \frac{a}{|a|^2}, \qquad
        \frac{\partial f}{\partial \delta_A} = \frac{\partial f}{\partial \delta_B}
            = \frac{\delta_{AB} - 2 (1 + f)\, a}{|a|^2}.

    Where parts cancel, the denominator of the score is not :math:`|a|^2` and is taken as given.
    """
    a, b, y = (np.asarray(effect, dtype=np.float64) for effect in (first, second, pair))
    additive = a + b
    squared, length = (additive * additive).sum(-1), squared_length_of_sum(a, b)
    score = ratio(((y - additive) * additive).sum(-1), length)
    coefficient = np.where(squared >= length, 2 * (1 + score), 2.0)[..., None]
    length = length[..., None]
    return ScoreGradient(ratio(additive, length), ratio(y - coefficient * additive, length))


def find_measured_pairs(
    conditions: Conditions, seed: int | None, without: Container[tuple[int, int]] = ()
) -> MeasuredPairs:
    """Pairs with enough cells of their own, of both parts alone and of controls.

    Of more than are needed some are drawn by the seed; ``without`` are left out.
    """
    n_cells = conditions.n_cells
    row_of = {
        (*index[dose > 0].tolist(), *dose[dose > 0].tolist()): row
        for row, (index, dose) in enumerate(zip(conditions.index, conditions.dose, strict=True))
    }
    found = []
    for a, b, dose_a, dose_b in sorted(key for key in row_of if len(key) == 4):
        groups = [(a, b, dose_a, dose_b), (a, dose_a), (b, dose_b), ()]
        if (a, b) not in without and row_of.keys() >= set(groups):
            members = [row_of[group] for group in groups]
            if n_cells[members].min() >= _LEAST_CELLS:
                found.append(members)
    kept = np.arange(len(found))
    if len(kept) > _MOST_PAIRS:
        kept = np.sort(np.random.default_rng(seed).choice(kept, _MOST_PAIRS, replace=False))
    rows = np.array(found, dtype=np.int64).reshape(-1, 4)[kept]
    # Sums are kept of the groups that are used alone, controls first.
    used = np.array([*rows[:1, 3], *np.setdiff1d(rows[:, :3], rows[:1, 3])], dtype=np.int64)
    group_of = np.full(len(n_cells), -1)
    group_of[used] = np.arange(len(used))
    pairs = rows[:, 0]
    return MeasuredPairs(
        conditions.index[pairs, :2],
        conditions.dose[pairs, :2],
        group_of[rows[:, :3]],
        group_of[conditions.codes],
        n_cells[used],
    )


def pair_residuals(
    measured: MeasuredPairs,
    chunks: Iterable[tuple[slice, Any]],
    effects: Sequence[tuple[NDArray[np.float64], ...]],
    gradients: Sequence[ScoreGradient],
) -> PairResiduals:
    r"""Observed deviations from additivity and interaction scores against those of a model.

    Scores are compared along the model's gradient, :math:`r = \sum_c \langle w_c, \hat\delta_c -
    \delta_c \rangle` over the pair and its parts: to first order the difference of the scores, and
    linear in the cells, so that its standard error follows from their variance along
    :math:`w_c`. Noise would bias the score of the observed effects themselves.

    Expression comes in runs of cells x genes with their place among the cells; effects are those
    of the first part, the second and the pair. Each field has a row a pair.
    """
    n_pairs, n_groups = len(effects), len(measured.n_cells)
    first, second, pair = (
        np.stack(side).astype(np.float64) for side in zip(*effects, strict=True)
    )
    of_pair, of_parts = (np.stack(side) for side in zip(*gradients, strict=True))
    # Weights of the cells of the pair, of its parts and of the controls, whose mean is in all.
    weights = np.concatenate([of_pair, of_parts, -of_pair - 2 * of_parts]).T
    n_genes = len(weights)
    sums = np.zeros((2, n_groups, n_genes + weights.shape[1]))
    for rows, expression in chunks:
        cells = np.flatnonzero(measured.group[rows] >= 0)
        group, expression = measured.group[rows][cells], expression[cells]
        member = sparse.csr_matrix(
            (np.ones(len(cells)), (group, np.arange(len(cells)))), shape=(n_groups, len(cells))
        )
        along = np.asarray(expression @ weights)
        squared = expression.power(2) if sparse.issparse(expression) else np.square(expression)
        for total, genes, scores in zip(
            sums, (expression, squared), (along, np.square(along)), strict=True
        ):
            by_gene = member @ genes
            total[:, :n_genes] += by_gene.toarray() if sparse.issparse(by_gene) else by_gene
            total[:, n_genes:] += member @ scores
    n_cells = np.maximum(measured.n_cells, 1)[:, None]
    mean = sums[0] / n_cells
    variance = np.maximum(sums[1] / n_cells - mean**2, 0) / np.maximum(n_cells - 1, 1)
    mean, by_gene, by_score = mean[:, :n_genes], variance[:, :n_genes], variance[:, n_genes:]
    g = measured.groups
    observed = [mean[g[:, side]] - mean[0] for side in range(3)]
    differences = [seen - said for seen, said in zip(observed, (pair, first, second), strict=True)]
    p = np.arange(n_pairs)
    return PairResiduals(
        deviation=differences[0] - differences[1] - differences[2],
        deviation_error=np.sqrt(by_gene[g].sum(1) + by_gene[0]),
        squared_parts=first**2 + second**2,
        score=(of_pair * differences[0] + of_parts * (differences[1] + differences[2])).sum(1),
        score_error=np.sqrt(
            by_score[g[:, 0], p]
            + by_score[g[:, 1], n_pairs + p]
            + by_score[g[:, 2], n_pairs + p]
            + by_score[0, 2 * n_pairs + p]
        ),
    )


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
    """
    n_pairs = len(residuals.score)
    if n_pairs < LEAST_PAIRS:
        raise ValueError(f"{n_pairs} pairs: at least {LEAST_PAIRS} are needed.")
    sampling = np.square(residuals.deviation_error).ravel()
    excess = np.square(residuals.deviation).ravel() - sampling
    size = residuals.squared_parts.ravel()
    design = np.column_stack([np.ones_like(size), size])
    found = np.array([max(float(excess.mean()), 0.0), 0.0])
    for _ in range(_MAX_UPDATES):
        # The square of a Normal deviate varies by its variance; what cannot vary tells nothing.
        weight = ratio(np.ones_like(sampling), sampling + design @ found)
        before, found = found, nnls(design * weight[:, None], excess * weight)[0]
        if np.allclose(found, before, rtol=_TOLERANCE, atol=0):
            break
    extra = _extra_variance(residuals.score, residuals.score_error)
    return PairCalibration(n_pairs, float(found[0]), float(found[1]), extra)


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
    """A pair's summary with a wider interval of the score, and a larger uncertainty and surprise.

    Classes and their probabilities stay; the expected effects of the parts have shape (n_genes,).
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
