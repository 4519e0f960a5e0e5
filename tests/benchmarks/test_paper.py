"""The reproductions run on small files of the published format, and say what they score."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams.datasets import simulated_screen

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks import paper_norman, paper_replogle
from benchmarks._family import FAMILY
from benchmarks._paper import (
    BASELINE,
    PUBLISHED_REPLOGLE,
    _additive,
    mean_and_spread,
    print_paper_table,
)
from benchmarks._paper_replogle import filtered_replogle, strong_perturbations

ROWS = ["ConditionalVAE", "SVAEPlus", "SAMSVAE mean-field", "SAMSVAE closed form"]
SMALL = ["--n-latent", "4", "--max-epochs", "2", "--particles", "2", "--iwelbo-particles", "5"]


def scperturb_file(path: Path, **arguments) -> ad.AnnData:
    """A file in the layout of scPerturb, and the screen that it was made of."""
    screen = simulated_screen(n_batches=1, library_size=2_000.0, seed=1, **arguments)
    counts = screen.X.toarray()
    labels = screen.obs["perturbation"].astype(str)
    obs = pd.DataFrame(
        {
            "perturbation": labels.str.replace("+", "_", regex=False).astype("category"),
            "nperts": np.where(labels == "control", 0, labels.str.count(r"\+") + 1),
            "ncounts": counts.sum(axis=1),
            "ngenes": (counts > 0).sum(axis=1),
        },
        index=screen.obs_names,
    )
    ad.AnnData(screen.X, obs=obs, var=pd.DataFrame(index=screen.var_names)).write_h5ad(path)
    return screen


@pytest.fixture(scope="module")
def norman_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("norman") / "norman.h5ad"
    scperturb_file(path, n_cells=900, n_genes=60, n_perturbations=8, n_pairs=12)
    return path


@pytest.fixture(scope="module")
def replogle_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replogle") / "replogle.h5ad"
    scperturb_file(
        path, n_cells=2_000, n_genes=80, n_perturbations=20, n_pairs=0, inactive_fraction=0.5
    )
    return path


@pytest.mark.parametrize("split", ["out-of-distribution", "data-efficiency"])
def test_norman(norman_file, tmp_path, capsys, split):
    rows_file = tmp_path / "rows.json"
    paper_norman.main(
        [
            *("--path", str(norman_file), "--split", split, "--seeds", "0", "--n-genes", "40"),
            *("--fractions", "0", "1", "--rows", *ROWS, "--json", str(rows_file), *SMALL),
        ]
    )
    printed = capsys.readouterr().out
    assert f"Norman, {split}, 1 seeds" in printed
    assert "Control cells: " in printed  # the audit of the split
    rows = json.loads(rows_file.read_text())
    assert [(row["fraction"], row["model"]) for row in rows] == [
        (fraction, row) for fraction in (0.0, 1.0) for row in (BASELINE, *ROWS)
    ]
    for row in rows:
        assert math.isnan(row["IWELBO"]) == (row["model"] == BASELINE)
        assert row["model"] == BASELINE or row["IWELBO"] < 0
        assert -1 <= row["effect correlation"] <= 1


def test_replogle(replogle_file, tmp_path, capsys):
    rows_file = tmp_path / "rows.json"
    paper_replogle.main(
        [
            *("--path", str(replogle_file), "--seeds", "0", "1", "--n-perturbations", "8"),
            *("--n-genes", "40", "--rows", *ROWS, "--json", str(rows_file), *SMALL),
        ]
    )
    printed = capsys.readouterr().out
    assert "40 genes, 8 perturbations" in printed
    assert "Published: Bereket and Karaletsos (2023), Replogle filtered" in printed
    rows = {row["model"]: row for row in json.loads(rows_file.read_text())}
    assert list(rows) == [BASELINE, *ROWS]
    assert rows["SAMSVAE mean-field"]["IWELBO, published"] == -1757.7
    assert rows["SAMSVAE mean-field"]["effect correlation, published"] == 0.30
    assert math.isnan(rows["SAMSVAE closed form"]["IWELBO, published"])
    assert rows["ConditionalVAE"]["IWELBO (sd)"] > 0
    assert rows[BASELINE]["effect correlation"] > 0.3


def test_replogle_without_a_file(tmp_path):
    with pytest.raises(SystemExit, match="--path"):
        paper_replogle.main(["--path", str(tmp_path / "none.h5ad")])


class TestReplogleFilter:
    def test_keeps_the_perturbations_that_do_something(self, replogle_file, tmp_path):
        truth = scperturb_file(
            tmp_path / "again.h5ad",
            n_cells=2_000,
            n_genes=80,
            n_perturbations=20,
            n_pairs=0,
            inactive_fraction=0.5,
        ).uns["truth"]
        active = truth["perturbation_names"][truth["mask"].any(axis=1)]
        adata = filtered_replogle(replogle_file, 0, 10, 80)
        assert set(adata.obs["perturbation"]) == {"control", *active}

    def test_does_not_look_at_test_cells(self, replogle_file):
        screen = ad.read_h5ad(replogle_file)
        screen.obs["split"] = np.where(np.arange(2_000) % 5, "train", "test")
        before = strong_perturbations(screen, 5)
        counts = screen.X.toarray()
        counts[::5] = np.random.default_rng(0).poisson(20, counts[::5].shape)
        screen.X = counts
        assert strong_perturbations(screen, 5) == before

    def test_lists_take_the_place_of_the_choice(self, replogle_file):
        genes = ["gene_02", "gene_30", "gene_31", "gene_44"]
        adata = filtered_replogle(replogle_file, 0, 722, 1_187, ["P001", "P002"], genes)
        assert set(adata.obs["perturbation"]) == {"control", "P001", "P002"}
        assert list(adata.var_names) == genes


def test_published_rows_are_rows():
    assert set(PUBLISHED_REPLOGLE) <= set(FAMILY)


def test_additive_baseline_by_hand():
    trained = pd.DataFrame([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], ["A", "B", "A+B"], ["g1", "g2"])
    seen = _additive(trained, pd.Index(["A+B", "B"]))
    np.testing.assert_array_equal(seen, [[5, 5], [0, 2]])
    unseen = _additive(trained.drop(index="A+B"), pd.Index(["A+B", "A+C", "C+D"]))
    np.testing.assert_array_equal(unseen, [[1, 2], [1, 0], [0, 0]])


def test_mean_and_spread_by_hand():
    runs = [
        {"model": "m", "seed": seed, "IWELBO": bound, "effect correlation": 0.5, "other": bound}
        for seed, bound in enumerate([-1.0, -3.0])
    ]
    (row,) = mean_and_spread(runs, ["model"])
    assert row == {
        "model": "m",
        "IWELBO": -2.0,
        "IWELBO (sd)": pytest.approx(np.sqrt(2)),
        "effect correlation": 0.5,
        "effect correlation (sd)": 0.0,
        "other": -2.0,
    }


def test_figures_are_not_published_for_other_screens(capsys):
    class Arguments:
        threads, json = 1, None

    print_paper_table("Norman", [{"model": "SVAEPlus", "IWELBO": -1.0}], {}, Arguments)
    assert "ublished" not in capsys.readouterr().out
