"""A model that recovers its simulation, fitted once for the tests that ask what it found."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import scvi_sams

from .conftest import SETUP, fit

if TYPE_CHECKING:
    from anndata import AnnData

SIZE: dict[str, Any] = {
    "n_genes": 200,
    "n_perturbations": 15,
    "n_pairs": 45,
    "n_latent": 5,
    "mask_probability": 0.2,
    "library_size": 4_000.0,
    "n_batches": 1,
    "seed": 1,
}
N_MEASURED_PAIRS = 10


def pairs_of(adata: AnnData) -> list[str]:
    """Every pair of a screen, in order."""
    return [c for c in adata.obs["perturbation"].cat.categories if "+" in c]


@cache
def recovered() -> scvi_sams.SAMSVAE:
    """Fit to the single perturbations and the first ten pairs of a simulated screen."""
    adata = scvi_sams.datasets.simulated_screen(n_cells=5_000, pair_fraction=0.4, **SIZE)
    left_out = pairs_of(adata)[N_MEASURED_PAIRS:]
    adata = adata[~adata.obs["perturbation"].isin(left_out)].copy()
    scvi_sams.SAMSVAE.setup_anndata(adata, **SETUP)
    return fit(adata, max_epochs=60, n_latent=10, n_hidden=100)


@cache
def observed() -> AnnData:
    """Effects in so many new cells of the same truth that their noise is small."""
    adata = scvi_sams.datasets.simulated_screen(n_cells=60_000, pair_fraction=0.6, **SIZE)
    return scvi_sams.evaluation.observed_effects(
        adata, perturbation_key="perturbation", control="control", layer="counts"
    )
