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
# # A gallery of plots
#
# Every plot of `scvi_sams.pl`, once, on a simulated screen. Each takes a table
# that a model returned, draws into the axes that it is given (`ax=`) or makes a figure, and
# returns the axes, which are yours to change.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc
import scvi

import scvi_sams

scvi.settings.seed = 0

# %%
adata = scvi_sams.datasets.simulated_screen(inactive_fraction=0.2)
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    batch_key="replicate",
)
model = scvi_sams.SAMSVAE(adata, n_latent=12)
model.train(train_size=0.7, check_val_every_n_epoch=1)

# %% [markdown]
# ## Training
#
# `scvi_sams.pl.training_history`: has it converged, does it overfit?

# %%
ax = scvi_sams.pl.training_history(model.history)

# %% [markdown]
# ## Masks and effects
#
# `scvi_sams.pl.mask_heatmap`: which perturbations move which latents. The strip at the
# left is for what you know about the perturbations: here the mechanism that was planted first.

# %%
mask, effect = model.get_perturbation_mask(), model.get_perturbation_effect()
ax = scvi_sams.pl.mask_heatmap(mask)

# %%
truth = adata.uns["truth"]
planted = {
    name: f"mechanism {row.argmax()}" if row.any() else "none"
    for name, row in zip(truth["perturbation_names"], truth["mask"] > 0, strict=True)
}
ax = scvi_sams.pl.mask_heatmap(mask, effect, pathways=planted)

# %% [markdown]
# ## Genes of a latent
#
# `scvi_sams.pl.gene_program`: what it raises and what it lowers.

# %%
programs = scvi_sams.tl.gene_programs(model, "typical")
most_used = (mask > 0.5).sum().idxmax()
ax = scvi_sams.pl.gene_program(programs, most_used)

# %% [markdown]
# ## Genes of a perturbation
#
# `scvi_sams.pl.effect_heatmap`: all conditions, the genes that change most.

# %%
strength = effect.abs().sum(axis=1).sort_values(ascending=False)
strong = list(strength.index[:15])
effects = model.get_average_treatment_effect(strong, n_samples=20)
ax = scvi_sams.pl.effect_heatmap(effects, n_genes=40, pathways=planted)

# %% [markdown]
# `scvi_sams.pl.volcano`: one condition, every gene.

# %% tags=["picture:volcano"]
table = scvi_sams.tl.differential_expression(model, strong[:1], delta=0.5)
ax = scvi_sams.pl.volcano(table)

# %% [markdown]
# `scvi_sams.pl.model_vs_observed_effects`: what the model says beside what the cells say.

# %%
observed = scvi_sams.evaluation.observed_effects(adata, "perturbation", "control", layer="counts")
ax = scvi_sams.pl.model_vs_observed_effects(effects, observed)

# %% [markdown]
# ## Guides and cells
#
# `scvi_sams.pl.guide_efficacy`: in what share of its cells each guide worked, and where that
# cannot be told. Here each perturbation is a guide of its own, and all of them work.

# %%
guides = scvi_sams.tl.guides(model)
ax = scvi_sams.pl.guide_efficacy(guides.loc[strong])

# %% [markdown]
# `scvi_sams.pl.perturbed_probability`: the probability of each cell that the perturbation took,
# against a gene that should have changed: of a real screen its target, here the one that
# changes most.

# %%
gene = table["lfc_mean"].abs().idxmax()
in_cells = model.get_perturbed_probability()
took = in_cells[in_cells["perturbation"] == strong[0]]["probability"]
share = sc.get.obs_df(adata, [gene], layer="counts")[gene] / adata.obs["total_counts"]
expression = 1e4 * share
is_control = adata.obs["perturbation"] == "control"
ax = scvi_sams.pl.perturbed_probability(took, expression[took.index], expression[is_control])
ax.set_ylabel(f"{gene}, counts per 10,000")

# %% [markdown]
# ## Cells
#
# The latent space is for scanpy: neighbours, UMAP, clusters. Beside it the same of the basal
# states, which perturbations do not move.

