from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import stats
from scvi.distributions import Normal

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError, tl
from scvi_sams.evaluation import interaction_residuals, interval_coverage
from scvi_sams.model.counterfactual import about_expectation
from scvi_sams.tl import PairThresholds, classify_pairs
from scvi_sams.tl.pair_draws import model_errors
from scvi_sams.tl.pair_statistics import PAIR_CLASSES, expected_surprise, regress_pair

from ._members import SHIFTED, fit_member
from ._recovered import N_MEASURED_PAIRS, observed, pairs_of, recovered
from .conftest import SETUP, fit, small_screen

PAIRS = ["P001+P002", "P001+P006", "P003+P005"]
PARTS = ["P001", "P002", "P003", "P005", "P006"]


class TestInteractions:
    def test_residuals_are_those_of_the_average_treatment_effects(self, any_fitted):
        """The same draws, cells and expectations, from the same seed."""
        sizes = {"n_cells": 20, "basal": "control"}
        cells = any_fitted.counterfactual(**sizes, seed=3)
        found = tl.pair_interactions(any_fitted, PAIRS, n_samples=15, counterfactual=cells)
        scvi.settings.seed = 3
        effect = any_fitted.get_average_treatment_effect([*PARTS, *PAIRS], n_samples=15, **sizes)
        np.testing.assert_allclose(
            found.X, interaction_residuals(effect, PAIRS).X, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(found.layers["effect"], effect[PAIRS].X, atol=1e-5)
        additive = effect[found.obs["first"]].X + effect[found.obs["second"]].X
        np.testing.assert_allclose(found.layers["additive"], additive, atol=1e-5)

    def test_brute_force(self, fitted, monkeypatch):
        """Draw by draw, each effect from its own call."""
        sizes = {"n_cells": 20, "basal": "control"}
        cells = fitted.counterfactual(**sizes, seed=3)
        found = tl.pair_interactions(
            fitted, PAIRS[:1], n_samples=8, credible_level=0.5, counterfactual=cells
        )
        drawn = []
        original = fitted.module.sample_globals

        def record(*args, **kwargs):
            drawn.append(about_expectation(fitted.module, original(*args, **kwargs)))
            return drawn[-1]

        monkeypatch.setattr(fitted.module, "sample_globals", record)
        tl.pair_interactions(fitted, PAIRS[:1], n_samples=8, counterfactual=cells)
        residuals, scores = [], []
        for draw in range(8):
            one = drawn[0].subset(draw, draw + 1)
            monkeypatch.setattr(fitted.module, "sample_globals", lambda *_, one=one: one)
            scvi.settings.seed = 3
            effect = fitted.get_average_treatment_effect(
                ["P001", "P002", "P001+P002"], n_samples=1, **sizes
            )
            first, second, pair = effect.X
            residuals.append(pair - first - second)
            scores.append(regress_pair(first, second, pair).interaction_score)
        np.testing.assert_allclose(found.layers["std"][0], np.std(residuals, 0), atol=1e-4)
        lower, upper = np.percentile(residuals, [25, 75], axis=0)
        np.testing.assert_allclose(found.layers["lower"][0], lower, atol=1e-4)
        np.testing.assert_allclose(found.layers["upper"][0], upper, atol=1e-4)
        row = found.obs.iloc[0]
        assert row["interaction_score"] == pytest.approx(np.mean(scores), abs=1e-3)
        ends = np.percentile(scores, [25, 75])
        found_ends = row[["interaction_score_lower", "interaction_score_upper"]].astype(float)
        np.testing.assert_allclose(found_ends, ends, atol=1e-3)
        assert row["surprise"] == pytest.approx(
            expected_surprise(np.array(residuals))["surprise"], rel=1e-3
        )

    def test_ways_to_write_pairs(self, fitted):
        sizes = {"n_samples": 4, "counterfactual": fitted.counterfactual(n_cells=8)}
        by_label = tl.pair_interactions(fitted, ["P001+P006"], **sizes)
        for pair in (
            ("P001", "P006"),
            {"P001": 1.0, "P006": 1.0},
            {"P006": 1, "P001": 1, "P002": 0},
        ):
            found = tl.pair_interactions(fitted, [pair], **sizes)
            np.testing.assert_array_equal(found.X, by_label.X)
            assert found.obs[["first", "second"]].iloc[0].tolist() == ["P001", "P006"]

    def test_doses(self, fitted):
        """A part acts at its dose in the pair, not at a dose of 1."""
        half = {"P001": 0.5, "P002": 2.0}
        cells = fitted.counterfactual(n_cells=20, seed=2)
        found = tl.pair_interactions(fitted, [half], n_samples=10, counterfactual=cells)
        effect = fitted.get_average_treatment_effect(
            [{"P001": 0.5}, {"P002": 2.0}, half], n_samples=10, n_cells=20, seed=2
        )
        expected = effect.X[2] - effect.X[0] - effect.X[1]
        np.testing.assert_allclose(found.X[0], expected, atol=1e-5)

    def test_table(self, fitted):
        found = tl.pair_interactions(
            fitted, PAIRS, n_samples=6, counterfactual=fitted.counterfactual(n_cells=10)
        )
        together = set(fitted.adata.obs["perturbation"])
        assert found.obs["measured"].tolist() == [pair in together for pair in PAIRS]
        probability = found.obs[[f"probability_{name}" for name in PAIR_CLASSES]]
        np.testing.assert_allclose(probability.sum(axis=1), 1)
        np.testing.assert_allclose(found.obs["class_probability"], probability.max(axis=1))
        assert found.obs["class"].cat.categories.tolist() == list(PAIR_CLASSES)
        assert found.var_names.tolist() == fitted.adata.var_names.tolist()
        everything = PairThresholds(relative_deviation=np.inf)
        found = tl.pair_interactions(fitted, PAIRS, 6, thresholds=everything)
        assert (found.obs["class"] == "additive").all()

    def test_a_linear_decoder_is_additive(self, monkeypatch):
        """Features decoded linearly: what is left is rounding."""
        adata = small_screen()
        adata.layers["features"] = np.log1p(adata.layers["counts"].toarray())
        SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": "features"}), is_count_data=False)
        model = fit(adata, max_epochs=20, gene_likelihood="normal")
        weights = torch.randn(model.module.n_latent, adata.n_vars)
        generative = model.module.generative

        def linear(z, *args, **kwargs):
            outputs = generative(z, *args, **kwargs)
            outputs["px"] = Normal(z @ weights, torch.tensor(1.0))
            return outputs

        monkeypatch.setattr(model.module, "generative", linear)
        found = tl.pair_interactions(
            model, PAIRS, n_samples=5, counterfactual=model.counterfactual(n_cells=10)
        )
        assert np.abs(found.layers["effect"]).max() > 0.1
        np.testing.assert_allclose(found.X, 0, atol=1e-4)
        assert (found.obs["class"] == "additive").all()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"pairs": ["P001+P0O2"]}, UnknownPerturbationError, "P002"),
            ({"pairs": ["P001"]}, ScreenError, "'P001' is 1 perturbation, not a pair"),
            ({"pairs": ["P001+P002+P003"]}, ScreenError, "3 perturbations"),
            ({"pairs": ["control"]}, ScreenError, "0 perturbations"),
            ({"pairs": [("P001", "P001")]}, ScreenError, "not a pair"),
            ({"pairs": ["P001+P002", "P001+P002"]}, ScreenError, "repeats"),
            ({"pairs": "P001+P002"}, ScreenError, "give a list"),
            ({"n_samples": 1}, ScreenError, "n_samples=1"),
            ({"credible_level": 0}, ValueError, "credible_level=0"),
        ],
    )
    def test_errors(self, fitted, arguments, error, message):
        with pytest.raises(error, match=message):
            tl.pair_interactions(fitted, **({"pairs": PAIRS} | arguments))


