from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from scvi_sams.tl.pair_calibration import (
    LEAST_PAIRS,
    PairCalibration,
    PairResiduals,
    calibrate_pairs,
    calibrated_summary,
    score_gradient,
    widen_interval,
)
from scvi_sams.tl.pair_statistics import pair_summary, regress_pair

N_GENES = 400


def residuals(
    n_pairs: int = 60, absolute: float = 0.3, relative: float = 0.2, score: float = 0.15, seed=0
) -> PairResiduals:
    """Residuals of known variance: sampling noise that differs by entry, and errors of a model."""
    rng = np.random.default_rng(seed)
    shape = (n_pairs, N_GENES)
    squared_parts = rng.exponential(2.0, shape)
    error, score_error = rng.uniform(0.05, 0.6, shape), rng.uniform(0.02, 0.3, n_pairs)
    variance = absolute**2 + relative**2 * squared_parts + error**2
    return PairResiduals(
        rng.normal(size=shape) * np.sqrt(variance),
        error,
        squared_parts,
        rng.normal(size=n_pairs) * np.hypot(score, score_error),
        score_error,
    )


@pytest.mark.parametrize("parts", ["different", "alike", "cancelling"])
def test_gradient_is_that_of_the_score(parts):
    rng = np.random.default_rng(1)
    first, second, pair = rng.normal(size=(3, 12))
    if parts == "alike":
        second = first.copy()
    if parts == "cancelling":  # the denominator is that of the least sum, taken as given
        second = -first
    gradient = score_gradient(first, second, pair)

    def score(first, second, pair):
        if parts != "cancelling":
            return regress_pair(first, second, pair).interaction_score
        additive, least = first + second, 0.02 * (fixed**2).sum()
        return (pair - additive) @ additive / least

    fixed, step = first.copy(), 1e-6
    for gene in range(12):
        move = step * np.eye(12)[gene]
        for side, expected in enumerate((gradient.parts, gradient.parts, gradient.pair)):
            effects = [first, second, pair]
            above = [e + move * (k == side) for k, e in enumerate(effects)]
            below = [e - move * (k == side) for k, e in enumerate(effects)]
            slope = (score(*above) - score(*below)) / (2 * step)
            assert slope == pytest.approx(expected[gene], abs=1e-6)


def test_variances_are_those_that_made_the_residuals():
    found = [calibrate_pairs(residuals(seed=seed)) for seed in range(20)]
    mean = np.mean([[f.absolute_variance, f.relative_variance] for f in found], axis=0)
    np.testing.assert_allclose(mean, [0.3**2, 0.2**2], rtol=0.03)
    assert np.mean([f.score_variance for f in found]) == pytest.approx(0.15**2, rel=0.15)
    assert {f.n_pairs for f in found} == {60}


def test_score_variance_solves_its_equation():
    data = residuals()
    variance = calibrate_pairs(data).score_variance
    total = np.sum(data.score**2 / (data.score_error**2 + variance))
    assert total == pytest.approx(len(data.score), rel=1e-6)


def test_noise_alone_leaves_nothing_for_the_model():
    data = residuals(absolute=0.0, relative=0.0, score=0.0)
    smaller = data._replace(deviation=0.9 * data.deviation, score=0.5 * data.score)
    assert calibrate_pairs(smaller)[1:] == (0.0, 0.0, 0.0)
    nothing = PairResiduals(*(np.zeros_like(values) for values in data))
    assert calibrate_pairs(nothing)[1:] == (0.0, 0.0, 0.0)


def test_an_error_that_all_pairs_share_counts():
    data = residuals(score=0.0)
    shifted = data._replace(score=0.3 + 0 * data.score, score_error=0 * data.score + 1e-6)
    assert calibrate_pairs(shifted).score_variance == pytest.approx(0.09, rel=1e-3)


def test_scales_with_the_units():
    data = residuals()
    found = calibrate_pairs(data)
    doubled = data._replace(
        deviation=2 * data.deviation,
        deviation_error=2 * data.deviation_error,
        squared_parts=4 * data.squared_parts,
    )
    again = calibrate_pairs(doubled)
    assert again.absolute_variance == pytest.approx(4 * found.absolute_variance, rel=1e-4)
    assert again.relative_variance == pytest.approx(found.relative_variance, rel=1e-4)


def test_leaves_one_pair_out():
    data = residuals(n_pairs=LEAST_PAIRS + 1)
    data.deviation[3], data.score[3] = 100.0, 100.0
    assert calibrate_pairs(data.without(3)).score_variance < 1
    assert calibrate_pairs(data).score_variance > 100
    with pytest.raises(ValueError, match="7 pairs: at least 8"):
        calibrate_pairs(data.without(3).without(0))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_widened_intervals_cover(level):
    """Truth that is a draw of the posterior and an error, both Normal; few pairs to learn from."""
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(200):
        found = calibrate_pairs(residuals(n_pairs=10, score=0.5, seed=seed))
        truth = rng.normal(0, np.hypot(0.2, 0.5), 200)
        half = 0.2 * stats.norm.ppf((1 + level) / 2)
        ends = widen_interval(0.0, -half, half, found.score_variance, found.n_pairs, level)
        inside.append((ends[0] <= truth) & (truth <= ends[1]))
    assert np.mean(inside) == pytest.approx(level, abs=0.025)


def test_no_error_leaves_an_interval_as_it_was():
    ends = widen_interval(np.array([1.0]), np.array([0.5]), np.array([3.0]), 0.0, 8, 0.9)
    np.testing.assert_allclose(ends, [[0.5], [3.0]])


def test_summary_holds_the_errors():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 30))
    pair = first + second + 0.1 * rng.normal(size=(5, 30))
    summary = pair_summary(first, second, pair)
    calibration = PairCalibration(12, 0.04, 0.01, 0.25)
    parts = first.mean(0), second.mean(0)
    found = calibrated_summary(summary, *parts, calibration, 0.95)
    error = 0.04 * 30 + 0.01 * (parts[0] @ parts[0] + parts[1] @ parts[1])
    assert found["surprise"] ** 2 == pytest.approx(summary["surprise"] ** 2 + error)
    assert found["uncertainty"] ** 2 == pytest.approx(summary["uncertainty"] ** 2 + error)
    half = found["interaction_score_upper"] - found["interaction_score"]
    assert half > stats.t.ppf(0.975, 12) * 0.5
    changed = {name for name in summary if summary[name] != found[name]}
    assert changed == {
        "surprise",
        "uncertainty",
        "interaction_score_lower",
        "interaction_score_upper",
    }
