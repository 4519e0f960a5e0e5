"""Where minibatches are formed: the same cells, the same fit, and a fallback."""

from __future__ import annotations

import os
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.dataloaders import DataSplitter

import scvi_sams
from scvi_sams.data.loader import SAMS_REGISTRY_KEYS
from scvi_sams.train import SAMSDataSplitter

NONZERO = SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY


def simulate(density: float, as_array: bool = False, model_class=scvi_sams.SAMSVAE):
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=300, n_genes=40, n_perturbations=6, n_pairs=2, n_latent=3
    )
    counts = adata.layers["counts"].toarray()
    counts *= np.random.default_rng(0).random(counts.shape) < density
    counts[:, 0] += 1  # no cell without counts
    adata.layers["counts"] = counts if as_array else sparse.csr_matrix(counts)
    model_class.setup_anndata(
        adata,
        layer="counts",
        perturbation_key="perturbation",
        control="control",
        batch_key="replicate",
    )
    return adata


@pytest.fixture(scope="module", params=["sparse", "mostly not zero", "array"])
def adata(request):
    return simulate(0.1 if request.param == "sparse" else 0.9, request.param == "array")


def minibatches(splitter, loader="train_dataloader"):
    scvi.settings.seed = 0
    splitter.setup()
    return list(getattr(splitter, loader)())


def manager(adata):
    return scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=8).adata_manager


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_minibatches_are_those_of_scvi_tools(adata, placement, loader):
    kwargs = {"train_size": 0.7, "validation_size": 0.2, "batch_size": 64}
    expected = minibatches(DataSplitter(manager(adata), **kwargs), loader)
    splitter = SAMSDataSplitter(manager(adata), data_placement=placement, **kwargs)
    found = minibatches(splitter, loader)
    assert splitter.placement == placement
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) - {NONZERO} == set(theirs)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


def test_positions_of_counts_come_with_sparse_training_cells():
    splitter = SAMSDataSplitter(manager(simulate(0.1)), batch_size=64)
    for batch in minibatches(splitter):
        assert torch.equal(batch[NONZERO], batch["X"].flatten().nonzero().squeeze(1))
    assert all(NONZERO not in batch for batch in minibatches(splitter, "val_dataloader"))


def fit(adata, placement, model_class=scvi_sams.SAMSVAE, train=None, **kwargs):
    scvi.settings.seed = 0
    model = model_class(adata, n_latent=4, n_hidden=8, **kwargs)
    model.train(
        3,
        batch_size=64,
        accelerator="cpu",
        enable_progress_bar=False,
        check_val_every_n_epoch=1,
        data_placement=placement,
        logger=None,
        **(train or {}),
    )
    return model