class TestRanking:
    def test_unmeasured_pairs_in_order(self, fitted):
        table = tl.rank_unmeasured_pairs(
            fitted, n_samples=4, counterfactual=fitted.counterfactual(n_cells=8)
        )
        names = fitted.perturbation_names
        every = {"+".join(pair) for pair in combinations(names, 2)}
        measured = {name for name in fitted.adata.obs["perturbation"].unique() if "+" in name}
        assert set(table.index) == every - measured
        assert table["surprise"].is_monotonic_decreasing
        np.testing.assert_allclose(
            table["surprise"] ** 2,
            table["expected_deviation"] ** 2 + table["uncertainty"] ** 2,
            rtol=1e-6,
        )

    def test_same_numbers_as_pairs_asked_for(self, fitted):
        table = tl.rank_unmeasured_pairs(
            fitted, ["P006", "P001"], n_samples=4, counterfactual=fitted.counterfactual(n_cells=8)
        )
        assert table.index.tolist() == ["P001+P006"]
        cells = fitted.counterfactual(n_cells=8)
        found = tl.pair_interactions(fitted, ["P001+P006"], 4, counterfactual=cells)
        pd.testing.assert_frame_equal(table, found.obs.drop(columns="measured"))

    def test_number_and_seed(self, fitted):
        whole = tl.rank_unmeasured_pairs(
            fitted, n_samples=3, counterfactual=fitted.counterfactual(n_cells=5)
        )
        pd.testing.assert_frame_equal(
            tl.rank_unmeasured_pairs(
                fitted, n_pairs=2, n_samples=3, counterfactual=fitted.counterfactual(n_cells=5)
            ),
            whole.iloc[:2],
        )
        other = tl.rank_unmeasured_pairs(
            fitted, n_samples=3, counterfactual=fitted.counterfactual(n_cells=5, seed=1)
        )
        assert (other["surprise"].sort_index() != whole["surprise"].sort_index()).any()

    def test_leaves_out_null_perturbations(self, screen):
        label = screen.obs["perturbation"].astype(str).str.replace("P006", "control_null_001")
        screen.obs["perturbation"] = label
        model = fit_member("SAMSVAE", screen, max_epochs=2)
        cells = model.counterfactual(n_cells=3)
        table = tl.rank_unmeasured_pairs(model, n_samples=2, counterfactual=cells)
        assert not table.index.str.contains("control_null_001").any()
        assert len(table) > 0

    def test_errors(self, fitted, tmp_path):
        with pytest.raises(UnknownPerturbationError, match="P001"):
            tl.rank_unmeasured_pairs(fitted, ["P0O1", "P002"])
        measured = next(name for name in fitted.adata.obs["perturbation"].unique() if "+" in name)
        with pytest.raises(ScreenError, match="is unmeasured"):
            tl.rank_unmeasured_pairs(fitted, measured.split("+"))
        with pytest.raises(ScreenError, match="n_pairs=0"):
            tl.rank_unmeasured_pairs(fitted, n_pairs=0)


