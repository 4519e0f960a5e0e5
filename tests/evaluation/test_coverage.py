from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import interval_coverage

N_GENES = 4_000


@pytest.fixture(scope="module")
def simulated() -> dict:
    """Truth from the predicted distribution, observed with noise as large as the posterior."""
    rng = np.random.default_rng(0)
    conditions, genes = ["A", "B"], [f"g{i}" for i in range(N_GENES)]
    mean = pd.DataFrame(rng.normal(size=(2, N_GENES)), index=conditions, columns=genes)
    std = np.array([[0.5], [2.0]])
    truth = mean + std * rng.normal(size=mean.shape)
    error = pd.DataFrame(np.broadcast_to(std, mean.shape), index=conditions, columns=genes)
    observed = truth + error * rng.normal(size=mean.shape)
    draws = mean.to_numpy() + std * rng.normal(size=(800, *mean.shape))
    return {
        "mean": mean,
        "std": std,
        "truth": truth,
        "observed": observed,
        "error": error,
        "draws": draws,
    }


def intervals(simulated: dict, level: float) -> ad.AnnData:
    half = norm.ppf((1 + level) / 2) * simulated["std"]
    mean = simulated["mean"]
    predicted = ad.AnnData(mean)
    predicted.layers["lower"] = mean.to_numpy() - half
    predicted.layers["upper"] = mean.to_numpy() + half
    predicted.uns["scvi_sams"] = {"credible_level": level}
    return predicted


class TestDraws:
    def test_right_of_the_truth(self, simulated):
        coverage = interval_coverage(
            simulated["mean"], simulated["truth"], draws=simulated["draws"], standard_error=None
        )
        assert list(coverage.columns) == [0.5, 0.8, 0.95]
        assert list(coverage.index) == ["A", "B"]
        np.testing.assert_allclose(coverage, [[0.5, 0.8, 0.95]] * 2, atol=0.03)

    def test_noise_of_observed_means(self, simulated):
        arguments = (simulated["mean"], simulated["observed"])
        naive = interval_coverage(*arguments, draws=simulated["draws"], standard_error=None)
        # The observed spread twice the predicted variance: z shrinks by the root of 2.
        expected = [2 * norm.cdf(norm.ppf((1 + a) / 2) / 2**0.5) - 1 for a in (0.5, 0.8, 0.95)]
        np.testing.assert_allclose(naive, [expected] * 2, atol=0.03)
        right = interval_coverage(
            *arguments, draws=simulated["draws"], standard_error=simulated["error"]
        )
        np.testing.assert_allclose(right, [[0.5, 0.8, 0.95]] * 2, atol=0.03)

    def test_too_sure_and_too_unsure(self, simulated):
        mean = simulated["mean"].to_numpy()
        narrow = mean + 0.2 * (simulated["draws"] - mean)
        sure = interval_coverage(
            simulated["mean"], simulated["truth"], draws=narrow, standard_error=None
        )
        assert (sure[0.95] < 0.4).all()
        wide = mean + 10 * (simulated["draws"] - mean)
        unsure = interval_coverage(
            simulated["mean"], simulated["truth"], draws=wide, standard_error=None
        )
        assert (unsure[0.5] > 0.95).all()

    def test_seed(self, simulated):
        def cover(seed: int) -> pd.DataFrame:
            return interval_coverage(
                simulated["mean"],
                simulated["observed"],
                draws=simulated["draws"][:20],
                standard_error=simulated["error"],
                seed=seed,
            )

        pd.testing.assert_frame_equal(cover(1), cover(1))
        assert not cover(1).equals(cover(2))

    def test_order_of_conditions_and_genes(self, simulated):
        shuffled = simulated["mean"].iloc[::-1, ::-1]
        coverage = interval_coverage(
            shuffled,
            simulated["truth"],
            draws=simulated["draws"][:, ::-1, ::-1],
            standard_error=None,
        )
        straight = interval_coverage(
            simulated["mean"], simulated["truth"], draws=simulated["draws"], standard_error=None
        )
        pd.testing.assert_frame_equal(coverage.loc[["A", "B"]], straight)


