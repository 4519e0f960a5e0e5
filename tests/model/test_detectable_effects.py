from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from scvi.distributions import NegativeBinomial

from scvi_sams import CPAVAE, SAMSVAE, ScreenError, tl
from scvi_sams.data import Conditions
from scvi_sams.module.closed_form import mask_evidence, spike_slab
from scvi_sams.tl import add_control_null
from scvi_sams.tl.call_power import bh_threshold, calling_problem, learned_effects

from ._simulations import fit_recovery, recovery_screen
from .conftest import SETUP, fit, small_screen


@pytest.fixture(scope="module")
def recovered():
    return fit_recovery("SAMSVAE", recovery_screen(), max_epochs=25)


@pytest.fixture(scope="module")
def genes(recovered):
    return tl.detectable_effects(recovered, on="genes")


def test_evidence_is_that_of_the_posterior():
    score, curvature = torch.randn(50) * 20, torch.rand(50) * 60
    for background, floor in ((0.0, 0.0), (0.02, 0.0), (0.0, 0.01), (0.02, 0.01)):
        prior = {"mask_prior_logit": -2.0, "embedding_variance": 1.5}
        prior |= {"background_variance": background, "mask_floor_variance": floor}
        evidence = mask_evidence(curvature, **prior)
        total = torch.tensor(background) + curvature.reciprocal()
        if floor == 0.0:  # the odds of the estimate with the mask and without, by the densities
            estimate = score / curvature
            wide, narrow = (
                torch.distributions.Normal(0, (total + variance).sqrt()).log_prob(estimate)
                for variance in (1.5, 0.0)
            )
            expected = -2.0 + wide - narrow
        else:
            expected = spike_slab(score, curvature, **prior).mask_logits
        found = evidence.at_zero + evidence.per_square * score.square()
        torch.testing.assert_close(
            found.clamp(-12, 12), expected.clamp(-12, 12), rtol=2e-3, atol=2e-3
        )


class TestLatents:
    def test_scores_give_the_log_odds_that_the_fit_reports(self, recovered):
        problem = calling_problem(recovered, "test")
        table = tl.mechanisms(recovered)
        reported = table["log_odds"].to_numpy().reshape(problem.curvature.shape)
        found = problem.log_odds(problem.score)
        inside = np.abs(reported) < 9  # beyond, they are clamped before the penalty
        assert inside.sum() > 50
        np.testing.assert_allclose(found[inside], reported[inside], atol=0.4)

    def test_the_effect_is_called_with_the_power(self, recovered):
        """Scores about the detectable effect, through the update that the fit makes."""
        limits = tl.detectable_effects(recovered, fdr=0.2, power=0.7, on="latents")
        problem = calling_problem(recovered, "test")
        excess = learned_effects(recovered, problem).excess
        effects, closed_form = recovered.module.effects, recovered.module.closed_form
        log_on, log_off = effects.mask_prior.log_probabilities()
        effect = limits["detectable_effect"].to_numpy().reshape(problem.curvature.shape)
        known = np.isfinite(effect) & (problem.curvature > 5)
        rng = np.random.default_rng(0)
        called = np.zeros(effect.shape)
        n_draws = 2_000
        for _ in range(n_draws):
            noise = np.sqrt(excess * problem.variance) * rng.standard_normal(effect.shape)
            score = problem.curvature * np.where(known, effect, 0) + noise
            posterior = spike_slab(
                torch.from_numpy(score),
                torch.from_numpy(problem.curvature),
                mask_prior_logit=log_on - log_off,
                embedding_variance=effects.embedding_variance,
                mask_floor_variance=1 / closed_form.mask_evidence_cells,
            )
            logits = posterior.mask_logits - effects.selection_penalty
            called += (logits >= limits.attrs["threshold"]).numpy()
        # The penalty of the fit is a few sweeps old.
        np.testing.assert_allclose(called[known] / n_draws, 0.7, atol=0.06)

    def test_of_perturbations_are_those_of_their_latents(self, recovered):
        limits = tl.detectable_effects(recovered)
        latents = tl.detectable_effects(recovered, on="latents").query("in_use")
        assert limits.index.tolist() == recovered.perturbation_names
        worst = latents.groupby("perturbation")["detectable_effect"].max()
        pd.testing.assert_series_equal(
            limits["worst_latent_effect"], worst, check_names=False, check_like=True
        )
        counts = recovered.adata.obs["perturbation"].value_counts()
        n_train = len(recovered.train_indices) / recovered.adata.n_obs
        assert (limits["n_cells"] - n_train * counts[limits.index]).abs().max() < 25
        called = tl.mechanisms(recovered, 0.1).groupby("perturbation")["called"].any()
        assert (limits["called"] == called[limits.index]).all()

    def test_more_is_seen_with_more_cells_and_less_power(self, recovered):
        few = calling_problem(recovered, "test", 0.25).least_effect(0.0, 0.8)
        all_cells = calling_problem(recovered, "test").least_effect(0.0, 0.8)
        known = np.isfinite(few)
        assert (all_cells[known] < few[known]).all()
        half, most = (
            tl.detectable_effects(recovered, power=p, on="latents")["detectable_effect"]
            for p in (0.5, 0.9)
        )
        assert (half[np.isfinite(most)] < most[np.isfinite(most)]).all()

    def test_a_null_makes_the_threshold_stricter(self):
        adata = small_screen(n_cells=900, control_fraction=0.5, n_pairs=0)
        add_control_null(adata, "perturbation", "control", n_null=5, max_control_share=0.95)
        SAMSVAE.setup_anndata(adata, **(SETUP | {"perturbation_key": "perturbation_with_null"}))
        model = fit(adata, max_epochs=15)
        with pytest.warns(UserWarning, match="5 null perturbations"):
            limits = tl.detectable_effects(model, 0.1)
        assert not limits.index.str.startswith("control_null").any()
        # Five null perturbations let nothing be called at one in ten, however large.
        assert np.isinf(limits["latent_effect"]).all()

    def test_what_has_no_closed_form_is_refused(self, fitted, screen):
        CPAVAE.setup_anndata(screen, **SETUP)
        model = CPAVAE(screen, n_latent=4, n_hidden=16)
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        with pytest.raises(NotImplementedError, match="has no masks"):
            tl.detectable_effects(model)
        SAMSVAE.setup_anndata(screen, **SETUP)
        by_gradient = fit(screen, max_epochs=1, global_inference="gradient")
        with pytest.raises(NotImplementedError, match="fitted by gradients"):
            tl.detectable_effects(by_gradient)
        with pytest.raises(ScreenError, match="on='cells' cannot be used"):
            tl.detectable_effects(fitted, on="cells")
        with pytest.raises(ScreenError, match="power=1.0 cannot be used"):
            tl.detectable_effects(fitted, power=1.0)


