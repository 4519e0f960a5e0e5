"""Conditions decoded with doses, pairs and direct effects, against decoding by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module import CellPopulation, SAMSVAEModule
from scvi_sams.module.doses import log_mean_exp

N_GENES, N_PERTURBATIONS, N_BATCH, N_DRAWS = 6, 4, 2, 5
PAIRS = [(0, 1), (1, 3)]
TARGETS = [2, -1, 0, 2]  # two perturbations share a target, one has none

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def make_module(n_latent: int = 3, *, simple: bool = False, **kwargs) -> SAMSVAEModule:
    if not simple:
        kwargs |= {"dose_response": "hill", "interactions": PAIRS, "targets": TARGETS}
    module = SAMSVAEModule(
        N_GENES, N_PERTURBATIONS, n_latent=n_latent, n_hidden=16, n_batch=N_BATCH, **kwargs
    )
    with torch.no_grad():
        effects = module.effects
        effects.mask_logits.normal_(1)
        effects.slab_mean.normal_()
        effects.frame.copy_(torch.linalg.qr(torch.randn_like(effects.frame))[0])
        effects.masks_on.fill_(True)
        if module.closed_form is not None:
            module.closed_form.basal_mean.normal_()
        module.px_r.normal_()
        if not simple:
            module.direct_effects.mean.normal_()
            module.dose_response.log_slope_mean.normal_()
    return module.double().eval()


def by_hand(module, draws, k: int, doses) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift of the latents and log fold changes of the genes under one draw."""
    responses = doses.tolist()
    if draws.hill is not None:
        ec50, slope = (field[k].exp() for field in draws.hill)
        responses = [
            d**h / (d**h + c**h) if d > 0 else 0.0
            for d, c, h in zip(responses, ec50.tolist(), slope.tolist(), strict=True)
        ]
    shift = sum(r * draws.effects[k, t] for t, r in enumerate(responses))
    for row, (a, b) in enumerate(module.interactions.pairs, N_PERTURBATIONS):
        shift = shift + responses[a] * responses[b] * draws.effects[k, row]
    fold_change = torch.zeros(N_GENES, dtype=torch.float64)
    if draws.direct is not None:
        for t, gene in enumerate(TARGETS):
            if gene >= 0:
                fold_change[gene] += responses[t] * draws.direct[k, t].item()
    return shift, fold_change


@pytest.fixture
def population() -> CellPopulation:
    return CellPopulation(
        torch.randn(N_DRAWS, 3, dtype=torch.float64),
        20 + 50 * torch.rand(N_DRAWS, 1, dtype=torch.float64),
        torch.randint(0, N_BATCH, (N_DRAWS, 1)),
    )


CONDITIONS = [[0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0], [1.3, 0.4, 0.0, 2.0]]


@torch.no_grad()
@pytest.mark.parametrize("doses", CONDITIONS, ids=["control", "single", "triple"])
@pytest.mark.parametrize("global_inference", ["closed_form", "gradient"])
@pytest.mark.parametrize("simple", [False, True], ids=["everything", "plain"])
def test_decoded_by_hand(simple, global_inference, doses, population):
    module = make_module(simple=simple, global_inference=global_inference)
    draws = module.sample_globals(N_DRAWS)
    condition = torch.tensor([doses], dtype=torch.float64)
    expected = []
    for k in range(N_DRAWS):
        shift, fold_change = by_hand(module, draws, k, condition[0])
        u = (population.basal + shift) @ module.effects.frame
        if module.closed_form is not None:
            u = u + module.closed_form.basal_mean[population.batch_index[:, 0]]
        logits = module.decoder(u, population.batch_index).logits + fold_change
        expected.append(population.library * torch.softmax(logits, -1))
    expected = torch.stack(expected)

    every_draw = module.decode_condition(population, condition, draws)
    torch.testing.assert_close(every_draw.mu.expand_as(expected), expected)
    one_each = module.decode_condition(population, condition, draws, one_draw_a_cell=True)
    torch.testing.assert_close(one_each.mu, expected[range(N_DRAWS), range(N_DRAWS)])
    some = module.decode_condition(population, condition, draws.subset(1, 3))
    torch.testing.assert_close(some.mu.expand_as(expected[1:3]), expected[1:3])


@torch.no_grad()
def test_draws_of_the_perturbations_asked_for(population):
    """They are those of the condition, and of all pairs."""
    module = make_module()
    asked = torch.tensor([1, 3])
    draws = module.sample_globals(N_DRAWS, asked)
    assert draws.rows.tolist() == [1, 3, 4, 5]
    everything = torch.full((N_DRAWS, N_PERTURBATIONS + len(PAIRS), 3), torch.nan).double()
    everything[:, draws.rows] = draws.effects
    whole = draws._replace(effects=everything, rows=torch.arange(N_PERTURBATIONS + len(PAIRS)))
    condition = torch.tensor([[0.0, 1.5, 0.0, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(
        module.decode_condition(population, condition, draws).mu,
        module.decode_condition(population, condition, whole).mu,
    )
    mean, _ = module.effects.moments(draws.rows)
    many = module.sample_globals(20_000, asked).effects
    torch.testing.assert_close(many.mean(0), mean, atol=0.05, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("global_inference", ["closed_form", "gradient"])
def test_importance_weights_meet_the_evidence(global_inference):
    """Against a sum over a grid of two latents, with shift and fold changes by hand."""
    n_cells, n_particles = 4, 40_000
    module = make_module(2, global_inference=global_inference)
    module.encoder.variance_logit.bias += 2.5  # a guide wider than the posterior
    dosage = torch.rand(n_cells, N_PERTURBATIONS, dtype=torch.float64) + 0.2
    dosage[0], dosage[1, 1:] = 0, 0
    counts = torch.poisson(8 * torch.rand(n_cells, N_GENES).double()) + 1
    batch = torch.randint(0, N_BATCH, (n_cells, 1))
    tensors = {
        REGISTRY_KEYS.X_KEY: counts,
        SAMS_REGISTRY_KEYS.PERTURBATION_KEY: dosage.to_sparse_csr(),
        REGISTRY_KEYS.BATCH_KEY: batch,
    }
    one = module.sample_globals(1)
    many = one._replace(
        n_samples=n_particles,
        effects=one.effects.expand(n_particles, -1, -1),
        direct=one.direct.expand(n_particles, -1),
        hill=type(one.hill)(*(field.expand(n_particles, -1) for field in one.hill)),
    )
    weights = module.log_importance_weights(tensors, many)

    shifts, fold_changes = zip(*(by_hand(module, one, 0, doses) for doses in dosage), strict=True)
    axis = torch.linspace(-6, 6, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    u = (grid[:, None] + torch.stack(shifts)) @ module.effects.frame
    if module.closed_form is not None:
        u = u + module.closed_form.basal_mean[batch[:, 0]]
    logits = module.decoder(u, batch).logits + torch.stack(fold_changes)
    mean = (counts.sum(1, keepdim=True) * torch.softmax(logits, -1)).numpy()
    theta = module.px_r.exp().numpy()
    log_likelihood = scipy.stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean))
    log_prior = scipy.stats.norm.logpdf(grid.numpy()).sum(-1)
    log_joint = log_likelihood.sum(-1) + log_prior[:, None]
    evidence = scipy.special.logsumexp(log_joint, axis=0) + 2 * math.log(axis[1] - axis[0])
    np.testing.assert_allclose(log_mean_exp(weights), evidence, atol=0.05)
