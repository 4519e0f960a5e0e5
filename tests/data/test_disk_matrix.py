"""Rows on disk against the matrix in memory, whatever the store and the order."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pytest
import zarr
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from scvi_sams import ScreenError
from scvi_sams.data.matrices import (
    DiskMatrix,
    compact_size,
    is_on_disk,
    row_pieces,
    rows_at_once,
)

# What anndata says of its own future defaults, when it writes Zarr.
pytestmark = pytest.mark.filterwarnings("ignore:.*[zZ]arr v[23]:UserWarning")

N_ROWS = 10_000


@pytest.fixture(scope="module")
def matrix() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    counts = sparse.random(N_ROWS, 12, density=0.2, format="csr", dtype=np.float32, rng=rng)
    counts.data = np.ceil(9 * counts.data)
    return counts


@pytest.fixture(scope="module", params=["h5ad", "h5ad, dense", "zarr", "zarr, dense"])
def stored(request, matrix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    values = matrix.toarray() if "dense" in request.param else matrix
    if request.param.startswith("h5ad"):
        anndata.AnnData(values).write_h5ad(folder / "screen.h5ad")
        adata = anndata.read_h5ad(folder / "screen.h5ad", backed="r")
        yield adata.X
        adata.file.close()
        return
    store = zarr.open_group(folder / "screen.zarr", mode="w")
    write_elem(store, "X", values)
    yield store["X"] if "dense" in request.param else sparse_dataset(store["X"])


def dense(rows) -> np.ndarray:
    return rows.toarray() if sparse.issparse(rows) else rows


@pytest.mark.parametrize(
    "index",
    [
        np.arange(100, 400),
        np.arange(0, N_ROWS, 37),
        np.arange(0, N_ROWS, 1_000),
        np.array([N_ROWS - 1, 3, 9_000, 4, 3, 0]),
        np.arange(N_ROWS)[::-1],
        np.empty(0, dtype=np.int64),
    ],
    ids=["neighbours", "short gaps", "long gaps", "any order", "backwards", "none"],
)
def test_rows_are_those_of_the_matrix(stored, matrix, index):
    assert is_on_disk(stored)
    disk = DiskMatrix(stored)
    rows = disk[index]
    assert len(disk) == N_ROWS
    assert sparse.issparse(rows) == disk.is_sparse
    np.testing.assert_array_equal(dense(rows), matrix[index].toarray())
    as_sparse = 6 * matrix[index].nnz + 8 * (len(index) + 1) if disk.is_sparse else None
    assert compact_size(disk, index) == (as_sparse, 4 * len(index) * 12)


def test_dense_rows_come_in_small_pieces_that_know_their_places(stored, matrix, monkeypatch):
    monkeypatch.setattr("scvi_sams.data.matrices._PIECE_VALUES", 100 * 12)
    disk, index = DiskMatrix(stored), np.random.default_rng(1).integers(0, N_ROWS, 700)
    if disk.is_sparse:
        assert rows_at_once(disk) == 4_096
        return
    assert rows_at_once(disk) == 100
    found = np.full((700, 12), np.nan)
    for place, rows in disk.dense_pieces(index):
        assert np.ptp(index[place]) < 100
        found[place] = rows
    np.testing.assert_array_equal(found, matrix[index].toarray())


@pytest.mark.parametrize("step", [1, 5, 64, 65, 3_000])
def test_pieces_are_few_and_not_too_long(step):
    stored = np.arange(7, 60_000, step)
    pieces = row_pieces(stored)
    np.testing.assert_array_equal(np.concatenate(pieces), stored)
    assert all(0 <= piece[-1] - piece[0] < 4_096 for piece in pieces)
    assert len(pieces) == (len(stored) if step > 64 else -(-(stored[-1] - 6) // 4_096))


def test_matrices_by_gene_are_refused(matrix, tmp_path):
    with h5py.File(tmp_path / "matrix.h5", "w") as file:
        write_elem(file, "X", matrix.tocsc())
        with pytest.raises(ScreenError, match=r"by gene \(CSC\)"):
            DiskMatrix(sparse_dataset(file["X"]))


def test_matrices_in_memory_are_not_on_disk(matrix):
    assert not is_on_disk(matrix)
    assert not is_on_disk(matrix.toarray())
