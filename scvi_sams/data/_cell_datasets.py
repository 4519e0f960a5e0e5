"""Cells a minibatch at a time: from the AnnData, from tensors on the device, or from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from torch.utils.data import BatchSampler, Dataset, RandomSampler, SequentialSampler

from scvi_sams._constants import SAMS_REGISTRY_KEYS

from ._compact_matrix import CompactMatrix, compact_rows, compact_size, to_dense
from ._disk_matrix import DiskMatrix, is_on_disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi.data import AnnDataManager
    from torch import Tensor

    from ._disk_matrix import MatrixRows
    from ._pools import PoolBatch

__all__ = [
    "DeviceCells",
    "DiskCells",
    "HostCells",
    "minibatch_as_formed",
    "minibatch_sampler",
    "reads_from_disk",
]

_DOSAGE = SAMS_REGISTRY_KEYS.PERTURBATION_KEY


class HostCells(Dataset):
    """Cells read from the AnnData, as scvi-tools does, but for doses that stay sparse.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    indices
        Cells of the data set, shape ``(n_cells,)``.
    data_and_attributes
        Registered data to read, with their types if a dict; all by default.
    load_sparse_tensor
        Whether to give sparse counts as sparse tensors.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
    ) -> None:
        types = _types(adata_manager, data_and_attributes)
        self.indices = np.asarray(indices)
        self._reads_in_order = reads_from_disk(adata_manager)  # HDF5 does, and scvi-tools sorts
        self._dosage: sparse.csr_matrix | None = None
        if types.pop(_DOSAGE, None) is not None:
            self._dosage = adata_manager.get_from_registry(_DOSAGE)
        self._others = adata_manager.create_torch_dataset(
            data_and_attributes=types, load_sparse_tensor=load_sparse_tensor
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Read a minibatch: the cells at some positions of ``indices``."""
        index = self.indices[np.asarray(batch)]
        if self._reads_in_order:
            index = np.sort(index)
        tensors = {key: torch.as_tensor(value) for key, value in self._others[index].items()}
        if self._dosage is not None:
            rows = self._dosage[index].tocoo()
            tensors[_DOSAGE] = _sparse_tensor(
                torch.from_numpy(np.stack([rows.row, rows.col]).astype(np.int64)),
                torch.from_numpy(rows.data.astype(np.float32)),
                rows.shape,
            )
        return tensors


class DeviceCells(Dataset):
    """Cells kept as compact tensors on a device, where minibatches are formed.

    A minibatch is that of :class:`HostCells`. Cells on disk are read in pieces, so that only the
    compact tensors need memory.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    indices
        Cells of the data set, shape ``(n_cells,)``.
    device
        Where to keep them.
    data_and_attributes
        Registered data to keep, with their types if a dict; all by default.
    nonzero_counts
        Whether to add the positions of the counts that are not zero, where they are sparse: the
        likelihood needs the gamma function at those alone.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray,
        device: torch.device | str = "cpu",
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        nonzero_counts: bool = False,
    ) -> None:
        self.indices = np.asarray(indices)
        registered = _registered(adata_manager, data_and_attributes)
        cells, self._place = self.indices, None
        if any(isinstance(values, DiskMatrix) for values, _ in registered.values()):
            cells, place = np.unique(self.indices, return_inverse=True)  # as they are stored
            self._place = torch.from_numpy(place)
        self._cells = _CompactCells(registered, cells, device, nonzero_counts)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Memory that the cells take on their device."""
        return self._cells.nbytes

    @staticmethod
    def required_bytes(adata_manager: AnnDataManager, indices: np.ndarray) -> int:
        """Memory that cells would take at most."""
        total = 0
        for key, (values, _) in _registered(adata_manager, None).items():
            as_sparse, as_table = compact_size(values, indices)
            if as_sparse is not None and (key == _DOSAGE or as_sparse < as_table):
                total += as_sparse
            else:
                total += as_table
        return total

    def __getitem__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Form a minibatch: the cells at some positions of ``indices``."""
        index = torch.as_tensor(batch)
        return self._cells.minibatch(index if self._place is None else self._place[index])


