from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, ScreenError, SVAEPlus, tl
from scvi_sams.datasets import simulated_screen
from scvi_sams.tl import add_control_null, match_latents
from scvi_sams.tl.distances import latent_gene_norm
from scvi_sams.tl.error_rates import bayesian_q_value, calibrated_q_value

from .conftest import QUIET, SETUP, SIZE, fit, small_screen

KEY = "perturbation_with_null"
COLUMNS = (
    "perturbation latent inclusion_probability log_odds effect_mean effect_std effect_lower "
    "effect_upper lfsr bayesian_q_value null_q_value q_value is_null called"
).split()


def _null_screen(seed=0):
    adata = small_screen(n_cells=900, control_fraction=0.5, n_pairs=0)
    add_control_null(adata, "perturbation", "control", n_null=5, max_control_share=0.95, seed=seed)
    SAMSVAE.setup_anndata(adata, **(SETUP | {"perturbation_key": KEY}))
    return adata


@pytest.fixture(scope="module")
def with_null():
    return fit(_null_screen(), max_epochs=25)


def _wide(table, column):
    wide = table.pivot(index="perturbation", columns="latent", values=column)
    return wide.loc[pd.unique(table["perturbation"]), pd.unique(table["latent"])]


class TestTable:
    def test_agrees_with_masks_and_effects(self, fitted):
        table = tl.mechanisms(fitted)
        assert table.columns.tolist() == COLUMNS
        assert len(table) == 6 * fitted.module.n_latent
        for column, expected in (
            ("inclusion_probability", fitted.get_perturbation_mask()),
            ("effect_mean", fitted.get_perturbation_effect()),
        ):
            pd.testing.assert_frame_equal(
                _wide(table, column),
                expected,
                check_names=False,
                check_dtype=False,
                rtol=1e-4,
                atol=1e-6,
            )
        q = table["inclusion_probability"]
        np.testing.assert_allclose(1 / (1 + np.exp(-table["log_odds"])), q)
        assert table["lfsr"].between(1 - q - 1e-9, 1).all()
        assert (table["effect_lower"] <= table["effect_upper"]).all()

    def test_moments_and_intervals_are_those_of_draws(self, fitted):
        table = tl.mechanisms(fitted, credible_level=0.5)
        effects = fitted.module.effects
        mean, variance = (moment.detach().numpy() for moment in effects.slab_moments())
        rng = np.random.default_rng(0)
        on = rng.random((20_000, *mean.shape)) < effects.mask_probability().numpy()
        slab = mean + np.sqrt(variance) * rng.normal(size=on.shape)
        draws = (on * slab).reshape(len(on), -1)
        np.testing.assert_allclose(table["effect_std"], draws.std(0), atol=0.03)
        ends = np.quantile(draws, [0.25, 0.75], axis=0)
        # The quantiles of a mixture jump where the weight of its point is near one of them.
        steady = (table["inclusion_probability"] - 0.5).abs() > 0.3
        for column, expected in zip(("effect_lower", "effect_upper"), ends, strict=True):
            np.testing.assert_allclose(table[column][steady], expected[steady], atol=0.03)

    def test_without_a_null_calls_are_bayesian(self, fitted):
        table = tl.mechanisms(fitted, fdr=0.1)
        expected = bayesian_q_value(fitted.get_perturbation_mask())
        np.testing.assert_allclose(_wide(table, "q_value"), expected, atol=1e-5)
        assert (table["called"] == (table["q_value"] <= 0.1)).all()
        assert table.attrs == {"fdr": 0.1, "n_null": 0}
        assert table["called"].any()
        assert not table["called"].all()

    def test_rates_are_checked(self, fitted):
        for method in (tl.mechanisms, tl.active_perturbations):
            with pytest.raises(ValueError, match="fdr=0"):
                method(fitted, fdr=0)
        with pytest.raises(ValueError, match="credible_level"):
            tl.mechanisms(fitted, credible_level=1)


