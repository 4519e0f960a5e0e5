"""Digests of the counts of cells, by which copies of a cell are found."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from scvi_sams._exceptions import ScreenError

from ._messages import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = ["row_digests"]

_CELLS_PER_CHUNK = 20_000  # of the counts in memory at once; backed files work as well


def row_digests(
    adata: AnnData, layer: str | None, min_genes: int
) -> tuple[NDArray[np.uint64] | None, NDArray[np.bool_]]:
    """Digest the counts of each cell, whatever way they are stored.

    Parameters
    ----------
    adata
        The screen, cells x genes; dense or sparse, in memory or backed.
    layer
        Layer of the counts; ``X`` by default.
    min_genes
        Detected genes from which on counts tell cells apart.

    Returns
    -------
    A digest of each cell (None without counts), the same for the same counts, and whether the cell
    has enough genes.

    Raises
    ------
    ScreenError
        If the layer is absent.

    Examples
    --------
    >>> import anndata
    >>> adata = anndata.AnnData(np.array([[3.0, 1.0], [3.0, 1.0], [0.0, 1.0]]))
    >>> digests, enough = row_digests(adata, None, min_genes=2)
    >>> bool(digests[0] == digests[1]), bool(digests[0] == digests[2]), enough.tolist()
    (True, False, [True, True, False])
    """
    if layer is not None and layer not in adata.layers:
        raise ScreenError(f"There is no layer {layer!r}, only {listed(adata.layers)}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    enough = np.ones(adata.n_obs, dtype=bool)
    if matrix is None:
        return None, enough
    digests = np.empty(adata.n_obs, dtype=np.uint64)
    for start, rows in _chunks(matrix, adata.n_obs):
        for offset, (first, last) in enumerate(pairwise(rows.indptr)):
            digest = hashlib.blake2b(rows.indices[first:last].astype(np.int32).tobytes())
            digest.update(rows.data[first:last].astype(np.float64).tobytes())
            digests[start + offset] = int.from_bytes(digest.digest()[:8], "little")
            enough[start + offset] = last - first >= min_genes
    return digests, enough


def _chunks(matrix: Any, n_cells: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
    for start in range(0, n_cells, _CELLS_PER_CHUNK):
        rows = sparse.csr_matrix(matrix[start : start + _CELLS_PER_CHUNK], copy=True)
        rows.sum_duplicates()
        rows.eliminate_zeros()
        yield start, rows
