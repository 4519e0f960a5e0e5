"""Embeddings given masks: the network, and sums over all masks that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from scvi_sams.module import PerturbationEffects, posteriors
from scvi_sams.module.posteriors import CorrelatedEmbedding

N_PERTURBATIONS, N_LATENT = 5, 3
EMBEDDING_SCALE = 1.3
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N_LATENT)), dtype=torch.float64)


@pytest.fixture
def network() -> CorrelatedEmbedding:
    network = CorrelatedEmbedding(N_PERTURBATIONS, N_LATENT).double()
    with torch.no_grad():
        network.moments.weight.normal_(std=0.3)
        network.moments.bias.normal_(std=0.3)
    return network


@pytest.fixture
def effects() -> PerturbationEffects:
    effects = PerturbationEffects(
        N_PERTURBATIONS,
        N_LATENT,
        posterior="correlated",
        embedding_scale=EMBEDDING_SCALE,
        spike_scale=0.0,
        trainable=True,
    ).double()
    with torch.no_grad():
        effects.mask_logits.normal_()
        effects.slab_mean.normal_()
        effects.slab_log_variance.fill_(-1.0)
        effects.correlated.moments.weight.normal_(std=0.3)
        effects.masks_on.fill_(True)
    return effects


class TestNetwork:
    def test_formula(self, network):
        masks = MASKS[[1, 6]]
        mean, log_variance = network(torch.tensor([4, 0]), masks)
        for row, perturbation in enumerate([4, 0]):
            hidden = network.from_mask.weight @ masks[row] + network.from_mask.bias
            hidden = (hidden + network.code[perturbation]).clamp(min=0)
            moments = network.moments.weight @ hidden + network.moments.bias
            torch.testing.assert_close(mean[row], moments[:N_LATENT])
            torch.testing.assert_close(log_variance[row], moments[N_LATENT:])

    def test_draws_in_front(self, network):
        rows = torch.arange(N_PERTURBATIONS)
        masks = torch.bernoulli(torch.full((7, N_PERTURBATIONS, N_LATENT), 0.5).double())
        together = network(rows, masks)
        apart = zip(*(network(rows, draw) for draw in masks), strict=True)
        for moments, expected in zip(together, apart, strict=True):
            torch.testing.assert_close(moments, torch.stack(expected))

    def test_a_perturbation_costs_one_row(self):
        small, large = (
            sum(p.numel() for p in CorrelatedEmbedding(n, N_LATENT, n_hidden=20).parameters())
            for n in (10, 1_010)
        )
        assert large - small == 1_000 * 20

    def test_frozen_network_learns_codes_only(self, network):
        network.freeze_network()
        mean, log_variance = network(torch.tensor([1, 3]), MASKS[[2, 7]])
        (mean.sum() + log_variance.square().sum()).backward()
        assert network.code.grad.any(1).tolist() == [False, True, False, True, False]
        others = {name for name, p in network.named_parameters() if p.grad is None}
        assert others == {"from_mask.weight", "from_mask.bias", "moments.weight", "moments.bias"}

    def test_starts_at_mean_field(self):
        moments = CorrelatedEmbedding(N_PERTURBATIONS, N_LATENT)(
            torch.arange(N_PERTURBATIONS), torch.ones(N_PERTURBATIONS, N_LATENT)
        )
        assert not any(moment.any() for moment in moments)


def over_all_masks(effects) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probability of each of the masks, and moments of embeddings given it."""
    masks = MASKS[:, None].expand(-1, N_PERTURBATIONS, -1)
    probability = Bernoulli(logits=effects.mask_logits).log_prob(masks).sum(-1).exp()
    mean, log_variance = effects.correlated(torch.arange(N_PERTURBATIONS), masks)
    variance = (effects.slab_log_variance + log_variance).exp()
    return probability.unsqueeze(-1), effects.slab_mean + mean, variance


class TestPosterior:
    @pytest.fixture(autouse=True)
    def _without_gradients(self):
        with torch.no_grad():
            yield

    def test_moments_match_the_sum_over_all_masks(self, effects, monkeypatch):
        monkeypatch.setattr(posteriors, "_N_MOMENT_DRAWS", 40_000)
        probability, mean, variance = over_all_masks(effects)
        masks = MASKS[:, None]
        first = (probability * masks * mean).sum(0)
        second = (probability * masks * (variance + mean.square())).sum(0)
        found_mean, found_variance = effects.moments()
        error = (second - first.square()).sqrt() / 40_000**0.5
        assert ((found_mean - first).abs() < 5 * error).all()
        torch.testing.assert_close(found_variance, second - first.square(), atol=0.03, rtol=0.03)

    def test_moments_are_always_the_same(self, effects):
        for once, again in zip(effects.moments(), effects.moments(), strict=True):
            assert torch.equal(once, again)

    def test_draws_match_the_sum_over_all_masks(self, effects):
        probability, mean, variance = over_all_masks(effects)
        first = (probability * MASKS[:, None] * mean).sum(0)
        second = (probability * MASKS[:, None] * (variance + mean.square())).sum(0)
        rows = torch.arange(N_PERTURBATIONS)
        for draws in (effects.sample(40_000), effects.rsample(rows, 0.5, 40_000)):
            error = draws.std(0) / 40_000**0.5
            assert ((draws.mean(0) - first).abs() < 5 * error).all()
            torch.testing.assert_close(draws.square().mean(0), second, atol=0.05, rtol=0.03)

    def test_divergence_averages_to_the_sum_over_all_masks(self, effects):
        probability, mean, variance = over_all_masks(effects)
        divergence = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, EMBEDDING_SCALE))
        expected = (probability * divergence).sum()
        draws = torch.stack([effects.kl_divergence()["kl_embedding"] for _ in range(2_000)])
        assert abs(draws.mean() - expected) < 5 * draws.std() / 2_000**0.5
        assert draws.std() > 0
