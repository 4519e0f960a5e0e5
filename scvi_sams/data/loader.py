"""Minibatches of cells kept on a device, or read from disk in shuffled pools of chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.dataloaders import AnnDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.matrices import (
    DiskMatrix,
    compact_rows,
    compact_size,
    compact_table,
    is_on_disk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence, Sized

    from anndata import AnnData
    from scvi.data import AnnDataManager

    from scvi_sams.data.matrices import CompactMatrix, MatrixRows

    Registered = dict[str, tuple[MatrixRows | DiskMatrix, torch.dtype]]


def cells_of(adata: AnnData, indices: Any = None) -> np.ndarray:
    """Positions of the cells that somebody names, in the order asked for.

    Cells are named by positions (negative ones count from the end), a boolean mask, names, a
    slice or a single one of them; all by default.

    Examples
    --------
    >>> import anndata, pandas as pd
    >>> adata = anndata.AnnData(obs=pd.DataFrame(index=["c1", "c2", "c3"]))
    >>> cells_of(adata, ["c3", "c1"]), cells_of(adata, [True, False, True])
    (array([2, 0]), array([0, 2]))
    """
    if indices is None or isinstance(indices, slice):
        cells = np.arange(adata.n_obs)[indices or slice(None)]
    else:
        asked = np.atleast_1d(np.asarray(indices))
        if not asked.size:
            asked = np.empty(0, np.int64)
        if asked.ndim != 1:
            raise ScreenError(f"indices of shape {asked.shape}: give one position a cell.")
        if asked.dtype == object:  # as pandas has them
            asked = np.array(asked.tolist())
        cells = _positions(adata, asked)
    if not cells.size:
        raise ScreenError(
            "indices name no cell. Give at least one (after train_size=1.0, say, there are no "
            "validation cells)."
        )
    return cells


def _positions(adata: AnnData, asked: np.ndarray) -> np.ndarray:
    n_cells, kind = adata.n_obs, asked.dtype.kind
    if kind == "b":
        if len(asked) != n_cells:
            raise ScreenError(
                f"indices is a mask of {len(asked)} cells, and there are {n_cells}: give one of "
                "all cells, or positions."
            )
        return np.flatnonzero(asked)
    if kind in "US":
        if not adata.obs_names.is_unique:
            raise ScreenError(
                "Names of cells repeat, so that indices cannot name them: give positions, or call "
                "`adata.obs_names_make_unique()`."
            )
        cells = adata.obs_names.get_indexer(asked.astype(str))
        if (cells < 0).any():
            raise ScreenError(
                f"indices name cells that adata.obs_names has not: {listed(asked[cells < 0])}."
            )
        return cells
    is_whole = kind in "iu" or (
        kind == "f" and bool(np.isfinite(asked).all() and (asked % 1 == 0).all())
    )
    if not is_whole:
        raise ScreenError(
            f"indices are of type {asked.dtype}: give positions, names of cells or a mask."
        )
    asked = asked.astype(np.int64)
    faulty = (asked < -n_cells) | (asked >= n_cells)
    if faulty.any():
        raise ScreenError(
            f"indices are out of range: {listed(asked[faulty])}, and there are {n_cells} cells."
        )
    return np.where(asked < 0, asked + n_cells, asked)


class PoolBatch(NamedTuple):
    """Cells `start` to before `stop` of a pool, which holds positions in a data set."""

    pool: np.ndarray
    start: int
    stop: int


class PoolSampler(DistributedSampler):
    """Minibatches of :class:`DiskCells`, pool after pool.

    Shuffled, the cells are cut into chunks of neighbours on disk; a pool is made of chunks in
    random order, whose cells are shuffled among each other. Every cell comes once an epoch, in a
    minibatch with cells of up to ``preload_nchunks`` places of the file, also where that is sorted
    by perturbation or batch. Names are those of annbatch, which reads so too. The order is random
    from torch's generator.

    Where several processes train, each has a data set of its own part of the cells: of the
    distributed samplers this is one that Lightning leaves as it is.
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
        for name in ("batch_size", "chunk_size", "preload_nchunks"):
            if (value := locals()[name]) < 1:
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
        for pool in self.pools():
            for start in range(0, len(pool), self.batch_size):
                stop = min(start + self.batch_size, len(pool))
                if stop - start == self.batch_size or not self.drop_last_batch:
                    yield PoolBatch(pool, start, stop)

    def pools(self) -> Iterator[np.ndarray]:
        """Give the pools of an epoch, as positions in the data set."""
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


