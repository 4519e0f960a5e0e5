"""Posterior and prior of masks and embeddings, against Monte Carlo, torch and sums over masks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributions import Bernoulli, Beta, Normal, kl_divergence
from torch.nn import functional as F

from scvi_sams.module.doses import additive_shift
from scvi_sams.module.posteriors import (
    GIVEN_LOGIT,
    POSTERIORS,
    CorrelatedEmbeddings,
    MaskPrior,
    MeanFieldEmbeddings,
    SpikeAndSlab,
    SpikeSlab,
    kl_bernoulli_log_prior,
    kl_centred_normal,
    relaxed_bernoulli,
)

from .minibatches import padded

if TYPE_CHECKING:
    from scvi_sams.module.posteriors import EffectsPosterior

EMBEDDING = tuple(POSTERIORS)


def kl_bernoulli(logits: torch.Tensor, prior_logit: torch.Tensor) -> torch.Tensor:
    return kl_bernoulli_log_prior(logits, F.logsigmoid(prior_logit), F.logsigmoid(-prior_logit))


class TestBernoulliDivergence:
    def test_matches_torch(self):
        logits, prior = torch.meshgrid(
            torch.linspace(-8, 8, 33, dtype=torch.float64),
            torch.linspace(-4, 4, 9, dtype=torch.float64),
            indexing="ij",
        )
        expected = kl_divergence(Bernoulli(logits=logits), Bernoulli(logits=prior))
        torch.testing.assert_close(kl_bernoulli(logits, prior), expected)

    def test_matches_monte_carlo(self):
        q, p = Bernoulli(logits=torch.tensor(1.2)), Bernoulli(logits=torch.tensor(-2.0))
        draws = q.sample((200_000,))
        estimate = (q.log_prob(draws) - p.log_prob(draws)).mean()
        torch.testing.assert_close(kl_bernoulli(q.logits, p.logits), estimate, atol=0.02, rtol=0)

    @pytest.mark.parametrize("logit", [-200.0, 200.0])
    def test_is_finite_where_the_posterior_is_certain(self, logit):
        divergence = kl_bernoulli(torch.tensor(logit), torch.tensor(1.0))
        sure = math.log1p(math.exp(math.copysign(1.0, -logit)))
        assert divergence.item() == pytest.approx(sure, rel=1e-4)


class TestNormalDivergence:
    def test_matches_torch(self):
        mean = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
        variance = torch.logspace(-4, 1, 6, dtype=torch.float64)
        expected = kl_divergence(
            Normal(mean, variance.sqrt()), Normal(torch.zeros_like(mean), math.sqrt(0.7))
        )
        torch.testing.assert_close(kl_centred_normal(mean, variance, 0.7), expected)

    def test_matches_monte_carlo(self):
        q, p = Normal(0.8, 0.5), Normal(0.0, 1.5)
        draws = q.sample((200_000,))
        estimate = (q.log_prob(draws) - p.log_prob(draws)).mean()
        exact = kl_centred_normal(torch.tensor(0.8), torch.tensor(0.25), 2.25)
        torch.testing.assert_close(exact, estimate, atol=0.01, rtol=0)


class TestRelaxedBernoulli:
    def test_draws_are_exact(self):
        logits = torch.tensor([-3.0, -0.5, 0.0, 2.0])
        draws = relaxed_bernoulli(logits.expand(100_000, 4), 0.5)
        assert set(draws.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(draws.mean(0), logits.sigmoid(), atol=0.01, rtol=0)

    def test_gradient_points_to_what_lowers_the_loss(self):
        logits = torch.zeros(20_000, requires_grad=True)
        relaxed_bernoulli(logits, 0.5).sum().backward()
        assert (logits.grad > 0).float().mean() > 0.99
        # Of the concrete relaxation at this temperature: the mean of soft (1 - soft) / 0.5.
        uniform = torch.linspace(0, 1, 100_002, dtype=torch.float64)[1:-1]
        soft = torch.sigmoid(torch.logit(uniform) / 0.5)
        expected = (soft * (1 - soft) / 0.5).mean().item()
        assert logits.grad.mean().item() == pytest.approx(expected, rel=0.02)


class TestMaskPrior:
    N_PERTURBATIONS, N_LATENT = 6, 4
    SHARING = ("all", "latent", "perturbation")

    def make(self, *args, **kwargs) -> MaskPrior:
        return MaskPrior(self.N_PERTURBATIONS, self.N_LATENT, *args, **kwargs).double()

    @staticmethod
    def bound(prior: MaskPrior, logits: torch.Tensor) -> torch.Tensor:
        return prior.kl_masks(logits).sum() + prior.kl_probability()

    @pytest.fixture
    def logits(self) -> torch.Tensor:
        return 2 * torch.randn(self.N_PERTURBATIONS, self.N_LATENT, dtype=torch.float64)

    @pytest.mark.parametrize("shared_by", SHARING)
    def test_update_minimises_the_divergence(self, logits, shared_by):
        prior = self.make((1.0, 5.0), shared_by)
        before = self.bound(prior, logits)
        prior.update(torch.sigmoid(logits))
        after = self.bound(prior, logits)
        assert after < before
        for parameter in (prior.posterior_a, prior.posterior_b):
            for factor in (0.9, 1.1):
                optimum = parameter.clone()
                parameter.mul_(factor)
                assert self.bound(prior, logits) > after
                parameter.copy_(optimum)

    @pytest.mark.parametrize("shared_by", SHARING)
    def test_divergence_matches_monte_carlo(self, logits, shared_by):
        prior = self.make((2.0, 3.0), shared_by)
        prior.update(torch.sigmoid(logits))
        posterior = Beta(prior.posterior_a, prior.posterior_b)
        draws = posterior.sample((100_000,))
        masks = torch.bernoulli(torch.sigmoid(logits).expand(100_000, -1, -1))
        log_masks = Bernoulli(logits=logits).log_prob(masks) - Bernoulli(draws).log_prob(masks)
        hyperprior = Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
        log_draws = posterior.log_prob(draws) - hyperprior.log_prob(draws)
        estimates = log_masks.sum((1, 2)) + log_draws.sum((1, 2))
        error = estimates.std() / 100_000**0.5
        assert abs(estimates.mean() - self.bound(prior, logits)) < 5 * error

    def test_probabilities_follow_their_masks(self):
        masks = torch.zeros(self.N_PERTURBATIONS, self.N_LATENT)
        masks[0], masks[:, 1] = 1, 1
        by_perturbation = self.make((1.0, 1.0), "perturbation")
        by_perturbation.update(masks)
        assert by_perturbation.mean().shape == (self.N_PERTURBATIONS, 1)
        assert by_perturbation.mean()[0].item() == pytest.approx(5 / 6)
        by_latent = self.make((1.0, 1.0), "latent")
        by_latent.update(masks)
        assert by_latent.mean()[0, 1].item() == pytest.approx(7 / 8)

    @pytest.mark.parametrize("n_pairs", [0, 3])
    @pytest.mark.parametrize("shared_by", SHARING)
    @pytest.mark.parametrize("probability", [0.1, 1.0, (1.0, 5.0)])
    def test_rows(self, probability, shared_by, n_pairs):
        prior = self.make(probability, shared_by, n_pairs)
        n_rows = self.N_PERTURBATIONS + n_pairs
        logits = 2 * torch.randn(n_rows, self.N_LATENT, dtype=torch.float64)
        prior.update(torch.sigmoid(logits[: self.N_PERTURBATIONS]))
        rows = torch.tensor([4, n_rows - 1, 1])
        torch.testing.assert_close(
            prior.kl_masks(logits[rows], rows), prior.kl_masks(logits)[rows]
        )

    @pytest.mark.parametrize("probability", [0.1, 1.0, (1.0, 5.0)])
    def test_pairs_have_a_probability_of_their_own(self, probability):
        prior = self.make(probability, n_pairs=2, pair_probability=0.03)
        logits = torch.randn(self.N_PERTURBATIONS + 2, self.N_LATENT, dtype=torch.float64)
        of_pairs = Bernoulli(torch.tensor(0.03).double())
        expected = kl_divergence(Bernoulli(logits=logits[-2:]), of_pairs)
        torch.testing.assert_close(prior.kl_masks(logits)[-2:], expected)
        alone = self.make(probability).kl_masks(logits[:-2])
        torch.testing.assert_close(prior.kl_masks(logits)[:-2], alone)

    def test_fixed_is_never_updated(self, logits):
        prior = self.make(0.1)
        prior.update(torch.sigmoid(logits))
        assert prior.mean().item() == pytest.approx(0.1)
        on, off = prior.log_probabilities()
        assert (on - off).sigmoid().item() == pytest.approx(0.1)
        assert prior.kl_probability() == 0

    def test_one_is_no_sparsity(self, logits):
        prior = self.make(1.0)
        assert not prior.sparse
        assert prior.given.all()
        assert not prior.kl_masks(logits).any()

    @pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, (0.0, 1.0), (1.0, -2.0)])
    def test_impossible(self, probability):
        with pytest.raises(ValueError, match="mask_prior="):
            self.make(probability)

    def test_unknown_sharing(self):
        with pytest.raises(ValueError, match="'gene' is unknown; use all, latent, perturbation"):
            self.make((1.0, 1.0), "gene")


N_PERTURBATIONS, N_LATENT = 5, 3
MASK_PRIOR, EMBEDDING_SCALE = 0.2, 1.3


def make_effects(background: float = 0.0, trainable: bool = False) -> SpikeAndSlab:
    """A posterior of some random shape, masks on."""
    prior = MaskPrior(N_PERTURBATIONS, N_LATENT, MASK_PRIOR)
    effects = SpikeAndSlab(prior, EMBEDDING_SCALE, trainable, background)
    shape = (N_PERTURBATIONS, N_LATENT)
    spike = float(background > 0)
    effects.assign(
        SpikeSlab(
            mask_logits=1.5 * torch.randn(shape),
            slab_mean=torch.randn(shape),
            slab_variance=0.05 + torch.rand(shape) * 0.5,
            spike_mean=spike * 0.2 * torch.randn(shape),
            spike_variance=spike * (0.01 + 0.05 * torch.rand(shape)),
        )
    )
    effects.masks_on = True
    return effects


class TestSpikeAndSlab:
    @pytest.fixture(params=[0.0, 0.3], ids=["point spike", "continuous spike"])
    def effects(self, request) -> SpikeAndSlab:
        return make_effects(request.param)

    def test_moments_match_draws(self, effects):
        draws = effects.sample(200_000)
        mean, variance = effects.moments()
        torch.testing.assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(draws.var(0), variance, atol=0.02, rtol=0.02)

    def test_moments_of_rows_are_those_of_the_whole(self, effects):
        for rows in (torch.tensor([3, 0, 3]), torch.tensor([[1, 0], [4, 4]])):
            for some, everything in zip(effects.moments(rows), effects.moments(), strict=True):
                assert torch.equal(some, everything[rows])

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
        slab_mean, slab_variance = effects.slab_moments()
        torch.testing.assert_close(mean, slab_mean, atol=0.05, rtol=0)
        torch.testing.assert_close(variance, slab_variance, atol=0.03, rtol=0.1)

    def test_draws_of_rows(self, effects):
        rows = torch.tensor([4, 1])
        draws = effects.sample(100_000, rows)
        assert draws.shape == (100_000, 2, N_LATENT)
        torch.testing.assert_close(draws.mean(0), effects.moments()[0][rows], atol=0.03, rtol=0)

    def test_relaxed_draws_have_the_same_moments(self):
        effects = make_effects(trainable=True)
        rows = torch.arange(N_PERTURBATIONS).repeat(40_000)
        with torch.no_grad():
            draws = effects.rsample(rows).reshape(40_000, N_PERTURBATIONS, N_LATENT)
            mean, variance = effects.moments()
        torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(draws.var(0), variance, atol=0.05, rtol=0.03)

    def test_divergence_matches_monte_carlo(self, effects):
        """The mean of ``log q - log p`` over draws of masks and of effects given the masks."""
        q, n_draws = effects.parameters_of(), 200_000
        q_mask, p_mask = Bernoulli(logits=q.mask_logits), Bernoulli(MASK_PRIOR)
        mask = q_mask.sample((n_draws,))
        background_variance = effects.background_variance.item()
        q_slab = Normal(q.slab_mean, q.slab_variance.sqrt())
        p_slab = Normal(0.0, (EMBEDDING_SCALE**2 + background_variance) ** 0.5)
        slab = q_slab.sample((n_draws,))
        log_ratio = mask * (q_slab.log_prob(slab) - p_slab.log_prob(slab))
        if background_variance:
            q_spike = Normal(q.spike_mean, q.spike_variance.sqrt())
            p_spike = Normal(0.0, background_variance**0.5)
            spike = q_spike.sample((n_draws,))
            log_ratio += (1 - mask) * (q_spike.log_prob(spike) - p_spike.log_prob(spike))
        divergence = effects.kl()
        torch.testing.assert_close(
            divergence["kl_embedding"], log_ratio.mean(0).sum(), rtol=0.01, atol=0.02
        )
        log_ratio = q_mask.log_prob(mask) - p_mask.log_prob(mask)
        torch.testing.assert_close(
            divergence["kl_mask"], log_ratio.mean(0).sum(), rtol=0.01, atol=0.02
        )

    def test_divergence_of_masks_and_effects_bounds_that_of_effects(self):
        """Forgetting the mask loses information: mixtures are closer than their parts."""
        effects = make_effects(0.3)
        q = effects.parameters_of()
        draws = effects.sample(100_000)
        variance = effects.background_variance

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
        joint = sum(effects.kl().values())
        assert 0 < marginal < joint

    def test_prior_is_at_no_distance_from_itself(self):
        effects = make_effects(0.3)
        effects.mask_logits.fill_(math.log(MASK_PRIOR / (1 - MASK_PRIOR)))
        effects.slab_mean.fill_(0)
        effects.slab_log_variance.fill_(math.log(EMBEDDING_SCALE**2 + 0.3**2))
        effects.spike_mean.fill_(0)
        effects.spike_variance.fill_(0.3**2)
        for term in effects.kl().values():
            assert term.item() == pytest.approx(0, abs=1e-5)

    def test_a_step_moves_means_a_share_of_the_way(self):
        """One share for all rows, or one for each."""
        for step in (0.25, torch.tensor([[0.25], [1.0], [0.0], [0.5], [0.7]])):
            effects = make_effects(0.3)
            old = SpikeSlab(*(field.clone() for field in effects.parameters_of()))
            new = SpikeSlab(*(field.abs() + 1 for field in old))
            effects.assign(new, step)
            found = effects.parameters_of()
            for name in ("mask_logits", "slab_mean", "spike_mean"):
                expected = (1 - step) * getattr(old, name) + step * getattr(new, name)
                torch.testing.assert_close(getattr(found, name), expected)
            for name in ("slab_variance", "spike_variance"):
                torch.testing.assert_close(getattr(found, name), getattr(new, name))

    def test_the_background_is_one_of_perturbations(self):
        prior = MaskPrior(3, 2, n_pairs=2)
        effects = SpikeAndSlab(prior, trainable=False, background_scale=0.5)
        assert effects.prior_background()[:, 0].tolist() == [0.25, 0.25, 0.25, 0, 0]
        given = SpikeAndSlab(MaskPrior(3, 2, 1.0), trainable=False, background_scale=0.5)
        assert not given.prior_background().any()
        assert not given.learns_background

    def test_reported_masks_are_charged_the_penalty(self):
        effects = make_effects()
        effects.selection_penalty.fill_(2.0)
        expected = torch.sigmoid(effects.mask_logits - 2)
        torch.testing.assert_close(effects.mask_probability(), expected)
        torch.testing.assert_close(effects.mask_log_odds(), effects.mask_logits - 2)

    def test_relaxed_draws_reach_the_posterior_of_their_rows(self):
        effects = make_effects(trainable=True)
        with torch.no_grad():  # both masks are then drawn
            effects.mask_logits.fill_(0.5)
        rows = torch.tensor([1, 4])
        effects.rsample(rows, n_samples=20).square().sum().backward()
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
        effects.rsample(torch.arange(N_PERTURBATIONS)).sum().backward()
        torch.testing.assert_close(effects.slab_mean.grad, torch.ones_like(effects.slab_mean))

    def test_closed_form_posteriors_are_not_trained(self):
        effects = make_effects()
        assert not any(parameter.requires_grad for parameter in effects.parameters())
        assert effects.trainable_parameters() == []

    def test_nothing_moves_before_the_masks_are_on(self):
        effects = make_effects(0.3, trainable=True)
        effects.masks_on = False
        rows = torch.tensor([0, 2])
        for zeros in (
            *effects.moments(),
            *effects.moments(rows),
            effects.sample(4),
            effects.sample(4, rows),
            effects.rsample(rows),
            effects.mask_probability(),
            *effects.kl().values(),
        ):
            assert not zeros.any()
        assert effects.sample(4, rows).shape == (4, 2, N_LATENT)


MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N_LATENT)), dtype=torch.float64)


def embedding_given(
    effects: CorrelatedEmbeddings, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the embeddings of all perturbations given their masks, by hand."""
    hidden = masks @ effects.from_mask.weight.T + effects.from_mask.bias + effects.code
    moments = hidden.clamp(min=0) @ effects.to_moments.weight.T + effects.to_moments.bias
    log_variance = effects.slab_log_variance + moments[..., N_LATENT:]
    return effects.slab_mean + moments[..., :N_LATENT], log_variance.exp()


