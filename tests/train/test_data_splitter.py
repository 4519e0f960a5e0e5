"""Where minibatches are formed: the same cells, the same fit, and a fallback."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.dataloaders import DataSplitter

import scvi_sams
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.train import SAMSDataSplitter, _data_splitter

DOSAGE, NONZERO = SAMS_REGISTRY_KEYS.PERTURBATION_KEY, SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY


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
    assert splitter.on_device == (placement == "device")
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) - {NONZERO} == set(theirs)
        for key, value in theirs.items():
            assert ours[key].layout == (torch.sparse_coo if key == DOSAGE else torch.strided)
            torch.testing.assert_close(ours[key].to_dense(), value, rtol=0, atol=0)


def test_positions_of_counts_come_with_sparse_training_cells():
    splitter = SAMSDataSplitter(manager(simulate(0.1)), batch_size=64)
    for batch in minibatches(splitter):
        assert torch.equal(batch[NONZERO], batch["X"].flatten().nonzero().squeeze(1))
    assert all(NONZERO not in batch for batch in minibatches(splitter, "val_dataloader"))


def fit(adata, placement, model_class=scvi_sams.SAMSVAE, **kwargs):
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


def test_too_large_a_screen_is_read_from_the_anndata(adata, monkeypatch):
    monkeypatch.setattr(_data_splitter, "_available_bytes", lambda device: 100.0)
    with pytest.warns(UserWarning, match=r"data_placement='device': the cells take .* of cpu"):
        fit(adata, "device")
    splitter = SAMSDataSplitter(manager(adata))  # "auto" says nothing
    assert NONZERO not in minibatches(splitter)[0]
    assert not splitter.on_device


def test_other_processes_read_from_the_anndata(adata):
    splitter = SAMSDataSplitter(manager(adata), data_placement="device", num_workers=1)
    splitter.setup()
    with pytest.warns(UserWarning, match="num_workers > 0"):
        assert not splitter.on_device


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
