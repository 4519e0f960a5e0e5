"""The conditional VAE: doses reach both networks, and its importance weights meet the evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from scvi import REGISTRY_KEYS

from scvi_sams.module import ConditionalVAEModule
from scvi_sams.module.base import CellPopulation

from .minibatches import columns, dosage_of, infer, minibatch, padded

N_CELLS, N_GENES, N_PERTURBATIONS = 6, 5, 3


@pytest.fixture
def module() -> ConditionalVAEModule:
    module = ConditionalVAEModule(N_GENES, N_PERTURBATIONS, n_latent=1, n_hidden=16).double()
    module.encoder.variance_logit.bias.data += 2.5  # wider than the posterior
    return module.eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    dosage = torch.rand(N_CELLS, N_PERTURBATIONS, dtype=torch.float64)
    dosage[0] = 0
    return minibatch(torch.poisson(8 * torch.rand(N_CELLS, N_GENES).double()) + 1, dosage)


def test_doses_reach_both_networks(module, tensors):
    inference, generative = module(tensors, compute_loss=False)
    dosage = dosage_of(tensors, N_PERTURBATIONS) + 1
    changed_inference, _ = module(tensors | columns(dosage), compute_loss=False)
    assert (inference["qz"].loc != changed_inference["qz"].loc).all()
    decoded = module.generative(inference["z"], inference["library"], side_input=dosage)["decoded"]
    assert (decoded.logits != generative["decoded"].logits).any(1).all()


def test_networks_see_the_doses_of_all_perturbations(module, tensors):
    dosage = dosage_of(tensors, N_PERTURBATIONS)
    outputs = infer(module, tensors)
    assert torch.equal(outputs["side_input"], dosage)
    more = infer(module, tensors | columns(dosage, n_columns=5))
    torch.testing.assert_close(more["qz"].loc, outputs["qz"].loc)


def test_importance_weights_meet_the_evidence(module, tensors):
    weights = module.log_importance_weights(tensors, module.sample_globals(50_000))
    assert weights.shape == (50_000, N_CELLS)
    grid = torch.linspace(-7, 7, 2_001, dtype=torch.float64)
    counts, dosage = tensors[REGISTRY_KEYS.X_KEY], dosage_of(tensors, N_PERTURBATIONS)
    batch = tensors[REGISTRY_KEYS.BATCH_KEY]
    with torch.no_grad():
        state = torch.cat(
            [grid[:, None, None].expand(-1, N_CELLS, 1), dosage.expand(len(grid), -1, -1)], -1
        )
        mean = counts.sum(1, keepdim=True) * torch.softmax(module.decoder(state, batch).logits, -1)
        theta = module.px_r.exp().numpy()
    log_likelihood = scipy.stats.nbinom.logpmf(
        counts.numpy(), theta, theta / (theta + mean.numpy())
    ).sum(-1)
    log_joint = log_likelihood + scipy.stats.norm.logpdf(grid.numpy())[:, None]
    expected = scipy.special.logsumexp(log_joint, axis=0) + math.log(grid[1] - grid[0])
    log_mean = torch.logsumexp(weights, 0) - math.log(len(weights))
    np.testing.assert_allclose(log_mean, expected, atol=0.03)


def test_condition_is_decoded_with_its_doses(module):
    population = CellPopulation(torch.randn(4, 1).double(), torch.full((4, 1), 50.0).double())
    condition = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    draws = module.sample_globals(3)
    expected = module.generative(
        population.basal, population.library, side_input=condition.expand(4, -1)
    )["px"].mu
    one_each = module.decode_condition(population, padded(condition), draws, one_draw_a_cell=True)
    torch.testing.assert_close(one_each.mu, expected)
    torch.testing.assert_close(
        module.decode_condition(population, padded(condition), draws).mu[0], expected
    )


def test_has_nothing_that_all_cells_share(module):
    assert module.global_divergences() == {}
    assert module.global_parameters() == []
    assert module.effects is None
    assert module.closed_form is None
    assert module.n_global_elements == 1


def test_state_is_loaded_as_it_was_saved(module):
    module.n_training_cells, module.counts_per_cell, module.initialized = 12, math.pi, True
    other = ConditionalVAEModule(N_GENES, N_PERTURBATIONS, n_latent=1, n_hidden=16).double()
    other.load_state_dict(module.state_dict())
    assert (other.n_training_cells, other.counts_per_cell) == (12, math.pi)
    assert other.initialized is True
