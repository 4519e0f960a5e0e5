from __future__ import annotations

import json

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks.high_moi import high_moi_screen


@pytest.fixture(scope="module")
def screen():
    """Some cells with one guide, whose counts are in obsm."""
    rng = np.random.default_rng(0)
    has = np.eye(6, dtype=int)[rng.integers(6, size=240)]
    counts = sparse.csr_matrix(rng.poisson(3.0, (240, 30)).astype(np.float32))
    adata = ad.AnnData(counts, pd.DataFrame(index=[f"c{k}" for k in range(240)]))
    adata.obs["lane"] = rng.choice(["x", "y"], 240)
    adata.obsm["guides"] = sparse.csr_matrix(has * 20 + rng.poisson(0.2, has.shape))
    names = [f"{gene}_{k}" for gene in ("A", "B", "non-targeting") for k in (1, 2)]
    targets = [name.rsplit("_", 1)[0] for name in names]
    adata.uns["guides"] = pd.DataFrame({"target": targets}, index=names)
    adata.obs["guide"] = np.array(names)[has.argmax(1)]
    return adata


@pytest.fixture
def path(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    return tmp_path / "screen.h5ad"


EXPECTED = {"A", "B", "control"}
CONTROL = ("--control", "non-targeting")


def test_counts_of_guides(until_training, path):
    words = (path, *CONTROL, "--guide-key", "guides")
    refused = until_training(*words)
    assert "look like counts of guides" in refused.error
    begun = until_training(*words, "--guide-threshold", "5")
    assert set(begun.labels) == EXPECTED


def test_a_column_with_a_table(until_training, path, screen, tmp_path):
    table = screen.uns["guides"].rename_axis("guide").reset_index()
    table.to_csv(tmp_path / "targets.csv", index=False)
    words = (path, *CONTROL, "--guide-key", "guide", "--guide-targets")
    begun = until_training(*words, tmp_path / "targets.csv")
    expected = screen.obs["guide"].map(screen.uns["guides"]["target"])
    assert begun.labels.tolist() == expected.replace("non-targeting", "control").tolist()
    assert set(until_training(*words, "guides").labels) == EXPECTED  # a key of uns
    table.rename(columns={"guide": "name"}).to_csv(tmp_path / "targets.csv", index=False)
    refused = until_training(*words, tmp_path / "targets.csv")
    assert "has no column guide; its first line is to be guide,target" in refused.error


def test_a_mudata(until_training, screen, tmp_path):
    guide = ad.AnnData(screen.obsm["guides"] > 5, screen.obs[[]].copy(), screen.uns["guides"])
    gene = ad.AnnData(screen.X, screen.obs[["guide"]].copy())
    mdata = mudata.MuData({"gene": gene, "guide": guide.copy()})
    mdata.obs["lane"] = screen.obs["lane"]
    mdata.write_h5mu(tmp_path / "screen.h5mu")
    begun = until_training(tmp_path / "screen.h5mu", "--batch-key", "lane")
    assert set(begun.labels) == EXPECTED


def test_neither_labels_nor_guides(until_training, path):
    assert "--perturbation-key is needed" in until_training(path).error
    assert "--guide-key" in until_training(path).error


@pytest.mark.slow
def test_a_fit_of_many_guides_a_cell(run, tmp_path):
    screen = high_moi_screen(5, 300, 40, 8, 3)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    words = ["fit", tmp_path / "screen.h5ad", "--guide-key", "guides", "--guide-threshold", "5"]
    words += ["--control", "none", "--max-epochs", "2", "--n-latent", "3", "--accelerator", "cpu"]
    done = run(*words, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    effects = ad.read_h5ad(tmp_path / "out" / "ate.h5ad")
    assert effects.obs_names.tolist() == [f"P{k:03d}" for k in range(1, 9)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_perturbations"] == 8