# %%
titles = {"X_sams": "basal state and perturbation", "X_basal": "basal state"}
adata.obsm["X_sams"] = model.get_latent_representation()
adata.obsm["X_basal"] = model.get_latent_representation(representation="basal")
cells = sc.pp.subsample(adata, n_obs=2_000, copy=True)
colored = cells.obs["perturbation"].where(cells.obs["perturbation"].isin([*strong[:6], "control"]))
cells.obs["strongest"] = colored.cat.remove_unused_categories()
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for ax, (key, title) in zip(axes, titles.items(), strict=True):
    sc.pp.neighbors(cells, use_rep=key)
    sc.tl.umap(cells)
    sc.pl.umap(cells, color="strongest", title=title, na_in_legend=False, ax=ax, show=False)

# %% [markdown]
# ## Pairs
#
# `scvi_sams.pl.pair_vs_additive_effects`: a pair against the sum of its parts. Genes off
# the line are where the model expects the whole to differ from the sum.

# %%
pairs = [name for name in adata.obs["perturbation"].cat.categories if "+" in name]
pair = max(pairs, key=lambda name: strength[name.split("+")].sum())
interactions = scvi_sams.tl.pair_interactions(model, [pair], n_samples=20)
ax = scvi_sams.pl.pair_vs_additive_effects(interactions)

# %% [markdown]
# ## Scores
#
# `scvi_sams.pl.scorecard`: the model beside baselines and ceilings, by any measure of
# a scorecard.

# %%
card = scvi_sams.evaluation.scorecard(model, n_bootstrap=200)
ax = scvi_sams.pl.scorecard(card, "pearson_perturbed")

# %% [markdown]
# ## Plans
#
# `pl.plan_screen`: what a smaller or a larger screen of these perturbations
# would recover, and the interval in which one such screen would fall.

# %%
plan = scvi_sams.tl.plan_screen(model)
ax = scvi_sams.pl.plan_screen(plan)

# %% [markdown]
# ## Doses
#
# `scvi_sams.pl.dose_response`: of a model with `dose_response="hill"`. Curves are solid
# where doses were measured.

# %%
dosed = scvi_sams.datasets.simulated_screen(
    6_000, 150, n_perturbations=8, n_pairs=0, doses=(0.1, 0.3, 1.0, 3.0, 10.0)
)
scvi_sams.SAMSVAE.setup_anndata(
    dosed, layer="counts", perturbation_key="perturbation", dosage_key="dose", control="control"
)
scvi.settings.num_threads = 1  # scanpy has raised it, and many small steps are slower then
hill = scvi_sams.SAMSVAE(dosed, n_latent=12, dose_response="hill")
hill.train()
strength = hill.get_perturbation_effect().abs().sum(axis=1)
curves = scvi_sams.tl.dose_response(hill).loc[strength.nlargest(4).index]
measured = dosed.obs.assign(dose=pd.to_numeric(dosed.obs["dose"], errors="coerce"))
measured = measured.groupby("perturbation", observed=True)["dose"].agg(["min", "max"])
ax = scvi_sams.pl.dose_response(curves, measured)

# %% [markdown]
# ## Contexts
#
# `scvi_sams.pl.context_differences`: what perturbations do in each context, filled where it was
# called to be another than in the rest.

# %%
mixed = scvi_sams.datasets.simulated_screen(
    4_000, 150, n_perturbations=12, n_pairs=0, n_contexts=3, context_fraction=0.5
)
scvi_sams.SAMSVAE.setup_anndata(
    mixed,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    context_key="context",
)
by_context = scvi_sams.SAMSVAE(mixed, n_latent=12)
by_context.train()
differences = scvi_sams.tl.context_differences(by_context, fdr=0.1)
ax = scvi_sams.pl.context_differences(differences, n_rows=10)

# %% [markdown]
# ## Into a paper
#
# ```python
# ax.figure.savefig("masks.pdf", bbox_inches="tight")
# ```
#
# Labels have 7 points, colours are those of Okabe and Ito and can be told apart by colour-blind
# readers. Set the size of the figure rather than scaling it afterwards:
# `figure, ax = plt.subplots(figsize=(3.5, 3), layout="constrained")`, then `ax=ax`.