class TestNull:
    def test_calibrates_and_is_left_out(self, with_null):
        table = tl.mechanisms(with_null, fdr=0.25)
        assert table.attrs == {"fdr": 0.25, "n_null": 5}
        assert not table["is_null"].any()
        assert table["perturbation"].nunique() == 6
        whole = tl.mechanisms(with_null, fdr=0.25, include_null=True)
        log_odds = _wide(whole, "log_odds")
        is_null = log_odds.index.str.startswith("control_null_")
        assert is_null.sum() == 5
        expected = np.maximum(
            calibrated_q_value(log_odds[~is_null], log_odds[is_null]),
            bayesian_q_value(_wide(table, "inclusion_probability")),
        )
        pd.testing.assert_frame_equal(_wide(table, "q_value"), expected)
        assert not whole.loc[whole["is_null"], "called"].any()
        pd.testing.assert_frame_equal(
            whole[~whole["is_null"]].reset_index(drop=True), table, check_exact=True
        )

    def test_others_can_be_named_or_none(self, with_null):
        names = with_null.perturbation_names
        some = [name for name in names if name.startswith("control_null_")][:4]
        table = tl.mechanisms(with_null, fdr=0.25, null=some)
        assert table.attrs["n_null"] == 4
        assert table["perturbation"].nunique() == 7
        table = tl.mechanisms(with_null, null=())
        assert table.attrs["n_null"] == 0
        assert table["perturbation"].nunique() == 11
        with pytest.raises(ScreenError, match="'nonsense'"):
            tl.mechanisms(with_null, null=["nonsense"])

    def test_of_several_fits_adds_up(self, with_null):
        other = tl.mechanisms(with_null, 0.25, include_null=True)
        table = tl.mechanisms(with_null, 0.2, null_tables=[other, other])
        assert table.attrs["n_null"] == 15
        log_odds = _wide(other, "log_odds")
        is_null = log_odds.index.str.startswith("control_null_")
        null = pd.concat(3 * [log_odds[is_null]])
        calibrated = calibrated_q_value(log_odds[~is_null], null)
        pd.testing.assert_frame_equal(_wide(table, "null_q_value"), calibrated)
        active = tl.active_perturbations(with_null, 0.2, null_tables=[other, other])
        assert active.attrs["n_null"] == 15
        with pytest.raises(ScreenError, match="no null perturbations"):
            tl.mechanisms(with_null, null_tables=[tl.mechanisms(with_null, 0.25)])

    def test_too_small_says_so(self, with_null):
        with pytest.warns(UserWarning, match="With 5 null perturbations"):
            table = tl.mechanisms(with_null, fdr=0.05)
        assert not table["called"].any()

    def test_of_whole_perturbations(self, with_null):
        active = tl.active_perturbations(with_null, fdr=0.25)
        log_odds = _wide(tl.mechanisms(with_null, 0.25, include_null=True), "log_odds")
        best = log_odds.max(axis=1).to_frame()
        is_null = best.index.str.startswith("control_null_")
        expected = calibrated_q_value(best[~is_null], best[is_null])
        np.testing.assert_allclose(active["q_value"], expected[0])
        assert active["latent"].tolist() == log_odds[~is_null].idxmax(axis=1).tolist()
        off = 1 - with_null.get_perturbation_mask().loc[active.index]
        np.testing.assert_allclose(active["probability_active"], 1 - off.prod(axis=1), atol=1e-5)
        assert (active["called"] == (active["q_value"] <= 0.25)).all()

    def test_is_known_after_loading(self, with_null, tmp_path):
        with_null.save(str(tmp_path / "model"))
        loaded = SAMSVAE.load(str(tmp_path / "model"), with_null.adata, accelerator="cpu")
        pd.testing.assert_frame_equal(tl.mechanisms(loaded, 0.25), tl.mechanisms(with_null, 0.25))


