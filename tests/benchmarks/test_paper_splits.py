"""The two splits of the Norman screen in the paper, and its genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scvi_sams import ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import check_leakage

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks._paper_splits import (
    split_pairs_by_training_cells,
    split_pairs_out_of_distribution,
    training_genes,
)

LABELS = ("perturbation", "control")
SPLITS = [split_pairs_out_of_distribution, split_pairs_by_training_cells]


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=2_000, n_genes=60, n_perturbations=12, n_pairs=16, seed=1)


def parts_of(adata: ad.AnnData, label: str) -> set[str]:
    cells = adata.obs["split"] == label
    return set(adata.obs.loc[cells, "perturbation"])


def test_out_of_distribution_pairs(screen):
    table = {}
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        split_pairs_out_of_distribution(screen, *LABELS, fraction, seed=2)
        table[fraction] = screen.obs["split"].copy()
        pairs = {name for name in parts_of(screen, "train") if "+" in name}
        assert len(pairs) == round(fraction * 12)
        assert not pairs & parts_of(screen, "test")
        assert len(parts_of(screen, "test")) == 4
    is_pair = screen.obs["perturbation"].str.contains("+", regex=False)
    held_out = screen.obs["perturbation"].isin(parts_of(screen, "test"))
    for column in table.values():
        assert ((column == "test") == (table[0] == "test")).all()
        assert (column[~is_pair].isin(["train", "validation"])).all()
        assert column[held_out].isin(["test", "unused"]).all()
        assert (column[held_out] == "test").mean() == pytest.approx(0.2, abs=0.03)
        share = (column[~is_pair] == "validation").mean()
        assert share == pytest.approx(0.2, abs=0.02)
    used = [table[f][is_pair] != "unused" for f in (0, 0.25, 0.5, 0.75, 1)]
    for smaller, larger in zip(used, used[1:], strict=False):
        assert (smaller <= larger).all()


def test_seeds_hold_out_other_pairs(screen):
    tested = set()
    for seed in range(5):
        split_pairs_out_of_distribution(screen, *LABELS, seed=seed)
        tested.add(frozenset(parts_of(screen, "test")))
    assert len(tested) > 1


def test_data_efficiency(screen):
    is_pair = screen.obs["perturbation"].str.contains("+", regex=False)
    columns = {}
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        column = split_pairs_by_training_cells(screen, *LABELS, fraction, seed=2).copy()
        columns[fraction] = column
        counts = pd.crosstab(screen.obs.loc[is_pair, "perturbation"], column[is_pair])
        assert (np.abs(counts["test"] - 0.2 * counts.sum(axis=1)) < 1).all()
        trained = column[is_pair].isin(["train", "validation"])
        assert trained.mean() == pytest.approx(0.8 * fraction, abs=0.03)
        assert column[~is_pair].isin(["train", "validation"]).all()
        assert (column == "test").equals(columns[0] == "test")
    assert not (columns[1] == "unused").any()


def test_a_screen_without_pairs():
    adata = ad.AnnData(obs=pd.DataFrame({"perturbation": ["control", "A", "B"]}, list("abc")))
    with pytest.raises(ScreenError, match="0 conditions of several"):
        split_pairs_out_of_distribution(adata, *LABELS)


@pytest.mark.parametrize("split", SPLITS)
def test_depends_on_its_seed_alone_and_is_recorded(screen, split):
    first = split(screen, *LABELS, 0.5, seed=4).copy()
    assert (split(screen, *LABELS, 0.5, seed=4) == first).all()
    assert (split(screen, *LABELS, 0.5, seed=5) != first).any()
    assert screen.uns["scvi_sams_splits"]["split"]["kind"] == split.__name__


@pytest.mark.parametrize(("split", "status"), [(SPLITS[0], "passed"), (SPLITS[1], "not checked")])
def test_does_not_leak(screen, split, status):
    split(screen, *LABELS, 0.5)
    assert check_leakage(screen).loc["held out", "status"] == status


def test_an_unused_cell_of_a_held_out_pair(screen):
    split_pairs_out_of_distribution(screen, *LABELS, 1.0)
    unused = screen.obs_names[screen.obs["split"] == "unused"][:1]
    screen.obs.loc[unused, "split"] = "train"
    with pytest.raises(ScreenError, match="conditions held out are seen"):
        check_leakage(screen)


def test_genes_are_those_of_scanpy_on_training_cells(screen):
    split_pairs_by_training_cells(screen, *LABELS)
    selected = training_genes(screen, 20)
    training = screen[screen.obs["split"] == "train"].copy()
    sc.pp.normalize_total(training, target_sum=1e4)
    sc.pp.log1p(training)
    sc.pp.highly_variable_genes(training, n_top_genes=20)
    assert (selected == training.var["highly_variable"]).all()
    assert selected.sum() == 20