N_CALIBRATING = 12


@pytest.fixture(scope="module")
def calibrated() -> SAMSVAE:
    """A model of twelve of the fifteen pairs of six perturbations, ten cells or more each."""
    adata = small_screen(n_cells=1_000, n_genes=40, n_pairs=N_CALIBRATING, pair_fraction=0.6)
    SAMSVAE.setup_anndata(adata, **SETUP)
    return fit(adata, max_epochs=4)


class TestCalibration:
    @staticmethod
    def found(model, pairs, seed=0, **kwargs):
        cells = model.counterfactual(n_cells=10, seed=seed)
        return tl.pair_interactions(model, pairs, n_samples=6, counterfactual=cells, **kwargs)

    def test_intervals_hold_the_errors_of_the_model(self, calibrated):
        """Those of the other measured pairs, in proportion to the effects of the parts."""
        pair, *others = pairs_of(calibrated.adata)
        first, second = pair.split("+")
        bare = self.found(calibrated, [pair], seed=3, calibration=None)
        found = self.found(calibrated, [pair], seed=3)
        assert found.obs["calibrated"].all()
        assert found.uns["scvi_sams"]["n_calibration_pairs"] == N_CALIBRATING - 1
        without = calibrated.adata[calibrated.adata.obs["perturbation"] != pair].copy()
        errors = model_errors(calibrated, without, seed=3).of_all
        assert errors.n_pairs == len(others)
        parts = calibrated.get_average_treatment_effect(
            [first, second, pair], n_samples=6, n_cells=10, seed=3
        ).X
        variance = errors.absolute_variance + errors.relative_variance * (
            parts[0] ** 2 + parts[1] ** 2
        )
        assert variance.min() > 0
        added = found.layers["std"] ** 2 - bare.layers["std"] ** 2
        # The other pairs are decoded without this one, from another stream of draws.
        np.testing.assert_allclose(added[0], variance, rtol=0.1)
        assert (found.layers["lower"] < bare.layers["lower"]).all()
        assert (found.layers["upper"] > bare.layers["upper"]).all()
        row, bare_row = found.obs.iloc[0], bare.obs.iloc[0]
        assert row["interaction_score_lower"] < bare_row["interaction_score_lower"]
        surprise = row["surprise"] ** 2 - bare_row["surprise"] ** 2
        assert surprise == pytest.approx(added.sum(), rel=1e-3)
        np.testing.assert_array_equal(found.X, bare.X)

    def test_same_bits_from_the_same_seed(self, calibrated):
        found = [self.found(calibrated, PAIRS) for _ in range(2)]
        pd.testing.assert_frame_equal(found[0].obs, found[1].obs)
        np.testing.assert_array_equal(found[0].layers["upper"], found[1].layers["upper"])

    def test_ranking(self, calibrated):
        table = tl.rank_unmeasured_pairs(
            calibrated, n_samples=4, counterfactual=calibrated.counterfactual(n_cells=8)
        )
        assert table["calibrated"].all()
        assert table.attrs["n_calibration_pairs"] == N_CALIBRATING
        cells = calibrated.counterfactual(n_cells=8)
        asked = tl.pair_interactions(calibrated, list(table.index), 4, counterfactual=cells)
        pd.testing.assert_frame_equal(table, asked.obs.drop(columns="measured"))
        bare = tl.rank_unmeasured_pairs(
            calibrated,
            n_samples=4,
            calibration=None,
            counterfactual=calibrated.counterfactual(n_cells=8),
        )
        assert (table["uncertainty"] > bare["uncertainty"].loc[table.index]).all()

    def test_too_few_pairs_say_so(self, fitted):
        found = self.found(fitted, PAIRS)
        assert not found.obs["calibrated"].any()
        assert found.uns["scvi_sams"]["n_calibration_pairs"] == 0
        bare = self.found(fitted, PAIRS, calibration=None)
        np.testing.assert_array_equal(found.layers["upper"], bare.layers["upper"])

    def test_pairs_with_a_shift_of_their_own_say_so(self, calibrated):
        own, other = pairs_of(calibrated.adata)[:2]
        model = fit(calibrated.adata, max_epochs=2, interactions=[tuple(own.split("+"))])
        found = self.found(model, [own, other])
        assert found.obs["calibrated"].tolist() == [False, True]
        assert found.uns["scvi_sams"]["n_calibration_pairs"] == N_CALIBRATING - 2

    def test_features(self):
        adata = small_screen(n_cells=800, n_genes=30, n_pairs=12, pair_fraction=0.6)
        adata.layers["features"] = np.log1p(adata.layers["counts"].toarray())
        SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": "features"}), is_count_data=False)
        model = fit(adata, max_epochs=2, gene_likelihood="normal")
        assert self.found(model, PAIRS).obs["calibrated"].all()

    def test_unknown(self, calibrated):
        with pytest.raises(ScreenError, match="calibration='seen' is unknown"):
            self.found(calibrated, PAIRS, calibration="seen")


