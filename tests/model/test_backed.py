"""A screen that stays on disk."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scvi

from scvi_sams import SAMSVAE

from .conftest import SETUP, fit, small_screen


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


def test_trains(on_disk):
    adata = on_disk.adata
    SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": None}))
    model = fit(adata, max_epochs=2)
    assert np.isfinite(model.get_elbo(n_samples=2))
    assert model.predict(["P001"], basal="control", n_samples=20).n_obs == 20
