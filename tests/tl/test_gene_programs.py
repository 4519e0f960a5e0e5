from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from scvi_sams import ScreenError
from scvi_sams.tl import top_genes
from scvi_sams.tl.summaries import summarize_effects, total_variance_share


class TestSummarizeEffects:
    def test_normal_draws(self):
        rng = np.random.default_rng(0)
        mean, std = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 2.0])
        summary = summarize_effects(rng.normal(mean, std, (200_000, 3)), 0.8)
        np.testing.assert_allclose(summary.mean, mean, atol=0.02)
        np.testing.assert_allclose(summary.std, std, rtol=0.02)
        half = norm.ppf(0.9) * std
        np.testing.assert_allclose(summary.lower, mean - half, atol=0.03)
        np.testing.assert_allclose(summary.upper, mean + half, atol=0.03)
        np.testing.assert_allclose(summary.sign_rate, norm.cdf(np.abs(mean) / std), atol=0.01)

    def test_no_effect_has_no_sign(self):
        summary = summarize_effects(np.zeros((5, 2)), 0.95)
        assert (summary.sign_rate == 0).all()

    @pytest.mark.parametrize("level", [0, 1, 95])
    def test_level(self, level):
        with pytest.raises(ValueError, match="credible_level"):
            summarize_effects(np.zeros((5, 2)), level)


class TestTotalVarianceShare:
    def test_ishigami(self):
        """The total indices of Ishigami's function, which are known in closed form."""
        rng = np.random.default_rng(0)
        draws, anew = rng.uniform(-np.pi, np.pi, (2, 400_000, 3))

        def ishigami(x):
            return (np.sin(x[:, 0]) + 7 * np.sin(x[:, 1]) ** 2)[:, None] + (
                0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])
            )[:, None]

        a, b = 7, 0.1
        v1 = 0.5 * (1 + b * np.pi**4 / 5) ** 2
        v2, v13 = a**2 / 8, b**2 * np.pi**8 * (1 / 18 - 1 / 50)
        expected = np.array([v1 + v13, v2, v13]) / (v1 + v2 + v13)
        for latent in range(3):
            moved = draws.copy()
            moved[:, latent] = anew[:, latent]
            share = total_variance_share(ishigami(draws), ishigami(moved))
            assert share == pytest.approx(expected[latent], abs=0.01)

    def test_nothing_varies(self):
        assert total_variance_share(np.ones((4, 2)), np.ones((4, 2))) == 0


class TestTopGenes:
    @pytest.fixture
    def programs(self):
        values = np.array([[3.0, -1.0, 0.0, 2.0, -4.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
        return ad.AnnData(
            values,
            obs=pd.DataFrame(index=["latent_0", "latent_1"]),
            var=pd.DataFrame(index=list("ABCDE")),
            layers={"sign_rate": np.array([[0.6, 1.0, 0.0, 0.9, 1.0], [0, 0, 0.5, 0, 0]])},
        )

    def test_order(self, programs):
        table = top_genes(programs, 2)
        found = table.groupby(["program", "direction"])["gene"].agg("".join).to_dict()
        assert found == {
            ("latent_0", "up"): "AD",
            ("latent_0", "down"): "EB",
            ("latent_1", "up"): "C",
        }
        assert table["rank"].tolist() == [1, 2, 1, 2, 1]
        assert table["effect"].tolist() == [3, 2, -4, -1, 1]
        assert table["sign_rate"].tolist() == [0.6, 0.9, 1, 1, 0.5]

    def test_sign_rate(self, programs):
        assert top_genes(programs, 5, min_sign_rate=0.8)["gene"].tolist() == ["D", "E", "B"]
        with pytest.raises(ScreenError, match="sign_rate"):
            top_genes(programs.to_df(), min_sign_rate=0.8)

    def test_arguments(self, programs):
        with pytest.raises(ValueError, match="n_genes=0"):
            top_genes(programs, 0)
        with pytest.raises(ValueError, match="min_sign_rate=2"):
            top_genes(programs, min_sign_rate=2)
