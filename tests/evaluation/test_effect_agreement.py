from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import r2_score

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import effect_agreement, effect_correlation


def relative_squared_error(predicted, observed) -> float:
    table = effect_agreement(predicted, observed, pooled=True)
    assert list(table.index) == ["all"]
    return table.loc["all", "relative_squared_error"]


@pytest.fixture
def effects() -> ad.AnnData:
    rng = np.random.default_rng(1)
    return ad.AnnData(
        rng.normal(size=(4, 6)),
        obs=pd.DataFrame({"n_cells": [5, 6, 7, 8]}, index=list("ABCD")),
        var=pd.DataFrame(index=list("uvwxyz")),
    )


class TestScores:
    def test_perfect_in_any_order(self, effects):
        shuffled = effects[list("CABD"), list("zyxwvu")]
        assert effect_correlation(shuffled, effects) == pytest.approx(1.0)
        assert relative_squared_error(shuffled, effects) == 0.0

    def test_agree_with_the_formulas(self, effects):
        predicted = effects.copy()
        predicted.X = predicted.X + np.random.default_rng(2).normal(size=(4, 6))
        expected = np.corrcoef(predicted.X.ravel(), effects.X.ravel())[0, 1]
        assert effect_correlation(predicted, effects) == pytest.approx(expected)
        error = ((predicted.X - effects.X) ** 2).sum() / (effects.X**2).sum()
        assert relative_squared_error(predicted, effects) == pytest.approx(error)
        table = effect_agreement(predicted, effects)
        assert list(table.index) == list("ABCD")
        for i, name in enumerate("ABCD"):
            row = table.loc[name]
            assert row["pearson"] == pytest.approx(np.corrcoef(predicted.X[i], effects.X[i])[0, 1])
            assert row["relative_squared_error"] == pytest.approx(
                ((predicted.X[i] - effects.X[i]) ** 2).sum() / (effects.X[i] ** 2).sum()
            )

    def test_scale_shows_in_the_error_only(self, effects):
        doubled = effects.copy()
        doubled.X = 2 * doubled.X
        assert effect_correlation(doubled, effects) == pytest.approx(1.0)
        assert relative_squared_error(doubled, effects) == pytest.approx(1.0)

    def test_no_effect_predicted(self, effects):
        nothing = effects.copy()
        nothing.X = np.zeros((4, 6))
        assert relative_squared_error(nothing, effects) == 1.0
        assert np.isnan(effect_correlation(nothing, effects))
        assert np.isnan(relative_squared_error(effects, nothing))

    def test_observed_may_hold_more(self, effects):
        table = effect_agreement(effects[["D", "B"], ["x", "u", "v"]], effects)
        assert table["n_cells"].to_dict() == {"D": 8, "B": 6}
        assert table["pearson"].tolist() == pytest.approx([1.0, 1.0])

    def test_sparse_effects(self, effects):
        sparse = effects.copy()
        sparse.X = sp.csr_matrix(sparse.X)
        assert effect_correlation(sparse, effects) == pytest.approx(1.0)

    def test_refuses_what_was_not_observed(self, effects):
        with pytest.raises(ScreenError, match="1 conditions of `predicted`.*'D'"):
            effect_correlation(effects, effects[list("ABC")])
        with pytest.raises(ScreenError, match="2 genes of `predicted`.*'u'"):
            relative_squared_error(effects, effects[:, list("wxyz")])


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(3)
    observed = pd.DataFrame(rng.normal(size=(5, 50)), index=list("ABCDE")).add_prefix("g")
    return observed + rng.normal(size=(5, 50)), observed