@pytest.mark.parametrize("member", SHIFTED)
def test_family(member):
    setup = {"combinations": "additive"} if member == "SVAEPlus" else {}
    model = fit_member(member, covariates=True, setup=setup)
    found = tl.pair_interactions(
        model, PAIRS, n_samples=3, counterfactual=model.counterfactual(n_cells=6)
    )
    assert np.isfinite(found.X).all()
    assert (
        len(
            tl.rank_unmeasured_pairs(
                model, n_samples=2, counterfactual=model.counterfactual(n_cells=4)
            )
        )
        == 12
    )


def test_without_a_posterior():
    model = fit_member("ConditionalVAE")
    with pytest.raises(NotImplementedError, match="get_average_treatment_effect"):
        tl.pair_interactions(model, PAIRS)
    with pytest.raises(NotImplementedError, match="get_average_treatment_effect"):
        tl.rank_unmeasured_pairs(model)


def test_combinations_of_their_own():
    model = fit_member("SVAEPlus")
    for method, *pairs in ((tl.rank_unmeasured_pairs,), (tl.pair_interactions, PAIRS)):
        with pytest.raises(NotImplementedError, match="combinations='additive'"):
            method(model, *pairs)


def test_pairs_with_a_shift_of_their_own():
    """A measured pair that is given a large shift departs from additivity by it."""
    model = fit_member("SAMSVAE", interactions=True)
    pair = next(name for name in model.adata.obs["perturbation"].unique() if "+" in name)
    before = tl.pair_interactions(
        model, [pair], n_samples=4, counterfactual=model.counterfactual(n_cells=20)
    )
    effects = model.module.effects
    a, b = (model.perturbation_names.index(part) for part in pair.split("+"))
    row = len(model.perturbation_names) + model.module.interactions.pairs.index((a, b))
    with torch.no_grad():
        effects.mask_logits[row] = 30.0
        effects.slab_mean[row] = 3.0
        effects.slab_log_variance[row] = -12.0
    after = tl.pair_interactions(
        model, [pair], n_samples=4, counterfactual=model.counterfactual(n_cells=20)
    )
    assert after.obs["deviation"].item() > 2 * before.obs["deviation"].item()
    assert after.obs["class"].item() != "additive"


