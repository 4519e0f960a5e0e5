from __future__ import annotations

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_sams
from scvi_sams.cli import main

pytestmark = pytest.mark.slow

FIGURES = {"training.png", "latent_umap.png", "masks.png", "effects.png"}
MARK = ".scvi-sams-output.json"
TABLES = {"masks.csv", "effects.csv", "ate.h5ad", "latent.h5ad", "summary.json"}


@pytest.fixture(scope="module")
def fitted(screen_path, tmp_path_factory):
    """The folder of one fit, and what it printed."""
    output = tmp_path_factory.mktemp("fit") / "deep" / "out"
    words = ["fit", screen_path, "--perturbation-key", "perturbation", "--control", "control"]
    words += ["--batch-key", "replicate", "--layer", "counts", "--size-factor-key"]
    words += ["total_counts", "--n-latent", "6", "--max-epochs", "3", "--seed", "1"]
    words += ["--held-out-fraction", "0.2", "--threads", "1", "--accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "scvi_sams", *map(str, words), "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output, done


def test_the_folder_holds_everything_and_nothing_is_left_beside(fitted):
    output, _ = fitted
    assert {path.name for path in output.iterdir()} == FIGURES | TABLES | {"model", MARK}
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    for name in FIGURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_tables_agree_with_the_saved_model(fitted):
    output, _ = fitted
    model = scvi_sams.SAMSVAE.load(str(output / "model"), adata=False)
    for name, expected in (
        ("masks", model.get_perturbation_mask()),
        ("effects", model.get_perturbation_effect()),
    ):
        table = pd.read_csv(output / f"{name}.csv", index_col=0)
        pd.testing.assert_frame_equal(
            table, expected, check_dtype=False, rtol=1e-5, check_names=False
        )


def test_effects_and_latents_are_labelled(fitted, screen_path):
    output, _ = fitted
    screen = ad.read_h5ad(screen_path)
    ate, latent = (ad.read_h5ad(output / f"{name}.h5ad") for name in ("ate", "latent"))
    conditions = set(screen.obs["perturbation"].unique()) - {"control"}
    assert set(ate.obs_names) == conditions
    assert list(ate.var_names) == list(screen.var_names)
    assert (ate.layers["lower"] <= ate.layers["upper"]).all()
    assert latent.shape == (500, 6)
    assert list(latent.obs_names) == list(screen.obs_names)
    assert (latent.obs["condition"] == screen.obs["perturbation"].astype(str)).all()
    assert not [column for column in latent.obs if column.startswith("_scvi")]


def test_the_summary_has_the_figures_and_the_provenance(fitted):
    output, _ = fitted
    summary = json.loads((output / "summary.json").read_text())
    latent = ad.read_h5ad(output / "latent.h5ad")
    held_out = latent.obs["scvi_sams_split"] == "held out"
    assert summary["n_cells"] == 500
    assert summary["n_genes"] == 60
    assert summary["n_perturbations"] == len(summary["perturbations"]) == 6
    assert summary["n_held_out_cells"] == held_out.sum()
    assert 90 <= held_out.sum() <= 110
    assert summary["held_out_iwelbo"] < 0
    assert -1 <= summary["held_out_ate_correlation"] <= 1
    assert -1 <= summary["held_out_ate_correlation_of_training_means"] <= 1
    assert 0 < summary["training_seconds"] < summary["seconds"]
    assert summary["peak_memory_mb"] > 100
    assert summary["seed"] == 1
    assert summary["arguments"]["batch_key"] == "replicate"
    assert summary["versions"].keys() == {"python", "scvi_sams", "scvi_tools", "torch", "anndata"}


def test_the_model_was_trained_on_the_other_cells(fitted):
    output, _ = fitted
    latent = ad.read_h5ad(output / "latent.h5ad")
    model = scvi_sams.SAMSVAE.load(str(output / "model"), adata=False)
    np.testing.assert_array_equal(
        np.sort(model.train_indices), np.flatnonzero(latent.obs["scvi_sams_split"] == "training")
    )


def test_the_report_is_on_stdout_and_progress_on_stderr(fitted):
    _, done = fitted
    assert "What the perturbations do" in done.stdout
    assert "P001" in done.stdout
    assert "held-out IWELBO" in done.stdout
    assert "Epoch" not in done.stdout
    assert "500 cells x 60 genes" in done.stderr
    assert "Training: epoch 3 of 3" in done.stderr
    assert "\r" not in done.stderr  # no bars in a log
    assert "Warning" not in done.stderr


def test_one_seed_gives_one_result(fitted, screen_path, tmp_path):
    output, _ = fitted
    again = json.loads((output / "summary.json").read_text())["arguments"]
    words = ["fit", screen_path, "-o", tmp_path / "again"]
    for name in ("perturbation_key", "batch_key", "layer", "size_factor_key", "n_latent"):
        words += ["--" + name.replace("_", "-"), again[name]]
    words += ["--control", "control", "--max-epochs", 3, "--seed", 1, "--threads", 1]
    words += ["--held-out-fraction", 0.2, "--accelerator", "cpu"]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "again" / "masks.csv").read_text() == (output / "masks.csv").read_text()
    first, second = (
        ad.read_h5ad(folder / "ate.h5ad").X for folder in (output, tmp_path / "again")
    )
    np.testing.assert_array_equal(first, second)


