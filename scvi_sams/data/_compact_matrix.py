"""Matrices of cells as small tensors on a device, read a minibatch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from ._disk_matrix import DiskMatrix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CompactMatrix",
    "SparseRows",
    "compact_rows",
    "compact_size",
    "compact_table",
    "to_dense",
]

_CHUNK_CELLS = 10_000  # read at once, so that a second copy of the screen never exists
_CHUNK_VALUES = 1_000_000


class SparseRows(NamedTuple):
    """The non-zero entries of some rows of a matrix, in row order.

    Attributes
    ----------
    row, column
        Where each entry is, shape ``(n_entries,)``; rows are numbered as they were asked for.
    value
        What it is, float32, shape ``(n_entries,)``.
    """

    row: Tensor
    column: Tensor
    value: Tensor


class CompactMatrix:
    """Rows of a sparse matrix in the smallest types that hold them exactly.

    Counts below 256 take one byte and a column of fewer than 32,768 two, so that an entry takes
    three bytes where scipy takes eight. A minibatch is formed on the device from the numbers of
    its cells, and is the same as from the matrix itself.

    Parameters
    ----------
    matrix
        CSR matrix, cells x columns.
    indices
        Cells to keep, in the order in which they will be asked for.
    device
        Where to keep them.

    Examples
    --------
    >>> counts = sparse.csr_matrix([[0, 3], [0, 0], [1, 0]])
    >>> compact = CompactMatrix(counts, np.array([2, 0]))
    >>> compact.dense(torch.tensor([1, 0]))
    tensor([[0., 3.],
            [1., 0.]])
    >>> compact.values.dtype
    torch.uint8
    """

    def __init__(
        self,
        matrix: sparse.csr_matrix,
        indices: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> None:
        matrix = _canonical(matrix)
        self.n_columns = matrix.shape[1]
        starts = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(np.diff(matrix.indptr)[indices], out=starts[1:])
        column_type, value_type = _column_type(self.n_columns), _smallest_type(matrix.data)
        # On the host too, so that the size of a minibatch is known without asking the device.
        self._starts = torch.from_numpy(starts)
        self.starts = self._starts.to(device)
        self.columns = torch.empty(int(starts[-1]), dtype=column_type, device=device)
        self.values = torch.empty(int(starts[-1]), dtype=value_type, device=device)
        for first in range(0, len(indices), _CHUNK_CELLS):
            rows = matrix[indices[first : first + _CHUNK_CELLS]]
            place = slice(starts[first], starts[first] + rows.nnz)
            self.columns[place] = torch.from_numpy(rows.indices).to(column_type)
            self.values[place] = torch.from_numpy(rows.data.astype(np.float32)).to(value_type)

    @classmethod
    def stacked(cls, parts: list[CompactMatrix]) -> CompactMatrix:
        """Put matrices of the same columns below each other.

        Examples
        --------
        >>> part = CompactMatrix(sparse.csr_matrix([[0, 3]]), np.array([0]))
        >>> CompactMatrix.stacked([part, part]).dense(torch.tensor([1]))
        tensor([[0., 3.]])
        """
        stacked = cls.__new__(cls)
        stacked.n_columns = parts[0].n_columns
        lengths = torch.cat([part._starts.diff() for part in parts])
        stacked._starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        stacked.starts = stacked._starts.to(parts[0].starts.device)
        stacked.columns = torch.cat([part.columns for part in parts])
        # In the largest of their types.
        stacked.values = torch.cat([part.values for part in parts])
        return stacked

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def nbytes(self) -> int:
        """Memory that the matrix takes on its device."""
        return sum(part.nbytes for part in (self.starts, self.columns, self.values))

    def rows(self, index: Tensor) -> SparseRows:
        """Read some rows.

        Parameters
        ----------
        index
            Their numbers, on the host, shape ``(n_rows,)``.
        """
        device = self.starts.device
        n_entries = int((self._starts[index + 1] - self._starts[index]).sum())
        index = index.to(device)
        start = self.starts[index]
        length = self.starts[index + 1] - start
        first = length.cumsum(0) - length
        row = torch.repeat_interleave(
            torch.arange(len(index), device=device), length, output_size=n_entries
        )
        position = torch.arange(n_entries, device=device) + (start - first).index_select(0, row)
        return SparseRows(
            row,
            self.columns.index_select(0, position).long(),
            self.values.index_select(0, position).float(),
        )

    def dense(self, index: Tensor) -> Tensor:
        """Read some rows, shape ``(n_rows, n_columns)``."""
        return to_dense(self.rows(index), len(index), self.n_columns)[0]


def to_dense(rows: SparseRows, n_rows: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """Write sparse rows out, and say where their entries are in the flattened matrix."""
    position = rows.row * n_columns + rows.column
    dense = torch.zeros(n_rows * n_columns, device=position.device)
    dense.scatter_(0, position, rows.value)
    return dense.view(n_rows, n_columns), position


def compact_rows(
    matrix: sparse.csr_matrix | np.ndarray | DiskMatrix,
    indices: np.ndarray,
    device: torch.device | str = "cpu",
    as_sparse: bool | None = None,
) -> CompactMatrix | Tensor:
    """Rows of a matrix as a :class:`CompactMatrix` or as a table, whichever is smaller.

    Parameters
    ----------
    matrix
        In memory or on disk, cells x columns. From disk it is read in pieces; increasing
        ``indices`` are read fastest.
    indices
        Cells to keep, in the order in which they will be asked for.
    device
        Where to keep them.
    as_sparse
        Which of the two, if it is not to depend on the size.

    Examples
    --------
    >>> compact_rows(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1]))
    tensor([[3, 0]], dtype=torch.uint8)
    """
    if not isinstance(matrix, DiskMatrix):
        if as_sparse is None:
            sparse_size, table_size = compact_size(matrix, indices)
            as_sparse = sparse_size is not None and sparse_size < table_size
        return (CompactMatrix if as_sparse else compact_table)(matrix, indices, device)
    parts: list[Any] = []
    for first in range(0, max(1, len(indices)), _CHUNK_CELLS):
        rows = matrix.rows(indices[first : first + _CHUNK_CELLS])
        parts.append(compact_rows(rows, np.arange(rows.shape[0]), device, as_sparse))
        as_sparse = isinstance(parts[0], CompactMatrix)
    if len(parts) == 1:
        return parts[0]
    return CompactMatrix.stacked(parts) if as_sparse else torch.cat(parts)


def compact_table(
    matrix: sparse.csr_matrix | np.ndarray, indices: np.ndarray, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows of a matrix that is mostly not zero, in the smallest type that holds them exactly.

    Returns
    -------
    Shape ``(n_rows, n_columns)``, on the device.

    Examples
    --------
    >>> compact_table(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1]))
    tensor([[3, 0]], dtype=torch.uint8)
    """
    dtype = _smallest_type(_values(matrix))
    table = torch.empty(len(indices), matrix.shape[1], dtype=dtype, device=device)
    for first in range(0, len(indices), _CHUNK_CELLS):
        rows = matrix[indices[first : first + _CHUNK_CELLS]]
        rows = rows.toarray() if sparse.issparse(rows) else rows
        part = torch.from_numpy(rows.astype(np.float32, copy=False))
        table[first : first + len(rows)] = part.to(dtype)
    return table


