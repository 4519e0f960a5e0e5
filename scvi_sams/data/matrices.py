"""Matrices of cells: rows read from disk, and rows kept as small tensors on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np
import torch
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse
from zarr import Array as ZarrArray

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.joined import check_sources

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MatrixRows: TypeAlias = sparse.csr_matrix | np.ndarray
"""Rows of a matrix in memory."""

_CHECKED_ENTRIES = 2**24  # indices looked at together
_MAX_GAP = 64  # rows: as many are read faster than a new piece is begun
_MAX_PIECE = 4_096  # rows, so that sparse requests do not bring the whole matrix
_PIECE_VALUES = 4_000_000  # of a dense piece: 16 MB of float32


def check_structure(matrix: Any, source: str) -> None:
    """Check the indices of a sparse matrix, which are trusted wherever it is read.

    Raises
    ------
    ScreenError
        If index pointers fall or end elsewhere than the entries, or an index is out of range.
    """
    is_disk = isinstance(matrix, CSRDataset | CSCDataset)
    if not is_disk and getattr(matrix, "format", None) not in ("csr", "csc"):
        return
    parts = matrix.group if is_disk else vars(matrix)
    starts, indices = (np.asarray(parts["indptr"][...]), parts["indices"])
    by_column = isinstance(matrix, CSCDataset) or getattr(matrix, "format", None) == "csc"
    n_rows, n_columns = matrix.shape[::-1] if by_column else matrix.shape
    mend = "The matrix is damaged: read the original file again."
    n_entries = indices.shape[0]
    if (
        len(starts) != n_rows + 1
        or starts[0] != 0
        or starts[-1] > n_entries
        or (np.diff(starts) < 0).any()
        or parts["data"].shape[0] != n_entries
    ):
        raise ScreenError(f"The index pointers of {source} do not rise to its entries. {mend}")
    for first in range(0, int(starts[-1]), _CHECKED_ENTRIES):
        piece = np.asarray(indices[first : min(first + _CHECKED_ENTRIES, int(starts[-1]))])
        faulty = np.flatnonzero((piece < 0) | (piece >= n_columns))
        if faulty.size:
            row = int(np.searchsorted(starts, first + faulty[0], side="right")) - 1
            raise ScreenError(
                f"{source} has an index out of range, {piece[faulty[0]]} of {n_columns}, in "
                f"{'column' if by_column else 'row'} number {row}. {mend}"
            )


def is_on_disk(values: Any) -> bool:
    """Whether a matrix of an AnnData is one that is read from a file or store when asked for."""
    return isinstance(values, CSRDataset | CSCDataset | h5py.Dataset | ZarrArray)


class DiskMatrix:
    """Rows of a matrix in an HDF5 file or a Zarr store, in any order.

    It is what a backed AnnData, or :func:`anndata.io.sparse_dataset`, gives: cells x genes, CSR or
    dense. Neighbouring rows are read at once, also over short gaps: that is some fifty times
    faster than row by row, and than anndata's own indexing.

    Examples
    --------
    >>> import tempfile, anndata, pathlib
    >>> adata = anndata.AnnData(sparse.csr_matrix([[0.0, 3.0], [1.0, 0.0], [0.0, 2.0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "screen.h5ad"
    ...     adata.write_h5ad(path)
    ...     backed = anndata.read_h5ad(path, backed="r")
    ...     print(DiskMatrix(backed.X)[np.array([2, 0])].toarray())
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
        check_sources(values)
        self.shape: tuple[int, int] = tuple(values.shape)
        self.is_sparse = isinstance(values, CSRDataset)
        if self.is_sparse:
            group = values.group
            self._data, self._columns = group["data"], group["indices"]
            # Of sparse matrices alone, as of those in memory.
            self.indptr = np.asarray(group["indptr"][...], dtype=np.int64)
        else:
            self._data = values

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> MatrixRows:
        """Read rows by their numbers, in any order."""
        index = np.asarray(index, dtype=np.int64)
        if not self.is_sparse:
            rows = np.empty((len(index), self.shape[1]), self._data.dtype)
            for place, piece in self.dense_pieces(index):
                rows[place] = piece
            return rows
        stored, place = np.unique(index, return_inverse=True)
        sparse_rows = self._sparse_rows(stored)
        in_order = np.array_equal(place, np.arange(len(stored)))
        return sparse_rows if in_order else sparse_rows[place]

    def dense_pieces(self, index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read rows of a dense matrix piece by piece, each with the places it has in `index`."""
        order = np.argsort(index, kind="stable")
        stored = np.asarray(index, dtype=np.int64)[order]
        n_done = 0
        for piece in row_pieces(stored, rows_at_once(self)):
            first, last = int(piece[0]), int(piece[-1]) + 1
            rows = np.asarray(self._data[first:last])
            if len(piece) != last - first:  # gaps, or a row that is asked for twice
                rows = rows[piece - first]
            yield order[n_done : n_done + len(piece)], rows
            n_done += len(piece)

    def _sparse_rows(self, stored: np.ndarray) -> sparse.csr_matrix:
        """Read rows in increasing order into one buffer, which is filled piece by piece."""
        lengths = self.indptr[stored + 1] - self.indptr[stored]
        indptr = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        data = np.empty(indptr[-1], self._data.dtype)
        columns = np.empty(indptr[-1], self._columns.dtype)
        n_done = 0
        for piece in row_pieces(stored):
            first, last = int(piece[0]), int(piece[-1]) + 1
            place = slice(indptr[n_done], indptr[n_done + len(piece)])
            start, stop = self.indptr[first], self.indptr[last]
            kept: Any = slice(None)
            if len(piece) < last - first:  # rows of gaps are read, and left out
                is_asked = np.zeros(last - first, bool)
                is_asked[piece - first] = True
                kept = np.repeat(is_asked, np.diff(self.indptr[first : last + 1]))
            data[place] = self._data[start:stop][kept]
            columns[place] = self._columns[start:stop][kept]
            n_done += len(piece)
        return sparse.csr_matrix((data, columns, indptr), shape=(len(stored), self.shape[1]))


def rows_at_once(matrix: Any) -> int:
    """Rows of a matrix that make a piece of some megabytes, if they are dense."""
    if getattr(matrix, "is_sparse", sparse.issparse(matrix)):
        return _MAX_PIECE
    return int(np.clip(_PIECE_VALUES // max(1, matrix.shape[1]), 1, _MAX_PIECE))


def row_pieces(stored: np.ndarray, n_at_most: int | None = None) -> list[np.ndarray]:
    """Cut increasing row numbers where a gap is long, and pieces of too many rows."""
    if len(stored) == 0:
        return []
    n_at_most = n_at_most or _MAX_PIECE
    pieces = []
    for near in np.split(stored, np.flatnonzero(np.diff(stored) > _MAX_GAP) + 1):
        bounds = np.arange(near[0] + n_at_most, near[-1] + 1, n_at_most)
        pieces.extend(np.split(near, np.searchsorted(near, bounds)))
    return pieces


CHUNK_CELLS = 10_000  # read at once, so that a second copy of the screen never exists
_SAMPLE_CELLS = 1_000  # that say of a screen on disk how large its counts are
_CHUNK_VALUES = 1_000_000


class CompactMatrix:
    """Rows of a sparse matrix in the smallest types that hold them exactly.

    Counts below 256 take one byte and a column of fewer than 32,768 two, so that an entry takes
    three bytes where scipy takes eight. A minibatch is formed on the device from the numbers of
    its cells, and is the same as from the matrix itself. Increasing `indices` are read fastest
    from disk.

    Examples
    --------
    >>> counts = sparse.csr_matrix([[0, 3], [0, 0], [1, 0]])
    >>> compact = CompactMatrix(counts, np.array([2, 0]))
    >>> compact.dense(torch.tensor([1, 0]))[0]
    tensor([[0., 3.],
            [1., 0.]])
    >>> compact.values.dtype
    torch.uint8
    """

    def __init__(
        self,
        matrix: sparse.csr_matrix | DiskMatrix,
        indices: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_columns = matrix.shape[1]
        size = _n_entries(matrix, indices)
        columns = torch.empty(size, dtype=_column_type(self.n_columns), device=device)
        values = torch.empty(size, dtype=torch.uint8, device=device)
        starts, n_entries = [np.zeros(1, dtype=np.int64)], 0
        for _, rows in _chunks(matrix, indices, CHUNK_CELLS):
            rows = _canonical(rows)
            place = slice(n_entries, n_entries + rows.nnz)
            values = _widened(values, rows)
            values[place] = torch.from_numpy(rows.data.astype(np.float32)).to(values.dtype)
            columns[place] = torch.from_numpy(rows.indices).to(columns.dtype)
            starts.append(n_entries + rows.indptr[1:].astype(np.int64))
            n_entries += rows.nnz
        self.columns, self.values = columns[:n_entries], values[:n_entries]
        # On the host too, so that the size of a minibatch is known without asking the device.
        self._starts = torch.from_numpy(np.concatenate(starts))
        self.starts = self._starts.to(device)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def nbytes(self) -> int:
        """Memory that the matrix takes on its device."""
        return sum(part.nbytes for part in (self.starts, self.columns, self.values))

    def dense(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Read some rows, by their numbers on the host.

        Returns
        -------
        tuple of Tensor
            The rows, float32 of shape ``(n_rows, n_columns)``, and where their entries are in them
            if they are flattened, shape ``(n_entries,)``.
        """
        device = self.starts.device
        n_rows = len(index)
        n_entries = int((self._starts[index + 1] - self._starts[index]).sum())
        index = index.to(device)
        start = self.starts[index]
        length = self.starts[index + 1] - start
        first = length.cumsum(0) - length
        row = torch.repeat_interleave(
            torch.arange(n_rows, device=device), length, output_size=n_entries
        )
        entry = torch.arange(n_entries, device=device) + (start - first).index_select(0, row)
        position = row * self.n_columns + self.columns.index_select(0, entry).long()
        rows = torch.zeros(n_rows * self.n_columns, device=device)
        rows.scatter_(0, position, self.values.index_select(0, entry).float())
        return rows.view(n_rows, self.n_columns), position


def compact_table(
    matrix: MatrixRows | DiskMatrix, indices: np.ndarray, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows of a matrix that is mostly not zero, in the smallest type that holds them exactly.

    Examples
    --------
    >>> compact_table(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1]))
    tensor([[3, 0]], dtype=torch.uint8)
    """
    table = torch.empty(len(indices), matrix.shape[1], dtype=torch.uint8, device=device)
    for place, rows in _dense_chunks(matrix, indices):
        table = _widened(table, rows)
        table[place] = torch.from_numpy(rows.astype(np.float32, copy=False)).to(table.dtype)
    return table


def compact_rows(
    matrix: MatrixRows | DiskMatrix, indices: np.ndarray, device: torch.device | str = "cpu"
) -> CompactMatrix | Tensor:
    """Rows of a matrix as a :class:`CompactMatrix` or as a table, whichever is smaller."""
    value = None
    if isinstance(matrix, DiskMatrix) and matrix.is_sparse:
        value = _smallest_type(_values(matrix[indices[:_SAMPLE_CELLS]]))
    as_sparse, as_table = compact_size(matrix, indices, value)
    if as_sparse is not None and as_sparse < as_table:
        return CompactMatrix(matrix, indices, device)
    return compact_table(matrix, indices, device)


def compact_size(
    matrix: MatrixRows | DiskMatrix, indices: np.ndarray, value: torch.dtype | None = None
) -> tuple[int | None, int]:
    """Bytes that rows would take at most as a :class:`CompactMatrix`, if sparse, and as a table.

    Values are of the smallest type for them unless `value` says it; on disk, where they are not
    read, of the largest.

    Examples
    --------
    >>> compact_size(sparse.csr_matrix([[0.5, 3.0], [0.0, 0.0]]), np.array([0, 1]))
    (36, 16)
    """
    if value is None:
        on_disk = isinstance(matrix, DiskMatrix)
        value = torch.float32 if on_disk else _smallest_type(_values(matrix))
    table = len(indices) * matrix.shape[1] * value.itemsize
    if not hasattr(matrix, "indptr"):
        return None, table
    per_entry = _column_type(matrix.shape[1]).itemsize + value.itemsize
    return _n_entries(matrix, indices) * per_entry + 8 * (len(indices) + 1), table


def _n_entries(matrix: Any, indices: np.ndarray) -> int:
    """Stored entries of rows of a CSR matrix."""
    return int((matrix.indptr[indices + 1] - matrix.indptr[indices]).sum())


def _chunks(matrix: Any, indices: np.ndarray, n_at_once: int) -> Iterator[tuple[slice, Any]]:
    """Rows of a matrix in pieces, with where they belong."""
    for first in range(0, len(indices), n_at_once):
        place = slice(first, min(first + n_at_once, len(indices)))
        yield place, matrix[indices[place]]


def _dense_chunks(matrix: Any, indices: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """The same as dense rows, of which only a few megabytes are held at once."""
    on_disk = isinstance(matrix, DiskMatrix)
    if on_disk and not matrix.is_sparse:
        yield from matrix.dense_pieces(indices)
        return
    for place, rows in _chunks(matrix, indices, CHUNK_CELLS if on_disk else rows_at_once(matrix)):
        yield place, rows if isinstance(rows, np.ndarray) else rows.toarray()


def _column_type(n_columns: int) -> torch.dtype:
    return torch.int16 if n_columns <= torch.iinfo(torch.int16).max else torch.int32


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The matrix with sorted columns, each entry once and none zero; itself if it is so."""
    if matrix.has_canonical_format and np.count_nonzero(matrix.data) == matrix.nnz:
        return matrix
    matrix = matrix.copy()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _widened(kept: Tensor, rows: MatrixRows) -> Tensor:
    """Tensor of the same values, of a type that holds those of further rows too."""
    return kept.to(torch.promote_types(kept.dtype, _smallest_type(_values(rows))))


def _values(matrix: Any) -> np.ndarray:
    """What a matrix in memory holds, in one dimension."""
    return matrix.data if sparse.issparse(matrix) else matrix.reshape(-1)


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


def rows_of(matrix: Any, rows: Any) -> Any:
    """Some rows of a matrix, in memory or on disk, in any order."""
    return (DiskMatrix(matrix) if is_on_disk(matrix) else matrix)[rows]
