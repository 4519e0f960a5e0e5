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
# # Guides that fail, and cells that escape
#
# A guide does not cut in every cell, and some guides hardly cut at all. All cells of a label count
# as perturbed nevertheless, and those that escaped pull its effect towards zero. How many are
# they, which are they, and what does the knock-out do where it took?
#
# The screen is that of [the second tutorial](02_interferon_gamma.ipynb): 25 knock-outs in
# THP-1 cells (Papalexi and colleagues, 2021), about four guides each. Its authors asked the same
# and wrote Mixscape for it. Here the answer is part of the model.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
import scvi

import scvi_sams

scvi.settings.seed = 0

# %%
panel = Path("papalexi2021_eccite.h5ad")
if panel.is_file():
    adata = sc.read_h5ad(panel)
    adata.obs["batch"] = adata.obs["bio_rep"]
    # The genes are a panel: their sum is not the library size of the cell.
    adata.obs["size_factor"] = adata.obs["total_umi_all_genes"].astype(float)
else:
    adata = scvi_sams.datasets.public_screen("papalexi_2021")
    adata.obs["batch"], adata.obs["guide"] = adata.obs["replicate"], adata.obs["guide_ID"]
    adata.obs["size_factor"] = np.asarray(adata.X.sum(axis=1)).ravel()
    logarithms = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    sc.pp.highly_variable_genes(logarithms, n_top_genes=500, batch_key="batch")
    targets = adata.var_names.isin(adata.obs["perturbation"].unique())
    adata = adata[:, logarithms.var["highly_variable"] | targets].copy()
print(adata.shape)
adata.obs.groupby("perturbation", observed=True)["guide"].nunique().describe()

# %% [markdown]
# ## Fit
#
# As always, with one more argument: which guide each cell has. It changes nothing of the
# training. `guide_key` says whose cells to compare afterwards.

# %%
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    perturbation_key="perturbation",
    control="control",
    guide_key="guide",
    batch_key="batch",
    size_factor_key="size_factor",
)
scvi.settings.num_threads = 1
model = scvi_sams.SAMSVAE(adata)
model.train(max_epochs=12)

# %% [markdown]
# ## Which guides work?
#
# The efficacy of a guide is the share of its cells in which the knock-out took. Where an effect is
# weak, nobody can tell: the interval is wide, the dot grey, and nothing should be claimed.

# %%
guides = scvi_sams.tl.guides(model)
known = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1", "SMAD4"]
shown = guides[guides["target"].isin(known)]
ax = scvi_sams.pl.guide_efficacy(shown)

# %%
told = guides[guides["can_be_told"]]
print(f"{len(told)} of {len(guides)} guides can be told; the least effective of them:")
told.sort_values("efficacy").head(5)[["target", "n_cells", "efficacy", "efficacy_upper"]]

# %% [markdown]
# ## Is it true?
#
# The transcript of the target is a witness, and we keep it out of the evidence
# (`own_gene=False`; the default takes it in, as it says much). Cells that are called escaped
# should have as much of it as controls have.

# %%
counts_per_10k = 1e4 / adata.obs["size_factor"].to_numpy(float)
is_control = (adata.obs["perturbation"] == "control").to_numpy()
probability = model.get_perturbed_probability(own_gene=False)


def transcript(gene, cells=slice(None)):
    counts = adata[:, gene].X
    counts = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
    return pd.Series(counts.ravel() * counts_per_10k, adata.obs_names)[cells]


rows = {}
for target in [name for name in known if name in adata.var_names]:
    p = probability[probability["perturbation"] == target]["probability"]
    of_cells = transcript(target, p.index)
    rows[target] = {
        "controls": transcript(target)[is_control].mean(),
        "took": of_cells[p > 0.5].mean(),
        "escaped": of_cells[p <= 0.5].mean(),
        "cells that escaped": int((p <= 0.5).sum()),
    }
pd.DataFrame(rows).T.round(2)

# %%
first, second = ["STAT1", "JAK2"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for ax, target in zip(axes, (first, second), strict=True):
    p = probability[probability["perturbation"] == target]["probability"]
    scvi_sams.pl.perturbed_probability(
        p, transcript(target, p.index), transcript(target)[is_control], ax=ax
    )
    ax.set_ylabel(f"{target}, counts per 10,000")

# %% [markdown]
# A knock-out need not lower its transcript: a frameshift leaves the messenger where it is, unless
# the cell degrades it. A target without a difference is therefore no evidence against the
# guide. One with a difference is evidence for the calls.
#
# ## Before and after
#
# Of all cells with the label, and of those in which it took: the same programme, larger. The
# factor is the inverse of the mean efficacy, roughly.

# %%
genes = {}
for effect in ("as_labelled", "where_it_took"):
    genes[effect] = model.get_average_treatment_effect(known, effect=effect, seed=0).to_df()
size = pd.DataFrame({name: np.sqrt((table**2).sum(axis=1)) for name, table in genes.items()})
size["ratio"] = size["where_it_took"] / size["as_labelled"]
size["mean efficacy"] = shown.groupby("target", observed=True)["efficacy"].mean()
size.round(2)

# %%
figure, ax = plt.subplots(figsize=(4.2, 4), layout="constrained")
for name in (first, "SMAD4"):
    ax.plot(*(genes[e].loc[name] for e in ("as_labelled", "where_it_took")), ".", label=name)
ax.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
ax.set(xlabel="effect as labelled (log2)", ylabel="effect where it took (log2)")
ax.legend(frameon=False)

# %% [markdown]
# For the cells themselves, put the probability into `obs` and go on with scanpy, as with the
# classes of Mixscape:

# %%
adata.obs["perturbed"] = model.get_perturbed_probability()["probability"]
adata.obs.groupby("perturbation", observed=True)["perturbed"].mean()[known].round(2)

# %% [markdown]
# ## What to be careful about
#
# - Effects that are weak, or graded from cell to cell, cannot be told from escape with certainty.
#   Read `can_be_told` first.
# - Do not filter cells by the probability and then test the same genes in them: cells were chosen
#   for showing the effect. `effect="where_it_took"` is the mean over what the model knows, with
#   no cell chosen.
# - Two guides of one target that point to different places (`off_target` in the table) are
#   a reason to doubt one of them, whatever their efficacy.
