"""Screens from which a minute of training recovers the truth, and the truth of their effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import scvi

import scvi_sams

from ._members import MEMBERS
from .conftest import QUIET, SETUP

if TYPE_CHECKING:
    from anndata import AnnData

RECOVERY_SIZE: dict[str, Any] = {
    "n_cells": 3_000,
    "n_genes": 100,
    "n_perturbations": 15,
    "n_pairs": 0,
    "n_latent": 5,
    "mask_probability": 0.2,
    "library_size": 4_000.0,
    "n_batches": 1,
    "seed": 1,
}


def recovery_screen(**kwargs: Any) -> AnnData:
    """Simulate a screen that is large enough to recover its truth."""
    return scvi_sams.datasets.simulated_screen(**(RECOVERY_SIZE | kwargs))


def fit_recovery(
    member: str,
    adata: AnnData,
    *,
    setup: dict[str, Any] | None = None,
    max_epochs: int = 40,
    train: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Fit a member to a copy of a screen for about a thousand steps."""
    adata = adata.copy()
    MEMBERS[member].setup_anndata(adata, **(SETUP | (setup or {})))
    scvi.settings.seed = 0
    model = MEMBERS[member](adata, **({"n_latent": 10, "n_hidden": 64} | kwargs))
    model.train(max_epochs=max_epochs, **QUIET, **(train or {}))
    return model


def true_effects(conditions: list[str], dose: str | None = None, **kwargs: Any) -> AnnData:
    """Observe effects in new cells of the same truth, so many that their noise is small.

    ``dose`` keeps the cells of one dose (and the controls).
    """
    adata = recovery_screen(**(kwargs | {"n_cells": 20_000}))
    kept = adata.obs["perturbation"].isin(conditions)
    if dose is not None:
        kept &= adata.obs["dose"] == dose
    adata = adata[kept | (adata.obs["perturbation"] == "control")].copy()
    observed = scvi_sams.evaluation.observed_effects(
        adata, perturbation_key="perturbation", control="control", layer="counts"
    )
    return observed[conditions]
