"""Cells on disk against the same cells in memory."""

from __future__ import annotations

import tracemalloc

import anndata
import numpy as np
import pytest
import torch
import zarr
from anndata.io import read_elem, sparse_dataset

import scvi_sams
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data.loader import DeviceCells, DiskCells, PoolSampler, reads_from_disk

# What anndata says of its own future defaults, when it writes Zarr.
pytestmark = pytest.mark.filterwarnings("ignore:.*[zZ]arr v[23]:UserWarning")

NONZERO = SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY
CELLS = np.random.default_rng(0).permutation(500)[:321]


def manager(adata: anndata.AnnData):
    scvi_sams.SAMSVAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        control="control",
        batch_key="replicate",
        continuous_covariate_keys=["stress"],
    )
    return scvi_sams.SAMSVAE(adata, n_latent=3, n_hidden=8).adata_manager


@pytest.fixture(scope="module")
def screen() -> anndata.AnnData:
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=500, n_genes=40, n_perturbations=6, n_pairs=2, n_latent=3, library_size=60.0
    )
    adata.X = adata.layers["counts"].copy()
    adata.X[7, 3] = 300  # needs a larger type than the rest
    adata.obs["stress"] = np.random.default_rng(1).normal(size=adata.n_obs)
    del adata.layers["counts"]
    return adata


@pytest.fixture(scope="module")
def in_memory(screen):
    return manager(screen.copy())


@pytest.fixture(scope="module", params=["h5ad", "h5ad, dense", "zarr"])
def on_disk(request, screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen")
    screen = screen.copy()
    if request.param == "zarr":
        screen.write_zarr(folder / "screen.zarr")
        store = zarr.open_group(folder / "screen.zarr", mode="r")
        obs, var = read_elem(store["obs"]), read_elem(store["var"])
        yield manager(anndata.AnnData(sparse_dataset(store["X"]), obs=obs, var=var))
        return
    if "dense" in request.param:
        screen.X = screen.X.toarray()
    screen.write_h5ad(folder / "screen.h5ad")
    adata = anndata.read_h5ad(folder / "screen.h5ad", backed="r")
    yield manager(adata)
    adata.file.close()


def own_cells(manager, indices=CELLS):
    """Minibatches as scvi-tools gives them."""
    dataset = manager.create_torch_dataset(indices)
    return lambda batch: {key: torch.as_tensor(value) for key, value in dataset[batch].items()}


def assert_same_cells(found, expected):
    assert found.keys() - {NONZERO} == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].layout == torch.strided
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_disk_is_told_from_memory(in_memory, on_disk):
    assert reads_from_disk(on_disk)
    assert not reads_from_disk(in_memory)


@pytest.mark.parametrize("shuffle", [True, False])
def test_minibatches_of_pools(in_memory, on_disk, shuffle):
    cells, expected = DiskCells(on_disk, CELLS), own_cells(in_memory)
    n_cells = 0
    for batch in PoolSampler(cells, 32, shuffle, chunk_size=10, preload_nchunks=6):
        found = cells[batch]
        assert_same_cells(found, expected(batch.pool[batch.start : batch.stop]))
        n_cells += len(found["X"])
        assert len(cells._pool) <= 60 + 32  # all that is in memory
    assert n_cells == len(cells) == 321


def test_cells_on_the_device_come_from_disk(in_memory, on_disk, monkeypatch):
    monkeypatch.setattr("scvi_sams.data.matrices.CHUNK_CELLS", 50)
    expected = DeviceCells(in_memory, CELLS, nonzero_counts=True)
    found = DeviceCells(on_disk, CELLS, nonzero_counts=True)
    needed = DeviceCells.required_bytes(on_disk, CELLS)
    assert 0 < found.nbytes <= needed
    for batch in (np.arange(20), [300, 5, 5, 17]):
        assert_same_cells(found[batch], own_cells(in_memory)(batch))
        if NONZERO in found[batch]:
            np.testing.assert_array_equal(found[batch][NONZERO], expected[batch][NONZERO])


def test_positions_of_counts_come_on_request(on_disk):
    cells = DiskCells(on_disk, CELLS, nonzero_counts=True)
    for batch in PoolSampler(cells, 64, True):
        found = cells[batch]
        if NONZERO in found:
            np.testing.assert_array_equal(found[NONZERO], found["X"].flatten().nonzero()[:, 0])


def test_a_dense_pool_is_never_held_as_floats(tmp_path, monkeypatch):
    """Its table has a byte a count, and of what is read a piece alone is there besides."""
    monkeypatch.setattr("scvi_sams.data.matrices._PIECE_VALUES", 50_000)
    counts = np.random.default_rng(0).poisson(1.0, (4_000, 1_000)).astype(np.float32)
    screen = anndata.AnnData(counts, obs={"perturbation": ["control", "A"] * 2_000})
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    scvi_sams.SAMSVAE.setup_anndata(backed, perturbation_key="perturbation", control="control")
    registered = scvi_sams.SAMSVAE._get_most_recent_anndata_manager(backed, required=True)
    cells = DiskCells(registered, np.arange(4_000))
    (first, *_) = PoolSampler(cells, 128, True, preload_nchunks=16)
    tracemalloc.start()
    found = cells[first]["X"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    backed.file.close()
    np.testing.assert_array_equal(found, counts[first.pool[first.start : first.stop]])
    assert len(first.pool) * 1_000 * 4 > 15e6  # bytes of the pool as it is on disk
    assert peak < 3e6


def test_scvi_tools_reads_them_too(in_memory, on_disk):
    """In the order of the file, where other processes form the minibatches."""
    found, expected = (own_cells(manager)([9, 2, 100]) for manager in (on_disk, in_memory))
    order = [
        np.argsort(cells["extra_continuous_covs"].numpy().ravel()) for cells in (found, expected)
    ]
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key][order[0]], value[order[1]], err_msg=key)
