# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Large screens, GPUs, clusters
#
# A genome-wide screen has ten thousand perturbations and two million cells. This page is about
# what grows with what, and which arguments matter then. It runs on a small screen, with the
# arithmetic for a large one.

# %%
import os
import time

import anndata as ad
import pandas as pd
import scvi
import torch

import scvi_sams

scvi.settings.seed = 0

# %% [markdown]
# ## What takes memory
#
# The dosage matrix is sparse from registration to the loss: a cell costs as many entries as it
# has perturbations, however many there are. Masks and effects are a few numbers for each
# perturbation and latent. What is large is the counts.

# %%
adata = scvi_sams.datasets.simulated_screen(
    n_cells=10_000, n_genes=500, n_perturbations=1_000, n_pairs=0, n_latent=10
)
counts = adata.layers["counts"]
nonzero = counts.nnz / adata.n_obs


def gigabytes(n_bytes):
    """Bytes as gigabytes."""
    return round(n_bytes / 1e9, 2)


cells, genes, perturbations, latents = 2_000_000, 8_000, 10_000, 100
pd.Series(
    {
        "counts, CSR, 2,000 genes seen in a cell": gigabytes(cells * 2_000 * 8),
        "counts, as a dense matrix": gigabytes(cells * genes * 4),
        "doses, as they are kept": gigabytes(cells * 8),
        "doses, as a dense matrix": gigabytes(cells * perturbations * 4),
        "masks and effects, 5 numbers each": gigabytes(perturbations * latents * 5 * 4),
    },
    name="GB for two million cells and ten thousand perturbations",
).to_frame()

# %% [markdown]
# So: keep counts in CSR, choose a few thousand genes, and never make the matrix dense.
#
# ## Where minibatches are formed
#
# `data_placement="auto"` keeps the cells as compact tensors on the device that trains, if they
# fit into half of what is free, and forms minibatches there. `"host"` reads each minibatch from
# the AnnData, as scvi-tools does. The fit is the same to the last bit on a CPU; the speed is not.

# %%
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    batch_key="replicate",
)


def seconds_of_an_epoch(placement):
    """Wall-clock time of the second epoch of two; the first sets things up."""
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    start = time.perf_counter()
    model.train(max_epochs=1, data_placement=placement)
    once = time.perf_counter()
    model.train(max_epochs=1, data_placement=placement)
    assert once > start
    return time.perf_counter() - once


pd.Series(
    {name: round(seconds_of_an_epoch(name), 1) for name in ("device", "host")},
    name="seconds for an epoch",
).to_frame()

# %% [markdown]
# ## A GPU
#
# Nothing to do: scvi-tools takes the GPU if there is one. `accelerator="cpu"` forbids it, and
# `precision="bf16-mixed"` is passed on to Lightning.

# %%
print("a GPU is", "here" if torch.cuda.is_available() else "not here; everything runs on the CPU")

# %% [markdown]
# ## Steps, not epochs
#
# What matters is how often masks and networks are updated. By default training takes some 3,000
# steps of 128 cells, and at least two passes: with two million cells that is two epochs, 31,000
# steps. On a GPU, larger batches use it better; keep an eye on the number of steps.
#
# | screen | `batch_size` | `max_epochs` | steps |
# |---|---|---|---|
# | 20,000 cells | 128 | 20 | 3,100 |
# | 300,000 cells | 256 | 4 | 4,700 |
# | 2,000,000 cells | 1,024 | 3 | 5,900 |
#
# ## Larger than memory
#
# A backed AnnData that does not fit is read in pools: chunks of neighbouring cells in random
# order, shuffled within a pool. One epoch of a million cells of 2,000 genes took three minutes and
# one gibibyte of memory on one core (`python -m benchmarks out_of_core --cells 1000000`).
# `"disk"` asks for it, here on a screen that would fit.

# %%
adata.write_h5ad("large_screen.h5ad")
backed = ad.read_h5ad("large_screen.h5ad", backed="r")
scvi_sams.SAMSVAE.setup_anndata(
    backed, perturbation_key="perturbation", control="control", batch_key="replicate"
)
model = scvi_sams.SAMSVAE(backed, n_latent=20)
model.train(max_epochs=1, data_placement="disk")
os.remove("large_screen.h5ad")

# %% [markdown]
# ## Ask for what you need
#
# Read-outs of ten thousand perturbations are large too. Name the conditions, and take fewer
# draws first.

# %%
strongest = model.get_perturbation_effect().abs().max(axis=1).nlargest(5).index
effect = model.get_average_treatment_effect(list(strongest), n_samples=5, n_cells=50)
effect.to_df().iloc[:, :5].round(2)

# %% [markdown]
# ## On a cluster
#
# The command line does the whole of it, writes its folder at the end or not at all, and takes a
# seed, so that an array of jobs is an array of seeds:
#
# ```bash
# #!/bin/bash
# #SBATCH --array=0-4
# #SBATCH --gres=gpu:1
# #SBATCH --cpus-per-task=4
# #SBATCH --mem=64G
# scvi-sams fit screen.h5ad --perturbation-key perturbation --control control \
#     --batch-key replicate --seed "$SLURM_ARRAY_TASK_ID" \
#     -o "fits/seed_$SLURM_ARRAY_TASK_ID"
# ```
#
# Several fits of one screen on several seeds are worth more than one long fit: what they agree
# on is what to believe (`scvi_sams.tl.mechanism_stability`).
#
# A job may be killed. `enable_checkpointing=True` in `train` keeps checkpoints, as in
# scvi-tools.

# %%
print(f"{nonzero:.0f} genes seen in a cell, {counts.nnz * 8 / 1e6:.0f} MB of counts")
