from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_conditions
from scvi_sams.tl import add_permuted_null

TARGETS = ["A", "A", "B", "C", "NT"]
NAMES = ["A_1", "A_2", "B_1", "C_1", "NT_1"]


def _null(names):
    return [name for name in names if name.startswith("permuted_null_")]


def _screen(n_cells=600, seed=0):
    rng = np.random.default_rng(seed)
    propensity = rng.choice([0.1, 0.6], (n_cells, 1))  # shallow and deep cells
    calls = rng.random((n_cells, 5)) < propensity * [1, 0.5, 1, 0.3, 1]
    calls[~calls.any(axis=1), 4] = True
    adata = anndata.AnnData(
        sparse.csr_matrix(rng.poisson(2, (n_cells, 4)).astype(np.float32) + 1),
        pd.DataFrame({"lane": rng.choice(["x", "y"], n_cells)}, [f"c{k}" for k in range(n_cells)]),
    )
    adata.obsm["guides"] = sparse.csr_matrix(calls.astype(np.int8))
    adata.uns["guides"] = pd.DataFrame({"target": TARGETS}, index=NAMES)
    return adata


def test_each_has_the_cells_of_a_real_one_in_every_batch():
    adata = _screen()
    table = add_permuted_null(adata, control="NT", batch_key="lane", n_null=7)
    SAMSVAE.setup_anndata(adata, guide_key="guides_with_null", control="NT")
    conditions = registered_conditions(SAMSVAE._get_most_recent_anndata_manager(adata))
    received = pd.DataFrame(
        conditions.cell_matrix.toarray() > 0, adata.obs_names, conditions.perturbations
    )
    counts = received.groupby(adata.obs["lane"].to_numpy()).sum()
    assert table.index.tolist() == _null(conditions.perturbations)
    assert len(table) == 7
    assert set(table["like"]) == {"A", "B", "C"}
    for name, row in table.iterrows():
        np.testing.assert_array_equal(counts[name], counts[row["like"]])
        assert row["n_cells"] == received[name].sum()
    # Cells keep their own guides, and no null is another one.
    n_own = adata.obsm["guides"].shape[1]
    assert (adata.obsm["guides_with_null"][:, :n_own] != adata.obsm["guides"]).nnz == 0
    assert len({column.tobytes() for column in received[table.index].to_numpy().T}) == 7


def test_cells_of_many_guides_have_null_ones_as_often():
    adata = _screen(6_000)
    table = add_permuted_null(adata, control="NT", n_null=40)
    n_guides = np.asarray(adata.obsm["guides"].sum(1)).ravel()
    null = adata.obsm["guides_with_null"][:, 5:].toarray()
    small = (table["n_cells"] == table["n_cells"].min()).to_numpy()
    share = np.array([null[n_guides == k][:, small].mean() for k in (1, 2, 3)])
    # In proportion to the guides of a cell, as far as draws without replacement allow.
    np.testing.assert_allclose(share / share[0], [1, 2, 3], rtol=0.15)


def test_a_seed_gives_the_same_draw_and_another_another():
    draws = []
    for seed in (0, 0, 1):
        adata = _screen()
        add_permuted_null(adata, control="NT", seed=seed)
        draws.append(adata.obsm["guides_with_null"].toarray())
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_what_cannot_be_used():
    adata = _screen()
    with pytest.raises(ValueError, match="n_null=0"):
        add_permuted_null(adata, n_null=0)
    with pytest.raises(ScreenError, match="no column 'plate'"):
        add_permuted_null(adata, control="NT", batch_key="plate")
    add_permuted_null(adata, control="NT")
    with pytest.raises(ScreenError, match="holds 'permuted_null_001' already"):
        add_permuted_null(adata, "guides_with_null", control="NT")


def test_without_a_control():
    adata = _screen()
    adata.uns["guides"]["target"] = ["A", "A", "B", "C", "D"]
    add_permuted_null(adata)
    with pytest.warns(UserWarning, match="No cell is a control"):
        SAMSVAE.setup_anndata(adata, guide_key="guides_with_null")
    conditions = registered_conditions(SAMSVAE._get_most_recent_anndata_manager(adata))
    assert conditions.perturbations[:4] == ["A", "B", "C", "D"]
    assert len(_null(conditions.perturbations)) == 4
