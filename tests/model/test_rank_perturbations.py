"""Draws along a target against closed forms, and a fitted model against simulated truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError, tl
from scvi_sams.evaluation import observed_effects
from scvi_sams.tl.summaries import along_target

from .conftest import SETUP, fit, small_screen

GENES = 12


class TestAlongTarget:
    def test_normal_draws(self):
        r"""A normal :math:`\delta` points towards with probability Phi(m t / sqrt(t' V t))."""
        rng = np.random.default_rng(0)
        mean, target = 0.3 * rng.normal(size=GENES), rng.normal(size=GENES)
        root = rng.normal(size=(GENES, GENES)) / 4
        draws = mean + rng.normal(size=(200_000, GENES)) @ root.T
        spread = np.sqrt(target @ root @ root.T @ target)
        found = along_target(draws, target, None, 0.8)
        length = np.linalg.norm(target)
        expected = norm.cdf(mean @ target / spread)
        assert found["probability"] == pytest.approx(expected, abs=0.005)
        assert found["probability_away"] == pytest.approx(1 - expected, abs=0.005)
        assert found["score"] == pytest.approx(mean @ target / length, abs=0.005)
        half = norm.ppf(0.9) * spread / length
        assert found["score_upper"] == pytest.approx(mean @ target / length + half, abs=0.01)
        assert found["score_lower"] == pytest.approx(mean @ target / length - half, abs=0.01)
        assert found["sign"] == np.sign(mean @ target)

    def test_a_target_that_is_known_with_an_error(self):
        """The same as to draw targets."""
        rng = np.random.default_rng(0)
        effect, target = rng.normal(size=GENES), 0.2 * rng.normal(size=GENES)
        error = rng.uniform(0.1, 0.5, GENES)
        drawn = target + error * rng.normal(size=(200_000, GENES))
        found = along_target(np.stack([effect, effect]), target, error, 0.95)
        assert found["probability"] == pytest.approx((drawn @ effect > 0).mean(), abs=0.005)

    def test_effects_that_are_zero_have_no_direction(self):
        draws = np.zeros((10, 3))
        draws[0] = 1
        for error in (None, np.ones(3) * 1e-9):
            found = along_target(draws, np.array([1.0, 0, np.nan]), error, 0.95)
            assert found["probability"] == pytest.approx(0.1)
            assert found["probability_away"] == pytest.approx(0)
            assert found["similarity"] == pytest.approx(0.1 / 2**0.5)

    def test_signs_are_calibrated_where_the_posterior_is(self):
        """Truth from the prior, and draws from the posterior of noisy measurements."""
        rng = np.random.default_rng(0)
        n, prior, noise = 4_000, 0.2, 0.2
        truth = prior * rng.normal(size=(n, GENES))
        measured = truth + noise * rng.normal(size=truth.shape)
        gain = prior**2 / (prior**2 + noise**2)
        std = (gain * noise**2) ** 0.5
        said, right = [], []
        for row in range(n):
            target = rng.normal(size=GENES)
            draws = gain * measured[row] + std * rng.normal(size=(400, GENES))
            said.append(along_target(draws, target, None, 0.95)["probability"])
            right.append(truth[row] @ target > 0)
        bins = np.digitize(said, [0.2, 0.4, 0.6, 0.8])
        for each in range(5):
            of_bin = bins == each
            assert np.mean(said, where=of_bin) == pytest.approx(
                np.mean(right, where=of_bin), abs=0.05
            )


@pytest.fixture(scope="module")
def recovered():
    """A model of a screen, and effects in so many cells that they are the truth."""
    arguments = {"n_genes": 120, "n_perturbations": 12, "n_pairs": 4, "n_latent": 4}
    adata = small_screen(n_cells=2_000, n_batches=1, **arguments)
    SAMSVAE.setup_anndata(adata, **SETUP)
    model = fit(adata, max_epochs=40)
    truth = observed_effects(small_screen(n_cells=40_000, n_batches=1, **arguments), **SETUP)
    return model, truth.to_df()


class TestOfAModel:
    def test_probabilities_of_signs_hold_against_the_truth(self, recovered):
        model, truth = recovered
        cells = model.counterfactual(n_cells=50, seed=0)
        rng = np.random.default_rng(0)
        said, right = [], []
        for _ in range(25):
            target = pd.Series(rng.normal(size=truth.shape[1]), index=truth.columns)
            found = tl.rank_perturbations(
                model, target, n_samples=60, counterfactual=cells, measured_pairs=True
            )
            said.append(found[["probability", "probability_away"]].max(axis=1))
            right.append((truth.loc[found.index] @ target > 0) == (found["sign"] > 0))
        said, right = pd.concat(said).to_numpy(), pd.concat(right).to_numpy()
        sure = said > 0.95
        assert right[sure].mean() > 0.9
        assert right[~sure].mean() < right[sure].mean()
        assert sure.mean() > 0.5

    def test_a_perturbation_is_first_towards_its_own_effect(self, recovered):
        model, truth = recovered
        for name in ("P001", "P007", "P012"):
            found = tl.rank_perturbations(model, truth.loc[name], n_samples=20)
            assert found.loc[name, "similarity"] == found["similarity"].max()
            assert found.loc[name, "probability"] > 0.95
            away = tl.rank_perturbations(model, -truth.loc[name], n_samples=20)
            assert away.loc[name, "probability_away"] > 0.95
            assert away.loc[name, "sign"] == -1
            assert away["score"].is_monotonic_decreasing

    def test_the_score_is_that_of_average_effects(self, recovered):
        model, truth = recovered
        target = truth.loc["P003"]
        found = tl.rank_perturbations(
            model,
            target,
            ["P001+P002"],
            n_samples=400,
            counterfactual=model.counterfactual(seed=0),
        )
        effect = model.get_average_treatment_effect(["P001+P002"], seed=0).to_df().iloc[0]
        expected = effect @ target / np.linalg.norm(target)
        assert found["score"].item() == pytest.approx(expected, abs=0.1)

    def test_a_state_is_found_by_the_perturbation_that_makes_it(self, recovered):
        model, truth = recovered
        state = model.adata.obs["perturbation"] == "P005"
        found = tl.rank_perturbations(model, state, n_samples=20)
        assert found.loc["P005", "similarity"] > 0.9
        assert found.loc["P005", "probability"] > 0.95
        # One that does the same may be as near.
        first = found["similarity"].idxmax()
        assert np.corrcoef(truth.loc[first], truth.loc["P005"])[0, 1] > 0.9
        same = tl.rank_perturbations(model, state.to_numpy(), n_samples=20)
        assert same["similarity"].idxmax() == first

    def test_sets_of_genes(self, recovered):
        model, truth = recovered
        genes = truth.loc["P004"].sort_values().index
        sets = {"up": genes[-8:].tolist(), "down": genes[:8].tolist()}
        cells = model.counterfactual(n_cells=50, seed=0)
        found = tl.rank_perturbations(model, sets, n_samples=20, counterfactual=cells)
        signs = pd.Series([1.0] * 8 + [-1.0] * 8, index=[*sets["up"], *sets["down"]])
        same = tl.rank_perturbations(model, signs, n_samples=20, counterfactual=cells)
        pd.testing.assert_frame_equal(found, same)
        assert found.attrs["n_genes"] == 16
        assert found.loc["P004", "probability"] > 0.95

    def test_errors(self, recovered):
        model, truth = recovered
        target = truth.loc["P001"]
        with pytest.raises(ScreenError, match="no gene of the model"):
            tl.rank_perturbations(model, {"up": ["GATA1"]})
        with pytest.raises(ScreenError, match="'upp'"):
            tl.rank_perturbations(model, {"upp": ["GATA1"]})
        with pytest.raises(ScreenError, match="in both sets"):
            tl.rank_perturbations(model, {"up": ["GATA1"], "down": ["GATA1"]})
        with pytest.raises(ScreenError, match="not finite"):
            tl.rank_perturbations(model, target / 0)
        with pytest.raises(ScreenError, match="twice"):
            tl.rank_perturbations(model, pd.concat([target, target.iloc[:1]]))
        with pytest.raises(ScreenError, match="cannot be read"):
            tl.rank_perturbations(model, np.ones(3, bool))
        with pytest.raises(ScreenError, match="the state has 0 cells"):
            tl.rank_perturbations(model, np.zeros(model.adata.n_obs, bool))
        with pytest.raises(ScreenError, match="other controls has 0"):
            tl.rank_perturbations(model, np.ones(model.adata.n_obs, bool))
        with pytest.raises(ScreenError, match="two draws"):
            tl.rank_perturbations(model, target, n_samples=1)
        with pytest.raises(UnknownPerturbationError, match="P999"):
            tl.rank_perturbations(model, target, ["P999"])

    def test_unseen_perturbations_from_a_model(self, recovered):
        """The effects and errors of the model's average effects, of those in the embedding."""
        model, _ = recovered
        rng = np.random.default_rng(0)
        names = [*model.perturbation_names[:11], "new"]
        embedding = pd.DataFrame(rng.normal(size=(12, 3)), index=names)
        found = tl.predict_unseen(model, embedding, seed=0)
        same = tl.predict_unseen(model.get_average_treatment_effect(names[:11], seed=0), embedding)
        assert found.obs_names.tolist() == ["new"]
        np.testing.assert_array_equal(found.X, same.X)
        assert found.uns["scvi_sams"]["n_measured"] == 11
