"""The Replogle screen, K562 genome-wide, filtered to strong effects without the test cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np

from benchmarks._paper import with_counts
from benchmarks._paper_splits import training_genes
from scvi_sams.datasets import fetch_screen, tidy_screen
from scvi_sams.evaluation import observed_effects, split_cells

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["filtered_replogle", "strong_perturbations"]

_CONTROLS = ("control", "non-targeting")


def filtered_replogle(
    path: Path | None,
    seed: int,
    n_perturbations: int,
    n_genes: int,
    perturbations: list[str] | None = None,
    genes: list[str] | None = None,
) -> ad.AnnData:
    """Read the cells and genes to fit, with their split, from a file that may not fit in memory.

    The cells are split before anything is chosen. Perturbations are those with the strongest
    effects, genes those that vary most, both in the training cells; lists take their place.
    Without a path the file is downloaded, about 9 GB.
    """
    # The loader of the package would read all two million cells.
    file = path or fetch_screen("replogle_2022_k562_gwps")
    screen = ad.read_h5ad(file, backed="r")
    split_cells(screen, validation_size=0.16, test_size=0.2, seed=seed)
    chosen = perturbations or strong_perturbations(screen, n_perturbations)
    labels = screen.obs["perturbation"].astype(str)
    cells = np.flatnonzero(labels.isin([*chosen, *_CONTROLS]).to_numpy())
    adata = tidy_screen(screen[cells].to_memory(), "replogle_2022_k562_gwps")
    screen.file.close()
    del adata.layers["counts"]  # X has them
    adata = with_counts(adata)
    if genes is None:
        selected = training_genes(adata, min(n_genes, adata.n_vars))
    else:
        selected = adata.var_names.isin(genes)
    return with_counts(adata[:, selected])


def strong_perturbations(screen: ad.AnnData, n: int) -> list[str]:
    r"""Perturbations of the largest effects in training cells.

    By :math:`\sum_g (\Delta_g^2 - s_g^2)`, the squared norm of the effect without the share that
    its standard error is expected to add, so that few cells are no advantage.
    """
    labels = screen.obs["perturbation"].astype(str)
    training = (screen.obs["split"] == "train").to_numpy()
    screen.obs["_trained"] = labels.where(training)
    present = [label for label in _CONTROLS if (screen.obs["_trained"] == label).any()]
    effects = observed_effects(screen, "_trained", present, min_cells=10)
    strength = (effects.X**2 - effects.layers["standard_error"] ** 2).sum(axis=1)
    return sorted(effects.obs_names[np.argsort(-strength, kind="stable")[:n]])
