"""Genes are selected on training cells, and what was computed on others is found."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

from scvi_sams import ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    CELLS_USED_UNS_KEY,
    check_leakage,
    record_cells_used,
    select_genes,
    split_cells,
    split_conditions,
    split_pairs_out_of_distribution,
)

LABELS = ("perturbation", "control")


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=1_000, n_genes=60, n_perturbations=12, n_pairs=16, seed=1)


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

    @pytest.mark.parametrize(("n_added", "n_dropped"), [(3, 3), (4, 0), (0, 2)])
    def test_overwritten_by_a_selection_on_all_cells(self, screen, n_added, n_dropped):
        split_cells(screen)
        select_genes(screen, n_top_genes=20)
        selected = screen.var["highly_variable"].to_numpy().copy()
        was_selected, was_not = np.flatnonzero(selected), np.flatnonzero(~selected)
        selected[was_selected[:n_dropped]] = False
        selected[was_not[:n_added]] = True
        screen.var["highly_variable"] = selected
        with pytest.raises(ScreenError, match=f"{n_added + n_dropped} genes differ"):
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

    def test_by_variance_of_the_counts(self, screen):
        """The flavour that wants counts gets them, untransformed."""
        pytest.importorskip("skmisc")
        split_cells(screen)
        selected = select_genes(screen, n_top_genes=20, flavor="seurat_v3")
        training = screen[screen.obs["split"] == "train"].copy()
        sc.pp.highly_variable_genes(training, n_top_genes=20, flavor="seurat_v3")
        assert (selected == training.var["highly_variable"]).all()

    def test_refusals(self, screen):
        screen.obs["split"] = "test"
        with pytest.raises(ScreenError, match=r"No cell of obs\['split'\] is for training"):
            select_genes(screen, n_top_genes=5)
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
