"""Minibatches of cells from the AnnData, from tensors on the device, or from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data.matrices import (
    CompactMatrix,
    DiskMatrix,
    compact_rows,
    compact_size,
    is_on_disk,
    to_dense,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence, Sized

    from scvi.data import AnnDataManager
    from torch import Tensor
    from torch.utils.data import Sampler

    from scvi_sams.data.matrices import MatrixRows

__all__ = [
    "DeviceCells",
    "DiskCells",
    "HostCells",
    "OrderedAnnDataLoader",
    "PoolBatch",
    "PoolSampler",
    "minibatch_as_formed",
    "minibatch_sampler",
    "reads_from_disk",
    "shuffled_pools",
]


class PoolBatch(NamedTuple):
    """A minibatch, and the pool that it is part of.

    Attributes
    ----------
    pool
        Positions of all cells of the pool in their data set, shape ``(n_pool,)``.
    start, stop
        Which of them make up the minibatch.
    """

    pool: np.ndarray
    start: int
    stop: int


class PoolSampler(DistributedSampler):
    """Minibatches of :class:`DiskCells`, pool after pool.

    Shuffled, the cells are cut into chunks of neighbours on disk; a pool is made of chunks in
    random order, whose cells are shuffled among each other. Every cell comes once an epoch, in a
    minibatch with cells of up to ``preload_nchunks`` places of the file, also where that is sorted
    by perturbation or batch. Names are those of annbatch, which reads so too.

    Where several processes train, each has a data set of its own part of the cells: of the
    distributed samplers this is one that Lightning leaves as it is.

    Parameters
    ----------
    cells
        The data set, with ``indices``.
    batch_size
        Cells in a minibatch.
    shuffle
        Whether the order is random, from torch's generator; that of the data set otherwise.
    drop_last
        Whether to leave out a last minibatch of fewer cells.
    chunk_size
        Cells of a chunk.
    preload_nchunks
        Chunks of a pool.

    Raises
    ------
    ValueError
        If a size is less than 1.
    """

    def __init__(
        self,
        cells: Sized,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        chunk_size: int = 256,
        preload_nchunks: int = 64,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "chunk_size": chunk_size,
            "preload_nchunks": preload_nchunks,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least one is needed.")
        super().__init__(cells, num_replicas=1, rank=0, shuffle=shuffle)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.drop_last_batch = drop_last  # of cells; `drop_last` is of replicas
        self.chunk_size = chunk_size
        self.preload_nchunks = preload_nchunks

    def __len__(self) -> int:
        n_cells = len(self.dataset)  # type: ignore[arg-type]
        n_full, left = divmod(n_cells, self.batch_size)
        return n_full + (left > 0 and not self.drop_last_batch)

    def __iter__(self) -> Iterator[PoolBatch]:
        """Give the minibatches of an epoch."""
        for pool in self._pools():
            for start in range(0, len(pool), self.batch_size):
                stop = min(start + self.batch_size, len(pool))
                if stop - start == self.batch_size or not self.drop_last_batch:
                    yield PoolBatch(pool, start, stop)

    def _pools(self) -> Iterator[np.ndarray]:
        n_cells = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            n_batches = max(1, self.chunk_size * self.preload_nchunks // self.batch_size)
            step = n_batches * self.batch_size
            for first in range(0, n_cells, step):
                yield np.arange(first, min(first + step, n_cells))
            return
        stored = np.argsort(self.dataset.indices, kind="stable")  # type: ignore[attr-defined]
        generator = np.random.default_rng(int(torch.empty((), dtype=torch.int64).random_()))
        for pool in shuffled_pools(
            n_cells, self.batch_size, self.chunk_size, self.preload_nchunks, generator
        ):
            yield stored[pool]


def shuffled_pools(
    n_cells: int,
    batch_size: int,
    chunk_size: int,
    preload_nchunks: int,
    generator: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Divide cells in the order of the disk into pools, each in random order.

    Pools but the last hold whole minibatches; cells that are left over wait for the next pool.

    Parameters
    ----------
    n_cells, batch_size, chunk_size
        Cells of all, of a minibatch and of a chunk.
    preload_nchunks
        Chunks of a pool.
    generator
        Source of the order.

    Examples
    --------
    >>> pools = list(shuffled_pools(10, 2, 3, 2, np.random.default_rng(0)))
    >>> [len(pool) for pool in pools], sorted(np.concatenate(pools).tolist())
    ([6, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    chunks = generator.permutation(-(-n_cells // chunk_size))
    waiting = np.empty(0, dtype=np.int64)
    for first in range(0, len(chunks), preload_nchunks):
        starts = chunks[first : first + preload_nchunks] * chunk_size
        cells = (starts[:, None] + np.arange(chunk_size)).ravel()
        pool = generator.permutation(np.concatenate([waiting, cells[cells < n_cells]]))
        is_last = first + preload_nchunks >= len(chunks)
        n_now = len(pool) if is_last else len(pool) // batch_size * batch_size
        pool, waiting = pool[:n_now], pool[n_now:]
        if len(pool):
            yield pool


class HostCells(Dataset):
    """Cells read from the AnnData, as scvi-tools does.

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
        self.indices = np.asarray(indices)
        self._reads_in_order = reads_from_disk(adata_manager)  # HDF5 does, and scvi-tools sorts
        self._cells = adata_manager.create_torch_dataset(
            data_and_attributes=data_and_attributes, load_sparse_tensor=load_sparse_tensor
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Read a minibatch: the cells at some positions of ``indices``."""
        index = self.indices[np.asarray(batch)]
        if self._reads_in_order:
            index = np.sort(index)
        return {key: torch.as_tensor(value) for key, value in self._cells[index].items()}


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
        for values, _ in _registered(adata_manager, None).values():
            as_sparse, as_table = compact_size(values, indices)
            total += as_table if as_sparse is None else min(as_sparse, as_table)
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
            kept = compact_rows(values, indices, device)
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


class OrderedAnnDataLoader(DataLoader):
    """Minibatches of cells for the public methods, in the order of the indices.

    In place of scvi-tools' loader, which makes the doses dense, and gives the cells of a minibatch
    in the order of the file if they stay on disk. From disk they are read many minibatches at a
    time (:class:`~scvi_sams.data.loader.DiskCells`), by this process alone.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    shuffle
        Whether the order is random.
    indices
        Cells, as numbers or as a mask; all by default.
    batch_size
        Cells in a minibatch.
    drop_last
        Whether to leave out a last minibatch of fewer cells.
    data_and_attributes
        Registered data to read, with their types if a dict; all by default.
    load_sparse_tensor
        Whether to give sparse counts as sparse tensors, where they are in memory.
    **kwargs
        Further arguments of :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        shuffle: bool = False,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int = 128,
        drop_last: bool = False,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        cells = np.arange(adata_manager.adata.n_obs) if indices is None else np.asarray(indices)
        if cells.dtype == bool:
            cells = np.flatnonzero(cells)
        sampler: Sampler
        dataset: DiskCells | HostCells
        if reads_from_disk(adata_manager):
            dataset = DiskCells(adata_manager, cells, data_and_attributes=data_and_attributes)
            sampler = PoolSampler(dataset, batch_size, shuffle, drop_last)
            kwargs |= {"num_workers": 0, "persistent_workers": False}
        else:
            dataset = HostCells(adata_manager, cells, data_and_attributes, load_sparse_tensor)
            sampler = minibatch_sampler(dataset, batch_size, shuffle, drop_last)
        super().__init__(
            dataset, sampler=sampler, batch_size=None, collate_fn=minibatch_as_formed, **kwargs
        )
