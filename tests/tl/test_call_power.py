from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, ncx2

from scvi_sams.tl.call_power import (
    CallingProblem,
    bh_threshold,
    calling_threshold,
    least_effect,
    null_threshold,
    power,
)
from scvi_sams.tl.error_rates import bayesian_q_value, calibrated_q_value

FDR = 0.1
SEEDS = range(6)


def _log_odds(seed, n_active=4, size=(12, 5)):
    rng = np.random.default_rng(seed)
    values = rng.normal(-4, 1, size)
    values[:n_active, 0] += rng.uniform(2, 12, n_active)
    return values


class TestPower:
    def test_is_that_of_the_noncentral_chi_squared(self):
        signal, least = np.meshgrid([0.0, 0.5, 2.0, -3.0], [0.0, 1.0, 2.5])
        expected = ncx2.sf(least**2, 1, np.maximum(signal**2, 1e-12))
        np.testing.assert_allclose(power(signal, least), expected, atol=1e-6)

    @pytest.mark.parametrize("wanted", [0.5, 0.8, 0.99])
    def test_the_least_effect_has_it(self, wanted):
        least = np.array([1.0, 2.0, 6.0])
        np.testing.assert_allclose(power(least_effect(least, wanted), least), wanted)

    def test_no_effect_is_needed_where_all_is_called_and_none_suffices_where_nothing_is(self):
        np.testing.assert_array_equal(least_effect(np.array([0.0, np.inf]), 0.8), [0, np.inf])

    def test_of_masks_is_the_share_of_scores_whose_log_odds_pass(self):
        problem = CallingProblem(*(np.full((1, 1), v) for v in (0.0, 30.0, 36.0, -5.0, 0.02)))
        effect = problem.least_effect(1.0, 0.8)
        noise = np.random.default_rng(0).standard_normal((100_000, 1))
        score = problem.curvature * effect + np.sqrt(problem.variance) * noise
        assert (problem.log_odds(score) >= 1.0).mean() == pytest.approx(0.8, abs=0.005)
        assert problem.power(effect, 1.0)[0, 0] == pytest.approx(0.8)

    def test_cells_that_tell_nothing_show_no_effect(self):
        problem = CallingProblem(*(np.full((1, 1), v) for v in (0.0, 0.0, 0.0, -3.0, 0.5)))
        assert problem.least_effect(0.0, 0.8)[0, 0] == np.inf
        assert problem.power(np.full((1, 1), 9.0), 0.0)[0, 0] == 0


class TestThresholds:
    """One entry more is called from the threshold on, by the very rule that calls."""

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("n_active", [0, 4])
    def test_bayesian(self, seed, n_active):
        values = _log_odds(seed, n_active).ravel()
        threshold = calling_threshold(values, FDR)
        for move, called in ((1e-6, True), (-1e-6, False)):
            entries = np.append(values, threshold + move)
            probability = pd.DataFrame({"l": 1 / (1 + np.exp(-entries))})
            assert (bayesian_q_value(probability)["l"].iloc[-1] <= FDR) == called

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("n_active", [0, 1, 6])
    def test_null(self, seed, n_active):
        real, null = _log_odds(seed, n_active), _log_odds(seed + 100, 0, (40, 5))
        threshold = null_threshold(real, null, FDR)
        far = np.full(4, -50.0)
        for value in np.unique(np.concatenate([null.ravel() + 1e-6, real.ravel(), [20.0]])):
            rows = np.vstack([real, [np.append(value, far)]])
            q_value = calibrated_q_value(pd.DataFrame(rows), pd.DataFrame(null))
            assert (q_value.iloc[-1, 0] <= FDR) == (value > threshold)

    def test_too_small_a_null_calls_nothing(self):
        assert null_threshold(_log_odds(0), _log_odds(1, 0, (3, 5)), FDR) == np.inf

    @pytest.mark.parametrize("seed", SEEDS)
    def test_benjamini_hochberg(self, seed):
        p_value = np.random.default_rng(seed).uniform(size=50) ** 2.5
        threshold = bh_threshold(p_value, FDR)
        for factor, called in ((1 - 1e-9, True), (1 + 1e-6, False)):
            every = np.append(p_value, threshold * factor)
            assert (false_discovery_control(every)[-1] <= FDR) == called
