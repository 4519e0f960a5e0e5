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
    return {
        "mean": mean,
        "std": std,
        "truth": truth,
        "observed": observed,
        "error": error,
    }


def intervals(simulated: dict, level: float) -> ad.AnnData:
    half = norm.ppf((1 + level) / 2) * simulated["std"]
    mean = simulated["mean"]
    predicted = ad.AnnData(mean)
    predicted.layers["lower"] = mean.to_numpy() - half
    predicted.layers["upper"] = mean.to_numpy() + half
    predicted.uns["scvi_sams"] = {"credible_level": level}
    return predicted


class TestIntervals:
    def test_agree_with_the_level(self, simulated):
        predicted = intervals(simulated, 0.8)
        coverage = interval_coverage(predicted, simulated["truth"], standard_error=None)
        assert list(coverage.index) == ["A", "B"]
        np.testing.assert_allclose(coverage, 0.8, atol=0.03)
        observed = ad.AnnData(simulated["observed"])
        observed.layers["standard_error"] = simulated["error"].to_numpy()
        np.testing.assert_allclose(interval_coverage(predicted, observed), 0.8, atol=0.03)

    def test_noise_of_observed_means(self, simulated):
        for level in (0.5, 0.95):
            arguments = intervals(simulated, level), simulated["observed"], level
            right = interval_coverage(*arguments, standard_error=simulated["error"])
            np.testing.assert_allclose(right, level, atol=0.03)
            # The observed spread twice the predicted variance: z shrinks by the root of 2.
            naive = interval_coverage(*arguments, standard_error=None)
            expected = 2 * norm.cdf(norm.ppf((1 + level) / 2) / 2**0.5) - 1
            np.testing.assert_allclose(naive, expected, atol=0.03)

    def test_too_sure_and_too_unsure(self, simulated):
        arguments = {"observed": simulated["truth"], "standard_error": None}
        assert (interval_coverage(intervals(simulated, 0.2), level=0.95, **arguments) < 0.4).all()
        assert (interval_coverage(intervals(simulated, 0.99), level=0.5, **arguments) > 0.95).all()

    def test_order_of_conditions_and_genes(self, simulated):
        predicted, truth = intervals(simulated, 0.8), simulated["truth"]
        shuffled = interval_coverage(predicted[::-1, ::-1], truth, standard_error=None)
        straight = interval_coverage(predicted, truth, standard_error=None)
        pd.testing.assert_series_equal(shuffled[["A", "B"]], straight)

    def test_ends_belong_to_the_interval(self, simulated):
        predicted = intervals(simulated, 0.5)
        upper = pd.DataFrame(
            predicted.layers["upper"], index=predicted.obs_names, columns=predicted.var_names
        )
        assert (interval_coverage(predicted, upper, standard_error=None) == 1).all()
        assert (interval_coverage(predicted, upper + 1e-6, standard_error=None) == 0).all()

    def test_agrees_with_loops(self):
        rng = np.random.default_rng(4)
        names = {"index": list("ABC"), "columns": [f"g{i}" for i in range(40)]}
        lower, width, error = (rng.uniform(0, 1, size=(3, 40)) for _ in range(3))
        predicted = ad.AnnData(pd.DataFrame(lower, **names))  # its centre plays no part
        predicted.layers.update(lower=lower, upper=lower + width)
        observed = pd.DataFrame(rng.normal(size=(3, 40)), **names)
        coverage = interval_coverage(predicted, observed, 0.8, pd.DataFrame(error, **names))
        for row, condition in enumerate("ABC"):
            n_inside = 0
            for gene in range(40):
                middle = lower[row, gene] + width[row, gene] / 2
                variance = (width[row, gene] / 2) ** 2 + (1.2815516 * error[row, gene]) ** 2
                n_inside += (observed.iloc[row, gene] - middle) ** 2 <= variance
            assert 0 < n_inside < 40
            assert coverage[condition] == n_inside / 40

    def test_without_a_posterior_there_is_no_coverage(self, simulated):
        predicted = intervals(simulated, 0.5)
        predicted.layers["lower"][0] = np.nan
        coverage = interval_coverage(predicted, simulated["truth"], standard_error=None)
        assert coverage.isna().tolist() == [True, False]


def test_refusals(simulated):
    predicted, truth = ad.AnnData(simulated["mean"]), simulated["truth"]
    with pytest.raises(ScreenError, match="does not say what the level"):
        interval_coverage(predicted, truth)
    with pytest.raises(ScreenError, match="`predicted` has no layer 'lower'"):
        interval_coverage(predicted, truth, 0.9, standard_error=None)
    with pytest.raises(ValueError, match="level 95 must be between 0 and 1"):
        interval_coverage(predicted, truth, 95)