def compact_size(
    matrix: sparse.csr_matrix | np.ndarray | DiskMatrix, indices: np.ndarray
) -> tuple[int | None, int]:
    """Bytes that rows would take at most as a :class:`CompactMatrix` and as a table.

    Values on disk are not read: they may need the largest type.

    Returns
    -------
    The two sizes; ``None`` for the first if the matrix is not sparse.

    Examples
    --------
    >>> compact_size(sparse.csr_matrix([[0.5, 3.0], [0.0, 0.0]]), np.array([0, 1]))
    (36, 16)
    """
    n_entries: int | None = None
    if isinstance(matrix, DiskMatrix):
        value = torch.float32.itemsize
        if matrix.is_sparse:
            n_entries = matrix.n_entries(indices)
    else:
        value = _smallest_type(_values(matrix)).itemsize
        if not isinstance(matrix, np.ndarray):
            n_entries = int(np.diff(matrix.indptr)[indices].sum())
    table = len(indices) * matrix.shape[1] * value
    if n_entries is None:
        return None, table
    per_entry = _column_type(matrix.shape[1]).itemsize + value
    return n_entries * per_entry + 8 * (len(indices) + 1), table


def _values(matrix: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """What a matrix holds, in one dimension."""
    return matrix.reshape(-1) if isinstance(matrix, np.ndarray) else matrix.data


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The matrix with sorted columns, each entry once and none zero; itself if it is so."""
    if matrix.has_canonical_format and np.count_nonzero(matrix.data) == matrix.nnz:
        return matrix
    matrix = matrix.copy()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _column_type(n_columns: int) -> torch.dtype:
    return torch.int16 if n_columns <= torch.iinfo(torch.int16).max else torch.int32


def _smallest_type(values: np.ndarray) -> torch.dtype:
    """The smallest type that holds values exactly, of those that torch computes with."""
    largest = 0.0
    for first in range(0, len(values), _CHUNK_VALUES):
        part = values[first : first + _CHUNK_VALUES]
        if part.min() < 0 or not np.array_equal(np.rint(part), part):
            return torch.float32
        largest = max(largest, float(part.max()))
    for candidate in (torch.uint8, torch.int16):
        if largest <= torch.iinfo(candidate).max:
            return candidate
    return torch.float32