class TestFamily:
    @pytest.mark.parametrize(
        ("model_class", "settings"),
        [
            (SAMSVAE, {"embedding_posterior": "correlated"}),
            (SAMSVAE, {"embedding_posterior": "mean_field", "basal_posterior": "mean_field"}),
            (SAMSVAE, {"interactions": True}),
            (SAMSVAE, {"dose_response": "hill"}),
            (SVAEPlus, {}),
        ],
    )
    def test_members_with_masks(self, screen, model_class, settings):
        further = {"combinations": "additive"} if model_class is SVAEPlus else {}
        model_class.setup_anndata(screen, **SETUP, **further)
        model = model_class(screen, **SIZE, **settings)
        model.train(max_epochs=3, **QUIET)
        table = tl.mechanisms(model)
        assert (
            table.drop(columns=["perturbation", "latent", "null_q_value"]).notna().all(axis=None)
        )
        np.testing.assert_allclose(
            _wide(table, "inclusion_probability"), model.get_perturbation_mask(), atol=1e-5
        )
        assert (table["effect_std"] >= 0).all()
        if (
            "embedding_posterior" not in settings
            or settings["embedding_posterior"] != "correlated"
        ):
            np.testing.assert_allclose(
                _wide(table, "effect_mean"), model.get_perturbation_effect(), atol=1e-5
            )
        assert len(tl.active_perturbations(model)) == 6
        assert np.isfinite(tl.perturbation_distance(model)).all(axis=None)
        assert tl.perturbation_distance(model, "mask").shape == (6, 6)

    def test_members_without_say_so(self, screen):
        for model_class in (CPAVAE, ConditionalVAE):
            model_class.setup_anndata(screen, **SETUP)
            model = model_class(screen, **SIZE)
            model.train(max_epochs=2, **QUIET)
            with pytest.raises(NotImplementedError, match="mechanisms: "):
                tl.mechanisms(model)
            with pytest.raises(NotImplementedError, match="active_perturbations: "):
                tl.active_perturbations(model)
            if model_class is CPAVAE:
                assert tl.perturbation_distance(model).shape == (6, 6)


class TestSimilarity:
    def test_distance_and_graph(self, any_fitted):
        distance = tl.perturbation_distance(
            any_fitted, metric="euclidean", counterfactual=any_fitted.counterfactual(n_cells=50)
        )
        assert distance.index.tolist() == any_fitted.perturbation_names
        again = tl.perturbation_distance(
            any_fitted, metric="euclidean", counterfactual=any_fitted.counterfactual(n_cells=50)
        )
        pd.testing.assert_frame_equal(distance, again, check_exact=True)
        graph = tl.perturbation_graph(
            any_fitted,
            metric="euclidean",
            n_neighbors=2,
            counterfactual=any_fitted.counterfactual(n_cells=50),
        )
        np.testing.assert_array_equal(graph.obsp["perturbation_distances"], distance)
        np.testing.assert_allclose(
            graph.obs["strength"],
            np.linalg.norm(any_fitted.get_perturbation_effect(), axis=1),
            rtol=1e-5,
        )

    def test_scale_of_a_latent_is_its_effect_on_genes(self, fitted):
        """A perturbation that moves one latent by one has the length that a latent is given."""
        norm = latent_gene_norm(fitted.counterfactual(n_cells=300))
        effects = fitted.module.effects
        state = {name: value.clone() for name, value in effects.state_dict().items()}
        try:
            effects.mask_logits[0], effects.mask_logits[0, 2] = -40.0, 40.0
            effects.slab_mean[0], effects.slab_log_variance[0] = 1.0, -40.0
            effects.spike_mean[0], effects.spike_variance[0] = 0.0, 0.0
            scvi.settings.seed = 0
            effect = fitted.get_average_treatment_effect(["P001"], n_samples=1, n_cells=3_000)
        finally:
            effects.load_state_dict(state)
        assert norm[2] == pytest.approx(np.linalg.norm(effect.X), rel=0.05)

    def test_effects_that_are_not_there_have_no_direction(self, fitted):
        effects = fitted.module.effects
        state = {name: value.clone() for name, value in effects.state_dict().items()}
        try:
            effects.mask_logits[:] = -5.0
            effects.selection_penalty[:] = 0.0
            effects.mask_logits[:2, 1] = 5.0
            effects.slab_mean[:] = 2.0
            distance = tl.perturbation_distance(
                fitted, counterfactual=fitted.counterfactual(n_cells=20)
            )
        finally:
            effects.load_state_dict(state)
        is_on = np.arange(6) < 2
        np.testing.assert_allclose(distance, is_on[:, None] != is_on, atol=1e-6)

    def test_null_is_left_out(self, with_null):
        assert len(tl.perturbation_distance(with_null)) == 6

    def test_global_randomness_is_left_alone(self, fitted):
        state = torch.random.get_rng_state()
        tl.perturbation_distance(fitted, counterfactual=fitted.counterfactual(n_cells=20))
        assert torch.equal(state, torch.random.get_rng_state())

    def test_unknown_arguments(self, fitted):
        with pytest.raises(ValueError, match="by='gene'"):
            tl.perturbation_distance(fitted, "gene")
        with pytest.raises(ValueError, match="metric='l1'"):
            tl.perturbation_distance(fitted, metric="l1")


