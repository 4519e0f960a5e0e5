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
# # Choosing and criticising a model
#
# Suppose a colleague hands you a fitted model with handsome heat maps. Five questions, in this
# order:
#
# 1. Does it beat the mean? The sum? (baselines)
# 2. How good could anything be? (ceilings)
# 3. Does it find structure where there is none? (shuffled labels)
# 4. Does sparsity help, or merely look tidy? (masks on and off)
# 5. Do simulated cells look like cells? (posterior predictive checks)

# %%
import numpy as np
import pandas as pd
import scvi

import scvi_sams

scvi.settings.seed = 0

# %% [markdown]
# ## A split that asks the right question
#
# Held-out cells of conditions that the model has seen ask whether it *describes*; held-out
# conditions whether it *predicts*. A third of the pairs are kept back here, so that it must
# predict.

# %%
adata = scvi_sams.datasets.simulated_screen(
    n_cells=6_000, n_pairs=15, pair_fraction=0.4, effect_size=1.5, inactive_fraction=0.3
)
scvi_sams.evaluation.split_pairs(adata, "perturbation", "control", n_seen=2, held_out=0.34)
scvi_sams.evaluation.check_leakage(adata)
split = {"external_indexing": scvi_sams.evaluation.split_indices(adata)}


def fit(model_class, **arguments):
    """A model of the training cells, whatever its class."""
    scvi.settings.seed = 0
    model_class.setup_anndata(
        adata,
        layer="counts",
        perturbation_key="perturbation",
        control="control",
        batch_key="replicate",
    )
    model = model_class(adata, n_latent=20, **arguments)
    model.train(datasplitter_kwargs=split)
    return model


# %% [markdown]
# ## 1 and 2. Beside baselines and ceilings
#
# Three models that differ by one assumption each: sparse and additive, additive, neither.

# %%
models = {
    "sparse, additive": fit(scvi_sams.SAMSVAE),
    "dense, additive": fit(scvi_sams.CPAVAE),
    "neither": fit(scvi_sams.ConditionalVAE),
}
card = scvi_sams.evaluation.scorecard(models, n_bootstrap=300)
card.table.round(3)

# %%
for sentence in card.verdict:
    print("-", sentence)

# %% [markdown]
# Read the verdict first, then the ceilings: `split half` is what half of the held-out cells say
# of the other half. A score near it leaves nothing to win on this screen, however low it looks,
# and two methods both near it are not told apart by it.
#
# `pearson_perturbed` is the correlation of effects relative to the *average perturbation*.
# Relative to control, predicting the average for everybody looks good in many screens.

# %% tags=["picture:scorecard"]
ax = scvi_sams.pl.scorecard(card, "pearson_perturbed")

# %% [markdown]
# A mean over conditions hides where it was earned. By the size of the effect:

# %%
card.by_stratum.dropna(how="all").round(3).head(12)

# %% [markdown]
# ## 3. Shuffled labels
#
# Give every cell the label of some other cell. Nothing is left to find, and a model that still
# finds mechanisms finds them anywhere.

# %%
shuffled = adata.copy()
labels = adata.obs["perturbation"].to_numpy()
shuffled.obs["perturbation"] = pd.Categorical(np.random.default_rng(0).permutation(labels))
scvi.settings.seed = 0
scvi_sams.SAMSVAE.setup_anndata(
    shuffled,
    layer="counts",
    perturbation_key="perturbation",
    control="control",
    batch_key="replicate",
)
on_shuffled = scvi_sams.SAMSVAE(shuffled, n_latent=20)
on_shuffled.train()


def masks_on(model):
    """Number of masks that are rather on than off."""
    return int((model.get_perturbation_mask() > 0.5).to_numpy().sum())


pd.Series(
    {
        "true masks": int(adata.uns["truth"]["mask"].sum()),
        "masks on": masks_on(models["sparse, additive"]),
        "masks on, shuffled labels": masks_on(on_shuffled),
    },
    name="count",
).to_frame()

# %% [markdown]
# ## 4. Sparsity, on and off
#
# The prior probability of a mask, from strict to none at all (1.0 is `CPAVAE`). Held-out
# likelihood says whether sparsity costs fit; held-out effects say whether it costs prediction;
# the masks say what it buys. It rarely makes predictions much better. It makes them readable.

# %%
test = adata.obs["split"].to_numpy() == "test"
observed = scvi_sams.evaluation.observed_effects(
    adata[test | (adata.obs["perturbation"] == "control").to_numpy()],
    "perturbation",
    "control",
    layer="counts",
)
conditions = list(observed.obs_names)
rows = {}
for prior in (0.002, 0.1, 1.0):
    sweep = fit(scvi_sams.SAMSVAE, mask_prior=prior)
    effect = sweep.get_average_treatment_effect(conditions, n_samples=10)
    rows[prior] = {
        # Without sparsity there are no masks: every effect is there.
        "masks on": masks_on(sweep) if prior < 1 else sweep.get_perturbation_effect().size,
        "IWELBO of held-out cells": sweep.get_iwelbo(indices=np.flatnonzero(test), n_particles=20),
        "correlation of effects": scvi_sams.evaluation.effect_correlation(effect, observed),
    }
pd.DataFrame(rows).T.rename_axis("mask_prior").round(3)

# %% [markdown]
# ## 5. Do simulated cells look like cells?
#
# For each gene, mean, variance and share of zeros: as observed, and in cells that the model
# simulates from its posterior. A likelihood that is wrong shows in variances and zeros first.

# %%
model = models["sparse, additive"]
checked = np.flatnonzero(test)[:500]
simulated = model.posterior_predictive_sample(indices=checked, n_samples=1)
simulated = np.asarray(simulated.todense()).reshape(len(checked), -1)
counts = adata.layers["counts"][checked].toarray()
pd.DataFrame(
    {
        name: {
            "correlation over genes": np.corrcoef(f(counts), f(simulated))[0, 1],
            "median ratio": np.median(f(simulated) / np.maximum(f(counts), 1e-3)),
        }
        for name, f in {
            "mean": lambda x: x.mean(axis=0),
            "variance": lambda x: x.var(axis=0),
            "share of zeros": lambda x: (x == 0).mean(axis=0) + 1e-3,
        }.items()
    }
).T.round(3)

# %% [markdown]
# scvi-tools' `scvi.criticism.PosteriorPredictiveCheck` takes these models too, and goes further.
#
# ## What to write down
#
# The split and its seed, the verdict of the scorecard, whichever way it went, the ceiling, masks
# on shuffled labels, and the calls that a second seed repeated. `card.to_csv("scorecard")` keeps
# scores with versions and settings.
