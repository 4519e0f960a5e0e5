"""Digests tell cells apart by their counts, not by how these are stored."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scvi_sams import ScreenError
from scvi_sams.evaluation import _leakage
from scvi_sams.evaluation._leakage import row_digests

COUNTS = np.random.default_rng(0).poisson(0.7, (31, 9))
STORAGES = [
    np.array,
    np.asfortranarray,
    sp.csr_matrix,
    sp.csc_matrix,
    sp.csr_array,
    sp.csc_array,
]


def digests_of(adata: ad.AnnData, layer: str | None = None) -> list[int]:
    return row_digests(adata, layer, 3)[0].tolist()


@pytest.fixture
def expected() -> list[int]:
    return digests_of(ad.AnnData(COUNTS.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cells_per_chunk", [1, 7, 1_000])
def test_do_not_depend_on_the_storage(storage, dtype, cells_per_chunk, monkeypatch, expected):
    monkeypatch.setattr(_leakage, "_CELLS_PER_CHUNK", cells_per_chunk)
    adata = ad.AnnData(np.zeros_like(COUNTS))
    adata.layers["counts"] = storage(COUNTS.astype(dtype))
    assert digests_of(adata, "counts") == expected


@pytest.mark.parametrize("storage", [np.array, sp.csr_matrix, sp.csc_matrix])
def test_backed(storage, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(_leakage, "_CELLS_PER_CHUNK", 7)
    ad.AnnData(storage(COUNTS.astype(np.float32))).write_h5ad(tmp_path / "screen.h5ad")
    assert digests_of(ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")) == expected


def test_same_counts_same_digest_and_no_others(expected):
    same = (COUNTS[:, None] == COUNTS[None]).all(-1)
    digests = np.array(expected)
    np.testing.assert_array_equal(digests[:, None] == digests, same)
    moved = COUNTS.copy()
    moved[:, [0, 1]] = moved[:, [1, 0]]  # the same numbers, of other genes
    changed = np.array(digests_of(ad.AnnData(moved.astype(np.float32)))) != digests
    np.testing.assert_array_equal(changed, COUNTS[:, 0] != COUNTS[:, 1])


def test_matrix_is_left_as_it_is():
    counts = sp.csr_matrix(COUNTS.astype(np.float32))
    counts.data[::3] = 0
    before = counts.copy()
    row_digests(ad.AnnData(counts), None, 3)
    assert counts.nnz == before.nnz
    np.testing.assert_array_equal(counts.data, before.data)


def test_cells_with_enough_genes():
    _, enough = row_digests(ad.AnnData(sp.csr_matrix(COUNTS.astype(np.float32))), None, 5)
    np.testing.assert_array_equal(enough, (COUNTS > 0).sum(1) >= 5)


def test_without_counts():
    adata = ad.AnnData(shape=(4, 3))
    digests, enough = row_digests(adata, None, 3)
    assert digests is None
    assert enough.all()
    with pytest.raises(ScreenError, match="no layer 'counts'"):
        row_digests(adata, "counts", 3)