class TestIntervals:
    def test_agree_with_the_level(self, simulated):
        predicted = intervals(simulated, 0.8)
        coverage = interval_coverage(predicted, simulated["truth"], standard_error=None)
        assert list(coverage.columns) == [0.8]
        np.testing.assert_allclose(coverage, 0.8, atol=0.03)
        observed = ad.AnnData(simulated["observed"])
        observed.layers["standard_error"] = simulated["error"].to_numpy()
        np.testing.assert_allclose(interval_coverage(predicted, observed), 0.8, atol=0.03)

    def test_several_levels(self, simulated):
        tables = {level: intervals(simulated, level) for level in (0.5, 0.95)}
        coverage = interval_coverage(
            tables, simulated["observed"], standard_error=simulated["error"]
        )
        np.testing.assert_allclose(coverage, [[0.5, 0.95]] * 2, atol=0.03)

    def test_ends_belong_to_the_interval(self, simulated):
        predicted = intervals(simulated, 0.5)
        upper = pd.DataFrame(
            predicted.layers["upper"], index=predicted.obs_names, columns=predicted.var_names
        )
        assert (interval_coverage(predicted, upper, standard_error=None) > 0.999).all(axis=None)
        assert (interval_coverage(predicted, upper + 1e-6, standard_error=None) == 0).all(
            axis=None
        )

    def test_agrees_with_loops(self):
        rng = np.random.default_rng(4)
        names = {"index": list("ABC"), "columns": [f"g{i}" for i in range(40)]}
        lower, width, error = (rng.uniform(0, 1, size=(3, 40)) for _ in range(3))
        predicted = ad.AnnData(pd.DataFrame(lower, **names))  # its centre plays no part
        predicted.layers = {"lower": lower, "upper": lower + width}
        observed = pd.DataFrame(rng.normal(size=(3, 40)), **names)
        coverage = interval_coverage(
            {0.8: predicted}, observed, standard_error=pd.DataFrame(error, **names)
        )
        for row, condition in enumerate("ABC"):
            n_inside = 0
            for gene in range(40):
                middle = lower[row, gene] + width[row, gene] / 2
                variance = (width[row, gene] / 2) ** 2 + (1.2815516 * error[row, gene]) ** 2
                n_inside += (observed.iloc[row, gene] - middle) ** 2 <= variance
            assert 0 < n_inside < 40
            assert coverage.loc[condition, 0.8] == n_inside / 40

    def test_without_a_posterior_there_is_no_coverage(self, simulated):
        predicted = intervals(simulated, 0.5)
        predicted.layers["lower"][0] = np.nan
        coverage = interval_coverage(predicted, simulated["truth"], standard_error=None)
        assert coverage[0.5].isna().tolist() == [True, False]


def test_refusals(simulated):
    mean, truth = simulated["mean"], simulated["truth"]
    with pytest.raises(ScreenError, match="does not say what the level"):
        interval_coverage(mean, truth)
    with pytest.raises(ScreenError, match="`predicted` has no layer 'lower'"):
        interval_coverage({0.9: ad.AnnData(mean)}, truth, standard_error=None)
    with pytest.raises(ValueError, match=r"shape \(800, 2, 3\): it must be samples x 2 cond"):
        interval_coverage(mean, truth, draws=simulated["draws"][..., :3], standard_error=None)
    with pytest.raises(ValueError, match="level 95 must be between 0 and 1"):
        interval_coverage(mean, truth, levels=[95], draws=simulated["draws"], standard_error=None)
    with pytest.raises(ValueError, match="must be one table"):
        interval_coverage({0.5: ad.AnnData(mean)}, truth, draws=simulated["draws"])