@pytest.mark.slow
def test_fakes_are_not_called_and_active_perturbations_are():
    adata = simulated_screen(
        n_cells=4_000,
        n_genes=300,
        n_pairs=0,
        n_latent=6,
        mask_probability=0.2,
        inactive_fraction=0.4,
        control_fraction=0.5,
        n_batches=1,
        seed=3,
    )
    add_control_null(adata, "perturbation", "control", n_null=25, max_control_share=0.95)
    SAMSVAE.setup_anndata(adata, **(SETUP | {"perturbation_key": KEY}))
    scvi.settings.seed = 3
    model = SAMSVAE(adata, n_latent=16, n_hidden=128)
    model.train(**QUIET)
    truth = adata.uns["truth"]
    is_active = pd.Series(truth["mask"].any(1), index=truth["perturbation_names"])
    active = tl.active_perturbations(model, fdr=0.1)["called"].loc[is_active.index]
    assert (active & ~is_active).sum() <= 2
    assert (active & is_active).sum() >= 0.8 * is_active.sum()
    effect = pd.DataFrame(truth["effect"], index=truth["perturbation_names"])
    found = model.get_perturbation_effect().loc[effect.index]
    assert match_latents(effect, found)["correlation"].mean() > 0.8


@pytest.mark.slow
class TestPapalexi:
    @pytest.fixture(scope="class")
    @classmethod
    def papalexi(cls, papalexi_path):
        adata = anndata.read_h5ad(papalexi_path)
        null = add_control_null(
            adata, "perturbation", "control", guide_key="guide", max_control_share=0.5
        )
        assert null["guide"].str.startswith("NT").all()
        SAMSVAE.setup_anndata(
            adata,
            perturbation_key=KEY,
            control="control",
            batch_key="bio_rep",
            size_factor_key="total_umi_all_genes",
        )
        scvi.settings.seed = 0
        model = SAMSVAE(adata)
        model.train(**QUIET)
        return model

    def test_the_interferon_pathway_stands_together(self, papalexi):
        pathway = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
        distance = tl.perturbation_distance(papalexi)
        assert distance.loc[pathway, pathway].to_numpy().max() < 0.2
        assert distance.loc["SMAD4", pathway].min() > 0.6
        others = distance.columns.difference(["IFNGR1", "IFNGR2", "JAK2", "STAT1"])
        assert distance.loc[pathway, others].to_numpy().min() > 0.2
        tree = linkage(squareform(distance, checks=False), "average")
        clusters = pd.Series(fcluster(tree, 0.5, "distance"), index=distance.index)
        assert clusters[pathway].nunique() == 1
        assert clusters["SMAD4"] != clusters["STAT1"]
        graph = tl.perturbation_graph(papalexi, n_neighbors=3)
        rows = graph.obs_names.get_indexer(pathway)
        connected = graph.obsp["connectivities"].toarray()[np.ix_(rows, rows)] > 0
        assert connected[~np.eye(4, dtype=bool)].all()

    def test_the_pathway_is_called_and_guides_of_controls_are_not(self, papalexi):
        table = tl.mechanisms(papalexi, null=(), fdr=0.05)
        called = table[table["called"]]["perturbation"]
        assert {"IFNGR1", "IFNGR2", "JAK2", "STAT1"} <= set(called)
        assert not called.str.startswith("control_null_").any()
