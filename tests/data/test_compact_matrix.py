"""Compact matrices against the matrices they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scvi_sams.data.matrices import CompactMatrix, compact_size, compact_table


def random_matrix(largest: int = 9, n_columns: int = 40) -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    values = rng.integers(1, largest + 1, (30, n_columns)) * (rng.random((30, n_columns)) < 0.3)
    values[4] = 0  # a cell without an entry
    values[0, :2] = 0, largest
    return sparse.csr_matrix(values.astype(np.float32))


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(9, torch.uint8), (255, torch.uint8), (256, torch.int16), (40_000, torch.float32)],
)
def test_rows_are_those_of_the_matrix_in_the_smallest_type(largest, dtype):
    matrix = random_matrix(largest)
    indices = np.random.default_rng(1).permutation(30)[:20]
    compact = CompactMatrix(matrix, indices)
    assert compact.values.dtype == dtype
    assert len(compact) == 20
    index = torch.tensor([3, 0, 19, 3])
    expected = matrix[indices[index.numpy()]].toarray()
    rows, position = compact.dense(index)
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), expected)
    np.testing.assert_array_equal(position.numpy(), np.flatnonzero(expected))


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_what_is_no_count_stays_a_float(value):
    matrix = sparse.csr_matrix([[0.0, value], [2.0, 0.0]])
    compact = CompactMatrix(matrix, np.array([0, 1]))
    assert compact.values.dtype == torch.float32
    assert compact.dense(torch.tensor([0, 1]))[0].tolist() == [[0.0, value], [2.0, 0.0]]


def test_many_columns_need_a_larger_index():
    matrix = sparse.csr_matrix(([1.0], ([0], [39_999])), shape=(1, 40_000))
    compact = CompactMatrix(matrix, np.array([0]))
    assert compact.columns.dtype == torch.int32
    assert compact.dense(torch.tensor([0]))[1].tolist() == [39_999]


def test_repeated_and_zero_entries_are_one_and_none():
    matrix = sparse.csr_matrix(([1.0, 2.0, 0.0], [1, 1, 0], [0, 2, 3]), shape=(2, 2))
    rows, position = CompactMatrix(matrix, np.array([0, 1])).dense(torch.tensor([0, 1]))
    assert (rows.tolist(), position.tolist()) == ([[0, 3], [0, 0]], [1])
    assert matrix.nnz == 3  # the screen itself is left alone


def test_no_row_and_rows_without_entries():
    compact = CompactMatrix(random_matrix(), np.array([4, 4]))
    assert compact.dense(torch.tensor([0, 1]))[0].abs().sum() == 0
    assert len(CompactMatrix(random_matrix(), np.array([], dtype=int))) == 0


def test_sizes_are_foreseen():
    matrix, indices = random_matrix(), np.arange(5, 25)
    as_sparse, as_table = compact_size(matrix, indices)
    assert as_sparse == CompactMatrix(matrix, indices).nbytes
    assert as_table == compact_table(matrix, indices).nbytes
    assert compact_size(matrix.toarray(), indices) == (None, as_table)


@pytest.mark.parametrize("as_array", [False, True])
def test_table_holds_the_rows(as_array):
    matrix = random_matrix(300)
    table = compact_table(matrix.toarray() if as_array else matrix, np.array([7, 2]))
    assert table.dtype == torch.int16
    np.testing.assert_array_equal(table.numpy(), matrix[[7, 2]].toarray())


@pytest.mark.parametrize("kind", ["sparse", "array"])
def test_chunks_are_put_below_each_other_in_the_largest_of_their_types(monkeypatch, kind):
    monkeypatch.setattr("scvi_sams.data.matrices.CHUNK_CELLS", 30)
    monkeypatch.setattr("scvi_sams.data.matrices._PIECE_VALUES", 30 * random_matrix().shape[1])
    matrix = sparse.vstack([random_matrix(9), random_matrix(300), random_matrix(9)], "csr")
    if kind == "sparse":
        compact = CompactMatrix(matrix, np.arange(90))
        found, dtype = compact.dense(torch.arange(90))[0], compact.values.dtype
    else:
        found = compact_table(matrix.toarray(), np.arange(90))
        dtype = found.dtype
    assert dtype == torch.int16
    np.testing.assert_array_equal(found.numpy(), matrix.toarray())
