"""Effects that depend on the context: planted ones found, none where there are none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, ScreenError, SVAEPlus, tl
from scvi_sams.evaluation import mask_recovery

from ._members import fit_member, read_outs, tiny_screen
from ._simulations import fit_recovery, recovery_screen
from .conftest import QUIET, SETUP, SIZE

LEVELS = ["G1", "G2M", "S"]
CONDITIONS = ["P001", "P002", "P001+P002"]
BY_CONTEXT = {"context_key": "phase"}


@pytest.fixture(scope="module")
def by_phase():
    """Of a screen in which P001 was never measured in S."""
    adata = tiny_screen(n_cells=500)
    lacks = adata.obs["perturbation"].astype(str).str.contains("P001") & (
        adata.obs["phase"] == "S"
    )
    return fit_member("SAMSVAE", adata[~lacks].copy(), setup=BY_CONTEXT, context_prior=0.05)


def deviations_of(model):
    """Expected deviations, perturbations x contexts x latents."""
    effects = model.module.effects
    moments = effects.moments()[0][-effects.n_deviations :].detach().numpy()
    return moments.reshape(len(model.perturbation_names), -1, moments.shape[1])


class TestSetUp:
    def test_one_level_is_the_present_model(self):
        adata = tiny_screen()
        adata.obs["all"] = "the same"
        found = fit_member("SAMSVAE", adata, setup={"context_key": "all"})
        expected = read_outs(fit_member("SAMSVAE", adata), CONDITIONS)
        for name, value in read_outs(found, CONDITIONS).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        with pytest.raises(NotImplementedError, match="two levels or more"):
            tl.context_differences(found)

    @pytest.mark.parametrize("placement", ["host", "device"])
    def test_the_same_wherever_cells_are(self, placement, by_phase):
        model = fit_member(
            "SAMSVAE",
            by_phase.adata,
            setup=BY_CONTEXT,
            context_prior=0.05,
            train={"data_placement": placement},
        )
        expected = read_outs(by_phase, CONDITIONS)
        for name, value in read_outs(model, CONDITIONS).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)

    def test_what_cannot_be(self):
        adata = tiny_screen()
        with pytest.raises(ScreenError, match=r"no column 'cell_typ' \(context\)"):
            SAMSVAE.setup_anndata(adata, **SETUP, context_key="cell_typ")
        adata.obs["gap"] = adata.obs["phase"].where(np.arange(adata.n_obs) > 3)
        with pytest.raises(ScreenError, match="4 cells without a context"):
            SAMSVAE.setup_anndata(adata, **SETUP, context_key="gap")
        adata.obs["apart"] = np.where(adata.obs["perturbation"] == "control", "none", "some")
        with pytest.warns(UserWarning, match=r"Contexts of adata.obs\['apart'\].*fewer than 20"):
            SAMSVAE.setup_anndata(adata, **SETUP, context_key="apart")

    def test_members_without(self):
        adata = tiny_screen()
        for member in (ConditionalVAE, SVAEPlus):
            member.setup_anndata(adata, **SETUP, **BY_CONTEXT)
            with pytest.raises(ValueError, match="context_key"):
                member(adata)
        SAMSVAE.setup_anndata(adata, **SETUP, **BY_CONTEXT)
        with pytest.raises(ValueError, match="closed-form inference"):
            SAMSVAE(adata, global_inference="gradient")

    def test_without_sparsity(self):
        """Shared effects are dense in CPA-VAE, deviations sparse all the same."""
        model = fit_member("CPAVAE", setup=BY_CONTEXT)
        assert isinstance(model, CPAVAE)
        table = tl.context_differences(model)
        assert table["probability"].between(0, 1).all()
        assert np.isfinite(model.get_perturbation_effect(context="S")).all(axis=None)


class TestReadOut:
    def test_effect_is_shared_part_and_deviation(self, by_phase):
        table = tl.context_differences(by_phase)
        shared = by_phase.get_perturbation_effect()
        for context in LEVELS:
            own = table[table["context"] == context].pivot(
                index="perturbation", columns="latent", values="difference"
            )
            found = by_phase.get_perturbation_effect(context=context)
            np.testing.assert_allclose(found - shared, own[shared.columns], atol=1e-6)
        assert table["difference"].abs().max() > 0

    def test_shift_has_the_deviations_by_dose(self, by_phase):
        own = deviations_of(by_phase)
        asked = ["P001", {"P001": 2.0}, {"P001": 2.0, "P003": 0.5}]
        shared = by_phase.get_perturbation_shift(asked).to_numpy()
        for number, context in enumerate(LEVELS):
            found = by_phase.get_perturbation_shift(asked, context=context).to_numpy() - shared
            first, third = own[0, number], own[2, number]
            expected = [first, 2 * first, 2 * first + 0.5 * third]
            np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_cells_are_shifted_as_their_context_says(self, by_phase):
        shift = by_phase.get_latent_representation(representation="perturbation")
        obs = by_phase.adata.obs
        for cell in (3, 40, 77):
            expected = by_phase.get_perturbation_shift(
                obs["perturbation"].iloc[cell], context=obs["phase"].iloc[cell]
            )
            np.testing.assert_allclose(shift[cell], expected.to_numpy()[0], atol=1e-5)

    def test_never_measured_is_the_prior(self, by_phase):
        """Mean zero, and the prior's variance on top of the shared part's."""
        module = by_phase.module
        row = len(by_phase.perturbation_names) + len(module.interactions) + LEVELS.index("S")
        mean, variance = module.effects.moments(torch.tensor([row]))
        assert mean.abs().max() < 1e-3
        np.testing.assert_allclose(variance.detach(), 0.05, rtol=0.01)
        table = tl.context_differences(by_phase).query("perturbation == 'P001'")
        assert table.groupby("context")["measured"].all().to_dict() == {
            "G1": True,
            "G2M": True,
            "S": False,
        }
        # Of the same cells, so that only the draws of the effects differ.
        cells = np.flatnonzero(by_phase.adata.obs["perturbation"] == "control")[:20]
        shared, there = (
            by_phase.get_average_treatment_effect(
                ["P001"], basal=cells, n_samples=400, context=context, seed=0
            )
            for context in (None, "S")
        )
        assert (there.layers["std"] > shared.layers["std"]).mean() > 0.9

    def test_population_is_of_the_context(self, by_phase):
        for basal in ("prior", "control"):
            cells = by_phase.predict(["P001"], 30, basal=basal, context="G2M", seed=0)
            assert set(cells.obs["context"]) == {"G2M"}
            mixed = by_phase.predict(["P001"], 60, basal=basal, seed=0)
            assert set(mixed.obs["context"]) == set(LEVELS)
        controls = by_phase.counterfactual("control", 30, context="S", seed=0)
        assert set(by_phase.adata.obs.loc[controls.cell_names, "phase"]) == {"S"}
        # Cells that are given stay what they are.
        given = by_phase.predict(["P001"], basal=[0, 1], context="S", seed=0)
        assert given.obs["context"].tolist() == by_phase.adata.obs["phase"].iloc[:2].tolist()

    def test_one_argument_everywhere(self, by_phase):
        conditions = ["P002"]
        cells = by_phase.counterfactual(context="S")
        whole = tl.differential_expression(by_phase, conditions, n_samples=5, counterfactual=cells)
        named = tl.differential_expression(by_phase, conditions, n_samples=5, context="S")
        pd.testing.assert_frame_equal(named, whole)
        shared = tl.differential_expression(by_phase, conditions, n_samples=5)
        assert not np.allclose(shared["lfc_mean"].sort_index(), named["lfc_mean"].sort_index())
        with pytest.raises(ScreenError, match="beside counterfactual"):
            tl.differential_expression(by_phase, conditions, counterfactual=cells, context="S")

    def test_unknown(self, by_phase, fitted):
        for method in (
            by_phase.get_perturbation_effect,
            by_phase.counterfactual,
            lambda context: by_phase.predict(["P001"], context=context),
            lambda context: by_phase.get_perturbation_shift(["P001"], context=context),
            lambda context: by_phase.get_average_treatment_effect(["P001"], context=context),
        ):
            with pytest.raises(ScreenError, match=r"no 'G2N'. The nearest is .*G2M"):
                method(context="G2N")
        with pytest.raises(ScreenError, match=r"knows no contexts.*context_key"):
            fitted.predict(["P001"], context="S")
        with pytest.raises(NotImplementedError, match="set it up with context_key"):
            tl.context_differences(fitted)

    def test_level_without_controls(self):
        """Library sizes are those of other controls, basal states of its own cells."""
        adata = tiny_screen()
        away = (adata.obs["phase"] == "S") & (adata.obs["perturbation"] == "control")
        with pytest.warns(UserWarning, match="Contexts of"):
            model = fit_member("SAMSVAE", adata[~away].copy()[:256].copy(), setup=BY_CONTEXT)
        assert set(model.predict(["P001"], 5, context="S").obs["context"]) == {"S"}
        with pytest.raises(ScreenError, match="control cells of this context"):
            model.predict(["P001"], 5, basal="control", context="S")

    def test_sure_signs_mark_a_change(self, by_phase):
        """Made by hand: the shared effect is 2, that in S is -2, sure or not."""
        model = fit_member("SAMSVAE", setup=BY_CONTEXT)
        effects = model.module.effects
        row = len(model.perturbation_names) + LEVELS.index("S")
        with torch.no_grad():
            effects.selection_penalty.zero_()
            effects.mask_logits[0, 0], effects.mask_logits[row, 0] = 20.0, 20.0
            effects.slab_mean[0, 0], effects.slab_mean[row, 0] = 2.0, -4.0
            for log_sd, changes in ((-3.0, True), (1.0, False)):
                effects.slab_log_variance[0, 0] = effects.slab_log_variance[row, 0] = 2 * log_sd
                entry = tl.context_differences(model).query(
                    "perturbation == 'P001' and context == 'S' and latent == 'latent_0'"
                )
                assert entry["called"].item()
                assert entry["sign_change"].item() == changes
                total = entry["shared_effect"].item() + entry["difference"].item()
                assert total == pytest.approx(-2.0)


class TestSaved:
    def test_loads_and_says_the_same(self, by_phase, tmp_path):
        by_phase.save(str(tmp_path / "model"))
        expected = by_phase.get_average_treatment_effect(CONDITIONS, context="S", seed=0)
        other = by_phase.adata[by_phase.adata.obs["phase"] != "G1"].copy()  # of fewer levels
        for adata in (False, other):
            loaded = SAMSVAE.load(str(tmp_path / "model"), adata, accelerator="cpu")
            found = loaded.get_average_treatment_effect(CONDITIONS, context="S", seed=0)
            np.testing.assert_array_equal(found.X, expected.X)
            pd.testing.assert_frame_equal(
                tl.context_differences(loaded), tl.context_differences(by_phase)
            )
        # Codes are the model's, though the AnnData has fewer levels.
        np.testing.assert_allclose(
            loaded.get_latent_representation(),
            by_phase.get_latent_representation(other),
            atol=1e-5,
        )

    def test_levels_never_seen_are_refused(self, by_phase):
        other = tiny_screen()
        other.obs["phase"] = other.obs["phase"].replace({"S": "S2"})
        message = r"contexts that the model has not seen: 'S2'; did you mean 'S'"
        with pytest.raises(ScreenError, match=message):
            by_phase.get_elbo(other)
        with pytest.raises(ScreenError, match=message):
            SAMSVAE.load_query_data(other, by_phase, accelerator="cpu")


class TestQuery:
    NEW = "P003"  # in between the others

    @pytest.fixture(scope="class")
    @classmethod
    def extended(cls):
        adata = tiny_screen(n_cells=600)
        is_new = adata.obs["perturbation"].astype(str).str.contains(cls.NEW).to_numpy()
        model = fit_member(
            "SAMSVAE",
            adata[~is_new].copy(),
            setup=BY_CONTEXT | {"batch_key": "replicate"},
            interactions=True,
        )
        query = adata[is_new | (adata.obs["perturbation"] == "control")].copy()
        return model, query

    def test_new_perturbations(self, extended):
        model, query = extended
        found = SAMSVAE.load_query_data(query, model, new_perturbations=True, accelerator="cpu")
        found.train(**QUIET)
        known = model.perturbation_names
        assert found.perturbation_names == [*known, self.NEW]
        asked = [*known, "P001+P002"]
        for context in (None, *LEVELS):
            np.testing.assert_allclose(
                found.get_perturbation_shift(asked, context=context),
                model.get_perturbation_shift(asked, context=context),
                atol=1e-6,
            )
        effects = found.module.effects
        free = ~effects.frozen.squeeze(1)
        rows = torch.zeros_like(free)
        rows[len(known)] = True
        rows[-len(LEVELS) :] = True
        assert torch.equal(free, rows)
        assert np.abs(deviations_of(found)[-1]).max() < 5
        assert tl.context_differences(found).query("perturbation == @self.NEW")["measured"].all()

    def test_new_batches(self, extended):
        model, query = extended
        query = query[query.obs["perturbation"] == "control"].copy()
        query.obs["replicate"] = "replicate_9"
        found = SAMSVAE.load_query_data(query, model, accelerator="cpu")
        means = found.module.closed_form.basal_mean
        n = len(LEVELS)
        expected = model.module.closed_form.basal_mean.view(-1, n, means.shape[1])
        torch.testing.assert_close(means[:-n].view_as(expected), expected)
        torch.testing.assert_close(means[-n:], expected.mean(0))
        scvi.settings.seed = 0
        found.train(max_epochs=1, **QUIET)
        assert np.isfinite(found.get_elbo())


@pytest.mark.slow
class TestRecovery:
    SCREEN = {
        "n_cells": 4_000,
        "n_perturbations": 30,
        "n_genes": 150,
        "n_contexts": 3,
        "control_fraction": 0.2,
    }

    @pytest.mark.parametrize("fraction", [0.3, 0.0])
    def test_planted_differences(self, fraction):
        adata = recovery_screen(context_fraction=fraction, **self.SCREEN)
        model = fit_recovery("SAMSVAE", adata, setup={"context_key": "context"})
        truth = adata.uns["truth"]
        rows, levels, _ = np.nonzero(truth["context_difference"])
        planted = {
            (truth["perturbation_names"][r], f"context_{c + 1}")
            for r, c in zip(rows, levels, strict=True)
        }
        assert len(planted) == round(fraction * 30)
        called = tl.context_differences(model, fdr=0.1).query("called")
        found = set(zip(called["perturbation"], called["context"], strict=True))
        assert len(found & planted) >= len(planted) - 1
        assert len(found - planted) <= 1
        assert mask_recovery(truth["mask"], model.get_perturbation_mask()).f1 > 0.9

    def test_a_shift_between_contexts_is_no_effect(self):
        """P001 does nothing and is in one context alone; without contexts it seems to do much."""
        adata = recovery_screen(context_spread=2.0, inactive_fraction=1.0, **self.SCREEN)
        names = adata.obs["perturbation"].astype(str)
        keep = (names != "P001") | (adata.obs["context"] == "context_1")
        adata = adata[keep].copy()
        sizes = {}
        for setup in ({"context_key": "context"}, {}):
            model = fit_recovery("SAMSVAE", adata, setup=setup, max_epochs=20)
            effect = model.get_average_treatment_effect(["P001"], seed=0).X
            sizes[len(setup)] = np.abs(effect).mean()
            if setup:
                assert model.get_perturbation_mask().max(axis=None) < 0.5
                assert not tl.context_differences(model)["called"].any()
        assert sizes[1] < sizes[0] / 4


def test_arguments():
    adata = tiny_screen()
    SAMSVAE.setup_anndata(adata, **SETUP, **BY_CONTEXT)
    with pytest.raises(ScreenError, match="context_prior=1"):
        SAMSVAE(adata, context_prior=1.0, **SIZE)
