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
# # A real screen: the interferon-gamma pathway
#
# [Papalexi and colleagues (2021)](https://doi.org/10.1038/s41588-021-00778-2) knocked out 25
# genes in THP-1 cells, a human monocyte line, and then stimulated them with interferon-gamma,
# among other things. Interferon-gamma binds a receptor of two chains, IFNGR1 and IFNGR2. The
# receptor activates the kinase JAK2, which phosphorylates STAT1; STAT1 goes to the nucleus,
# switches on IRF1, and the two of them switch on hundreds of genes.
#
# So we know what to expect. Losing any link of the chain from receptor to STAT1 should look the
# same. Losing IRF1, the last link, should look like part of it. And most of the other genes on
# the list are bystanders.
#
# Will a model that is told none of this find it?

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

import scvi_sams

scvi.settings.seed = 0

# %% [markdown]
# ## The screen
#
# `public_screen` fetches the public file once (about 400 MB) and keeps it. What you see below
# comes from a smaller file, with the same cells and a panel of 299 genes.

# %%
panel = Path("papalexi2021_eccite.h5ad")
if panel.is_file():
    adata = sc.read_h5ad(panel)
    adata.obs["batch"] = adata.obs["bio_rep"]
    # The genes are a panel: their sum is not the library size of the cell.
    adata.obs["size_factor"] = adata.obs["total_umi_all_genes"].astype(float)
else:
    adata = scvi_sams.datasets.public_screen("papalexi_2021")
    adata.obs["batch"] = adata.obs["replicate"]
    adata.obs["size_factor"] = np.asarray(adata.X.sum(axis=1)).ravel()

# %% [markdown]
# Before anything is modelled: how many cells does each knock-out have? And, if the genes are all
# of them, keep the two thousand that vary most.

# %%
if adata.n_vars > 2_000:
    logarithms = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    sc.pp.highly_variable_genes(logarithms, n_top_genes=2_000, batch_key="batch")
    targets = adata.var_names.isin(adata.obs["perturbation"].unique())
    adata = adata[:, logarithms.var["highly_variable"] | targets].copy()
print(adata.shape)
adata.obs["perturbation"].value_counts().head(10)

# %% [markdown]
# ## Before: what scanpy sees
#
# Normalised, log-transformed, principal components, UMAP. What one sees are replicates and the
# cell cycle. Knock-outs (in colour; others are grey) are spread over all of it; those of the
# pathway lean to one side at most.

# %%
known = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
# Of the other knock-outs the label is missing, which scanpy draws in grey below the rest.
upstream = ", ".join(known[:3])
colors = {known[3]: "#D55E00", upstream: "#E69F00", "SMAD4": "#0072B2", "control": "black"}
groups = {name: name for name in colors} | dict.fromkeys(known[:3], upstream)
adata.obs["knock-out"] = pd.Categorical(adata.obs["perturbation"].map(groups), list(colors))

counts = adata.X.copy()
sc.pp.normalize_total(adata, target_sum=1e4)
sc.pp.log1p(adata)
sc.pp.pca(adata, n_comps=20)
sc.pp.neighbors(adata)
sc.tl.umap(adata, random_state=0)
drawn = {"palette": colors, "na_in_legend": False, "frameon": False, "size": 12}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
sc.pl.umap(adata, color="knock-out", ax=axes[0], show=False, **drawn)
sc.pl.umap(adata, color="batch", ax=axes[1], show=False, frameon=False, size=8)
figure.tight_layout()

# %% [markdown]
# ## Fit, with nulls
#
# Some of the control cells get the labels of perturbations that do nothing. Whatever the model
# claims about those is false, which is how we learn the price of its claims.

# %%
adata.X = counts
null = scvi_sams.tl.add_control_null(adata, "perturbation", "control")
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    perturbation_key="perturbation_with_null",
    control="control",
    batch_key="batch",
    size_factor_key="size_factor",
)
scvi.settings.num_threads = 1  # scanpy has raised it, and many small steps are slower then
model = scvi_sams.SAMSVAE(adata)
model.train()

# %% [markdown]
# ## Which knock-outs do anything?
#
# Most of the twenty-five do nothing much to the transcriptome. That is a finding, and it is
# called at a rate that holds whatever the posterior is worth.