@pytest.mark.slow
def test_ranks_the_surprises_of_a_simulation():
    """Pairs that were never measured, against many cells of the same truth."""
    model = recovered()
    truth = interaction_residuals(observed().to_df())
    unmeasured = truth.obs_names[N_MEASURED_PAIRS:]
    table = tl.rank_unmeasured_pairs(model)
    deviation = np.linalg.norm(truth[unmeasured].X, axis=1)
    ranked = table.loc[unmeasured, "surprise"]
    assert stats.spearmanr(ranked, deviation).statistic > 0.7
    found = tl.pair_interactions(model, list(unmeasured))
    score = classify_pairs(observed().to_df()).loc[unmeasured, "interaction_score"]
    assert found.obs["calibrated"].all()
    lower, upper = found.obs["interaction_score_lower"], found.obs["interaction_score_upper"]
    assert score.between(lower, upper).mean() > 0.85
    coverage = interval_coverage(found, truth, standard_error=None)
    assert coverage.mean() > 0.8
    assert np.corrcoef(found.obs["interaction_score"], score)[0, 1] > 0.7
    per_pair = [np.corrcoef(x, y)[0, 1] for x, y in zip(found.X, truth[unmeasured].X, strict=True)]
    strong = deviation > np.median(deviation)
    assert np.median(np.array(per_pair)[strong]) > 0.5
