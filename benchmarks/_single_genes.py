"""Screens of known average effects, some of which no latent can carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scvi_sams.module.likelihood import expected_log_normalized

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["VARIANTS", "single_gene_screen"]

VARIANTS = ("default", "single_genes", "misspecified")
_N_STATES = 400  # that the expectation is taken over
_ESCAPED = 0.25


def single_gene_screen(
    variant: str,
    seed: int,
    n_cells: int = 12_000,
    n_genes: int = 600,
    n_perturbations: int = 120,
    n_pairs: int = 40,
    n_latent: int = 15,
) -> tuple[ad.AnnData, pd.DataFrame]:
    """Simulate a screen, and the exact average effects of its conditions.

    ``"default"`` has latent shifts alone; in ``"single_genes"`` a third of the perturbations
    also change one to five genes; in ``"misspecified"`` there are small effects on all genes
    besides, a quarter of the cells escaped, and the dispersion differs by gene.

    Returns
    -------
    The counts, with the shifts of latents (perturbations x latents) in ``uns["shift"]``, and
    effects in ``log2(1 + 1e4 x / library)``, conditions x genes.
    """
    rng = np.random.default_rng(seed)
    mask = rng.random((n_perturbations, n_latent)) < 0.12
    shift = mask * (2.0 * rng.choice([-1, 1], mask.shape) + rng.normal(0, 0.3, mask.shape))
    change = np.zeros((n_perturbations, n_genes))
    if variant != "default":
        for row in rng.permutation(n_perturbations)[: n_perturbations // 3]:
            genes = rng.choice(n_genes, rng.integers(1, 6), replace=False)
            change[row, genes] = rng.choice([-1, 1], len(genes)) * rng.uniform(
                0.5, 1.5, len(genes)
            )
    wrong = variant == "misspecified"
    change += 0.05 * rng.normal(size=change.shape) * wrong
    theta = rng.gamma(4.0, 1.25, n_genes) + 0.3 if wrong else np.full(n_genes, 5.0)
    w_in = rng.normal(size=(n_latent, 64)) / n_latent**0.5
    w_out = rng.normal(size=(64, n_genes)) / 8
    intercept = rng.normal(-1, 1.2, n_genes)

    pairs = np.array(np.triu_indices(n_perturbations, 1)).T
    pairs = pairs[np.sort(rng.choice(len(pairs), n_pairs, replace=False))]
    names = [f"P{k:03d}" for k in range(n_perturbations)]
    labels = ["control", *names, *(f"{names[a]}+{names[b]}" for a, b in pairs)]
    dose = np.zeros((len(labels), n_perturbations))
    dose[1 + np.arange(n_perturbations), np.arange(n_perturbations)] = 1
    dose[1 + n_perturbations + np.arange(n_pairs)[:, None], pairs] = 1

    def rates(z: NDArray[np.float64], lfc: NDArray[np.float64]) -> NDArray[np.float64]:
        hidden = z @ w_in
        logits = (np.tanh(hidden) + 0.2 * hidden) @ w_out + intercept + lfc
        rate = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(rate / rate.sum(1, keepdims=True))

    kind = rng.random(n_cells)
    code = np.where(
        kind < 0.1,
        0,
        np.where(
            kind < 0.75,
            1 + rng.integers(n_perturbations, size=n_cells),
            1 + n_perturbations + rng.integers(n_pairs, size=n_cells),
        ),
    )
    library = rng.lognormal(np.log(8_000), 0.3, (n_cells, 1))
    acts = dose[code] * ~(wrong * (rng.random((n_cells, 1)) < _ESCAPED)).astype(bool)
    basal = rng.normal(size=(n_cells, n_latent))
    chunks = []
    for rows in np.array_split(np.arange(n_cells), max(1, n_cells // 2_000)):
        mean = rates(basal[rows] + acts[rows] @ shift, acts[rows] @ change) * library[rows]
        chunks.append(
            sp.csr_matrix(rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32))
        )
    adata = ad.AnnData(
        sp.vstack(chunks, format="csr"),
        obs=pd.DataFrame(
            {"perturbation": np.array(labels)[code]}, index=[f"cell_{i}" for i in range(n_cells)]
        ),
        var=pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)]),
        uns={"shift": shift},
    )
    states, size = (
        rng.normal(size=(_N_STATES, n_latent)),
        rng.lognormal(np.log(8_000), 0.3, (_N_STATES, 1)),
    )

    def level(of: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = rates(states + of @ shift, (of @ change)[None]) * size
        return (
            expected_log_normalized(*(torch.from_numpy(v).float() for v in (mean, theta, size)))
            .mean(0)
            .numpy()
        )

    at_rest = level(dose[0])
    share = 1 - _ESCAPED * wrong
    effects = np.stack([share * (level(of) - at_rest) for of in dose[1:]])
    return adata, pd.DataFrame(effects, labels[1:], adata.var_names)