class DeviceCells(Dataset):
    """Cells kept as compact tensors on a device, where minibatches are formed.

    A minibatch is that of scvi-tools' own data set. With `nonzero_counts` it has the positions of
    the counts that are not zero too, where counts are sparse: the likelihood needs the gamma
    function at those alone. Cells on disk are read in pieces, so that only the compact tensors
    need memory.
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
        self._device, self._nonzero_counts = device, nonzero_counts
        self._kept: dict[str, tuple[CompactMatrix | Tensor, torch.dtype]] = {}
        self._n_given = _n_given(self._registered, self.indices)
        self._start()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Any) -> dict[str, Tensor]:
        """Form a minibatch: the cells at some positions of ``indices``."""
        batch = torch.as_tensor(batch)
        return _narrowed(self._minibatch(self._place[batch]), self._n_given[batch.numpy()])

    @property
    def nbytes(self) -> int:
        """Memory that the cells take on their device."""
        return sum(kept.nbytes for kept, _ in self._kept.values())

    @staticmethod
    def required_bytes(adata_manager: AnnDataManager, indices: np.ndarray) -> int:
        """Memory that cells would take at most."""
        sizes = [
            compact_size(values, indices) for values, _ in _registered(adata_manager).values()
        ]
        return sum(min(size for size in pair if size is not None) for pair in sizes)

    def _start(self) -> None:
        cells, place = np.unique(self.indices, return_inverse=True)  # as they are stored
        self._place = torch.from_numpy(place)
        for key, (values, dtype) in self._registered.items():
            self._kept[key] = compact_rows(values, cells, self._device), dtype

    def _minibatch(self, index: Tensor) -> dict[str, Tensor]:
        """Form a minibatch of the rows that are kept, by their numbers on the host."""
        tensors, on_device = {}, index.to(self._device)
        for key, (kept, dtype) in self._kept.items():
            if isinstance(kept, Tensor):
                tensors[key] = kept.index_select(0, on_device).to(dtype)
                continue
            rows, position = kept.dense(index)
            tensors[key] = rows.to(dtype)
            if key == REGISTRY_KEYS.X_KEY and self._nonzero_counts:
                tensors[SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY] = position
        return tensors


class DiskCells(DeviceCells):
    """Cells that stay on disk, of which one pool of minibatches at a time is on the device."""

    def _start(self) -> None:
        self._pool: np.ndarray | None = None

    def __getitem__(self, batch: PoolBatch) -> dict[str, Tensor]:
        """Form a minibatch of a pool, which is read if it is not the one in memory."""
        if self._pool is not batch.pool:
            self._kept = {}  # never two pools
            cells = self.indices[batch.pool]
            for key, (values, dtype) in self._registered.items():
                if isinstance(values, DiskMatrix) and not values.is_sparse:
                    kept: Any = compact_table(values, cells, self._device)  # without a copy
                else:
                    kept = compact_rows(values[cells], np.arange(len(cells)), self._device)
                self._kept[key] = kept, dtype
            self._pool = batch.pool
        n_given = self._n_given[batch.pool[batch.start : batch.stop]]
        return _narrowed(self._minibatch(torch.arange(batch.start, batch.stop)), n_given)


# Columns of what cells received come in steps of as many, so that few widths occur.
_COLUMNS = 8
_OF_COLUMNS = (
    SAMS_REGISTRY_KEYS.PERTURBATION_KEY,
    SAMS_REGISTRY_KEYS.DOSE_KEY,
    SAMS_REGISTRY_KEYS.GUIDE_KEY,
)


def _n_given(registered: Registered, cells: np.ndarray) -> np.ndarray:
    """Number of perturbations of cells; known on the host, so that no device is asked for it."""
    if SAMS_REGISTRY_KEYS.DOSE_KEY not in registered:
        return np.zeros(len(cells), dtype=np.int32)
    doses: Any = registered[SAMS_REGISTRY_KEYS.DOSE_KEY][0]
    given = np.asarray((doses > 0).sum(axis=1)).ravel()
    return given[cells].astype(np.int32)


def _narrowed(tensors: dict[str, Tensor], n_given: np.ndarray) -> dict[str, Tensor]:
    """Leave out columns that no cell of a minibatch fills: the widest cell of all needs them."""
    width = max(1, -(-int(n_given.max(initial=0)) // _COLUMNS)) * _COLUMNS
    for key in _OF_COLUMNS:
        if key in tensors and tensors[key].shape[1] > width:
            tensors[key] = tensors[key][:, :width]
    return tensors


def reads_from_disk(adata_manager: AnnDataManager) -> bool:
    """Whether any registered matrix stays on disk."""
    keys = adata_manager.data_registry
    return any(is_on_disk(adata_manager.get_from_registry(key)) for key in keys)


def _registered(
    adata_manager: AnnDataManager,
    data_and_attributes: list[str] | dict[str, Any] | None = None,
) -> Registered:
    """Each registered datum, and its type in a minibatch, as scvi-tools gives it."""
    registered = {}
    dataset = adata_manager.create_torch_dataset(data_and_attributes=data_and_attributes)
    for key, dtype in dataset.keys_and_dtypes.items():
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


class OrderedAnnDataLoader(AnnDataLoader):
    """Minibatches of cells for the public methods, in the order of the indices.

    Those of scvi-tools' loader, which gives the cells of a minibatch in the order of the file if
    they stay on disk. From there they are read many minibatches at a time (:class:`DiskCells`), by
    this process alone.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        shuffle: bool = False,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int = 128,
        drop_last: bool = False,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        cells = cells_of(adata_manager.adata, indices)
        if reads_from_disk(adata_manager):
            dataset = DiskCells(adata_manager, cells, data_and_attributes=data_and_attributes)
            sampler = PoolSampler(dataset, batch_size, shuffle, drop_last)
            DataLoader.__init__(self, dataset, sampler=sampler, batch_size=None)
            return
        kwargs |= {"drop_last": drop_last, "data_and_attributes": data_and_attributes}
        super().__init__(
            adata_manager, indices=cells, batch_size=batch_size, shuffle=shuffle, **kwargs
        )
