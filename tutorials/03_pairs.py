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
# # Pairs: what was never measured, and when not to believe it
#
# A hundred genes make 4,950 pairs. Nobody measures them all, and a model that adds up single
# effects in latent space offers to fill in the rest. When should you take the offer?
#
# This page uses a simulated screen, since only there do we know which pairs hold a surprise.
# Half of its pairs do exactly what their parts do together. The other half move one more
# mechanism, which neither part moves alone.

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import scvi

import scvi_sams

scvi.settings.seed = 0

# %%
adata = scvi_sams.datasets.simulated_screen(
    n_cells=8_000, n_pairs=16, pair_fraction=0.5, interaction_fraction=0.5
)
truth = adata.uns["truth"]
surprise = pd.Series(
    np.abs(truth["interaction"]).sum(axis=1) > 0, index=pd.Index(truth["pair_names"], name="pair")
)
surprise.value_counts().rename({True: "with a surprise", False: "sum of the parts"})

# %% [markdown]
# ## Hold some back
#
# Two pairs of each kind are put away, with all of their cells. Both parts of each are seen
# alone.

# %%
held_out = [*surprise.index[surprise][:2], *surprise.index[~surprise][:2]]
scvi_sams.evaluation.split_pairs(adata, "perturbation", "control", n_seen=2, held_out=held_out)
adata.obs["split"].value_counts()

# %%
scvi_sams.SAMSVAE.setup_anndata(
    adata,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    batch_key="replicate",
)
model = scvi_sams.SAMSVAE(adata, n_latent=20)
split = {"external_indexing": scvi_sams.evaluation.split_indices(adata)}
model.train(datasplitter_kwargs=split)

# %% [markdown]
# ## Beside the sum of the parts
#
# The scorecard scores held-out pairs, with the sum of the measured single effects (`additive`)
# next to the model. This is the table to look at before anything else.

# %%
card = scvi_sams.evaluation.scorecard(model, n_bootstrap=200)
card.table.round(3)

# %% [markdown]
# Four pairs say little in the mean. One by one they say what matters here:

# %%
scores = card.per_condition.query("measure == 'pearson_perturbed'")
scores = scores.pivot(index="condition", columns="predictor", values="value")
scores.insert(0, "surprise", surprise.reindex(scores.index))
scores[["surprise", "SAMSVAE", "additive"]].sort_values("surprise").round(3)

# %% [markdown]
# For pairs without a surprise the model is very good. For pairs with one, nobody who knows the
# parts alone could have been right, and neither was. **The model cannot tell you which kind an
# unmeasured pair is.**
#
# ## Intervals that do not help
#
# Can the intervals warn of it? How much of the true deviation of the held-out pairs from
# additivity lies inside them?

# %%
interactions = scvi_sams.tl.pair_interactions(model, held_out, n_samples=30)
observed = scvi_sams.evaluation.observed_effects(adata, "perturbation", "control")
residual = scvi_sams.evaluation.interaction_residuals(observed, held_out)[held_out].to_df()
inside = (interactions.layers["lower"] <= residual) & (residual <= interactions.layers["upper"])
inside.mean(axis=1).rename("share of genes inside the interval of 95%").round(2).to_frame()

# %% tags=["picture:pairs"]
ax = scvi_sams.pl.pair_vs_additive_effects(interactions, held_out[0])

# %% [markdown]
# They do not (the share would be 0.95 if they did). Part of that is noise in what was observed;
# most is that the intervals are those of masks and effects, with the decoder taken as known.
# They answer "how well are the parts known?", not "is this pair like its parts?".
#
# ## Measure it, and the model can learn it
#
# With `interactions=True`, or a list of pairs, each measured pair may have a sparse shift of its
# own. The prior is strict: most pairs should not need one.

# %%
training_pairs = [tuple(pair.split("+")) for pair in surprise.index.difference(held_out)]
with_interactions = scvi_sams.SAMSVAE(adata, n_latent=20, interactions=training_pairs)
with_interactions.train(datasplitter_kwargs=split)
interactions = scvi_sams.tl.interaction_effects(with_interactions)
found = interactions.groupby("pair")["inclusion_probability"].max()
table = pd.DataFrame(
    {
        "planted": surprise.reindex(found.index),
        "probability of an interaction": found.round(3),
    }
)
table.sort_values("probability of an interaction", ascending=False)

# %% [markdown]
# ## Which pair next?
#
# What the model *can* say of unmeasured pairs is where the parts saturate: two strong
# perturbations that push the same genes cannot both have their full effect. The ranking is by
# the error to expect of adding up, which is a reasonable order in which to look, and no more.

# %%
ranked = scvi_sams.tl.rank_unmeasured_pairs(
    with_interactions,
    n_pairs=8,
    n_samples=4,
    counterfactual=with_interactions.counterfactual(n_cells=20),
)
ranked[["first", "second", "surprise", "interaction_score", "class"]].round(2)

# %% [markdown]
# ## A real screen
#
# [Norman and colleagues (2019)](https://doi.org/10.1126/science.aax4438) activated genes alone
# and in pairs in K562 cells. What you see below comes from a thin subset, of 3,375 cells with 150
# counts each. The whole screen, which `public_screen` fetches, is a better judge.

# %%
subset = Path("norman2019_subset.h5ad")
if subset.is_file():
    screen = sc.read_h5ad(subset)
    screen.obs["size_factor"] = screen.obs["total_umi_all_genes"].astype(float)
else:
    screen = scvi_sams.datasets.public_screen("norman_2019")
    screen.obs["size_factor"] = np.asarray(screen.X.sum(axis=1)).ravel()
scvi_sams.evaluation.split_pairs(screen, "perturbation", "control", n_seen=2, held_out=0.99)
if screen.n_vars > 2_000:  # those that vary most, by the training cells alone
    training = screen[screen.obs["split"] == "train"].copy()
    sc.pp.normalize_total(training, target_sum=1e4)
    sc.pp.log1p(training)
    sc.pp.highly_variable_genes(training, n_top_genes=2_000)
    screen = screen[:, training.var["highly_variable"]].copy()
scvi_sams.SAMSVAE.setup_anndata(
    screen, perturbation_key="perturbation", control="control", size_factor_key="size_factor"
)
real = scvi_sams.SAMSVAE(screen)
real.train(datasplitter_kwargs={"external_indexing": scvi_sams.evaluation.split_indices(screen)})
print(scvi_sams.evaluation.scorecard(real, n_bootstrap=200))

# %% [markdown]
# On that subset the sum of the measured singles tends to win: with a hundred shallow cells a
# perturbation, latents shrink what raw means keep. The verdict at the foot of the scorecard says
# so. Believe it, and add up.
#
# ## In short
#
# | you have | do |
# |---|---|
# | singles only | expect the sum; rank by `tl.rank_unmeasured_pairs`; believe no epistasis |
# | some pairs | hold a few out; if `additive` wins, add up |
# | pairs whose deviation matters | `interactions=True`, and look at those that were measured |
