"""A covariate in natural units fits as well as the same one scaled: held-out bounds in nats."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np
import scvi

import scvi_sams

if TYPE_CHECKING:
    from collections.abc import Sequence

RANGES = ((0.0, 1.0), (0.0, 1e4), (1e4, 1.1e5))


def bounds(n_cells: int = 800, n_genes: int = 60, seed: int = 0) -> dict[str, float]:
    """Held-out bound by range of the covariate, nats a cell."""
    found = {}
    share = np.random.default_rng(seed).random(n_cells)
    for low, high in RANGES:
        adata = scvi_sams.datasets.simulated_screen(
            n_cells=n_cells, n_genes=n_genes, n_perturbations=3, n_pairs=1, n_latent=3, seed=seed
        )
        adata.obs["covariate"] = low + (high - low) * share
        scvi_sams.SAMSVAE.setup_anndata(
            adata,
            layer="counts",
            perturbation_key="perturbation",
            control="control",
            continuous_covariate_keys=["covariate"],
        )
        scvi.settings.seed = seed
        model = scvi_sams.SAMSVAE(adata, encode_covariates=True)
        model.train(accelerator="cpu", enable_progress_bar=False)
        scvi.settings.seed = seed
        found[f"[{low:g}, {high:g}]"] = model.get_iwelbo(indices=model.validation_indices)
    return found


def main(arguments: Sequence[str]) -> None:
    """Print the bounds."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    for name, bound in bounds().items():
        print(f"covariate over {name:16} {bound:9.2f} nats a cell")