@pytest.mark.parametrize("density", [0.1, 0.9])
@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (scvi_sams.SAMSVAE, {}),
        (scvi_sams.SAMSVAE, {"gene_likelihood": "zinb", "dispersion": "gene-batch"}),
        (scvi_sams.SAMSVAE, {"dispersion": "gene-batch", "dose_response": "hill"}),
        (scvi_sams.SAMSVAE, {"global_inference": "gradient"}),
        (scvi_sams.ConditionalVAE, {}),
    ],
)
def test_the_fit_does_not_depend_on_the_placement(density, model_class, settings):
    adata = simulate(density, model_class=model_class)
    on_device, on_host = (
        fit(adata, placement, model_class, **settings) for placement in ("device", "host")
    )
    for ours, theirs in zip(
        on_device.module.state_dict().values(), on_host.module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    for key in ("train_loss", "elbo_validation"):
        np.testing.assert_allclose(
            on_device.history[key].astype(float), on_host.history[key].astype(float), rtol=1e-5
        )


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 400 bytes."""
    known = {"SC_PHYS_PAGES": 4, "SC_PAGE_SIZE": 100}
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: known.get(name) or sysconf(name))


@pytest.mark.usefixtures("small_machine")
def test_too_large_a_screen_is_read_from_the_anndata(adata):
    with pytest.warns(UserWarning, match=r"data_placement='device': the cells take .* of cpu"):
        fit(adata, "device")
    splitter = SAMSDataSplitter(manager(adata))  # "auto" says nothing
    assert NONZERO not in minibatches(splitter)[0]
    assert splitter.placement == "host"


@pytest.fixture(scope="module")
def backed(adata, tmp_path_factory):
    """The same screen, its counts on disk, sorted by perturbation."""
    path = tmp_path_factory.mktemp("backed") / "screen.h5ad"
    stored = anndata.AnnData(adata.layers["counts"], obs=adata.obs[["perturbation", "replicate"]])
    stored[np.argsort(stored.obs["perturbation"].astype(str), kind="stable")].write_h5ad(path)
    stored = anndata.read_h5ad(path, backed="r")
    scvi_sams.SAMSVAE.setup_anndata(
        stored, perturbation_key="perturbation", control="control", batch_key="replicate"
    )
    yield stored
    stored.file.close()


def test_cells_on_disk_are_kept_on_the_device_if_they_fit(backed, request):
    splitter = SAMSDataSplitter(manager(backed), batch_size=64)
    found = minibatches(splitter)
    assert splitter.placement == "device"
    request.getfixturevalue("small_machine")
    splitter = SAMSDataSplitter(manager(backed), batch_size=64)
    from_disk = minibatches(splitter)
    assert splitter.placement == "disk"
    for cells in (found, from_disk):
        counts = torch.cat([batch["X"] for batch in cells]).numpy()
        expected = backed.to_memory()[splitter.train_idx].X
        expected = expected.toarray() if sparse.issparse(expected) else expected
        np.testing.assert_array_equal(
            counts[np.lexsort(counts.T)], expected[np.lexsort(expected.T)]
        )
    with pytest.warns(UserWarning, match=r"cells take up to .* of cpu.*data_placement='disk'"):
        fit(backed, "device")


def test_a_fit_from_disk_is_that_of_the_seed(backed):
    kwargs = {"datasplitter_kwargs": {"chunk_size": 8, "preload_nchunks": 4}}
    first, second = (fit(backed, "disk", train=kwargs) for _ in range(2))
    other = fit(backed, "disk", train={"datasplitter_kwargs": {"chunk_size": 8}})
    states = [model.module.state_dict() for model in (first, second, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_validation_cells_are_the_same_from_disk(backed):
    found, expected = (
        minibatches(
            SAMSDataSplitter(manager(backed), data_placement=placement, batch_size=16),
            "val_dataloader",
        )
        for placement in ("disk", "device")
    )
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)


def test_disk_is_for_cells_that_are_there(adata):
    with pytest.raises(ValueError, match=r"data_placement='disk', but .* in memory"):
        fit(adata, "disk")


def test_other_processes_do_not_read_pools(backed):
    splitter = SAMSDataSplitter(manager(backed), data_placement="disk", num_workers=1)
    splitter.setup()
    with pytest.warns(UserWarning, match="num_workers > 0"):
        assert splitter.placement == "host"


def test_processes_read_different_places_of_the_disk(backed):
    parts = []
    for rank in range(3):
        splitter = SAMSDataSplitter(manager(backed), data_placement="disk", chunk_size=10)
        splitter.setup()
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        splitter.trainer = SimpleNamespace(world_size=3, global_rank=rank, strategy=strategy)
        parts.append(splitter.train_dataloader().dataset.indices)
    assert len({len(part) for part in parts}) == 1
    cells = np.concatenate(parts)
    np.testing.assert_array_equal(np.unique(cells), np.sort(splitter.train_idx))
    assert len(cells) - len(np.unique(cells)) < 3
    place = np.argsort(np.argsort(splitter.train_idx))
    place_of = dict(zip(splitter.train_idx, place, strict=True))
    for part in parts:  # neighbours, but where a chunk ends
        gaps = np.diff(np.sort([place_of[cell] for cell in part]))
        assert np.mean(gaps == 1) > 0.85


def test_other_processes_read_from_the_anndata(adata):
    splitter = SAMSDataSplitter(manager(adata), data_placement="device", num_workers=1)
    splitter.setup()
    with pytest.warns(UserWarning, match="num_workers > 0"):
        assert splitter.placement == "host"


def test_unknown_placement_is_refused(adata):
    with pytest.raises(ValueError, match="data_placement='gpu' is unknown; use one of 'auto'"):
        fit(adata, "gpu")


def test_a_second_training_is_one_of_a_module_that_trains():
    adata = simulate(0.5)
    model = fit(adata, "auto")
    modes = []
    handle = model.module.register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    model.train(1, accelerator="cpu", enable_progress_bar=False, train_size=1.0)
    handle.remove()
    assert all(modes)
    assert len(modes) > 0
    assert not model.module.training
