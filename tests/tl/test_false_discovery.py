from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from scvi_sams import ScreenError
from scvi_sams.tl.error_rates import bayesian_q_value, calibrated_q_value


def _frame(values, prefix="P"):
    values = np.asarray(values, dtype=float)
    values = values[:, None] if values.ndim == 1 else values
    index = [f"{prefix}{k}" for k in range(len(values))]
    return pd.DataFrame(values, index=index, columns=[f"l{k}" for k in range(values.shape[1])])


class TestBayesian:
    def test_mean_of_the_called_set(self):
        probability = _frame(np.random.default_rng(0).random((7, 4)).round(1))  # with ties
        q_value = bayesian_q_value(probability)
        for name in probability.index:
            for latent in probability:
                called = probability.to_numpy() >= probability.loc[name, latent]
                expected = (1 - probability.to_numpy()[called]).mean()
                assert q_value.loc[name, latent] == pytest.approx(expected)

    def test_is_the_rate_if_the_probabilities_are_right(self):
        rng = np.random.default_rng(1)
        shares = []
        for _ in range(400):
            probability = rng.beta(0.3, 0.7, 100)
            is_true = rng.random(100) < probability
            called = bayesian_q_value(_frame(probability))["l0"].to_numpy() <= 0.1
            shares.append((called & ~is_true).sum() / max(called.sum(), 1))
        assert 0.08 < np.mean(shares) < 0.105

    @pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
    def test_wants_probabilities(self, value):
        with pytest.raises(ValueError, match="between 0 and 1"):
            bayesian_q_value(_frame([0.5, value]))


class TestCalibrated:
    def test_of_one_column_is_benjamini_hochberg_on_conformal_p_values(self):
        rng = np.random.default_rng(0)
        score, null = rng.normal(size=40).round(1), rng.normal(size=25).round(1)
        score[:15] += 3
        p_value = (1 + (null[None] >= score[:, None]).sum(1)) / (len(null) + 1)
        q_value = calibrated_q_value(_frame(score), _frame(null))["l0"]
        np.testing.assert_allclose(q_value, false_discovery_control(p_value, method="bh"))

    def test_of_entries_is_the_larger_of_the_two_estimates(self):
        rng = np.random.default_rng(0)
        score, null = rng.normal(size=(12, 5)), rng.normal(size=(9, 5))
        score[:6, :2] += 4
        null[0] += 1.5  # one fake with several calls

        def estimate(threshold):
            estimates = []
            for axis in (1, None):
                reaching = [
                    np.count_nonzero(v >= threshold if axis is None else v.max(1) >= threshold)
                    for v in (score, null)
                ]
                estimates.append((1 + reaching[1]) / 10 * 12 / reaching[0])
            return min(max(estimates), 1)

        q_value = calibrated_q_value(_frame(score), _frame(null)).to_numpy()
        for row, column in np.ndindex(score.shape):
            lower = score[score <= score[row, column]]
            assert q_value[row, column] == pytest.approx(min(map(estimate, lower)))

    @pytest.mark.parametrize("n_active", [0, 10])
    def test_controls_the_rate_where_a_plain_ratio_does_not(self, n_active):
        rng = np.random.default_rng(2)
        n_real, n_null, nominal = 30, 20, 0.2
        shares, plain_shares = [], []
        for _ in range(1_500):
            score, null = rng.normal(size=n_real), rng.normal(size=n_null)
            score[:n_active] += 4
            called = calibrated_q_value(_frame(score), _frame(null))["l0"].to_numpy() <= nominal
            shares.append(called[n_active:].sum() / max(called.sum(), 1))
            ratio = [(null >= s).mean() * n_real / (score >= s).sum() for s in score]
            lowest = score[np.array(ratio) <= nominal].min(initial=np.inf)
            plain = score >= lowest
            plain_shares.append(plain[n_active:].sum() / max(plain.sum(), 1))
        bound = nominal * (n_real - n_active) / n_real
        assert np.mean(shares) < bound + 0.02
        if n_active == 0:
            assert np.mean(plain_shares) > 1.5 * nominal

    @pytest.mark.parametrize("correlation", [0.0, 0.5])
    def test_controls_the_rate_of_entries_of_one_perturbation_that_are_false_together(
        self, correlation
    ):
        rng = np.random.default_rng(3)
        n_real, n_null, n_latent, n_active, nominal = 40, 40, 8, 20, 0.1

        def noise(n):
            shared = rng.normal(size=(n, 1))
            own = rng.normal(size=(n, n_latent))
            return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own

        shares, powers = [], []
        for _ in range(400):
            score, null = noise(n_real), noise(n_null)
            is_true = np.zeros(score.shape, dtype=bool)
            is_true[np.arange(n_active), rng.integers(n_latent, size=n_active)] = True
            score[is_true] += 5
            called = calibrated_q_value(_frame(score), _frame(null)).to_numpy() <= nominal
            shares.append((called & ~is_true).sum() / max(called.sum(), 1))
            powers.append((called & is_true).sum() / n_active)
        assert np.mean(shares) < nominal + 0.01
        assert np.mean(powers) > 0.8

    def test_few_fakes_call_nothing(self):
        score = _frame(10 + np.random.default_rng(0).normal(size=(20, 3)))
        q_value = calibrated_q_value(score, _frame(np.zeros((9, 3))))
        assert (q_value == 0.1).all(axis=None)

    def test_wants_a_null_of_the_same_latents_without_nan(self):
        score = _frame(np.ones((3, 2)))
        with pytest.raises(ScreenError, match="no null perturbations"):
            calibrated_q_value(score, score.iloc[:0])
        with pytest.raises(ScreenError, match="3 latents and the others 2"):
            calibrated_q_value(score, _frame(np.ones((3, 3))))
        with pytest.raises(ScreenError, match="NaN"):
            calibrated_q_value(score, np.nan * score)

    def test_of_no_perturbations(self):
        assert calibrated_q_value(_frame(np.ones((0, 2))), _frame(np.ones((3, 2)))).empty