def test_contexts_and_donors(run, screen_path, tmp_path):
    adata = ad.read_h5ad(screen_path)
    adata.obs["type"] = np.where(np.arange(adata.n_obs) % 2, "T", "B")
    adata.write_h5ad(tmp_path / "screen.h5ad")
    words = ("--perturbation-key", "perturbation", "--control", "control", "--n-latent", 4)
    words += ("--context-key", "type", "--donor-key", "replicate", "--batch-key", "replicate")
    done = run("fit", tmp_path / "screen.h5ad", *words, "--max-epochs", 2, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    differences = pd.read_csv(tmp_path / "out" / "context_differences.csv")
    assert set(differences["context"]) == {"B", "T"}
    for table in (differences, pd.read_csv(tmp_path / "out" / "mechanisms.csv")):
        assert (table["donor_sd"] >= 0).all()


def test_a_dosage_matrix_is_fitted_with_nothing_held_out(run, screen_path, tmp_path):
    adata = ad.read_h5ad(screen_path)
    doses = adata.obs["perturbation"].astype(str).str.get_dummies(sep="+").drop(columns="control")
    adata.obsm["dose"] = 0.5 * doses
    adata.write_h5ad(tmp_path / "doses.h5ad")
    done = run(
        *("fit", tmp_path / "doses.h5ad", "--dosage-obsm", "dose", "--n-latent", 4),
        *("--max-epochs", 2, "--held-out-fraction", 0, "-o", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_iwelbo"] is None
    assert summary["n_held_out_cells"] == 0
    assert "none held out" in done.out
    assert "P001:0.5" in ad.read_h5ad(tmp_path / "out" / "ate.h5ad").obs_names


def alone(name, pair):
    """Whether this is a single perturbation and not a part of the pair."""
    return name != "control" and "+" not in name and name not in pair


@pytest.fixture(scope="module")
def scored(screen_path, tmp_path_factory):
    """The folder of a fit without two conditions, and what it printed."""
    output = tmp_path_factory.mktemp("scored") / "out"
    screen = ad.read_h5ad(screen_path)
    pair = next(label for label in screen.obs["perturbation"].unique() if "+" in label)
    single = next(name for name in screen.obs["perturbation"].unique() if alone(name, pair))
    words = ["--perturbation-key", "perturbation", "--control", "control", "--n-latent", "4"]
    words += ["--max-epochs", "2", "--accelerator", "cpu", "-o", str(output)]
    words += ["--held-out-conditions", "+".join(reversed(pair.split("+"))), single]
    done = subprocess.run(
        [sys.executable, "-m", "scvi_sams", "fit", str(screen_path), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output, done, sorted([pair, single])


def test_held_out_conditions_are_not_trained_on(scored):
    output, _, conditions = scored
    latent = ad.read_h5ad(output / "latent.h5ad")
    held_out = latent.obs["scvi_sams_split"] == "held out"
    chosen = latent.obs["condition"].isin(conditions)
    assert held_out[chosen].all()
    assert not held_out[~chosen].all()
    model = scvi_sams.SAMSVAE.load(str(output / "model"), adata=False)
    assert not chosen.iloc[model.train_indices].any()


def test_held_out_conditions_are_scored(scored):
    output, done, conditions = scored
    written = {path.name for path in output.iterdir()} - FIGURES - TABLES - {"model", MARK}
    assert written == {
        "scorecard.csv",
        "scorecard_per_condition.csv",
        "scorecard_comparison.csv",
        "scorecard.json",
        "scorecard.md",
        "scorecard.png",
    }
    table = pd.read_csv(output / "scorecard_per_condition.csv")
    assert sorted(table["condition"].unique()) == conditions
    assert {"SAMSVAE", "no change", "additive", "bootstrap"} <= set(table["predictor"])
    summary = json.loads((output / "summary.json").read_text())
    assert sorted(summary["held_out_conditions"]) == conditions
    assert "Only 2 conditions can be compared" in done.stdout
    assert "Held-out conditions: " in done.stdout
