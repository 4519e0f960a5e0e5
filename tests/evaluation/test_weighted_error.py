from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import mean_squared_error, r2_score

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import (
    differential_expression_weights,
    effect_agreement,
    observed_effects,
)


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "A", "B", "rare"], [80, 60, 50, 1])
    rate = np.full((191, 15), 4.0)
    rate[80:140, 3] = 12.0
    rate[140:190, 7] = 0.5
    cells = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(191)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=cells)


def weighted_effect_error(predicted, observed, weights, reference=None) -> pd.DataFrame:
    table = effect_agreement(predicted, observed, reference, weights)
    return table[["weighted_mse", "weighted_r2"]]


def weigh(adata, **kwargs) -> pd.DataFrame:
    arguments = {"perturbation_key": "perturbation", "control": "control"} | kwargs
    return differential_expression_weights(adata, **arguments)


class TestWeights:
    @pytest.mark.parametrize("against", ["rest", "control"])
    def test_are_those_of_scanpys_t_test(self, screen, against):
        weights = weigh(screen, against=against)
        assert list(weights.index) == ["A", "B"]
        tested = screen.copy()
        sc.pp.normalize_total(tested, target_sum=1e4)
        sc.pp.log1p(tested, base=2)
        sc.tl.rank_genes_groups(
            tested, "perturbation", groups=["A", "B"], reference=against, method="t-test"
        )
        for name in ("A", "B"):
            score = sc.get.rank_genes_groups_df(tested, name).set_index("names")["scores"].abs()
            expected = ((score - score.min()) / (score.max() - score.min())) ** 2
            np.testing.assert_allclose(weights.loc[name], expected[weights.columns], atol=1e-3)

    def test_single_out_the_genes_that_respond(self, screen):
        weights = weigh(screen)
        assert weights.loc["A"].idxmax() == "3"
        assert weights.loc["B"].idxmax() == "7"
        assert weights.drop(columns=["3", "7"]).to_numpy().max() < 0.2
        assert (weights.min(axis=1) == 0).all()

    def test_no_gene_differs(self):
        cells = pd.DataFrame({"perturbation": ["control", "A"] * 3}, index=list("abcdef"))
        assert (weigh(ad.AnnData(np.full((6, 4), 2.0), obs=cells)) == 1).all(axis=None)

    def test_refusals(self, screen):
        with pytest.raises(ValueError, match="against='all' is unknown"):
            weigh(screen, against="all")
        with pytest.raises(ValueError, match="min_cells=1"):
            weigh(screen, min_cells=1)
        with pytest.raises(ScreenError, match="fewer than 2 cells, the first 'rare'"):
            weigh(screen, conditions=["rare"])


class TestWeightedError:
    @pytest.fixture
    def tables(self) -> list[pd.DataFrame]:
        values = np.random.default_rng(1).normal(size=(3, 4, 30))
        predicted, observed, weights = (
            pd.DataFrame(each, index=list("ABCD")).add_prefix("g") for each in values
        )
        return [predicted, observed, weights**2]

    def test_agrees_with_scikit_learn(self, tables):
        predicted, observed, weights = tables
        mean = observed.mean()
        table = weighted_effect_error(predicted, observed, weights, reference=mean)
        for name, weight in weights.iterrows():
            truth, guess = observed.loc[name] - mean, predicted.loc[name] - mean
            error = mean_squared_error(truth, guess, sample_weight=weight)
            assert table.loc[name, "weighted_mse"] == pytest.approx(error)
            r2 = r2_score(truth, guess, sample_weight=weight)
            assert table.loc[name, "weighted_r2"] == pytest.approx(r2)

    def test_perfect_and_worse_than_nothing(self, tables):
        predicted, observed, weights = tables
        table = weighted_effect_error(observed, observed, weights)
        assert (table["weighted_mse"] == 0).all()
        assert (table["weighted_r2"] == 1).all()
        assert (weighted_effect_error(-observed, observed, weights)["weighted_r2"] < -2).all()

    def test_a_collapsed_prediction_pays_where_genes_respond(self, screen):
        half = np.arange(screen.n_obs) % 2 == 0
        key = {"perturbation_key": "perturbation", "control": "control"}
        observed = observed_effects(screen[half], min_cells=2, **key)
        weights = weigh(screen[~half])
        other = observed_effects(screen[~half], min_cells=2, **key)
        collapsed = pd.DataFrame([other.to_df().mean()] * 2, index=["A", "B"])
        uniform = weights * 0 + 1
        weighted = [weighted_effect_error(each, observed, weights) for each in (other, collapsed)]
        assert (weighted[0]["weighted_r2"] > 0.6).all()
        assert (weighted[1]["weighted_r2"] < 0.3).all()
        plain = [weighted_effect_error(each, observed, uniform) for each in (other, collapsed)]
        seen = weighted[1]["weighted_mse"] / weighted[0]["weighted_mse"]
        assert (seen > 1.2 * plain[1]["weighted_mse"] / plain[0]["weighted_mse"]).all()

    def test_no_weight_at_all(self, tables):
        predicted, observed, weights = tables
        weights.loc["B"] = 0
        table = weighted_effect_error(predicted, observed, weights)
        assert table.isna().all(axis=1).tolist() == [False, True, False, False]

    def test_refusals(self, tables):
        predicted, observed, weights = tables
        with pytest.raises(ScreenError, match="not in `weights`, the first 'D'"):
            weighted_effect_error(predicted, observed, weights.iloc[:3])
        with pytest.raises(ScreenError, match="`weights` of 'A' must be finite and 0 or more"):
            weighted_effect_error(predicted, observed, -weights)
