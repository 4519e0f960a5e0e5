from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment

from scvi_sams import SAMSVAE, tl
from scvi_sams.module.likelihood import expected_log_normalized
from scvi_sams.tl import top_genes

from ._members import MEMBERS, SHIFTED, SPARSE, fit_member
from ._recovered import observed, recovered
from .conftest import SETUP, fit, small_screen


def _decoded(model, states, library, batch_index):
    """Expected log-normalised expression of states, by the generative model itself."""
    states = model.module.to_network(torch.as_tensor(states))
    outputs = model.module.generative(states, library, batch_index=batch_index)
    px = outputs["px"]
    return expected_log_normalized(px.mu, px.theta, library).numpy()


class TestProgrammes:
    @pytest.mark.parametrize("move", [1.0, -2.5])
    def test_brute_force(self, fitted, monkeypatch, move):
        """Cell by cell and latent by latent, at the posterior means of the basal states."""
        indices = np.arange(0, 600, 20)
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        programs = tl.gene_programs(
            fitted, move, credible_level=0.8, counterfactual=fitted.counterfactual(basal=indices)
        )

        basal = fitted.get_latent_representation(indices=indices, representation="basal")
        counts = fitted.adata.layers["counts"][indices].toarray()
        library = torch.as_tensor(counts.sum(1, keepdims=True), dtype=torch.float32)
        batch = torch.zeros(len(indices), 1, dtype=torch.long)
        with torch.inference_mode():
            base = _decoded(fitted, basal, library, batch)
            for latent in range(fitted.module.n_latent):
                moved = basal.copy()
                moved[:, latent] += move
                change = _decoded(fitted, moved, library, batch) - base
                mean = change.mean(0)
                np.testing.assert_allclose(programs.X[latent], mean, atol=2e-4)
                lower, upper = np.quantile(change, [0.1, 0.9], axis=0)
                np.testing.assert_allclose(programs.layers["lower"][latent], lower, atol=5e-4)
                np.testing.assert_allclose(programs.layers["upper"][latent], upper, atol=5e-4)
                clear = np.abs(change).min(0) > 1e-3
                agrees = (np.sign(change) == np.sign(mean)).mean(0)
                np.testing.assert_allclose(
                    programs.layers["sign_rate"][latent][clear], agrees[clear]
                )

    def test_labels(self, any_fitted):
        programs = tl.gene_programs(
            any_fitted, counterfactual=any_fitted.counterfactual(n_cells=30)
        )
        assert programs.obs_names.tolist() == any_fitted.get_perturbation_effect().columns.tolist()
        assert programs.var_names.tolist() == any_fitted.adata.var_names.tolist()
        assert (programs.obs["move"] == 1).all()
        assert (programs.layers["lower"] <= programs.layers["upper"]).all()
        assert ((programs.layers["sign_rate"] >= 0) & (programs.layers["sign_rate"] <= 1)).all()
        assert programs.obs["effect_share"].sum() == pytest.approx(1)
        assert programs.uns["scvi_sams"]["move"] == "1.0"

    def test_seed(self, fitted):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first = tl.gene_programs(
            fitted, "typical", counterfactual=fitted.counterfactual(n_cells=20, seed=1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(4)
        again = tl.gene_programs(
            fitted, "typical", counterfactual=fitted.counterfactual(n_cells=20, seed=1)
        )
        np.testing.assert_array_equal(first.X, again.X)
        pd.testing.assert_frame_equal(first.obs, again.obs)
        assert (
            tl.gene_programs(
                fitted, "typical", counterfactual=fitted.counterfactual(n_cells=20, seed=2)
            ).X
            != first.X
        ).any()

    def test_typical_move(self, fitted):
        """The size of effects among the perturbations that use a latent."""
        programs = tl.gene_programs(
            fitted, "typical", counterfactual=fitted.counterfactual(n_cells=400)
        )
        effects = fitted.module.effects
        weight = effects.mask_probability().numpy()
        mean, variance = (moment.detach().numpy() for moment in effects.moments())
        size = np.sqrt((weight * (mean**2 + variance)).sum(0) / weight.sum(0))
        used = weight.max(0) > 0.9
        assert used.any()
        np.testing.assert_allclose(programs.obs["move"][used], size[used], rtol=0.05)
        np.testing.assert_allclose(programs.obs["n_perturbations"], weight.sum(0), rtol=1e-5)

    def test_variance_share(self, fitted):
        """Fixing a latent that the decoder ignores loses nothing; all of them together, all."""
        programs = tl.gene_programs(fitted, counterfactual=fitted.counterfactual(n_cells=2_000))
        share = programs.obs["variance_share"]
        assert (share >= 0).all()
        assert 0.9 < share.sum() < 2
        strength = np.square(programs.X).sum(1)
        assert stats.spearmanr(share, strength).statistic > 0.8

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"move": 0}, ValueError, "move=0"),
            ({"move": "large"}, ValueError, "move='large'"),
            ({"move": np.inf}, ValueError, "move=inf"),
            ({"credible_level": 2}, ValueError, "credible_level=2"),
        ],
    )
    def test_errors(self, fitted, arguments, error, message):
        with pytest.raises(error, match=message):
            tl.gene_programs(fitted, **arguments)


