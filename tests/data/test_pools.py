"""Orders in which cells on disk are read: each cell once, shuffled, in few places at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scvi_sams.data.loader import PoolSampler, shuffled_pools


class Cells(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.indices)


def some_cells(n_cells: int) -> Cells:
    return Cells(indices=np.random.default_rng(1).permutation(2 * n_cells)[:n_cells])


def read(sampler: PoolSampler) -> list[np.ndarray]:
    return [batch.pool[batch.start : batch.stop] for batch in sampler]


@pytest.mark.parametrize("n_cells", [1, 63, 64, 1_000, 1_024])
@pytest.mark.parametrize("batch_size", [1, 64, 500])
@pytest.mark.parametrize(("chunk_size", "preload_nchunks"), [(16, 8), (7, 3), (2_000, 1)])
def test_every_cell_comes_once(n_cells, batch_size, chunk_size, preload_nchunks):
    generator = np.random.default_rng(0)
    pools = list(shuffled_pools(n_cells, batch_size, chunk_size, preload_nchunks, generator))
    np.testing.assert_array_equal(np.sort(np.concatenate(pools)), np.arange(n_cells))
    for pool in pools[:-1]:
        assert len(pool) % batch_size == 0
        assert len(pool) <= chunk_size * preload_nchunks + batch_size


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("n_cells", [40, 1_000, 1_024])
def test_minibatches_are_whole(n_cells, shuffle, drop_last):
    sampler = PoolSampler(some_cells(n_cells), 64, shuffle, drop_last, 16, 8)
    batches = read(sampler)
    assert len(batches) == len(sampler) == (n_cells // 64 if drop_last else -(-n_cells // 64))
    assert all(len(batch) == 64 for batch in batches[:-1])
    cells = np.concatenate([np.empty(0, int), *batches])
    assert len(np.unique(cells)) == len(cells)
    assert drop_last or len(cells) == n_cells
    if not shuffle:
        np.testing.assert_array_equal(cells, np.arange(len(cells)))


def test_pools_are_of_few_places_of_the_file():
    cells = some_cells(10_000)
    for pool in {id(batch.pool): batch.pool for batch in PoolSampler(cells, 64, True)}.values():
        assert len(pool) <= 64 * 256 + 64
    rank = np.argsort(np.argsort(cells.indices))
    pools = {id(b.pool): b.pool for b in PoolSampler(cells, 64, True, False, 50, 10)}.values()
    assert len(pools) == 20
    for pool in pools:
        assert len(np.unique(rank[pool] // 50)) <= 10 + 64  # chunks, and cells left over


def test_minibatches_mix_what_the_file_has_apart():
    """Twenty conditions, one after another in the file: nearly as many in a minibatch."""
    n_cells, n_conditions = 20_000, 20
    cells = Cells(indices=np.arange(n_cells))
    condition = np.arange(n_cells) * n_conditions // n_cells
    found = [
        len(np.unique(condition[batch]))
        for batch in read(PoolSampler(cells, 128, True, True, chunk_size=25))
    ]
    by_chance = n_conditions * (1 - (1 - 1 / n_conditions) ** 128)
    assert np.mean(found) > 0.93 * by_chance


def test_order_is_that_of_the_seed():
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        sampler = PoolSampler(some_cells(500), 64, True, False, 16, 8)
        return np.concatenate(read(sampler) + read(sampler)).tolist()

    first = order(0)
    assert first == order(0) != order(1)
    assert first[:500] != first[500:]


@pytest.mark.parametrize("name", ["batch_size", "chunk_size", "preload_nchunks"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}=0: at least one"):
        PoolSampler(some_cells(3), **({"batch_size": 2} | {name: 0}))
