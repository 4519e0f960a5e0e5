"""Effects on single genes that latents cannot carry, from training to prediction."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi

import scvi_sams
from scvi_sams.evaluation import interval_coverage, observed_effects

LABELS = {"perturbation_key": "perturbation", "control": "control"}
PLANTED = {"A": "gene_3", "B": "gene_11", "C": "gene_20"}


def planted_screen(seed: int = 0, n_cells: int = 1_600) -> ad.AnnData:
    """Perturbations that take three quarters of one gene, or nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["control", "A", "B", "C", "D", "E", "A+B"], n_cells)
    rate = np.tile(rng.gamma(2.0, 2.0, 60) + 2.0, (n_cells, 1)) * rng.gamma(20, 0.05, (n_cells, 1))
    for name, gene in PLANTED.items():
        has = np.array([name in label.split("+") for label in labels])
        rate[has, int(gene.split("_")[1])] *= 0.25
    return ad.AnnData(
        rng.poisson(rate).astype(np.float32),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"cell_{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"gene_{g}" for g in range(60)]),
    )


def fit(adata, seed: int = 0, **kwargs):
    scvi.settings.seed = seed
    scvi_sams.SAMSVAE.setup_anndata(adata, **LABELS)
    model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=32, **kwargs)
    model.train(max_epochs=10, train_size=1.0, accelerator="cpu", enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model():
    return fit(planted_screen())


@pytest.fixture(scope="module")
def other_cells():
    return observed_effects(planted_screen(seed=1, n_cells=8_000), **LABELS)


def effects_of(model, conditions, **kwargs) -> pd.DataFrame:
    return model.get_average_treatment_effect(conditions, seed=0, **kwargs).to_df()


@pytest.mark.parametrize("condition", [*PLANTED, "A+B"])
def test_planted_effects_are_predicted(model, other_cells, condition):
    """The sum of those of the parts too; what is seen in other cells is the truth."""
    genes = [PLANTED[name] for name in condition.split("+")]
    found = effects_of(model, [condition]).loc[condition, genes]
    truth = other_cells.to_df().loc[condition, genes]
    assert (truth < -1).all()
    np.testing.assert_allclose(found, truth, rtol=0.25)  # of some two hundred cells


def test_latents_alone_do_not_carry_them(model):
    alone = model.counterfactual(gene_effects=False, seed=0)
    table = scvi_sams.tl.differential_expression(model, ["C"], counterfactual=alone)
    whole = scvi_sams.tl.differential_expression(model, ["C"])
    change = [t.loc["gene_20", "lfc_mean"] for t in (table, whole)]
    assert change[1] < -1.5
    assert change[0] > change[1] + 0.3


def test_table(model):
    table = model.get_gene_effects()
    assert len(table) == 5 * 60
    assert table["lfsr"].is_monotonic_increasing
    called = table[table["lfsr"] < 0.05]
    found = set(zip(called["perturbation"], called["gene"], strict=True))
    assert set(PLANTED.items()) <= found
    assert not set(called["perturbation"]) & {"D", "E"}
    planted = called.set_index("perturbation").loc[list(PLANTED), "log2_fold_change"]
    assert planted.between(-2.6, -1.5).all()


def test_intervals_hold_them(model, other_cells):
    effect = model.get_average_treatment_effect(["A"], n_samples=100, seed=0)
    std = pd.DataFrame(effect.layers["std"], effect.obs_names, effect.var_names)
    assert (std.loc["A"] > 0).all()
    lower, upper = (effect.to_df(layer)["gene_3"].item() for layer in ("lower", "upper"))
    assert lower < other_cells.to_df().loc["A", "gene_3"] < upper


@pytest.mark.parametrize("train_size", [1.0, 0.8])
def test_intervals_cover_other_cells(train_size, other_cells):
    """Of all genes, with what was absorbed found from residuals or from validation cells."""
    screen = planted_screen(seed=2)
    scvi.settings.seed = 2
    scvi_sams.SAMSVAE.setup_anndata(screen, **LABELS)
    model = scvi_sams.SAMSVAE(screen, n_latent=4, n_hidden=32)
    model.train(max_epochs=10, train_size=train_size, accelerator="cpu", enable_progress_bar=False)
    assert 0 <= float(model.module.gene_effects.absorbed) <= 0.9
    effect = model.get_average_treatment_effect(["A", "B", "C", "D", "E"], n_samples=50, seed=0)
    for level in (0.8, 0.95):
        effect = model.get_average_treatment_effect(
            ["A", "B", "C", "D", "E"], n_samples=100, credible_level=level, seed=0
        )
        share = interval_coverage(effect, other_cells[effect.obs_names]).mean()
        assert share == pytest.approx(level, abs=0.1)


def test_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = scvi_sams.SAMSVAE.load(tmp_path / "model", model.adata, accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.get_gene_effects(), model.get_gene_effects())


def test_a_seed_gives_the_same():
    first, second = (fit(planted_screen(n_cells=400)) for _ in range(2))
    pd.testing.assert_frame_equal(first.get_gene_effects(), second.get_gene_effects())


def test_off_or_without_controls_says_why():
    screen = planted_screen(n_cells=400)
    off = fit(screen, gene_effects=False)
    with pytest.raises(NotImplementedError, match="gene_effects=False"):
        off.get_gene_effects()
    few = screen[(screen.obs["perturbation"] != "control") | (np.arange(400) < 100)].copy()
    with pytest.raises(NotImplementedError, match="at least 50 are needed"):
        fit(few).get_gene_effects()


def test_unknown_perturbation(model):
    with pytest.raises(scvi_sams.ScreenError, match="'Z'"):
        model.get_gene_effects(["Z"])


def test_targets_by_column_and_by_key():
    screen = planted_screen(n_cells=400)
    screen.uns["targets"] = dict(PLANTED)
    screen.obs["target"] = screen.obs["perturbation"].astype(str).map(PLANTED)
    for key in ("targets", "target"):
        table = fit(screen, direct_effects=key).get_gene_effects()
        own = table[table["is_target"]].set_index("perturbation")["gene"].to_dict()
        assert own == PLANTED
    with pytest.raises(scvi_sams.ScreenError, match="'nowhere' is neither"):
        fit(screen, direct_effects="nowhere")
