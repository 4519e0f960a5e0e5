"""In which order cells on disk are read: long pieces, shuffled well enough to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

__all__ = ["PoolBatch", "PoolSampler", "shuffled_pools"]


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
