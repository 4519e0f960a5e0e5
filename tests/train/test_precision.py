"""Options of a step: mixed precision, and torch.compile of the networks."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

import scvi_sams


@pytest.fixture(scope="module")
def adata():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=1_200, n_genes=80, n_perturbations=6, n_pairs=2, n_latent=3
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    return adata


def fit(adata, **kwargs):
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=32)
    model.train(15, accelerator="cpu", enable_progress_bar=False, logger=None, **kwargs)
    return model


def test_half_precision_trains_to_the_same_bound(adata):
    full, mixed = fit(adata), fit(adata, precision="bf16-mixed")
    losses = [model.history["train_loss"].iloc[-1, 0] for model in (full, mixed)]
    assert losses[0] != losses[1]  # it was indeed another precision
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)
    assert all(p.dtype == torch.float32 for p in mixed.module.parameters())
    effects = [
        model.get_average_treatment_effect(n_samples=2, n_cells=50) for model in (full, mixed)
    ]
    assert scvi_sams.evaluation.effect_correlation(effects[1], effects[0]) > 0.95
