"""Which cells a perturbation took in, by a fitted model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scvi_sams
from scvi_sams import SAMSVAE, ConditionalVAE, ScreenError

SETUP = {"perturbation_key": "label", "control": "control", "guide_key": "guide_id"}


def _screen():
    """Two guides a perturbation, the second of which works in half of the cells."""
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=1_500, n_genes=150, n_perturbations=5, n_pairs=0, control_fraction=0.5,
        n_latent=4, effect_size=3.0, n_batches=1,
    )  # fmt: skip
    label = adata.obs["perturbation"].astype(str).to_numpy().astype(object)
    guide = label.copy()
    escaped = np.zeros(adata.n_obs, bool)
    rng = np.random.default_rng(0)
    controls = iter(rng.permutation(np.flatnonzero(label == "control")))
    for name in np.unique(label[label != "control"]):
        first, second = np.array_split(np.flatnonzero(label == name), 2)
        guide[first], guide[second] = f"{name}g1", f"{name}g2"
        for _ in range(len(second)):
            cell = next(controls)
            label[cell], guide[cell], escaped[cell] = name, f"{name}g2", True
    adata.obs["label"], adata.obs["guide_id"] = label.astype(str), guide.astype(str)
    adata.obs["escaped"] = escaped
    return adata


@pytest.fixture(scope="module")
def model():
    adata = _screen()
    SAMSVAE.setup_anndata(adata, **SETUP)
    model = SAMSVAE(adata, n_latent=8, n_hidden=64)
    model.train(max_epochs=60, accelerator="cpu", enable_progress_bar=False)
    return model


def test_probabilities_tell_the_cells_that_escaped(model):
    table = model.get_perturbed_probability()
    is_control = model.adata.obs["label"] == "control"
    assert list(table.columns) == ["perturbation", "guide", "probability"]
    assert table.index.tolist() == model.adata.obs_names[~is_control].tolist()
    known = model.adata.obs.loc[table.index]
    assert (table["perturbation"] == known["label"]).all()
    assert (table["guide"] == known["guide_id"]).all()
    p = table["probability"]
    assert p[~known["escaped"]].mean() - p[known["escaped"]].mean() > 0.6
    some = model.get_perturbed_probability(indices=np.flatnonzero(~is_control)[[3, 1]])
    pd.testing.assert_frame_equal(some, table.iloc[[3, 1]], atol=1e-5)


def test_guides_that_work_in_half_of_their_cells_are_found(model):
    table = scvi_sams.tl.guides(model)
    first, second = (table[table.index.str.endswith(f"g{k}")]["efficacy"] for k in (1, 2))
    assert first.min() > 0.8
    np.testing.assert_allclose(second, 0.5, atol=0.15)
    assert table["can_be_told"].mean() > 0.8
    assert not table["off_target"].any()
    with pytest.raises(ScreenError, match="fdr"):
        scvi_sams.tl.guides(model, fdr=2)


def test_effects_where_it_took_are_those_of_the_cells_that_did_not_escape(model):
    adata = model.adata
    observed = scvi_sams.evaluation.observed_effects(
        adata[~adata.obs["escaped"]].copy(), perturbation_key="label", control="control"
    )[model.perturbation_names].X
    error = {
        effect: np.square(
            model.get_average_treatment_effect(seed=0, effect=effect).X - observed
        ).sum()
        for effect in ("as_labelled", "where_it_took")
    }
    assert error["where_it_took"] < 0.6 * error["as_labelled"]
    default = model.get_average_treatment_effect(seed=0).X
    labelled = model.get_average_treatment_effect(seed=0, effect="as_labelled").X
    np.testing.assert_array_equal(default, labelled)
    cells = {
        effect: model.predict(["P001"], 50, seed=0, return_mean=True, effect=effect).X
        for effect in ("as_labelled", "where_it_took")
    }
    assert not np.array_equal(*cells.values())
    with pytest.raises(ScreenError, match="where_it_took"):
        model.counterfactual(effect="took")


def test_what_was_solved_is_saved(model, tmp_path):
    table = model.get_perturbed_probability()
    guides = scvi_sams.tl.guides(model)
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", model.adata)
    pd.testing.assert_frame_equal(loaded.get_perturbed_probability(), table, atol=1e-5)
    without = SAMSVAE.load(tmp_path / "model", adata=False)
    pd.testing.assert_frame_equal(scvi_sams.tl.guides(without), guides)
    kept, model.efficacy_ = model.efficacy_, None
    model.save(tmp_path / "unsolved")
    with pytest.raises(ScreenError, match="AnnData"):
        scvi_sams.tl.guides(SAMSVAE.load(tmp_path / "unsolved", adata=False))
    model.efficacy_ = kept


def test_guides_without_training_cells_are_refused(model):
    other = model.adata[:400].copy()
    perturbed = np.flatnonzero(other.obs["label"] != "control")
    guides = other.obs["guide_id"].astype(str).to_numpy().astype(object)
    guides[perturbed[0]] = "never seen"
    other.obs["guide_id"] = guides.astype(str)
    with pytest.raises(ScreenError, match="not trained with"):
        model.get_perturbed_probability(other)


def test_results_hold_the_probability(model):
    adata = model.adata.copy()
    scvi_sams.tl.write_results(model, adata)
    written = adata.obs["sams_perturbed_probability"]
    table = model.get_perturbed_probability()
    assert written[adata.obs["label"] == "control"].isna().all()
    np.testing.assert_allclose(written[table.index], table["probability"], atol=1e-5)


def test_models_without_a_closed_form_say_so():
    adata = scvi_sams.datasets.simulated_screen(n_cells=300, n_genes=40, n_pairs=0)
    for cls, options, reason in (
        (ConditionalVAE, {}, "act through"),
        (SAMSVAE, {"basal_posterior": "mean_field"}, "closed form"),
    ):
        cls.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = cls(adata, n_latent=4, n_hidden=16, **options)
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        with pytest.raises(NotImplementedError, match=reason):
            model.get_perturbed_probability()


def test_pairs_have_a_probability_for_each_part():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=600, n_genes=60, n_perturbations=4, n_pairs=2, pair_fraction=0.5
    )
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = SAMSVAE(adata, n_latent=5, n_hidden=32, interactions=True)
    model.train(max_epochs=10, accelerator="cpu", enable_progress_bar=False)
    table = model.get_perturbed_probability()
    parts = adata.obs["perturbation"].astype(str).str.split("+")
    expected = parts[adata.obs["perturbation"] != "control"].explode()
    assert sorted(zip(table.index, table["perturbation"], strict=True)) == sorted(expected.items())
    assert table["probability"].between(0, 1).all()


def test_cells_of_many_perturbations_are_read_as_the_others():
    """Minibatches are as wide as their own cells, of which a few here have twenty."""
    adata = scvi_sams.datasets.simulated_screen(
        600, n_genes=100, n_perturbations=24, n_pairs=0, n_batches=1, seed=0
    )
    names = sorted(set(adata.obs["perturbation"]) - {"control"})
    label = adata.obs["perturbation"].astype(str).to_numpy(object)
    label[5] = label[500] = "+".join(names[:20])
    adata.obs["label"] = label.astype(str)
    SAMSVAE.setup_anndata(adata, perturbation_key="label", control="control")
    model = SAMSVAE(adata, n_latent=4, n_hidden=16)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    table = model.get_perturbed_probability()
    assert table.index.value_counts().to_dict()[adata.obs_names[5]] == 20
    alone = model.get_perturbed_probability(indices=[5])
    pd.testing.assert_frame_equal(alone, table.loc[[adata.obs_names[5]]], atol=1e-5)
    one = adata.obs_names[np.flatnonzero(adata.obs["label"].isin(names))[0]]
    assert len(table.loc[[one]]) == 1