# %%
rate = max(0.1, 1.5 / (len(null) + 1))  # a rate below 1 / (nulls + 1) cannot be reached
active = scvi_sams.tl.active_perturbations(model, fdr=rate)
print(f"{active['called'].sum()} of {len(active)} at a false discovery rate of {rate:.2f}")
active.sort_values("log_odds", ascending=False).head(10)[["log_odds", "q_value", "called"]]

# %% [markdown]
# ## Who shares a mechanism?
#
# The heart of it. Each column is a latent, each row a knock-out that moves one.

# %% tags=["picture:mask_heatmap"]
effect = model.get_perturbation_effect()
ax = scvi_sams.pl.mask_heatmap(model.get_perturbation_mask(), effect)

# %%
mask = model.get_perturbation_mask() > 0.5
shared = mask.loc[known].all()
pathway_latents = list(shared.index[shared])
print("latents that the four have in common:", pathway_latents)
members = mask.index[mask[pathway_latents].any(axis=1)] if pathway_latents else []
print("all that move them:", list(members))

# %% [markdown]
# Receptor, kinase and STAT1 share a latent, as the
# textbook has it, and SMAD4 is somewhere else: it belongs to the TGF-beta pathway. STAT1 is the
# strongest of the four. All signal passes through it.
#
# The same without thresholds, as a tree of perturbations by what they do:

# %%
distance = scvi_sams.tl.perturbation_distance(model, by="effect")
strong = [name for name in distance.index if effect.loc[name].abs().max() > 0.5]
if len(strong) > 2:
    between = squareform(distance.loc[strong, strong], checks=False)
    clusters = fcluster(linkage(between, "average"), t=4, criterion="maxclust")
    print(pd.Series(clusters, index=strong, name="cluster").sort_values().to_string())

# %% [markdown]
# ## Which genes?
#
# A name for the latent must come from its genes. Interferon-stimulated genes should lead it: the
# chemokines CXCL9, CXCL10 and CXCL11, the guanylate-binding GBPs, HLA genes. If so, and if
# knock-outs push it the way that lowers them, we may call it the interferon-gamma response.

# %% tags=["picture:gene_program"]
programs = scvi_sams.tl.gene_programs(model, "typical")
latent = pathway_latents[0] if pathway_latents else effect.abs().sum().idxmax()
ax = scvi_sams.pl.gene_program(programs, latent)

# %%
sign = effect.loc[known, latent].mean()
verb = "raise" if sign > 0 else "lower"
print(f"The four {verb} {latent} (mean effect {sign:.2f}).")

# %% [markdown]
# ## After: scanpy again
#
# The basal representation is what the cells would be without their knock-out, and the shift is
# what the knock-out adds. On the full state the knock-outs of the pathway come apart from the
# controls together, and those of SMAD4 elsewhere.

# %% tags=["picture:interferon_gamma"]
adata.obsm["X_sams"] = model.get_latent_representation()
adata.obsm["X_basal"] = model.get_latent_representation(representation="basal")
figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
for ax, key in zip(axes, ("X_basal", "X_sams"), strict=True):
    sc.pp.neighbors(adata, use_rep=key, key_added=key)
    sc.tl.umap(adata, neighbors_key=key, random_state=0)
    sc.pl.umap(adata, color="knock-out", ax=ax, show=False, **drawn)
    ax.set_title({"X_basal": "basal state", "X_sams": "basal state and knock-out"}[key])
figure.tight_layout()

# %% [markdown]
# ## Does the model say what the cells say?
#
# Effects of the model beside those observed, for the pathway. Single genes far from the diagonal
# are worth a look: often the target itself, which a guide changes directly.

# %%
observed = scvi_sams.evaluation.observed_effects(
    adata, "perturbation", "control", size_factor_key="size_factor", conditions=known
)
predicted = model.get_average_treatment_effect(known)
ax = scvi_sams.pl.model_vs_observed_effects(predicted, observed)
agreement = scvi_sams.evaluation.effect_agreement(predicted, observed)
pd.DataFrame(agreement).round(3)

# %% [markdown]
# These are the cells that the model was fitted to, so this is description, not prediction. How
# to tell the difference is the subject of [the fourth tutorial](04_choosing_a_model.ipynb).
#
# ## What to be careful about
#
# - One fit is one fit. Repeat with other seeds and keep what repeats
#   (`scvi_sams.tl.mechanism_stability`).
# - Guides fail. Cells that escaped their edit are counted as knocked out, and shrink the effects.
# - The latent that the four share is evidence that they act alike in these cells under this
#   stimulus. It is not a wiring diagram: nothing here says that JAK2 lies above STAT1.