class TestCorrelated:
    """Embeddings given masks: the network, and sums over all masks that there are."""

    @pytest.fixture
    def effects(self) -> CorrelatedEmbeddings:
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT)
        effects = CorrelatedEmbeddings(prior, EMBEDDING_SCALE).double()
        with torch.no_grad():
            effects.mask_logits.normal_()
            effects.slab_mean.normal_()
            effects.slab_log_variance.fill_(-1.0)
            effects.to_moments.weight.normal_(std=0.3)
            effects.to_moments.bias.normal_(std=0.3)
        effects.masks_on = True
        return effects

    @pytest.fixture
    def over_all_masks(self, effects) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probability of each of the masks, and moments of embeddings given it."""
        masks = MASKS[:, None].expand(-1, N_PERTURBATIONS, -1)
        with torch.no_grad():
            probability = Bernoulli(logits=effects.mask_logits).log_prob(masks).sum(-1).exp()
            return probability.unsqueeze(-1), *embedding_given(effects, masks)

    @torch.no_grad()
    @pytest.mark.parametrize("mask", range(len(MASKS)))
    def test_formula(self, effects, mask):
        """Where the masks are sure, moments are those of the embedding given them."""
        masks = MASKS[mask].expand(N_PERTURBATIONS, -1)
        effects.mask_logits.copy_(200 * (2 * masks - 1))
        expected_mean, expected_variance = embedding_given(effects, masks)
        mean, variance = effects.moments()
        torch.testing.assert_close(mean, masks * expected_mean)
        torch.testing.assert_close(variance, masks * expected_variance)

    def test_starts_at_mean_field(self):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, 1.0)
        correlated, mean_field = CorrelatedEmbeddings(prior), MeanFieldEmbeddings(prior)
        for effects in (correlated, mean_field):
            effects.masks_on = True
            with torch.no_grad():
                effects.slab_mean.copy_(torch.arange(15.0).reshape(5, 3))
        for ours, expected in zip(correlated.moments(), mean_field.moments(), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_a_perturbation_costs_one_row(self):
        small, large = (
            CorrelatedEmbeddings(MaskPrior(n_perturbations, N_LATENT))
            for n_perturbations in (10, 1_010)
        )
        n_code = small.code.shape[1]
        n_small, n_large = (
            sum(p.numel() for p in effects.trainable_parameters()) for effects in (small, large)
        )
        assert n_large - n_small == 1_000 * (n_code + 3 * N_LATENT)

    def test_a_query_learns_codes_only(self, effects):
        shared = [*effects.from_mask.parameters(), *effects.to_moments.parameters()]
        learned = {id(parameter) for parameter in effects.trainable_parameters()}
        assert {id(parameter) for parameter in shared} < learned
        effects.freeze(torch.tensor([0]))
        assert effects.is_query
        learned = {id(parameter) for parameter in effects.trainable_parameters()}
        assert not {id(parameter) for parameter in shared} & learned
        assert id(effects.code) in learned
        effects.rsample(torch.tensor([1, 3]), 20).square().sum().backward()
        assert effects.code.grad.any(1).tolist() == [False, True, False, True, False]

    @torch.no_grad()
    def test_moments_match_the_sum_over_all_masks(self, effects, over_all_masks):
        effects.n_moment_draws = 40_000
        probability, mean, variance = over_all_masks
        masks = MASKS[:, None]
        first = (probability * masks * mean).sum(0)
        second = (probability * masks * (variance + mean.square())).sum(0)
        found_mean, found_variance = effects.moments()
        error = (second - first.square()).sqrt() / 40_000**0.5
        assert ((found_mean - first).abs() < 5 * error).all()
        torch.testing.assert_close(found_variance, second - first.square(), atol=0.03, rtol=0.03)

    @torch.no_grad()
    def test_moments_given_one_mask_match_the_sum_over_the_others(self, effects, over_all_masks):
        effects.n_moment_draws = 40_000
        probability, mean, variance = over_all_masks
        masks = MASKS[:, None]
        on = (probability * masks).sum(0)
        first = (probability * masks * mean).sum(0) / on
        second = (probability * masks * (variance + mean.square())).sum(0) / on
        found_mean, found_variance = effects.slab_moments()
        torch.testing.assert_close(found_mean, first, atol=0.03, rtol=0.03)
        torch.testing.assert_close(found_variance, second - first.square(), atol=0.03, rtol=0.03)

    @torch.no_grad()
    @pytest.mark.parametrize("probability", [0.009, 0.02, 0.3, 0.97])
    def test_moments_given_one_mask_are_over_the_draws_where_it_is_on(self, effects, probability):
        """A network that masks do not matter to says the free moments, at any probability."""
        torch.nn.init.zeros_(effects.to_moments.weight)
        torch.nn.init.zeros_(effects.to_moments.bias)
        effects.mask_logits.fill_(math.log(probability / (1 - probability)))
        mean, variance = effects.slab_moments()
        torch.testing.assert_close(mean, effects.slab_mean)
        torch.testing.assert_close(variance, effects.slab_log_variance.exp())

    @torch.no_grad()
    def test_a_mask_that_is_never_on_says_the_prior(self, effects):
        effects.mask_logits[1, 2] = -12
        mean, variance = effects.slab_moments()
        assert mean[1, 2] == 0
        assert variance[1, 2].item() == pytest.approx(EMBEDDING_SCALE**2)

    @torch.no_grad()
    def test_moments_are_always_the_same(self, effects):
        for once, again in zip(effects.moments(), effects.moments(), strict=True):
            assert torch.equal(once, again)
        rows = torch.tensor([[1, 0], [4, 4]])
        for some, everything in zip(effects.moments(rows), effects.moments(), strict=True):
            torch.testing.assert_close(some, everything[rows])

    @torch.no_grad()
    def test_draws_match_the_sum_over_all_masks(self, effects, over_all_masks):
        probability, mean, variance = over_all_masks
        first = (probability * MASKS[:, None] * mean).sum(0)
        second = (probability * MASKS[:, None] * (variance + mean.square())).sum(0)
        rows = torch.arange(N_PERTURBATIONS)
        for draws in (effects.sample(40_000), effects.rsample(rows, 40_000)):
            error = draws.std(0) / 40_000**0.5
            assert ((draws.mean(0) - first).abs() < 5 * error).all()
            torch.testing.assert_close(draws.square().mean(0), second, atol=0.05, rtol=0.03)

    @torch.no_grad()
    def test_divergence_averages_to_the_sum_over_all_masks(self, effects, over_all_masks):
        probability, mean, variance = over_all_masks
        divergence = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, EMBEDDING_SCALE))
        expected = (probability * divergence).sum()
        draws = torch.stack([effects.kl()["kl_embedding"] for _ in range(2_000)])
        assert abs(draws.mean() - expected) < 5 * draws.std() / 2_000**0.5
        assert draws.std() > 0


class TestEveryFamily:
    def make(
        self,
        posterior: str,
        mask_prior: float | tuple[float, float] = 0.02,
        embedding_scale: float = 1.0,
        **kwargs,
    ) -> EffectsPosterior:
        prior = MaskPrior(40, 3, mask_prior, **kwargs)
        effects = POSTERIORS[posterior](prior, embedding_scale).double()
        with torch.no_grad():
            effects.slab_mean.normal_()
            effects.set_mask_logits(torch.randn(effects.n_rows, 3).double())
            if posterior == "correlated":
                effects.to_moments.weight.normal_(std=0.3)
        effects.masks_on = True
        return effects

    @pytest.mark.parametrize("posterior", ["mean_field", "spike_and_slab", "point"])
    def test_moments_match_draws(self, posterior):
        effects = self.make(posterior)
        with torch.no_grad():
            draws = effects.sample(20_000)
            mean, variance = effects.moments()
        scale = draws.std(0) + 0.01
        assert ((draws.mean(0) - mean).abs() < 0.06 * scale).all()
        torch.testing.assert_close(draws.var(0), variance, atol=0.05, rtol=0.1)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_divergence_from_random_rows_is_unbiased(self, posterior):
        effects = self.make(posterior)
        with torch.no_grad():
            whole = torch.stack([sum(effects.kl().values()) for _ in range(300)])
            effects.max_divergence_rows = 10
            some = torch.stack([sum(effects.kl().values()) for _ in range(3_000)])
        error = math.hypot(whole.std() / 300**0.5, some.std() / 3_000**0.5)
        assert some.std() > 0
        assert abs(some.mean() - whole.mean()) < 5 * error

    def test_divergence_from_random_rows_counts_pairs(self):
        """With masks whose prior is learned for each perturbation, and pairs with their own."""
        effects = self.make(
            "spike_and_slab",
            mask_prior=(1.0, 3.0),
            shared_by="perturbation",
            n_pairs=20,
            pair_probability=0.01,
        )
        effects.update_mask_prior()
        with torch.no_grad():
            whole = effects.kl()
            effects.max_divergence_rows = 10
            some = [effects.kl() for _ in range(3_000)]
        for name, expected in whole.items():
            estimates = torch.stack([terms[name] for terms in some])
            assert abs(estimates.mean() - expected) < 5 * estimates.std() / 3_000**0.5

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_divergence_matches_torch(self, posterior):
        effects = self.make(posterior, mask_prior=0.1, embedding_scale=0.8)
        masks = Bernoulli(logits=effects.mask_logits)
        terms = effects.kl()
        expected = kl_divergence(masks, Bernoulli(torch.tensor(0.1).double())).sum()
        torch.testing.assert_close(terms["kl_mask"], expected)
        slab = Normal(effects.slab_mean, (0.5 * effects.slab_log_variance).exp())
        embedding = kl_divergence(slab, Normal(0.0, 0.8))
        if posterior == "mean_field":
            torch.testing.assert_close(terms["kl_embedding"], embedding.sum())
        elif posterior == "spike_and_slab":
            torch.testing.assert_close(terms["kl_embedding"], (masks.probs * embedding).sum())
        elif posterior == "point":
            assert terms["kl_embedding"] == 0

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_gradients_of_draws_match_finite_differences(self, posterior):
        """Without sparsity, and the noise the same, draws are smooth in the posterior."""
        effects = self.make(posterior, mask_prior=1.0)
        rows = torch.tensor([3, 17])

        def draws(*_):
            torch.manual_seed(3)
            return effects.rsample(rows, 2)

        parameters = effects.trainable_parameters()
        if posterior == "correlated":  # all of them are many
            parameters = [effects.slab_mean, effects.slab_log_variance, effects.to_moments.bias]
        assert torch.autograd.gradcheck(draws, parameters)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_without_sparsity(self, posterior):
        effects = self.make(posterior, mask_prior=1.0)
        assert effects.kl()["kl_mask"] == 0
        assert (effects.mask_probability() == 1).all()
        assert (effects.sample(5) != 0).all()
        assert not effects.mask_logits.requires_grad
        if posterior != "correlated":
            mean, variance = effects.moments()
            torch.testing.assert_close(mean, effects.slab_mean)
            expected = 0 if posterior == "point" else effects.slab_log_variance.exp()
            torch.testing.assert_close(variance, torch.zeros_like(mean) + expected)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_without_sparsity_pairs_are_sparse(self, posterior):
        effects = self.make(posterior, mask_prior=1.0, n_pairs=2)
        effects.set_mask_logits(-3.0)
        probability = effects.mask_probability()
        assert (probability[:40] == 1).all()
        assert (probability[40:] < 0.1).all()
        terms = effects.kl()
        terms["kl_mask"].backward()
        assert terms["kl_mask"] > 0
        assert not effects.mask_logits.grad[:40].any()
        assert effects.mask_logits.grad[40:].all()

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    )
    def test_a_mask_that_is_given_is_exactly_one(self, dtype):
        assert torch.sigmoid(torch.tensor(GIVEN_LOGIT, dtype=dtype)) == 1

    def test_frozen_rows_stay(self):
        effects = self.make("spike_and_slab")
        effects.freeze(slice(10))
        before = SpikeSlab(*(field.detach().clone() for field in effects.parameters_of()))
        new = SpikeSlab(*(field + 1 for field in before))
        effects.assign(new)
        for field, old, wanted in zip(effects.parameters_of(), before, new, strict=True):
            torch.testing.assert_close(field[:10], old[:10])
            torch.testing.assert_close(field[10:], wanted[10:])

    def test_rows_that_are_frozen_are_counted(self):
        effects = self.make("mean_field")
        assert not effects.is_query
        effects.freeze(torch.tensor([3, 5]))
        effects.freeze(torch.tensor([5, 7]))
        assert effects.n_frozen == 3
        assert effects.is_query
        assert not effects.is_frozen
        effects.freeze(torch.tensor([3, 4]), False)
        assert effects.frozen.squeeze(1).nonzero().flatten().tolist() == [5, 7]
        effects.freeze()
        assert effects.is_frozen

    def test_the_prior_of_a_query_stays(self):
        effects = self.make("mean_field", mask_prior=(1.0, 3.0))
        effects.freeze(torch.tensor([0]))
        before = effects.mask_prior.mean()
        effects.update_mask_prior()
        assert torch.equal(effects.mask_prior.mean(), before)
        effects.freeze(frozen=False)
        effects.update_mask_prior()
        assert not torch.equal(effects.mask_prior.mean(), before)


class TestCoordinates:
    """Shifts in the networks' coordinates, against draws of effects in latents."""

    @pytest.fixture(params=EMBEDDING)
    def effects(self, request) -> EffectsPosterior:
        effects = POSTERIORS[request.param](MaskPrior(N_PERTURBATIONS, N_LATENT)).double()
        with torch.no_grad():
            effects.slab_mean.normal_()
            effects.set_mask_logits(torch.randn(N_PERTURBATIONS, N_LATENT).double())
            effects.rotation.copy_(torch.linalg.qr(torch.randn(3, 3).double())[0])
        effects.masks_on = True
        return effects

    @pytest.fixture
    def dosage(self) -> torch.Tensor:
        dosage = torch.rand(8, N_PERTURBATIONS, dtype=torch.float64) + 0.5
        dosage *= torch.rand(8, N_PERTURBATIONS) < 0.4
        dosage[0] = 0
        return dosage

    @torch.no_grad()
    def test_there_and_back(self, effects):
        z = torch.randn(4, 7, N_LATENT, dtype=torch.float64)
        u = effects.to_network(z)
        torch.testing.assert_close(u, z @ effects.rotation)
        torch.testing.assert_close(effects.to_latents(u)[0], z)
        assert not torch.allclose(u, z)

    @torch.no_grad()
    def test_variances_in_latents(self, effects):
        """Of independent coordinates of the networks."""
        variance = torch.rand(2, N_LATENT, dtype=torch.float64)
        draws = torch.randn(400_000, 2, N_LATENT, dtype=torch.float64) * variance.sqrt()
        _, expected = effects.to_latents(torch.zeros(2, N_LATENT).double(), variance)
        torch.testing.assert_close(
            effects.to_latents(draws)[0].var(0), expected, rtol=0.02, atol=0
        )

    @torch.no_grad()
    def test_moments_and_draws_of_shifts(self, effects, dosage):
        if isinstance(effects, CorrelatedEmbeddings):
            effects.n_moment_draws = 4_000
        doses = padded(dosage)
        mean, variance, effect = effects.shift_moments(doses)
        of_latents = dosage.square() @ effects.moments()[1]
        torch.testing.assert_close(additive_shift(doses, effect), mean)
        expected = effects.to_network(dosage @ effects.sample(100_000))
        drawn = effects.sampled_shift(doses, 100_000)
        assert drawn.shape == expected.shape
        for draws in (expected, drawn):
            torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
            spread = effects.to_latents(draws)[0].var(0)
            torch.testing.assert_close(spread, of_latents, atol=0.05, rtol=0.05)
        torch.testing.assert_close(variance, of_latents @ effects.rotation.square())

    @torch.no_grad()
    def test_cells_of_a_perturbation_share_a_draw(self, effects):
        effects.set_mask_logits(2.0)
        doses = padded(torch.eye(N_PERTURBATIONS, dtype=torch.float64)[[0, 2, 0, 2]])
        shift = effects.sampled_shift(doses, 1)
        assert shift.shape == (4, N_LATENT)
        assert torch.equal(shift[:2], shift[2:])

    @torch.no_grad()
    def test_controls_alone(self, effects):
        doses = padded(torch.zeros(4, N_PERTURBATIONS, dtype=torch.float64))
        for n_samples, shape in ((1, (4, N_LATENT)), (6, (6, 4, N_LATENT))):
            shift = effects.sampled_shift(doses, n_samples)
            assert shift.shape == shape
            assert not shift.any()
        assert not any(part.any() for part in effects.shift_moments(doses)[:2])