@pytest.mark.parametrize("member", MEMBERS)
def test_family(member):
    model = fit_member(member, covariates=True)
    programs = tl.gene_programs(
        model, counterfactual=model.counterfactual(n_cells=20, batch="replicate_2")
    )
    assert np.isfinite(programs.X).all()
    assert np.abs(programs.X).max() > 0
    assert ("effect_share" in programs.obs) == (member in SHIFTED)
    assert ("n_perturbations" in programs.obs) == (member in SPARSE)
    if member in SHIFTED:
        assert (
            tl.gene_programs(model, "typical", counterfactual=model.counterfactual(n_cells=20))
            .obs["move"]
            .gt(0)
            .all()
        )
    else:
        with pytest.raises(NotImplementedError, match="typical"):
            tl.gene_programs(model, "typical")


def test_features():
    """Features that are no counts move in their own units."""
    adata = small_screen()
    adata.layers["features"] = np.log1p(adata.layers["counts"].toarray())
    SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": "features"}), is_count_data=False)
    model = fit(adata, max_epochs=2, gene_likelihood="normal")
    programs = tl.gene_programs(model, counterfactual=model.counterfactual(n_cells=10))
    assert programs.uns["scvi_sams"]["units"] == "units of the features"
    assert np.isfinite(programs.X).all()


@pytest.mark.slow
def test_recovers_the_programmes_of_a_simulation():
    """Perturbations of one latent each show what that latent does."""
    model = recovered()
    truth = model.adata.uns["truth"]
    names = np.asarray(truth["perturbation_names"])
    mask, effect = truth["mask"], truth["effect"]
    programs = tl.gene_programs(model, "typical")

    # Match latents by effects, and compare signed programmes where one latent does all.
    learned = model.get_perturbation_effect().to_numpy()
    match = np.corrcoef(effect.T, learned.T)[: mask.shape[1], mask.shape[1] :]
    true_of, learned_of = linear_sum_assignment(-np.abs(np.nan_to_num(match)))
    alone = [t for t in range(len(names)) if mask[t].sum() == 1]
    assert len(alone) >= 3
    effects = observed().to_df()
    agreement = []
    for t in alone:
        latent = learned_of[true_of.tolist().index(int(np.argmax(mask[t])))]
        program = programs.X[latent] * np.sign(learned[t, latent])
        agreement.append(np.corrcoef(program, effects.loc[names[t]])[0, 1])
    assert np.median(agreement) > 0.85

    # A set of what truly goes up with a latent is found in its programme.
    t = alone[int(np.argmax(agreement))]
    latent = learned_of[true_of.tolist().index(int(np.argmax(mask[t])))]
    sets = {"TRUE": effects.loc[names[t]].nlargest(15).index}
    rng = np.random.default_rng(0)
    sets |= {f"RANDOM_{k}": rng.choice(effects.columns, 15, replace=False) for k in range(10)}
    direction = "up" if learned[t, latent] > 0 else "down"
    moved = programs.to_df().loc[f"latent_{latent}"] * np.sign(learned[t, latent])
    p_value = {
        name: stats.mannwhitneyu(moved[genes], moved.drop(genes), alternative="greater").pvalue
        for name, genes in sets.items()
    }
    assert min(p_value, key=p_value.get) == "TRUE"
    assert p_value["TRUE"] * len(sets) < 1e-3
    best = top_genes(programs, 15)
    best = best.query(f"program == 'latent_{latent}' and direction == '{direction}'")
    assert best["gene"].isin(sets["TRUE"]).mean() > 0.4
    # Latents that no perturbation uses have no share in what perturbations do.
    unused = np.setdiff1d(np.arange(10), learned_of)
    assert programs.obs["effect_share"].to_numpy()[unused].max() < 0.1
