"""Public screens, end to end."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi

from scvi_sams import SAMSVAE

from .conftest import QUIET

pytestmark = pytest.mark.slow


def _run(adata, conditions, tmp_path):
    """Five epochs and every read-out; returns the model as saved and loaded."""
    scvi.settings.seed = 0
    model = SAMSVAE(adata, n_latent=10, n_hidden=64)
    model.train(max_epochs=5, **QUIET)
    bounds = model.history["elbo_train"].to_numpy(dtype=float).ravel()
    assert bounds[-1] < bounds[0]
    assert model.module.effects.masks_on

    latent = model.get_latent_representation()
    assert latent.shape == (adata.n_obs, 10)
    assert np.isfinite(latent).all()
    assert model.get_perturbation_mask().shape == (len(model.perturbation_names), 10)
    effect = model.get_average_treatment_effect(conditions, n_samples=3, n_cells=20)
    assert effect.obs_names.tolist() == conditions
    assert np.isfinite(effect.X).all()
    assert model.predict(conditions, n_samples=3).shape == (3 * len(conditions), adata.n_vars)
    some = np.arange(200)
    assert model.get_iwelbo(indices=some, n_particles=5) > model.get_iwelbo(
        indices=some, n_particles=1
    )

    model.save(str(tmp_path / "model"))
    loaded = SAMSVAE.load(str(tmp_path / "model"), adata, accelerator="cpu")
    np.testing.assert_allclose(
        loaded.get_latent_representation(indices=some), latent[some], atol=1e-5
    )


def test_papalexi(papalexi_path, tmp_path):
    adata = anndata.read_h5ad(papalexi_path)
    # pandas' integers that may be missing: numpy makes objects of them
    assert isinstance(adata.obs["total_umi_all_genes"].dtype, pd.Int32Dtype)
    SAMSVAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        control="control",
        batch_key="bio_rep",
        size_factor_key="total_umi_all_genes",
    )
    _run(adata, ["IFNGR1", "SMAD4", "IFNGR1+SMAD4"], tmp_path)


def test_norman(norman_path, tmp_path):
    adata = anndata.read_h5ad(norman_path)
    with pytest.warns(UserWarning, match="no cell has apart from each other"):
        SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    _run(adata, ["KLF1", "KLF1+MAP2K6", "KLF1+SGK1"], tmp_path)