class TestByCondition:
    def test_agrees_with_scikit_learn(self, tables):
        predicted, observed = tables
        table = effect_agreement(predicted, observed, n_top_genes=7)
        for name, row in observed.iterrows():
            assert table.loc[name, "r2"] == pytest.approx(r2_score(row, predicted.loc[name]))
            top = row.abs().nlargest(7).index
            guess = predicted.loc[name, top]
            assert table.loc[name, "r2_top"] == pytest.approx(r2_score(row[top], guess))
            assert table.loc[name, "pearson_top"] == pytest.approx(row[top].corr(guess))

    def test_data_frames_and_anndata_agree(self, tables):
        predicted, observed = tables
        expected = effect_agreement(predicted, observed)
        table = effect_agreement(ad.AnnData(predicted), ad.AnnData(observed))
        pd.testing.assert_frame_equal(table, expected, check_index_type=False)

    def test_against_a_reference(self, tables):
        predicted, observed = tables
        mean = observed.mean()
        table = effect_agreement(predicted, observed, reference=mean)
        for name, row in observed.iterrows():
            delta, guess = row - mean, predicted.loc[name] - mean
            assert table.loc[name, "pearson"] == pytest.approx(delta.corr(guess))
            top = row.abs().nlargest(20).index  # the strongest against the controls
            assert table.loc[name, "pearson_top"] == pytest.approx(delta[top].corr(guess[top]))
            error = ((delta - guess) ** 2).sum() / (delta**2).sum()
            assert table.loc[name, "relative_squared_error"] == pytest.approx(error)

    def test_the_mean_earns_nothing_against_itself(self, tables):
        _, observed = tables
        shared = observed + 5 * np.sin(np.arange(50))  # what every perturbation does
        mean = shared.mean()
        collapsed = pd.DataFrame([mean] * 5, index=shared.index).astype(np.float32)
        against_control = effect_agreement(collapsed, shared)
        assert (against_control["pearson"] > 0.9).all()
        against_mean = effect_agreement(collapsed, shared, reference=mean)
        assert against_mean["pearson"].isna().all()
        assert against_mean["relative_squared_error"].to_numpy() == pytest.approx(1.0)
        assert (against_mean["r2"] < 0.1).all()
        perfect = effect_agreement(shared, shared, reference=mean)
        np.testing.assert_allclose(perfect[["pearson", "pearson_top", "r2", "r2_top"]], 1.0)

    def test_permuted_predictions_lose_what_is_their_own(self, tables):
        _, observed = tables
        shifted = observed.loc[list("BCDEA")].set_axis(observed.index)
        table = effect_agreement(shifted, observed)
        assert (table["pearson"].abs() < 0.5).all()
        assert (table["r2"] < 0).all()

    def test_strongest_genes_of_another_table(self, tables):
        predicted, observed = tables
        other = observed.iloc[:, ::-1] * np.linspace(0, 1, 50)
        table = effect_agreement(predicted, observed, ranking=other, n_top_genes=5)
        top = other.loc["A"].abs().nlargest(5).index
        expected = predicted.loc["A", top].corr(observed.loc["A", top])
        assert table.loc["A", "pearson_top"] == pytest.approx(expected)

    def test_constant_up_to_rounding_is_constant(self):
        observed = pd.DataFrame(np.full((1, 6), 0.1), index=["A"]).add_prefix("g")
        predicted = observed + np.arange(6)
        table = effect_agreement(predicted, observed, n_top_genes=3)
        assert table[["pearson", "r2", "pearson_top", "r2_top"]].isna().all(axis=None)

    def test_what_could_not_be_predicted_is_nan(self, tables):
        predicted, observed = tables
        predicted.loc["C"] = np.nan
        table = effect_agreement(predicted, observed)
        assert table.isna().all(axis=1).tolist() == [False, False, True, False, False]

    def test_refusals(self, tables):
        predicted, observed = tables
        with pytest.raises(ValueError, match="n_top_genes=1"):
            effect_agreement(predicted, observed, n_top_genes=1)
        short = observed.iloc[0, 1:]
        with pytest.raises(ScreenError, match="`reference` lacks 1 genes.*'g0'"):
            effect_agreement(predicted, observed, reference=short)
        with pytest.raises(ScreenError, match="condition 'A' twice"):
            effect_correlation(pd.concat([predicted, predicted]), observed)
        with pytest.raises(ScreenError, match="not in `ranking`, the first 'E'"):
            effect_agreement(predicted, observed, ranking=observed.iloc[:4])
