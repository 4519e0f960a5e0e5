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
# # Quick start
#
# A screen in which we know the answer: thirty perturbations, each of which moves one or two of
# eight hidden mechanisms, and eight pairs of them. We fit the model, ask which perturbations
# share a mechanism, predict a pair that nobody measured, and check everything against the truth.
#
# The fit takes about half a minute of one core.

# %%
import matplotlib.pyplot as plt
import scanpy as sc
import scvi

import scvi_sams

scvi.settings.seed = 0

# %% [markdown]
# ## A screen
#
# Yours would come from `sc.read_h5ad`. All that matters is a matrix of raw counts and a column
# that says what each cell received.

# %%
adata = scvi_sams.datasets.simulated_screen()
adata.obs["perturbation"].value_counts().head(8)

# %% [markdown]
# A look with scanpy first. Perturbations hide behind the ordinary differences between cells: on
# a UMAP of the principal components, controls and perturbed cells lie together.

# %%
adata.layers["log1p"] = sc.pp.log1p(sc.pp.normalize_total(adata, inplace=False)["X"])
sc.pp.pca(adata, layer="log1p", n_comps=20)
sc.pp.neighbors(adata, use_rep="X_pca")
sc.tl.umap(adata, random_state=0)
adata.obs["is_control"] = (adata.obs["perturbation"] == "control").map(
    {True: "control", False: "perturbed"}
)
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
controls = {"groups": ["control"], "palette": {"control": "#D55E00", "perturbed": "lightgrey"}}
controls |= {"na_in_legend": False, "title": "controls among perturbed cells"}
sc.pl.umap(adata, color="is_control", ax=axes[0], show=False, frameon=False, size=20, **controls)
sc.pl.umap(adata, color="replicate", ax=axes[1], show=False, frameon=False, size=20)
figure.tight_layout()

# %% [markdown]
# ## Fit
#
# Three lines, as for any scvi-tools model. The default is to train until about 3,000 steps are
# done.

# %%
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    batch_key="replicate",
)
scvi.settings.num_threads = 1  # scanpy has raised it, and many small steps are slower then
model = scvi_sams.SAMSVAE(adata, n_latent=20)
model.train()
ax = scvi_sams.pl.training_history(model.history)

# %% [markdown]
# The step in the middle is where the masks are switched on: before it the model is a plain VAE.
#
# ## Which perturbation moves what?
#
# Each row is a perturbation, each column a latent that some perturbation uses. Most entries are
# exactly off. Latents that nobody uses come last; having more of them than needed costs little.

# %% tags=["picture:quick_start"]
ax = scvi_sams.pl.mask_heatmap(model.get_perturbation_mask(), model.get_perturbation_effect())

# %% [markdown]
# Now as a table, called at a false discovery rate. `effect_mean` is in standard deviations of
# the basal state.

# %%
mechanisms = scvi_sams.tl.mechanisms(model, fdr=0.05).query("called")
mechanisms.head(10)[["perturbation", "latent", "effect_mean", "effect_lower", "effect_upper"]]

# %% [markdown]
# The truth is in `adata.uns["truth"]`. Latents come in any order and sign, so they are matched
# first.

# %%
truth = adata.uns["truth"]
names = list(truth["perturbation_names"])
found = model.get_perturbation_mask().loc[names]
recovery = scvi_sams.evaluation.mask_recovery(truth["mask"], found)
print(f"precision {recovery.precision:.2f}, recall {recovery.recall:.2f}, F1 {recovery.f1:.2f}")

# %% [markdown]
# ## What a latent means
#
# A latent is a direction in which expression moves. Here are the genes it raises and lowers
# most.

# %%
programs = scvi_sams.tl.gene_programs(model, "typical")
scvi_sams.tl.top_genes(programs, 3).head(12)

# %% [markdown]
# ## A pair that nobody measured
#
# Take the two strongest perturbations that were never together in a cell.

# %%
strength = (model.get_perturbation_effect() ** 2).sum(axis=1).sort_values(ascending=False)
measured = set(adata.obs["perturbation"].cat.categories)
first = strength.index[0]
second = next(
    name for name in strength.index[1:] if not {f"{first}+{name}", f"{name}+{first}"} & measured
)
pair = f"{first}+{second}"
cells = model.predict([first, second, pair], n_samples=100)
print(cells)

# %% [markdown]
# What comes back is an AnnData with counts, gene names and labels, ready for scanpy. The same
# for effects, with intervals:

# %%
effect = model.get_average_treatment_effect([first, second, pair])
genes = effect.to_df().loc[pair].abs().nlargest(8).index
effect.to_df()[genes].round(2)

# %% [markdown]
# ## Basal states
#
# What would each cell be without its perturbation? In the basal representation perturbed cells
# lie among the controls; in the representation of the shifts they lie where their mechanism is.

# %%
adata.obsm["X_basal"] = model.get_latent_representation(representation="basal")
adata.obsm["X_sams"] = model.get_latent_representation()
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for ax, key in zip(axes, ("X_basal", "X_sams"), strict=True):
    sc.pp.neighbors(adata, use_rep=key)
    sc.tl.umap(adata, random_state=0)
    sc.pl.umap(adata, color="is_control", ax=ax, show=False, frameon=False, size=20, **controls)
    ax.set_title({"X_basal": "basal state", "X_sams": "with perturbation"}[key])
figure.tight_layout()

# %% [markdown]
# ## Keep it
#
# ```python
# model.save("my_model", overwrite=True)
# model = scvi_sams.SAMSVAE.load("my_model", adata)
# ```
#
# Next: the same on [a real screen](02_interferon_gamma.ipynb), or [how to find out whether to
# believe it](04_choosing_a_model.ipynb).