class TestGenes:
    def test_differences_are_those_of_the_cells(self, recovered, genes):
        adata = recovered.adata[np.sort(recovered.train_indices)]
        counts = adata.layers["counts"].toarray()
        y = np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True))
        label = adata.obs["perturbation"].to_numpy()
        for name in recovered.perturbation_names[:3]:
            rows = genes[genes["perturbation"] == name]
            expected = y[label == name].mean(0) - y[label == "control"].mean(0)
            np.testing.assert_allclose(rows["difference"], expected, atol=1e-4)

    def test_the_difference_is_called_with_the_power(self, genes):
        rows = genes[genes["perturbation"] == "P001"]
        z = rows["detectable_difference"] / rows["standard_error"]
        p_value = 2 * norm.sf(np.abs(rows["difference"] / rows["standard_error"]))
        drawn = z.iloc[0] + np.random.default_rng(0).standard_normal(100_000)
        passes = 2 * norm.sf(np.abs(drawn)) <= bh_threshold(p_value, 0.1)
        assert passes.mean() == pytest.approx(0.8, abs=0.005)
        assert z.std() < 1e-9

    def test_fold_changes_shift_the_expression_by_that_difference(self, recovered, genes):
        """Of counts drawn from the model, every rate changed by the fold change of its gene."""
        cells = recovered.counterfactual(n_cells=400, seed=1)
        nothing = Conditions.from_request({}, recovered.perturbation_names)
        px = cells.decode(nothing, 0, cells.draw(1, nothing))
        library = cells.population.library
        rows = genes[genes["perturbation"] == "P001"]

        def level(change):
            drawn = NegativeBinomial(mu=px.mean * 2**change, theta=px.theta).sample((40,))
            return torch.log2(1 + 1e4 * drawn / library).flatten(0, -2).mean(0).numpy()

        before = level(0.0)
        for column, sign in (("rise", 1), ("fall", -1)):
            change = rows[column].to_numpy()
            known = np.isfinite(change)
            assert (sign * change > 0).all()
            shift = level(torch.from_numpy(np.where(known, change, 0.0)).float()) - before
            expected = sign * rows["detectable_difference"].to_numpy()
            np.testing.assert_allclose(shift[known], expected[known], rtol=0.15, atol=0.05)

    def test_cells_are_needed(self, recovered, tmp_path):
        recovered.save(tmp_path / "m")
        without = SAMSVAE.load(tmp_path / "m", adata=False)
        with pytest.raises(ScreenError, match="without its AnnData"):
            tl.detectable_effects(without, on="genes")
        assert "share_twofold" not in tl.detectable_effects(without)
        assert "share_twofold" in tl.detectable_effects(recovered)
