"""What is known of a simulated screen is found again."""

from __future__ import annotations

import numpy as np
import pytest
import scvi

import scvi_sams
from scvi_sams import SAMSVAE

from .conftest import QUIET, SETUP, fit, small_screen


def _true_effects(adata, conditions):
    """Observed effects of as many cells as it takes for their noise to vanish."""
    large = scvi_sams.datasets.simulated_screen(n_cells=16_000, seed=1)
    np.testing.assert_array_equal(large.uns["truth"]["mask"], adata.uns["truth"]["mask"])
    large = large[large.obs["perturbation"].isin(["control", *conditions])].copy()
    return scvi_sams.evaluation.observed_effects(
        large, perturbation_key="perturbation", control="control", layer="counts"
    )


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def recovered(request):
    adata = scvi_sams.datasets.simulated_screen(n_cells=4_000, seed=1)
    SAMSVAE.setup_anndata(adata, **SETUP, batch_key="replicate")
    scvi.settings.seed = 0
    model = SAMSVAE(adata, n_latent=16, n_hidden=128, global_inference=request.param)
    model.train(**QUIET)
    return model, request.param


@pytest.mark.slow
class TestRecovery:
    def test_masks(self, recovered):
        model, engine = recovered
        found = scvi_sams.evaluation.mask_recovery(
            model.adata.uns["truth"]["mask"], model.get_perturbation_mask()
        )
        assert found.f1 > {"closed_form": 0.9, "gradient": 0.3}[engine]

    def test_effects(self, recovered):
        model, _ = recovered
        predicted = model.get_average_treatment_effect()
        truth = _true_effects(model.adata, model.perturbation_names)
        assert scvi_sams.evaluation.effect_correlation(predicted, truth) > 0.8

    def test_effects_of_pairs(self, recovered):
        model, engine = recovered
        pairs = [label for label in model.adata.obs["perturbation"].unique() if "+" in label]
        assert len(pairs) == 8
        predicted = model.get_average_treatment_effect(pairs)
        truth = _true_effects(model.adata, pairs)
        least = {"closed_form": 0.9, "gradient": 0.75}[engine]
        assert scvi_sams.evaluation.effect_correlation(predicted, truth) > least


@pytest.mark.parametrize("engine", ["closed_form", "gradient"])
class TestRepeat:
    def test_bitwise(self, engine):
        """Everything from a seed: data, networks, training, read-outs."""

        def run(seed):
            adata = small_screen(seed=seed)
            SAMSVAE.setup_anndata(adata, **SETUP, batch_key="replicate")
            model = fit(adata, max_epochs=4, seed=seed, global_inference=engine)
            state = {name: value.numpy() for name, value in model.module.state_dict().items()}
            return state | {
                "latent": model.get_latent_representation(give_mean=False),
                "cells": model.predict(["P001+P006"], n_samples=5).X.toarray(),
                "effect": model.get_average_treatment_effect(n_samples=3, n_cells=5).X,
                "bound": model.get_iwelbo(n_particles=2, return_mean=False),
            }

        first, second, other = run(3), run(3), run(4)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], err_msg=name)
        assert not np.array_equal(first["latent"], other["latent"])