class DiskCells(Dataset):
    """Cells that stay on disk, read a pool of minibatches at a time.

    Cells of a pool are kept as compact tensors on a device, where its minibatches are formed: at
    any time there are as many in memory as a pool has. A minibatch is that of :class:`HostCells`,
    in the order that was asked for.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    indices
        Cells of the data set, shape ``(n_cells,)``.
    device
        Where to keep the cells of a pool.
    data_and_attributes
        Registered data to read, with their types if a dict; all by default.
    nonzero_counts
        As in :class:`DeviceCells`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray,
        device: torch.device | str = "cpu",
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        nonzero_counts: bool = False,
    ) -> None:
        self.indices = np.asarray(indices)
        self._registered = _registered(adata_manager, data_and_attributes)
        self._device = device
        self._nonzero_counts = nonzero_counts
        self._pool: np.ndarray | None = None
        self._cells: _CompactCells | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: PoolBatch) -> dict[str, Tensor]:
        """Form a minibatch of a pool, which is read if it is not the one in memory."""
        if self._cells is None or self._pool is not batch.pool:
            self._cells = None  # never two pools
            self._cells = self._read(self.indices[batch.pool])
            self._pool = batch.pool
        return self._cells.minibatch(torch.arange(batch.start, batch.stop))

    def _read(self, cells: np.ndarray) -> _CompactCells:
        rows = {
            key: (values.rows(cells) if isinstance(values, DiskMatrix) else values[cells], dtype)
            for key, (values, dtype) in self._registered.items()
        }
        return _CompactCells(rows, np.arange(len(cells)), self._device, self._nonzero_counts)


class _CompactCells:
    """Registered data of some cells as compact tensors, from which minibatches are formed."""

    def __init__(
        self,
        registered: dict[str, tuple[MatrixRows | DiskMatrix, torch.dtype]],
        indices: np.ndarray,
        device: torch.device | str,
        nonzero_counts: bool,
    ) -> None:
        self.nonzero_counts = nonzero_counts
        self.sparse: dict[str, CompactMatrix] = {}
        self.tables: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}
        for key, (values, dtype) in registered.items():
            kept = compact_rows(values, indices, device, True if key == _DOSAGE else None)
            if isinstance(kept, CompactMatrix):
                self.sparse[key] = kept
            else:
                self.tables[key] = kept
                self._types[key] = dtype

    @property
    def nbytes(self) -> int:
        """Memory that the cells take on their device."""
        of_tables = sum(table.nbytes for table in self.tables.values())
        return of_tables + sum(matrix.nbytes for matrix in self.sparse.values())

    def minibatch(self, index: Tensor) -> dict[str, Tensor]:
        """Form a minibatch of the cells at some positions, on the host."""
        tensors = {}
        if self.tables:
            on_device = index.to(next(iter(self.tables.values())).device)
            for key, table in self.tables.items():
                tensors[key] = table.index_select(0, on_device).to(self._types[key])
        for key, matrix in self.sparse.items():
            rows = matrix.rows(index)
            if key == _DOSAGE:
                tensors[key] = _sparse_tensor(
                    torch.stack([rows.row, rows.column]),
                    rows.value,
                    (len(index), matrix.n_columns),
                )
                continue
            tensors[key], position = to_dense(rows, len(index), matrix.n_columns)
            if key == REGISTRY_KEYS.X_KEY and self.nonzero_counts:
                tensors[SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY] = position
        return tensors


def _types(
    adata_manager: AnnDataManager, data_and_attributes: list[str] | dict[str, Any] | None
) -> dict[str, Any]:
    """Type of each registered datum in a minibatch, as scvi-tools gives it."""
    dataset = adata_manager.create_torch_dataset(data_and_attributes=data_and_attributes)
    return dict(dataset.keys_and_dtypes)


def reads_from_disk(adata_manager: AnnDataManager) -> bool:
    """Whether any registered matrix stays on disk."""
    keys = adata_manager.data_registry
    return any(is_on_disk(adata_manager.get_from_registry(key)) for key in keys)


def minibatch_sampler(
    cells: Dataset, batch_size: int, shuffle: bool = False, drop_last: bool = False
) -> BatchSampler:
    """Positions of the cells of whole minibatches, which a data set here reads at once.

    Parameters
    ----------
    cells
        The data set.
    batch_size
        Cells in a minibatch.
    shuffle
        Whether the order is random, from torch's generator; that of the data set otherwise.
    drop_last
        Whether to leave out a last minibatch of fewer cells.
    """
    order = RandomSampler(cells) if shuffle else SequentialSampler(cells)  # type: ignore[arg-type]
    return BatchSampler(order, batch_size=batch_size, drop_last=drop_last)


def minibatch_as_formed(batch: Any) -> Any:
    """Collate nothing: a data set here gives whole minibatches."""
    return batch


def _registered(
    adata_manager: AnnDataManager, data_and_attributes: list[str] | dict[str, Any] | None
) -> dict[str, tuple[MatrixRows | DiskMatrix, torch.dtype]]:
    """Each registered datum, and its type in a minibatch."""
    registered = {}
    for key, dtype in _types(adata_manager, data_and_attributes).items():
        values = adata_manager.get_from_registry(key)
        if is_on_disk(values):
            values = DiskMatrix(values)
        elif sparse.issparse(values):
            values = values.tocsr()
        else:
            values = np.asarray(values)
            values = values.reshape(len(values), -1)
        registered[key] = values, torch.from_numpy(np.zeros(0, dtype)).dtype
    return registered


def _sparse_tensor(position: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(
        position, values, shape, check_invariants=False, is_coalesced=True
    )
