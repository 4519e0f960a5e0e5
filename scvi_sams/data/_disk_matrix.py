"""Rows of a matrix that stays on disk, read in few long pieces."""

from __future__ import annotations

from typing import Any, TypeAlias

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse
from zarr import Array as ZarrArray

from scvi_sams._exceptions import ScreenError

__all__ = ["DiskMatrix", "MatrixRows", "is_on_disk"]

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
        pieces = [self._piece(piece) for piece in _pieces(stored)]
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


def _pieces(stored: np.ndarray) -> list[np.ndarray]:
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
