from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import latent_recovery, mask_recovery


def mean_correlation_coefficient(true, inferred, method="pearson") -> float:
    return latent_recovery(true, inferred, method).mean_correlation


def linear_r2(true, inferred, seed=0) -> float:
    return latent_recovery(true, inferred, seed=seed).linear_r2


@pytest.fixture
def mask() -> np.ndarray:
    return np.random.default_rng(0).random((40, 5)) < 0.3


@pytest.fixture
def effect(mask) -> np.ndarray:
    return mask * np.random.default_rng(1).normal(size=mask.shape)


def best_match(score: np.ndarray) -> float:
    """Largest sum over one-to-one matchings, by trying them all."""
    if score.shape[0] > score.shape[1]:
        score = score.T
    rows = range(score.shape[0])
    return max(score[rows, list(p)].sum() for p in permutations(range(score.shape[1]), len(rows)))


class TestMaskRecovery:
    def test_perfect_whatever_the_order(self, mask):
        order = [3, 0, 4, 1, 2]
        result = mask_recovery(mask, mask[:, order])
        assert result[:4] == (1.0, 1.0, 1.0, 1.0)
        assert [order[k] for k in result.predicted_latents] == result.true_latents.tolist()

    def test_agrees_with_all_permutations(self, mask):
        predicted = np.random.default_rng(2).random((40, 6)) < 0.3
        common = mask.T.astype(int) @ predicted
        sizes = np.add.outer(mask.sum(0), predicted.sum(0))
        result = mask_recovery(mask, predicted)
        assert result.macro_f1 * 5 == pytest.approx(best_match(2 * common / sizes))
        n_common = common[result.true_latents, result.predicted_latents].sum()
        assert result.f1 == pytest.approx(2 * n_common / (mask.sum() + predicted.sum()))
        assert result.f1 == pytest.approx(
            2 * result.precision * result.recall / (result.precision + result.recall)
        )

    def test_spare_columns_count_as_errors(self, mask):
        spare = np.zeros((40, 2), bool)
        assert mask_recovery(mask, np.hstack([mask, spare])).f1 == 1.0
        spare[:10, 0] = True
        result = mask_recovery(mask, np.hstack([mask, spare]))
        assert result.recall == 1.0
        assert result.precision == pytest.approx(mask.sum() / (mask.sum() + 10))

    def test_missing_columns_count_as_misses(self, mask):
        result = mask_recovery(mask, mask[:, :3])
        assert result.precision == 1.0
        assert result.recall == pytest.approx(mask[:, :3].sum() / mask.sum())
        assert result.macro_f1 == pytest.approx(3 / 5)

    def test_split_column_keeps_one_half(self):
        truth = np.ones((10, 1))
        halves = np.zeros((10, 2))
        halves[:6, 0] = halves[6:, 1] = 1
        result = mask_recovery(truth, halves)
        assert (result.precision, result.recall) == (0.6, 0.6)
        assert result.predicted_latents.tolist() == [0]

    def test_threshold_is_exclusive(self):
        truth, probability = np.array([[1], [1], [0]]), np.array([[0.9], [0.5], [0.2]])
        assert mask_recovery(truth, probability).recall == 0.5
        assert mask_recovery(truth, probability, threshold=0.4).f1 == 1.0

    def test_empty_masks(self, mask):
        nothing = np.zeros_like(mask)
        assert mask_recovery(nothing, nothing)[:4] == (1.0, 1.0, 1.0, 1.0)
        assert mask_recovery(mask, nothing)[:4] == (0.0, 1.0, 0.0, 0.0)
        assert mask_recovery(nothing, mask)[:3] == (0.0, 0.0, 1.0)
        assert mask_recovery(mask, mask[:, :0])[:4] == (0.0, 1.0, 0.0, 0.0)

    def test_tables_are_matched_by_name(self, mask):
        names = [f"P{i}" for i in range(40)]
        truth = pd.DataFrame(mask, index=names)
        assert mask_recovery(truth, truth.iloc[::-1]).f1 == 1.0
        with pytest.raises(ScreenError, match=r"1 perturbations are in one table only.*'P39'"):
            mask_recovery(truth, truth.iloc[:-1])

    def test_refuses_what_cannot_be_compared(self, mask):
        with pytest.raises(ScreenError, match="40 perturbations and the predicted one 39"):
            mask_recovery(mask, mask[:-1])
        with pytest.raises(ScreenError, match=r"predicted table has shape \(40,\)"):
            mask_recovery(mask, mask[:, 0])
        with pytest.raises(ScreenError, match="predicted table holds values that are not finite"):
            mask_recovery(mask, np.where(mask, np.nan, 0.0))


