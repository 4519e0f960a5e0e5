"""A screen that stays on disk."""

from __future__ import annotations

from functools import partial

import anndata
import numpy as np
import pytest
import scvi
import zarr

from scvi_sams import SAMSVAE, ScreenError
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data import loader
from scvi_sams.data.loader import PoolSampler
from scvi_sams.data.matrices import DiskMatrix
from scvi_sams.evaluation import effect_correlation, mask_recovery

from ._simulations import recovery_screen, true_effects
from .conftest import QUIET, SETUP, fit, small_screen


@pytest.fixture(scope="module")
def in_memory():
    adata = small_screen()
    adata.X = adata.layers["counts"].copy()
    SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": None}))
    return fit(adata, max_epochs=3)


@pytest.fixture(scope="module")
def on_disk(in_memory, tmp_path_factory):
    """The same model, its cells on disk."""
    folder = tmp_path_factory.mktemp("backed")
    in_memory.save(str(folder / "model"))
    in_memory.adata.write_h5ad(folder / "screen.h5ad")
    adata = anndata.read_h5ad(folder / "screen.h5ad", backed="r")
    yield SAMSVAE.load(str(folder / "model"), adata, accelerator="cpu")
    adata.file.close()


@pytest.mark.parametrize("indices", [None, [9, 2, 300, 41, 5], np.arange(600) % 7 == 0])
def test_read_out(in_memory, on_disk, indices):
    for method in ("get_latent_representation", "get_normalized_expression"):
        expected, found = [], []
        for model, values in ((in_memory, expected), (on_disk, found)):
            scvi.settings.seed = 1
            values.append(np.asarray(getattr(model, method)(indices=indices, batch_size=3)))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_counterfactual(in_memory, on_disk):
    cells = []
    for model in (in_memory, on_disk):
        scvi.settings.seed = 1
        cells.append(model.predict(["P001"], basal=[70, 3, 512, 8]))
    for predicted in cells:
        assert predicted.obs["basal_cell"].tolist() == [
            in_memory.adata.obs_names[index] for index in (70, 3, 512, 8)
        ]
    share = [predicted.layers["normalized_expression"] for predicted in cells]
    np.testing.assert_allclose(*share, rtol=1e-4)
    np.testing.assert_array_equal(*[predicted.obs["library_size"] for predicted in cells])


def test_likelihood(in_memory, on_disk):
    bounds = []
    for model in (in_memory, on_disk):
        scvi.settings.seed = 1
        bounds.append(
            model.get_iwelbo(
                indices=[500, 3, 77, 12], n_particles=5, batch_size=3, return_mean=False
            )
        )
    np.testing.assert_allclose(*bounds, rtol=1e-5)
    assert len(set(bounds[0])) == 4


def test_what_cells_received(in_memory, on_disk):
    for model in (in_memory, on_disk):
        indices = [9, 2, 300]
        (batch,) = model._make_data_loader(model.adata, indices=indices)
        for key in (SAMS_REGISTRY_KEYS.PERTURBATION_KEY, SAMS_REGISTRY_KEYS.DOSE_KEY):
            expected = in_memory.adata_manager.get_from_registry(key)
            np.testing.assert_array_equal(batch[key], expected[indices])


def test_reads_few_pieces(on_disk, monkeypatch):
    """Not minibatch by minibatch, and never more cells at once than a pool has."""
    small = partial(PoolSampler, chunk_size=16, preload_nchunks=8)
    monkeypatch.setattr(loader, "PoolSampler", small)
    sizes = []
    rows = DiskMatrix.__getitem__
    monkeypatch.setattr(
        DiskMatrix,
        "__getitem__",
        lambda self, index: sizes.append(len(index)) or rows(self, index),
    )
    on_disk.get_latent_representation(batch_size=10)
    assert sizes == [17] + [120] * 5  # a look at whether they are counts still, then all


@pytest.mark.filterwarnings("ignore:.*zarr v[23]")  # formats that anndata will write by default
@pytest.mark.parametrize("storage", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_counts_changed_on_disk(in_memory, tmp_path, storage, kind):
    """By another program, in the file that the model reads."""
    adata = in_memory.adata.copy()
    if kind == "dense":
        adata.X = adata.X.toarray()
    if storage == "h5ad":
        adata.write_h5ad(tmp_path / "screen.h5ad")
        adata = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r+")
        stored = adata.file["X"]
    else:
        store = zarr.open_group(tmp_path / "screen.zarr", mode="w")
        anndata.io.write_elem(store, "X", adata.X)
        stored = store["X"]
        adata.X = stored if kind == "dense" else anndata.io.sparse_dataset(stored)
    model = SAMSVAE.load(_saved(in_memory, tmp_path), adata, accelerator="cpu")
    model.get_latent_representation(indices=[1])
    values = stored if kind == "dense" else stored["data"]
    values[...] = np.log1p(values[...])
    with pytest.raises(ScreenError, match=r"adata.X held counts when it was set up.*changed"):
        model.get_latent_representation(indices=[1])
    if storage == "h5ad":
        adata.file.close()


def _saved(model, folder):
    model.save(folder / "model")
    return folder / "model"


def test_trains(on_disk):
    adata = on_disk.adata
    SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": None}))
    model = fit(adata, max_epochs=2)
    assert np.isfinite(model.get_elbo(n_samples=2))
    assert model.predict(["P001"], basal="control", n_samples=20).n_obs == 20


@pytest.mark.slow
def test_a_fit_from_disk_is_as_good_as_one_from_memory(tmp_path):
    """Of a file that is sorted by perturbation, in pools of a tenth of it."""
    screen = recovery_screen()
    stored = anndata.AnnData(
        screen.layers["counts"], obs=screen.obs[["perturbation"]], var=screen.var[[]]
    )
    order = np.argsort(stored.obs["perturbation"].astype(str), kind="stable")
    stored[order].write_h5ad(tmp_path / "screen.h5ad")
    truth = true_effects(sorted(set(screen.obs["perturbation"]) - {"control"}))
    found = {}
    for placement in ("device", "disk"):
        adata = anndata.read_h5ad(
            tmp_path / "screen.h5ad", backed="r" if placement == "disk" else None
        )
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
        scvi.settings.seed = 0
        model = SAMSVAE(adata, n_latent=10, n_hidden=64)
        model.train(
            40,
            check_val_every_n_epoch=1,
            data_placement=placement,
            datasplitter_kwargs={"chunk_size": 16, "preload_nchunks": 17},
            **QUIET,
        )
        effects = model.get_average_treatment_effect(truth.obs_names.tolist())
        found[placement] = (
            mask_recovery(screen.uns["truth"]["mask"], model.get_perturbation_mask()).f1,
            effect_correlation(effects, truth),
            model.history["elbo_validation"].iloc[-1, 0],
        )
        if placement == "disk":
            adata.file.close()
    (f1, correlation, bound), (disk_f1, disk_correlation, disk_bound) = found.values()
    assert disk_f1 > f1 - 0.03 > 0.9
    assert disk_correlation > correlation - 0.01 > 0.9
    assert abs(disk_bound / bound - 1) < 0.005
