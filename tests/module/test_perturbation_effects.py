"""The posterior of masks and effects, against Monte Carlo and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from scvi_sams.module import PerturbationEffects
from scvi_sams.module.closed_form import SpikeSlab

N_PERTURBATIONS, N_LATENT = 5, 3
MASK_PRIOR, EMBEDDING_SCALE = 0.2, 1.3


def make_effects(spike_scale: float = 0.0, **kwargs) -> PerturbationEffects:
    """A posterior of some random shape, masks on."""
    effects = PerturbationEffects(
        N_PERTURBATIONS,
        N_LATENT,
        mask_prior=MASK_PRIOR,
        embedding_scale=EMBEDDING_SCALE,
        spike_scale=spike_scale,
        **kwargs,
    )
    shape = (N_PERTURBATIONS, N_LATENT)
    spike = float(spike_scale > 0)
    effects.assign(
        SpikeSlab(
            mask_logits=1.5 * torch.randn(shape),
            slab_mean=torch.randn(shape),
            slab_variance=0.05 + torch.rand(shape) * 0.5,
            spike_mean=spike * 0.2 * torch.randn(shape),
            spike_variance=spike * (0.01 + 0.05 * torch.rand(shape)),
        )
    )
    effects.masks_on.fill_(True)
    return effects


@pytest.fixture(params=[0.0, 0.3], ids=["point spike", "continuous spike"])
def effects(request) -> PerturbationEffects:
    return make_effects(request.param)


class TestMoments:
    def test_match_draws(self, effects):
        draws = effects.sample(200_000)
        mean, variance = effects.moments()
        torch.testing.assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(draws.var(0), variance, atol=0.02, rtol=0.02)

    def test_rows_are_those_of_the_whole(self, effects):
        rows = torch.tensor([3, 0, 3])
        for some, everything in zip(effects.moments(rows), effects.moments(), strict=True):
            assert torch.equal(some, everything[rows])


class TestSample:
    def test_mask_is_on_as_often_as_its_probability(self):
        effects = make_effects()
        frequency = (effects.sample(100_000) != 0).float().mean(0)
        torch.testing.assert_close(frequency, effects.mask_probability(), atol=0.01, rtol=0)

    def test_embedding_given_mask(self):
        effects = make_effects()
        draws = effects.sample(100_000)
        on = draws != 0
        mean = draws.sum(0) / on.sum(0)
        variance = (on * (draws - mean).square()).sum(0) / on.sum(0)
        torch.testing.assert_close(mean, effects.posterior.slab_mean, atol=0.05, rtol=0)
        torch.testing.assert_close(variance, effects.posterior.slab_variance, atol=0.03, rtol=0.1)

    def test_rows(self, effects):
        rows = torch.tensor([4, 1])
        draws = effects.sample(100_000, rows)
        assert draws.shape == (100_000, 2, N_LATENT)
        torch.testing.assert_close(draws.mean(0), effects.moments()[0][rows], atol=0.03, rtol=0)

    def test_relaxed_draws_have_the_same_moments(self):
        effects = make_effects(trainable=True)
        rows = torch.arange(N_PERTURBATIONS).repeat(40_000)
        with torch.no_grad():
            draws = effects.rsample(rows, 0.5).reshape(40_000, N_PERTURBATIONS, N_LATENT)
            mean, variance = effects.moments()
        torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(draws.var(0), variance, atol=0.05, rtol=0.03)


class TestDivergence:
    def test_matches_monte_carlo(self, effects):
        """The mean of ``log q - log p`` over draws of masks and of effects given the masks."""
        q, n_draws = effects.posterior, 200_000
        q_mask, p_mask = Bernoulli(logits=q.mask_logits), Bernoulli(MASK_PRIOR)
        mask = q_mask.sample((n_draws,))
        spike_variance = effects.spike_variance.item()
        q_slab = Normal(q.slab_mean, q.slab_variance.sqrt())
        p_slab = Normal(0.0, (EMBEDDING_SCALE**2 + spike_variance) ** 0.5)
        slab = q_slab.sample((n_draws,))
        log_ratio = mask * (q_slab.log_prob(slab) - p_slab.log_prob(slab))
        if spike_variance:
            q_spike = Normal(q.spike_mean, q.spike_variance.sqrt())
            p_spike = Normal(0.0, spike_variance**0.5)
            spike = q_spike.sample((n_draws,))
            log_ratio += (1 - mask) * (q_spike.log_prob(spike) - p_spike.log_prob(spike))
        divergence = effects.kl_divergence()
        torch.testing.assert_close(
            divergence["kl_embedding"], log_ratio.mean(0).sum(), rtol=0.01, atol=0.02
        )
        log_ratio = q_mask.log_prob(mask) - p_mask.log_prob(mask)
        torch.testing.assert_close(
            divergence["kl_mask"], log_ratio.mean(0).sum(), rtol=0.01, atol=0.02
        )

    def test_of_masks_and_effects_bounds_that_of_effects(self):
        """Forgetting the mask loses information: mixtures are closer than their parts."""
        effects = make_effects(0.3)
        q = effects.posterior
        draws = effects.sample(100_000)
        variance = effects.spike_variance

        def log_mixture(on, slab, spike):
            return torch.logaddexp(
                on.log() + slab.log_prob(draws), (1 - on).log() + spike.log_prob(draws)
            )

        log_q = log_mixture(
            effects.mask_probability(),
            Normal(q.slab_mean, q.slab_variance.sqrt()),
            Normal(q.spike_mean, q.spike_variance.sqrt()),
        )
        log_p = log_mixture(
            torch.tensor(MASK_PRIOR),
            Normal(0.0, (EMBEDDING_SCALE**2 + variance).sqrt()),
            Normal(0.0, variance.sqrt()),
        )
        marginal = (log_q - log_p).mean(0).sum()
        joint = sum(effects.kl_divergence().values())
        assert 0 < marginal < joint

    def test_prior_is_at_no_distance_from_itself(self):
        effects = make_effects(0.3)
        effects.mask_logits.fill_(math.log(MASK_PRIOR / (1 - MASK_PRIOR)))
        effects.slab_mean.fill_(0)
        effects.slab_log_variance.fill_(math.log(EMBEDDING_SCALE**2 + 0.3**2))
        effects.spike_mean.fill_(0)
        effects.spike_posterior_variance.fill_(0.3**2)
        for term in effects.kl_divergence().values():
            assert term.item() == pytest.approx(0, abs=1e-5)


class TestGradient:
    def test_relaxed_draws_reach_the_posterior_of_their_rows(self):
        effects = make_effects(trainable=True)
        with torch.no_grad():  # both masks are then drawn
            effects.mask_logits.fill_(0.5)
        rows = torch.tensor([1, 4])
        effects.rsample(rows, 0.5, n_samples=20).square().sum().backward()
        for parameter in (effects.mask_logits, effects.slab_mean, effects.slab_log_variance):
            touched = parameter.grad.abs().sum(1) > 0
            if parameter is effects.mask_logits:
                assert touched.nonzero()[:, 0].tolist() == [1, 4]
            else:
                assert set(touched.nonzero()[:, 0].tolist()) <= {1, 4}

    def test_embeddings_learn_where_the_mask_is_on(self):
        effects = make_effects(trainable=True)
        with torch.no_grad():
            effects.mask_logits.fill_(30.0)
        effects.rsample(torch.arange(N_PERTURBATIONS), 0.5).sum().backward()
        torch.testing.assert_close(effects.slab_mean.grad, torch.ones_like(effects.slab_mean))

    def test_closed_form_posteriors_are_not_trained(self):
        assert not any(parameter.requires_grad for parameter in make_effects().parameters())


class TestBeforeTheMasksAreOn:
    @pytest.fixture
    def effects(self) -> PerturbationEffects:
        effects = make_effects(0.3, trainable=True)
        effects.masks_on.fill_(False)
        return effects

    def test_nothing_moves(self, effects):
        rows = torch.tensor([0, 2])
        for zeros in (
            *effects.moments(),
            *effects.moments(rows),
            effects.sample(4),
            effects.sample(4, rows),
            effects.rsample(rows, 0.5),
            *effects.kl_divergence().values(),
        ):
            assert not zeros.any()
        assert effects.sample(4, rows).shape == (4, 2, N_LATENT)


class TestAssign:
    def test_damping_moves_means_a_share_of_the_way(self):
        effects = make_effects(0.3)
        old = SpikeSlab(*(field.clone() for field in effects.posterior))
        new = SpikeSlab(*(field.abs() + 1 for field in old))
        effects.assign(new, damping=0.25)
        for name in ("mask_logits", "slab_mean", "spike_mean"):
            expected = 0.75 * getattr(old, name) + 0.25 * getattr(new, name)
            torch.testing.assert_close(getattr(effects.posterior, name), expected)
        for name in ("slab_variance", "spike_variance"):
            torch.testing.assert_close(getattr(effects.posterior, name), getattr(new, name))
