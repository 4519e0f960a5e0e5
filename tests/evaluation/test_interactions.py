from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import (
    interaction_agreement,
    interaction_residuals,
    observed_average_treatment_effect,
)


@pytest.fixture
def effects() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(6, 10))
    return pd.DataFrame(values, index=["A", "B", "C", "A+B", "A+B+C", "A+X"]).add_prefix("g")


class TestResiduals:
    def test_agree_with_the_formula(self, effects):
        residuals = interaction_residuals(effects).to_df()
        assert list(residuals.index) == ["A+B", "A+B+C"]
        expected = effects.loc["A+B"] - effects.loc["A"] - effects.loc["B"]
        np.testing.assert_allclose(residuals.loc["A+B"], expected)
        np.testing.assert_allclose(
            residuals.loc["A+B+C"], effects.loc["A+B+C"] - effects.loc[["A", "B", "C"]].sum()
        )

    def test_combinations_asked_for(self, effects):
        assert list(interaction_residuals(effects, ["A+B+C"]).obs_names) == ["A+B+C"]
        with pytest.raises(ScreenError, match=r"'A\+X' needs 'X', which is not in `effects`"):
            interaction_residuals(effects, ["A+X"])
        with pytest.raises(ScreenError, match="'A' is no combination joined by"):
            interaction_residuals(effects, ["A"])
        with pytest.raises(ScreenError, match="No condition of `effects` joins parts by '_'"):
            interaction_residuals(effects, combination_delimiter="_")

    def test_twice_the_same(self, effects):
        doubled = effects.rename(index={"A+B": "A+A"})
        residuals = interaction_residuals(doubled, ["A+A"]).to_df()
        np.testing.assert_allclose(residuals.loc["A+A"], doubled.loc["A+A"] - 2 * doubled.loc["A"])

    def test_the_additive_prediction_has_none(self, effects):
        effects.loc["A+B"] = effects.loc["A"] + effects.loc["B"]
        residuals = interaction_residuals(effects.astype(np.float32)).to_df()
        assert (residuals.loc["A+B"] == 0).all()  # not what single precision leaves

    def test_standard_errors_are_those_of_repeated_screens(self):
        rng = np.random.default_rng(1)
        n_cells = {"control": 30, "A": 20, "B": 15, "A+B": 10}
        cells = pd.DataFrame(
            {"perturbation": np.repeat(list(n_cells), list(n_cells.values()))},
            index=[f"cell{i}" for i in range(75)],
        )
        residuals, errors = [], []
        for counts in rng.poisson(4, (400, 75, 6)):
            screen = ad.AnnData(counts + 1.0, obs=cells)
            observed = observed_average_treatment_effect(screen, "perturbation", "control")
            found = interaction_residuals(observed)
            residuals.append(found.X[0])
            errors.append(found.layers["standard_error"][0] ** 2)
        np.testing.assert_allclose(np.var(residuals, axis=0), np.mean(errors, axis=0), rtol=0.2)

    def test_a_single_cell_has_no_standard_error(self, effects):
        observed = ad.AnnData(effects)
        observed.layers["standard_error"] = np.where(effects.index == "C", np.nan, 1.0)[
            :, None
        ] * (np.ones(effects.shape))
        errors = interaction_residuals(observed).layers["standard_error"]
        np.testing.assert_allclose(errors[0], 3**0.5)
        assert np.isnan(errors[1]).all()


def screen_of_residuals(
    share: float, size: float = 6.0, seed: int = 0
) -> tuple[pd.DataFrame, ad.AnnData, np.ndarray]:
    """True residuals, of which a share is not 0, and observed ones with unit errors."""
    rng = np.random.default_rng(seed)
    shape = (10, 200)
    is_real = rng.random(shape) < share
    truth = np.where(is_real, size * rng.choice([-1, 1], shape), 0.0)
    names = {"index": [f"A+P{i}" for i in range(10)], "columns": [f"g{i}" for i in range(200)]}
    observed = ad.AnnData(pd.DataFrame(truth + rng.normal(size=shape), **names))
    observed.layers["standard_error"] = np.ones(shape)
    return pd.DataFrame(truth, **names), observed, is_real