class TestEffects:
    def test_perfect_up_to_order_sign_scale_and_offset(self, effect):
        changed = effect[:, [3, 0, 4, 1, 2]] * [1, -2, 3, -4, 5] + 1
        result = latent_recovery(effect, changed)
        assert result.mean_correlation == pytest.approx(1.0)
        assert result.correlation == pytest.approx(np.ones(5))
        assert result.inferred_latents.tolist() == [1, 3, 4, 0, 2]

    def test_agrees_with_all_permutations(self, effect):
        predicted = np.random.default_rng(3).normal(size=(40, 6))
        correlation = np.abs(np.corrcoef(effect.T, predicted.T)[:5, 5:])
        result = latent_recovery(effect, predicted)
        assert result.mean_correlation == pytest.approx(best_match(correlation) / 5)

    def test_unmatched_true_latents_count_as_zero(self, effect):
        assert latent_recovery(effect, effect[:, :2]).mean_correlation == pytest.approx(2 / 5)

    def test_constant_columns(self, effect):
        spare = np.full((40, 1), 0.1)
        assert latent_recovery(
            effect, np.hstack([spare, effect])
        ).mean_correlation == pytest.approx(1)
        assert latent_recovery(
            np.hstack([spare, effect]), effect
        ).mean_correlation == pytest.approx(1)
        assert latent_recovery(effect, np.repeat(spare, 5, axis=1)).mean_correlation == 0.0
        assert np.isnan(latent_recovery(spare, effect).mean_correlation)


class TestMeanCorrelationCoefficient:
    @pytest.fixture
    def latents(self) -> np.ndarray:
        return np.random.default_rng(4).normal(size=(2_000, 4))

    @pytest.mark.parametrize("method", ["pearson", "spearman"])
    def test_perfect_whatever_order_sign_and_scale(self, latents, method):
        inferred = latents[:, [3, 1, 0, 2]] * [1, -2, 3, -0.1] + 5
        assert mean_correlation_coefficient(latents, inferred, method) == pytest.approx(1)

    def test_monotone_functions_keep_the_ranks(self, latents):
        curved = np.exp(2 * latents)
        assert mean_correlation_coefficient(latents, curved, "spearman") == pytest.approx(1)
        assert mean_correlation_coefficient(latents, curved) < 0.8

    def test_agrees_with_all_permutations(self, latents):
        inferred = latents @ np.random.default_rng(5).normal(size=(4, 6))
        for method in ("pearson", "spearman"):
            both = pd.DataFrame(np.hstack([latents, inferred])).corr(method).abs().to_numpy()
            expected = best_match(both[:4, 4:]) / 4
            result = mean_correlation_coefficient(latents, inferred, method)
            assert result == pytest.approx(expected)

    def test_is_the_mean_of_latent_recovery(self, effect):
        predicted = effect + np.random.default_rng(6).normal(size=effect.shape)
        expected = latent_recovery(effect, predicted).mean_correlation
        assert mean_correlation_coefficient(effect, predicted) == expected

    def test_missing_constant_and_unrelated_latents(self, latents):
        assert mean_correlation_coefficient(latents, latents[:, :3]) == pytest.approx(3 / 4)
        constant = np.ones_like(latents)
        assert mean_correlation_coefficient(latents, constant) == 0
        assert np.isnan(mean_correlation_coefficient(constant, latents))
        shuffled = np.random.default_rng(7).permutation(latents)
        assert mean_correlation_coefficient(latents, shuffled) < 0.1

    def test_cells_are_matched_by_name(self, latents):
        true = pd.DataFrame(latents[:50]).rename(index="cell{}".format)
        assert mean_correlation_coefficient(true, true.iloc[::-1]) == pytest.approx(1)
        with pytest.raises(ScreenError, match="1 rows are in one table only, the first 'cell0'"):
            mean_correlation_coefficient(true, true.iloc[1:])
        with pytest.raises(ValueError, match="method='kendall' is unknown"):
            mean_correlation_coefficient(true, true, "kendall")


class TestLinearR2:
    @pytest.fixture
    def latents(self) -> np.ndarray:
        return np.random.default_rng(8).normal(size=(5_000, 3))

    def test_rotations_do_not_matter(self, latents):
        rng = np.random.default_rng(9)
        inferred = latents @ rng.normal(size=(3, 5)) + 2
        assert linear_r2(latents, inferred) == pytest.approx(1)
        assert mean_correlation_coefficient(latents, inferred) < 0.95

    def test_known_noise(self, latents):
        noisy = latents + 0.5 * np.random.default_rng(10).normal(size=latents.shape)
        assert linear_r2(latents, noisy) == pytest.approx(1 / 1.25, abs=0.02)

    def test_what_is_missing_is_not_explained(self, latents):
        assert linear_r2(latents, latents[:, :2]) == pytest.approx(2 / 3, abs=0.02)

    def test_noise_earns_nothing(self, latents):
        rng = np.random.default_rng(11)
        few = slice(0, 100)  # in the fitted cells alone, 40 regressors explain much
        assert linear_r2(latents[few], rng.normal(size=(100, 40))) < 0
        assert linear_r2(latents, np.zeros((5_000, 2))) == pytest.approx(0, abs=0.01)

    def test_constant_latents_do_not_count(self, latents):
        padded = np.hstack([latents, np.ones((5_000, 1))])
        assert linear_r2(padded, latents) == pytest.approx(1)
        assert np.isnan(linear_r2(np.ones((50, 2)), latents[:50]))

    def test_seed(self, latents):
        noisy = latents + np.random.default_rng(12).normal(size=latents.shape)
        assert linear_r2(latents, noisy, seed=3) == linear_r2(latents, noisy, seed=3)
        assert linear_r2(latents, noisy, seed=3) != linear_r2(latents, noisy, seed=4)
