"""Small models of every member of the family, trained for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import scvi

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

from .conftest import COVARIATES, QUIET, SETUP, SIZE, add_covariates, small_screen

if TYPE_CHECKING:
    from anndata import AnnData

MEMBERS = {model.__name__: model for model in (SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE)}
SPARSE = ("SAMSVAE", "SVAEPlus")
SHIFTED = ("SAMSVAE", "CPAVAE", "SVAEPlus")
COVARIATE_CASES = ["plain", "covariates"]


def tiny_screen(**kwargs: Any) -> AnnData:
    """A screen to train on in a fraction of a second."""
    return add_covariates(small_screen(**({"n_cells": 300, "n_genes": 40} | kwargs)))


def fit_member(
    member: str,
    adata: AnnData | None = None,
    *,
    covariates: bool = False,
    setup: dict[str, Any] | None = None,
    max_epochs: int = 4,
    seed: int = 0,
    train: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Set up a copy of a screen and fit a member to it from a seed."""
    model_class = MEMBERS[member]
    adata = tiny_screen() if adata is None else adata.copy()
    arguments = SETUP | (COVARIATES if covariates else {}) | (setup or {})
    model_class.setup_anndata(adata, **arguments)
    scvi.settings.seed = seed
    model = model_class(adata, **(SIZE | kwargs))
    model.train(max_epochs=max_epochs, batch_size=64, **QUIET, **(train or {}))
    return model


def read_outs(model: Any, conditions: list[str], *, with_cells: bool = True) -> dict[str, Any]:
    """What a model says, each read-out from the same seed, as arrays by name."""
    methods: dict[str, Any] = {
        "cells": lambda: model.predict(conditions, n_samples=4).X.toarray(),
        "effect": lambda: model.get_average_treatment_effect(conditions, n_samples=3, n_cells=5).X,
    }
    if model.module.effects is not None:
        methods["shift"] = lambda: model.get_perturbation_shift(conditions).to_numpy()
        methods["effects"] = lambda: model.get_perturbation_effect().to_numpy()
        if model.module.effects.sparse:
            methods["mask"] = lambda: model.get_perturbation_mask().to_numpy()
    if with_cells:
        methods |= {
            "latent": model.get_latent_representation,
            "draw": lambda: model.get_latent_representation(give_mean=False),
            "iwelbo": lambda: model.get_iwelbo(n_particles=3, return_mean=False),
            "elbo": lambda: model.get_elbo(n_samples=3, return_mean=False),
        }
    found = {}
    for name, method in methods.items():
        scvi.settings.seed = 11
        found[name] = method()
    return found