class TestAgreement:
    def test_the_truth_finds_what_was_observed(self):
        truth, observed, is_real = screen_of_residuals(0.1)
        agreement = interaction_agreement(truth, observed)
        assert agreement.n_observed == pytest.approx(is_real.sum(), rel=0.1)
        assert agreement.recall > 0.9
        assert agreement.precision > 0.9
        expected = np.corrcoef(truth.to_numpy().ravel(), observed.X.ravel())[0, 1]
        assert agreement.correlation == pytest.approx(expected)
        name = truth.index[3]
        expected = np.corrcoef(truth.loc[name], observed[name].X.ravel())[0, 1]
        assert agreement.by_combination.loc[name, "correlation"] == pytest.approx(expected)
        assert agreement.by_combination["n_observed"].sum() == agreement.n_observed

    def test_of_itself(self):
        _, observed, _ = screen_of_residuals(0.1)
        agreement = interaction_agreement(observed, observed)
        assert (agreement.correlation, agreement.recall, agreement.precision) == pytest.approx(
            (1, 1, 1)
        )

    def test_calls_are_those_of_benjamini_and_hochberg(self):
        _, observed, _ = screen_of_residuals(0.05, size=3.0)
        p_values = np.sort(2 * norm.sf(np.abs(observed.X)).ravel())
        passes = p_values <= 0.1 * np.arange(1, p_values.size + 1) / p_values.size
        expected = np.flatnonzero(passes).max() + 1
        assert interaction_agreement(observed, observed, fdr=0.1).n_observed == expected

    def test_agrees_with_loops(self):
        truth, observed, _ = screen_of_residuals(0.1, size=3.0)
        rng = np.random.default_rng(6)
        observed.layers["standard_error"] = rng.uniform(0.5, 1.5, size=observed.shape)
        predicted = truth + rng.normal(scale=1.5, size=truth.shape)
        agreement = interaction_agreement(predicted, observed, n_predicted=150)
        pairs = [(name, gene) for name in truth.index for gene in truth.columns]
        z = np.abs(observed.X / observed.layers["standard_error"]).ravel()
        by_p_value = sorted(range(len(pairs)), key=lambda k: -z[k])
        n_called = max(
            rank
            for rank, k in enumerate(by_p_value, start=1)
            if 2 * norm.sf(z[k]) <= 0.05 * rank / len(pairs)
        )
        called = {pairs[k] for k in by_p_value[:n_called]}
        strongest = sorted(pairs, key=lambda pair: -abs(predicted.loc[pair]))[:150]
        signs = np.sign(observed.to_df() * predicted)
        found = [pair for pair in strongest if pair in called and signs.loc[pair] > 0]
        assert 0 < len(found) < min(150, n_called)
        assert agreement.n_observed == n_called
        assert agreement.recall == pytest.approx(len(found) / n_called)
        assert agreement.precision == pytest.approx(len(found) / 150)
        for name in truth.index:
            own = agreement.by_combination.loc[name]
            n_own = sum(pair[0] == name for pair in called)
            assert own["n_observed"] == n_own
            assert own["recall"] * n_own == pytest.approx(sum(pair[0] == name for pair in found))

    def test_false_discoveries_are_held(self):
        false, called = 0, 0
        for seed in range(20):
            truth, observed, is_real = screen_of_residuals(0.1, size=4.0, seed=seed)
            every = interaction_agreement(truth, observed, n_predicted=truth.size)
            assert every.n_predicted == is_real.sum()  # residuals of 0 are not predicted
            called += every.n_observed
            false += every.n_observed - round(every.recall * every.n_observed)
        assert 0.02 < false / called < 0.07

    def test_noise_alone_is_no_interaction(self):
        n_observed = [
            interaction_agreement(*screen_of_residuals(0.0, seed=seed)[:2]).n_observed
            for seed in range(20)
        ]
        assert np.mean(np.array(n_observed) > 0) < 0.3

    def test_signs_count(self):
        _, observed, _ = screen_of_residuals(0.1)
        flipped = observed.copy()
        flipped.X = -flipped.X
        agreement = interaction_agreement(flipped, observed)
        assert agreement.correlation == pytest.approx(-1)
        assert agreement.recall == agreement.precision == 0

    def test_permuted_finds_by_chance(self):
        truth, observed, is_real = screen_of_residuals(0.1)
        values = np.random.default_rng(5).permutation(truth.to_numpy().ravel())
        permuted = pd.DataFrame(values.reshape(truth.shape), truth.index, truth.columns)
        agreement = interaction_agreement(permuted, observed)
        assert agreement.recall == pytest.approx(0.05, abs=0.05)  # a tenth, half with its sign

    def test_additive_predicts_nothing(self):
        truth, observed, _ = screen_of_residuals(0.1)
        agreement = interaction_agreement(0 * truth, observed)
        assert agreement.n_predicted == 0
        assert agreement.recall == 0
        assert np.isnan(agreement.precision)
        assert np.isnan(agreement.correlation)

    def test_fewer_predicted(self):
        truth, observed, _ = screen_of_residuals(0.1)
        agreement = interaction_agreement(observed, observed, n_predicted=10)
        assert agreement.n_predicted == 10
        assert agreement.precision == 1
        assert agreement.recall == pytest.approx(10 / agreement.n_observed)

    def test_refusals(self):
        truth, observed, _ = screen_of_residuals(0.1)
        with pytest.raises(ScreenError, match="`observed` has no layer 'standard_error'"):
            interaction_agreement(truth, ad.AnnData(truth))
        with pytest.raises(ValueError, match="fdr=5 must be between 0 and 1"):
            interaction_agreement(truth, observed, fdr=5)
        with pytest.raises(ValueError, match="n_predicted=-1"):
            interaction_agreement(truth, observed, n_predicted=-1)
