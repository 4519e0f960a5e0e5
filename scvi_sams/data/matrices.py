"""Matrices of cells: rows read from disk, and rows kept as small tensors on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import torch
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse
from zarr import Array as ZarrArray

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CompactMatrix",
    "DiskMatrix",
    "MatrixRows",
    "SparseRows",
    "compact_rows",
    "compact_size",
    "compact_table",
    "is_on_disk",
    "to_dense",
]


MatrixRows: TypeAlias = sparse.csr_matrix | np.ndarray
"""Rows of a matrix in memory."""

_MAX_GAP = 64  # rows: as many are read faster than a new piece is begun
_MAX_PIECE = 4_096  # rows, so that sparse requests do not bring the whole matrix


def is_on_disk(values: Any) -> bool:
    """Whether a matrix of an AnnData is one that is read from a file or store when asked for.

    Examples
    --------
    >>> is_on_disk(np.zeros((2, 3)))
    False
    """
    return isinstance(values, CSRDataset | CSCDataset | h5py.Dataset | ZarrArray)


class DiskMatrix:
    """Rows of a matrix in an HDF5 file or a Zarr store, in any order.

    Neighbouring rows are read at once, also over short gaps: that is some fifty times faster than
    row by row, and than anndata's own indexing.

    Parameters
    ----------
    values
        What a backed AnnData, or :func:`anndata.io.sparse_dataset`, gives as matrix: cells x
        genes, CSR or dense.

    Raises
    ------
    ScreenError
        If it is stored by gene (CSC), so that a row asks for the whole of it.

    Examples
    --------
    >>> import tempfile, anndata, pathlib
    >>> adata = anndata.AnnData(sparse.csr_matrix([[0.0, 3.0], [1.0, 0.0], [0.0, 2.0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "screen.h5ad"
    ...     adata.write_h5ad(path)
    ...     backed = anndata.read_h5ad(path, backed="r")
    ...     print(DiskMatrix(backed.X).rows(np.array([2, 0])).toarray())
    ...     backed.file.close()
    [[0. 2.]
     [0. 3.]]
    """

    def __init__(self, values: Any) -> None:
        if isinstance(values, CSCDataset):
            raise ScreenError(
                "The counts are stored by gene (CSC) on disk, where reading a cell reads all of "
                "them. Write them by cell (CSR), or read the screen into memory: "
                "`adata = adata.to_memory()`."
            )
        self.shape: tuple[int, int] = tuple(values.shape)
        self.is_sparse = isinstance(values, CSRDataset)
        self._starts: np.ndarray | None = None
        if self.is_sparse:
            group = values.group
            self._data, self._columns = group["data"], group["indices"]
            self._starts = np.asarray(group["indptr"][...], dtype=np.int64)
        else:
            self._data = values

    def __len__(self) -> int:
        return self.shape[0]

    def n_entries(self, index: np.ndarray) -> int:
        """Stored entries of some rows."""
        if self._starts is None:
            return len(index) * self.shape[1]
        return int((self._starts[index + 1] - self._starts[index]).sum())

    def rows(self, index: np.ndarray) -> MatrixRows:
        """Read some rows.

        Parameters
        ----------
        index
            Their numbers, in any order, shape ``(n_rows,)``.

        Returns
        -------
        CSR matrix or array, shape ``(n_rows, n_columns)``, in the order of ``index``.
        """
        index = np.asarray(index, dtype=np.int64)
        stored, place = np.unique(index, return_inverse=True)
        pieces = [self._piece(piece) for piece in row_pieces(stored)]
        if not self.is_sparse:
            rows = np.concatenate(pieces) if pieces else np.empty((0, self.shape[1]), np.float32)
            return rows[place]
        if not pieces:
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        rows = sparse.vstack(pieces, format="csr") if len(pieces) > 1 else pieces[0]
        return rows if len(index) == len(stored) and _is_range(place) else rows[place]

    def _piece(self, index: np.ndarray) -> MatrixRows:
        """Read rows that are close to each other, in increasing order."""
        first, last = int(index[0]), int(index[-1]) + 1
        if self._starts is None:
            return np.asarray(self._data[first:last])[index - first]
        starts = self._starts[first : last + 1]
        rows = sparse.csr_matrix(
            (
                np.asarray(self._data[starts[0] : starts[-1]]),
                np.asarray(self._columns[starts[0] : starts[-1]]),
                starts - starts[0],
            ),
            shape=(last - first, self.shape[1]),
        )
        return rows if len(index) == last - first else rows[index - first]


def row_pieces(stored: np.ndarray) -> list[np.ndarray]:
    """Cut increasing row numbers where a gap is long, and pieces that are."""
    if len(stored) == 0:
        return []
    pieces = []
    for near in np.split(stored, np.flatnonzero(np.diff(stored) > _MAX_GAP) + 1):
        if near[-1] - near[0] < _MAX_PIECE:
            pieces.append(near)
            continue
        bounds = np.arange(near[0] + _MAX_PIECE, near[-1] + 1, _MAX_PIECE)
        pieces.extend(np.split(near, np.searchsorted(near, bounds)))
    return pieces


def _is_range(place: np.ndarray) -> bool:
    return bool((place == np.arange(len(place))).all())


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
