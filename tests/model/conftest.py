"""Small screens and the models fitted to them, made once; tests leave them as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scvi

import scvi_sams

if TYPE_CHECKING:
    from anndata import AnnData

SETUP = {"layer": "counts", "perturbation_key": "perturbation", "control": "control"}
SIZE = {"n_latent": 6, "n_hidden": 32}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def small_screen(**kwargs) -> AnnData:
    arguments = {
        "n_cells": 600,
        "n_genes": 80,
        "n_perturbations": 6,
        "n_pairs": 3,
        "n_latent": 3,
        "control_fraction": 0.2,
    }
    return scvi_sams.datasets.simulated_screen(**(arguments | kwargs))


def fit(adata: AnnData, max_epochs: int = 8, seed: int = 0, **kwargs) -> scvi_sams.SAMSVAE:
    """Fit a small model from a seed, to an AnnData that is set up."""
    scvi.settings.seed = seed
    model = scvi_sams.SAMSVAE(adata, **(SIZE | kwargs))
    model.train(max_epochs=max_epochs, batch_size=64, check_val_every_n_epoch=1, **QUIET)
    return model


def add_covariates(adata: AnnData) -> AnnData:
    rng = np.random.default_rng(0)
    adata.obs["phase"] = rng.choice(["G1", "S", "G2M"], adata.n_obs)
    adata.obs["stress"] = rng.normal(size=adata.n_obs)
    adata.obs["total"] = 2 * np.asarray(adata.layers["counts"].sum(1)).ravel()
    return adata


def counts_per_library(model: scvi_sams.SAMSVAE) -> float:
    """Share of a cell's library that its genes make up, in screens of :func:`add_covariates`."""
    return 1.0 if model.summary_stats.n_batch == 1 else 0.5


COVARIATES = {
    "batch_key": "replicate",
    "size_factor_key": "total",
    "categorical_covariate_keys": ["phase"],
    "continuous_covariate_keys": ["stress"],
}


@pytest.fixture(scope="session")
def fitted() -> scvi_sams.SAMSVAE:
    """A model of single perturbations and pairs, without covariates."""
    adata = small_screen()
    scvi_sams.SAMSVAE.setup_anndata(adata, **SETUP)
    return fit(adata, max_epochs=25)


@pytest.fixture(scope="session")
def fitted_covariates() -> scvi_sams.SAMSVAE:
    """A model with batches, covariates of both kinds and size factors, which its encoder sees."""
    adata = add_covariates(small_screen())
    scvi_sams.SAMSVAE.setup_anndata(adata, **SETUP, **COVARIATES)
    return fit(adata, max_epochs=25, encode_covariates=True)


@pytest.fixture(params=["fitted", "fitted_covariates"])
def any_fitted(request) -> scvi_sams.SAMSVAE:
    return request.getfixturevalue(request.param)


@pytest.fixture
def screen() -> AnnData:
    """A screen that no model was set up on yet."""
    return small_screen()