class TestState:
    """Numbers of Python go where the tensors of a state go."""

    def make(self) -> SpikeAndSlab:
        return SpikeAndSlab(MaskPrior(4, 2), trainable=False)

    def test_is_saved_and_loaded(self, tmp_path):
        effects = self.make()
        effects.masks_on = True
        effects.freeze(torch.tensor([1, 2]))
        torch.save(effects.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt")
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        before = dict(state)
        other = self.make()
        other.load_state_dict(state)
        assert other.masks_on is True
        assert other.n_frozen == 2
        assert type(other.n_frozen) is int
        assert state.keys() == before.keys()  # what was loaded is left as it was

    def test_is_found_inside_of_other_modules(self):
        effects, other = self.make(), self.make()
        effects.masks_on = True
        parent = torch.nn.ModuleDict({"inner": torch.nn.Sequential(other)})
        state = {f"inner.0.{name}": value for name, value in effects.state_dict().items()}
        assert parent.load_state_dict(state).missing_keys == []
        assert other.masks_on
        assert parent.state_dict().keys() == state.keys()

    def test_goes_with_a_copy_and_is_its_own(self):
        effects = self.make()
        effects.masks_on = True
        other = copy.deepcopy(effects)
        assert other.masks_on
        other.masks_on = False
        assert effects.masks_on
        assert bool(effects.state_dict()["masks_on"])

    def test_what_is_missing_is_said(self):
        effects = self.make()
        effects.masks_on = True
        state = effects.state_dict()
        del state["masks_on"]
        other = self.make()
        with pytest.raises(RuntimeError, match="Missing key.*masks_on"):
            other.load_state_dict(state)
        other.load_state_dict(state, strict=False)
        assert other.masks_on is False
