from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scvi_sams import ScreenError
from scvi_sams.data import (
    CELLS_USED_UNS_KEY,
    check_leakage,
    record_cells_used,
    select_genes,
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_pairs,
    split_pairs_out_of_distribution,
    split_perturbations,
)
from scvi_sams.datasets import simulated_screen

LABELS = ("perturbation", "control")


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=1_000, n_genes=60, n_perturbations=12, n_pairs=16, seed=1)


def cells_of(adata: ad.AnnData, condition: str) -> pd.Index:
    return adata.obs_names[adata.obs["perturbation"] == condition]


class TestHeldOut:
    @pytest.mark.parametrize(
        "split",
        [
            lambda adata: split_cells(adata),
            lambda adata: split_conditions(adata, *LABELS),
            lambda adata: split_perturbations(adata, *LABELS),
            lambda adata: split_pairs(adata, *LABELS, 0, 0.5),
            lambda adata: split_pairs(adata, *LABELS, 1, 0.5),
            lambda adata: split_pairs(adata, *LABELS, 2),
            lambda adata: split_pairs_out_of_distribution(adata, *LABELS, 0.5),
            lambda adata: split_batches(adata, "replicate", ["replicate_1"]),
        ],
    )
    def test_splits_of_the_package_pass(self, screen, split):
        split(screen)
        table = check_leakage(screen)
        assert list(table.index) == ["held out", "duplicated cells", "cells used", "controls"]
        assert table.loc["duplicated cells", "status"] == "passed"

    def test_a_training_cell_of_a_held_out_condition(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"])
        screen.obs.loc[cells_of(screen, "P002")[:3], "split"] = "train"
        with pytest.raises(ScreenError, match=r"conditions held out are seen.*'P002 \(3 cells\)'"):
            check_leakage(screen)

    def test_a_validation_cell_counts_as_seen(self, screen):
        split_conditions(screen, *LABELS, ["P001"])
        screen.obs.loc[cells_of(screen, "P001")[:1], "split"] = "validation"
        with pytest.raises(ScreenError, match="P001"):
            check_leakage(screen)

    def test_a_held_out_condition_that_was_all_moved_to_training(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"])
        screen.obs.loc[cells_of(screen, "P001"), "split"] = "train"
        with pytest.raises(ScreenError, match="P001"):
            check_leakage(screen)

    def test_the_same_pair_in_the_other_order(self, screen):
        pair = next(c for c in screen.obs["perturbation"].cat.categories if "+" in c)
        split_conditions(screen, *LABELS, [pair])
        screen.obs["perturbation"] = screen.obs["perturbation"].astype(str)
        cell = cells_of(screen, pair)[0]
        screen.obs.loc[cell, ["perturbation", "split"]] = [
            "+".join(pair.split("+")[::-1]),
            "train",
        ]
        with pytest.raises(ScreenError, match=pair.replace("+", r"\+")):
            check_leakage(screen)

    def test_a_pair_with_a_perturbation_held_out(self, screen):
        pair = next(c for c in screen.obs["perturbation"].cat.categories if "+" in c)
        part = pair.split("+")[0]
        split_perturbations(screen, *LABELS, [part])
        screen.obs.loc[cells_of(screen, pair)[:1], "split"] = "train"
        with pytest.raises(ScreenError, match=f"perturbations held out are seen.*{part}"):
            check_leakage(screen)

    def test_a_batch(self, screen):
        split_batches(screen, "replicate", ["replicate_2"])
        moved = (screen.obs["replicate"] == "replicate_2") & (screen.obs["perturbation"] == "P001")
        screen.obs.loc[moved, "split"] = "train"
        with pytest.raises(ScreenError, match="batches held out are seen.*replicate_2"):
            check_leakage(screen)

    def test_controls_of_a_held_out_batch_are_reported(self, screen):
        split_batches(
            screen,
            "replicate",
            ["replicate_2"],
            perturbation_key="perturbation",
            control="control",
            train_on_controls=True,
            validation_size=0,
        )
        n_control = (screen.obs["perturbation"] == "control").sum()
        table = check_leakage(screen)
        assert table.loc["held out", "status"] == "passed"
        assert table.loc["controls", "status"] == "reported"
        assert f"{n_control} in train, 0 in validation" in table.loc["controls", "detail"]

    def test_a_dose(self, screen):
        screen.obs["perturbation"] = np.where(np.arange(1_000) % 4, "A", "control")
        screen.obs["dose"] = np.where(np.arange(1_000) % 4, np.arange(1_000) % 4, 0)
        split_doses(screen, *LABELS, "dose")
        assert check_leakage(screen).loc["held out", "status"] == "passed"
        screen.obs.loc[screen.obs_names[3], "split"] = "train"
        with pytest.raises(ScreenError, match="doses held out are seen.*A:3"):
            check_leakage(screen)


class TestOwnColumn:
    """A split that was not made here has no record."""

    def test_by_cell_unless_told(self, screen):
        screen.obs["mine"] = np.where(np.arange(1_000) % 2, "train", "test")
        table = check_leakage(screen, "mine")
        assert table.loc["held out", "status"] == "not checked"
        assert table.loc["controls", "status"] == "not checked"

    def test_conditions(self, screen):
        screen.obs["mine"] = np.where(screen.obs["perturbation"] == "P001", "test", "train")
        arguments = {"perturbation_key": "perturbation", "control": "control"}
        check_leakage(screen, "mine", held_out_by="condition", **arguments)
        with pytest.raises(ScreenError, match="P002"):
            check_leakage(
                screen, "mine", held_out_by="condition", held_out=["P001", "P002"], **arguments
            )
        with pytest.raises(ScreenError, match="perturbation_key"):
            check_leakage(screen, "mine", held_out_by="condition")
        with pytest.raises(ValueError, match="held_out_by='gene'"):
            check_leakage(screen, "mine", held_out_by="gene")

    def test_perturbations_of_test_cells(self, screen):
        screen.obs["mine"] = np.where(screen.obs["perturbation"] == "P001", "test", "train")
        with pytest.raises(ScreenError, match="P001"):  # in pairs that are trained on
            check_leakage(
                screen,
                "mine",
                held_out_by="perturbation",
                perturbation_key="perturbation",
                control="control",
            )

    def test_doses_and_batches_need_their_columns(self, screen):
        split_cells(screen)
        for by, key in (("dose", "dosage_key"), ("batch", "batch_key")):
            with pytest.raises(ScreenError, match=key):
                check_leakage(
                    screen, held_out_by=by, perturbation_key="perturbation", control="control"
                )


class TestDuplicates:
    def duplicate(self, screen: ad.AnnData, dense: bool) -> ad.AnnData:
        split_cells(screen)
        test = screen[screen.obs["split"] == "test"][:2].copy()
        test.obs["split"] = "train"
        test.obs_names = ["copy_1", "copy_2"]
        both = ad.concat([screen, test])
        if dense:
            both.X = both.X.toarray()
        return both

    @pytest.mark.parametrize("dense", [False, True])
    def test_identical_counts(self, screen, dense):
        with pytest.raises(ScreenError, match=r"4 cells have identical counts.*\(test\) and "):
            check_leakage(self.duplicate(screen, dense))

    def test_stored_zeros_and_unsorted_genes_do_not_hide_a_copy(self, screen):
        both = self.duplicate(screen, dense=False)
        last = both.X[-1].toarray().ravel()
        order = np.random.default_rng(0).permutation(len(last))
        row = sp.csr_matrix((last[order], order, [0, len(last)]), shape=(1, len(last)))
        both.X = sp.vstack([both.X[:-1], row], format="csr")
        with pytest.raises(ScreenError, match="4 cells have identical counts"):
            check_leakage(both)

    def test_identical_names(self, screen):
        split_cells(screen)
        names = screen.obs_names.to_numpy(dtype=object).copy()
        train, test = (np.flatnonzero(screen.obs["split"] == p)[0] for p in ("train", "test"))
        names[train] = names[test]
        screen.obs_names = pd.Index(names)
        with pytest.raises(ScreenError, match="2 cells have identical names"):
            check_leakage(screen)

    def test_copies_within_a_part_or_unused_are_no_leak(self, screen):
        both = self.duplicate(screen, dense=False)
        both.obs.loc[["copy_1", "copy_2"], "split"] = ["test", "unused"]
        assert check_leakage(both).loc["duplicated cells", "status"] == "passed"

    def test_cells_of_few_genes_are_not_compared(self, screen):
        split_cells(screen)
        screen.X = sp.csr_matrix((1_000, 60), dtype=np.float32)
        detail = check_leakage(screen).loc["duplicated cells", "detail"]
        assert "1000 cells with fewer than 10 genes" in detail
        with pytest.raises(ScreenError, match="identical counts"):
            check_leakage(screen, min_genes=0)

    def test_a_layer(self, screen):
        both = self.duplicate(screen, dense=False)
        both.X = None
        assert "no counts" in check_leakage(both).loc["duplicated cells", "detail"]
        with pytest.raises(ScreenError, match="identical counts"):
            check_leakage(both, layer="counts")
        with pytest.raises(ScreenError, match="no layer 'raw'"):
            check_leakage(both, layer="raw")


class TestGeneSelection:
    def test_is_that_of_scanpy_on_training_cells(self, screen):
        split_cells(screen)
        selected = select_genes(screen, n_top_genes=20)
        training = screen[screen.obs["split"] == "train"].copy()
        sc.pp.normalize_total(training, target_sum=1e4)
        sc.pp.log1p(training)
        sc.pp.highly_variable_genes(training, n_top_genes=20)
        assert (selected == training.var["highly_variable"]).all()
        assert selected.sum() == 20

    def test_does_not_depend_on_test_cells(self, screen):
        split_cells(screen)
        before = select_genes(screen, n_top_genes=20, layer="counts").copy()
        test = (screen.obs["split"] != "train").to_numpy()
        counts = screen.layers["counts"].toarray()
        counts[test] = np.random.default_rng(0).poisson(5, counts[test].shape)
        screen.layers["counts"] = sp.csr_matrix(counts)
        assert (select_genes(screen, n_top_genes=20, layer="counts") == before).all()

    def test_passes_and_survives_an_h5ad_and_the_choice_of_genes(self, screen, tmp_path):
        split_conditions(screen, *LABELS)
        select_genes(screen, n_top_genes=20, batch_key="replicate")
        chosen = screen[:, screen.var["highly_variable"]].copy()
        chosen.write_h5ad(tmp_path / "screen.h5ad")
        table = check_leakage(ad.read_h5ad(tmp_path / "screen.h5ad"), min_genes=0)
        assert table.loc["cells used", "status"] == "passed"

    def test_on_all_cells(self, screen):
        split_cells(screen)
        record_cells_used(screen, "highly_variable", np.ones(1_000, dtype=bool))
        with pytest.raises(ScreenError, match="'highly_variable' was computed on 200 cells that"):
            check_leakage(screen)

    def test_on_the_training_cells_of_another_split(self, screen):
        split_cells(screen, seed=0)
        select_genes(screen, n_top_genes=20)
        split_cells(screen, seed=1)
        with pytest.raises(ScreenError, match="cells that are held out"):
            check_leakage(screen)

    def test_on_unused_cells_of_held_out_conditions(self, screen):
        split_pairs_out_of_distribution(screen, *LABELS)
        record_cells_used(screen, "rank_genes_groups", screen.obs["split"] != "test")
        with pytest.raises(ScreenError, match="'rank_genes_groups' was computed on"):
            check_leakage(screen)

    def test_overwritten_by_a_selection_on_all_cells(self, screen):
        split_cells(screen)
        select_genes(screen, n_top_genes=20)
        screen.var["highly_variable"] = np.roll(screen.var["highly_variable"], 1)
        with pytest.raises(ScreenError, match="genes differ"):
            check_leakage(screen)

    def test_record_that_no_longer_fits_its_cells(self, screen):
        split_cells(screen, test_size=0)
        select_genes(screen, n_top_genes=20)
        used = screen.obs["used_for_highly_variable"].to_numpy().copy()
        used[[np.flatnonzero(used)[0], np.flatnonzero(~used)[0]]] ^= True
        screen.obs["used_for_highly_variable"] = used
        with pytest.raises(ScreenError, match="compute it again"):
            check_leakage(screen)

    def test_cells_dropped_after_the_selection_are_reported(self, screen):
        split_cells(screen)
        select_genes(screen, n_top_genes=20)
        dropped = np.flatnonzero(screen.obs["split"] == "train")[:7]
        left = screen[np.setdiff1d(np.arange(1_000), dropped)].copy()
        assert "7 cells that were used" in check_leakage(left).loc["cells used", "detail"]

    def test_named_but_not_recorded(self, screen):
        split_cells(screen)
        screen.var["highly_variable"] = True
        table = check_leakage(screen)
        assert table.loc["cells used", "status"] == "not checked"
        assert "highly_variable" in table.loc["cells used", "detail"]
        with pytest.raises(ScreenError, match="not recorded on which cells 'highly_variable'"):
            check_leakage(screen, selections=["highly_variable"])

    def test_validation_cells_are_reported(self, screen):
        split_cells(screen)
        record_cells_used(screen, "panel", screen.obs["split"] != "test")
        assert "160 cells for validation" in check_leakage(screen).loc["cells used", "detail"]
        assert set(screen.uns[CELLS_USED_UNS_KEY]) == {"panel"}

    def test_refusals(self, screen):
        split_cells(screen)
        with pytest.raises(ScreenError, match="there are 60 genes"):
            select_genes(screen, n_top_genes=61)
        with pytest.raises(ScreenError, match="no layer 'raw'"):
            select_genes(screen, n_top_genes=5, layer="raw")
        with pytest.raises(ScreenError, match="no column 'lane'"):
            select_genes(screen, n_top_genes=5, batch_key="lane")
        with pytest.raises(ScreenError, match="1000 booleans"):
            record_cells_used(screen, "panel", [True])
        with pytest.raises(ScreenError, match="view"):
            record_cells_used(screen[:5], "panel", np.ones(5, dtype=bool))


def test_all_leaks_are_named_at_once(screen):
    split_conditions(screen, *LABELS, ["P001"])
    screen.obs.loc[cells_of(screen, "P001")[:1], "split"] = "train"
    record_cells_used(screen, "panel", np.ones(1_000, dtype=bool))
    with pytest.raises(ScreenError, match=r"P001.*'panel'"):
        check_leakage(screen)
