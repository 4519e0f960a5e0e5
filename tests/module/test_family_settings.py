"""One module in all its settings: divergences and importance weights against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from scvi import REGISTRY_KEYS
from torch.distributions import Bernoulli, Normal, kl_divergence

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module import PerturbationEffects, SAMSVAEModule, posteriors
from scvi_sams.module.closed_form import SpikeSlab
from scvi_sams.module.doses import log_mean_exp

N_CELLS, N_GENES, N_PERTURBATIONS = 6, 5, 4
DOSAGE = SAMS_REGISTRY_KEYS.PERTURBATION_KEY
BASAL = ("mean_field", "correlated", "residual", "amortized")
EMBEDDING = ("mean_field", "correlated", "spike_and_slab", "point")


def make_module(n_latent: int = 3, **kwargs) -> SAMSVAEModule:
    module = SAMSVAEModule(
        N_GENES,
        N_PERTURBATIONS,
        n_latent=n_latent,
        n_hidden=16,
        global_inference="gradient",
        **kwargs,
    )
    effects = module.effects
    with torch.no_grad():
        effects.slab_mean.normal_()
        effects.mask_logits.normal_()
        effects.frame.copy_(torch.linalg.qr(torch.randn_like(effects.frame))[0])
        if effects.correlated is not None:
            effects.correlated.moments.weight.normal_(std=0.3)
        effects.masks_on.fill_(True)
        module.px_r.normal_()
    return module.double().eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    dosage = torch.rand(N_CELLS, N_PERTURBATIONS, dtype=torch.float64) + 0.5
    dosage *= torch.rand(N_CELLS, N_PERTURBATIONS) < 0.5
    dosage[0], dosage[1, 0] = 0, 1
    return {
        REGISTRY_KEYS.X_KEY: torch.poisson(8 * torch.rand(N_CELLS, N_GENES).double()) + 1,
        DOSAGE: dosage,
        REGISTRY_KEYS.BATCH_KEY: torch.zeros(N_CELLS, 1, dtype=torch.long),
    }


@pytest.mark.parametrize("embedding", EMBEDDING)
@pytest.mark.parametrize("basal", BASAL)
class TestEverySetting:
    def test_trains(self, basal, embedding, tensors):
        module = make_module(basal_posterior=basal, embedding_posterior=embedding).train()
        for n_particles in (1, 3):
            _, _, output = module(tensors, inference_kwargs={"n_samples": n_particles})
            loss = output.loss + sum(module.global_divergences().values()) / 100
            loss.backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name

    def test_particles_average_to_the_bound(self, basal, embedding, tensors):
        """The mean of many sampled bounds is that of one with as many particles."""
        module = make_module(basal_posterior=basal, embedding_posterior=embedding).train()
        module.encoder.hidden.eval()  # without dropout
        with torch.no_grad():
            _, _, many = module(tensors, inference_kwargs={"n_samples": 4_000})
            single = torch.stack([module(tensors)[2].loss for _ in range(400)])
        assert abs(single.mean() - many.loss) < 5 * single.std() / 20

    def test_importance_weights_meet_the_evidence(self, basal, embedding, tensors):
        module = make_module(1, basal_posterior=basal, embedding_posterior=embedding)
        module.encoder.variance_logit.bias.data += 2.5  # a guide wider than the posterior
        draws = module.sample_globals(1)
        n_particles = 40_000
        # Small shifts: the residual guide is off by the whole of them.
        draws = draws._replace(effects=0.2 * draws.effects)
        shared = draws._replace(
            n_samples=n_particles, effects=draws.effects.expand(n_particles, -1, -1)
        )
        weights = module.log_importance_weights(tensors, shared)
        expected = log_evidence(module, tensors, draws.effects[0])
        np.testing.assert_allclose(log_mean_exp(weights), expected, atol=0.05)


def log_evidence(module, tensors, effects) -> np.ndarray:
    """``log p(x | effects)`` of each cell by a sum over a grid of basal states."""
    grid = torch.linspace(-7, 7, 2_001, dtype=torch.float64)
    shift = tensors[DOSAGE] @ effects @ module.effects.frame
    x = tensors[REGISTRY_KEYS.X_KEY]
    with torch.no_grad():
        decoded = module.decoder(grid[:, None, None] + shift, tensors[REGISTRY_KEYS.BATCH_KEY])
        log_likelihood = log_probability(
            module.gene_likelihood,
            decoded,
            module.px_r.exp().numpy(),
            x.numpy(),
            x.sum(1, keepdim=True).numpy(),
        ).sum(-1)
    log_joint = log_likelihood + scipy.stats.norm.logpdf(grid.numpy())[:, None]
    return scipy.special.logsumexp(log_joint, axis=0) + math.log(grid[1] - grid[0])


def log_probability(gene_likelihood, decoded, dispersion, x, library) -> np.ndarray:
    if gene_likelihood == "normal":
        return scipy.stats.norm.logpdf(x, decoded.logits.numpy(), dispersion)
    mean = library * torch.softmax(decoded.logits, -1).numpy()
    if gene_likelihood == "poisson":
        return scipy.stats.poisson.logpmf(x, mean)
    counts = scipy.stats.nbinom.logpmf(x, dispersion, dispersion / (dispersion + mean))
    if gene_likelihood == "nb":
        return counts
    zero = torch.sigmoid(decoded.zero_inflation_logits).numpy()
    return np.where(x == 0, np.log(zero + (1 - zero) * np.exp(counts)), np.log1p(-zero) + counts)


@pytest.mark.parametrize("gene_likelihood", ["zinb", "poisson", "normal"])
def test_importance_weights_of_other_likelihoods(gene_likelihood, tensors):
    module = make_module(1, gene_likelihood=gene_likelihood)
    module.encoder.variance_logit.bias.data += 2.5
    if gene_likelihood == "normal":
        tensors[REGISTRY_KEYS.X_KEY] = torch.randn(N_CELLS, N_GENES).double()
        module.px_r.data.abs_()  # no posterior far narrower than the guide
    else:
        tensors[REGISTRY_KEYS.X_KEY][:, 0] = 0
    if gene_likelihood == "zinb":
        module.decoder.zero_inflation_logits.bias.data += 3  # as many zeros as not
    draws = module.sample_globals(1)
    shared = draws._replace(n_samples=40_000, effects=draws.effects.expand(40_000, -1, -1))
    weights = module.log_importance_weights(tensors, shared)
    expected = log_evidence(module, tensors, draws.effects[0])
    np.testing.assert_allclose(log_mean_exp(weights), expected, atol=0.05)


@pytest.mark.parametrize("basal", BASAL[:3])
def test_basal_divergence_is_expected_over_the_shift(basal, tensors):
    module = make_module(basal_posterior=basal)
    outputs = module.inference(**module._get_inference_input(tensors))
    potential = outputs["potential"]
    draws = module.effects.sample(50_000)
    shift = tensors[DOSAGE] @ draws @ module.effects.frame
    mean = potential.basal_mean(shift).expand_as(shift)
    guide = Normal(mean, potential.variance.sqrt())
    estimates = kl_divergence(guide, Normal(0.0, 1.0)).sum(-1)
    error = estimates.std(0) / 50_000**0.5
    assert ((estimates.mean(0) - module.kl_basal(outputs)).abs() < 5 * error + 1e-8).all()


def test_network_sees_the_shift(tensors):
    """Its guide is that of a drawn shift, and so is the divergence."""
    module = make_module(basal_posterior="amortized").train()
    module.encoder.hidden.eval()  # without dropout
    outputs = module.inference(**module._get_inference_input(tensors), n_samples=3)
    location, gain, variance = outputs["potential"]
    assert gain is None
    assert location.shape == outputs["shift_mean"].shape == (3, N_CELLS, 3)
    for particle in range(3):
        alone = module.encoder(
            tensors[REGISTRY_KEYS.X_KEY], side_input=outputs["shift_mean"][particle]
        )
        torch.testing.assert_close(location[particle], alone.location)
        torch.testing.assert_close(variance[particle], alone.variance)
    expected = kl_divergence(Normal(location, variance.sqrt()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(module.kl_basal(outputs), expected)
    perturbed = tensors[DOSAGE].any(1)
    moved = (location[0] != location[1]).all(1)
    assert torch.equal(moved, perturbed)


class TestEffects:
    def make(self, **kwargs) -> PerturbationEffects:
        effects = PerturbationEffects(40, 3, trainable=True, spike_scale=0.0, **kwargs).double()
        with torch.no_grad():
            effects.slab_mean.normal_()
            effects.mask_logits.normal_()
            if effects.correlated is not None:
                effects.correlated.moments.weight.normal_(std=0.3)
            effects.masks_on.fill_(True)
        return effects

    @pytest.mark.parametrize("posterior", ["mean_field", "spike_and_slab", "point"])
    def test_moments_match_draws(self, posterior):
        effects = self.make(posterior=posterior)
        with torch.no_grad():
            draws = effects.sample(20_000)
            mean, variance = effects.moments()
        scale = draws.std(0) + 0.01
        assert ((draws.mean(0) - mean).abs() < 0.06 * scale).all()
        torch.testing.assert_close(draws.var(0), variance, atol=0.05, rtol=0.1)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_divergence_from_random_rows_is_unbiased(self, posterior, monkeypatch):
        effects = self.make(posterior=posterior)
        with torch.no_grad():
            whole = torch.stack([sum(effects.kl_divergence().values()) for _ in range(300)])
            monkeypatch.setattr(posteriors, "_MAX_DIVERGENCE_ROWS", 10)
            some = torch.stack([sum(effects.kl_divergence().values()) for _ in range(3_000)])
        error = math.hypot(whole.std() / 300**0.5, some.std() / 3_000**0.5)
        assert some.std() > 0
        assert abs(some.mean() - whole.mean()) < 5 * error

    def test_divergence_from_random_rows_counts_pairs(self, monkeypatch):
        """With masks whose prior is learned for each perturbation, and pairs with their own."""
        effects = self.make(
            mask_prior=(1.0, 3.0),
            mask_prior_shared_by="perturbation",
            n_pairs=20,
            interaction_prior=0.01,
        )
        effects.update_mask_prior()
        with torch.no_grad():
            whole = effects.kl_divergence()
            monkeypatch.setattr(posteriors, "_MAX_DIVERGENCE_ROWS", 10)
            some = [effects.kl_divergence() for _ in range(3_000)]
        for name, expected in whole.items():
            estimates = torch.stack([terms[name] for terms in some])
            assert abs(estimates.mean() - expected) < 5 * estimates.std() / 3_000**0.5

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_divergence_matches_torch(self, posterior):
        effects = self.make(posterior=posterior, mask_prior=0.1, embedding_scale=0.8)
        masks = Bernoulli(logits=effects.mask_logits)
        terms = effects.kl_divergence()
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
        effects = self.make(posterior=posterior, mask_prior=1.0)
        rows = torch.tensor([3, 17])

        def draws(*_):
            torch.manual_seed(3)
            return effects.rsample(rows, 0.5, 2)

        parameters = effects.trainable_parameters()
        if effects.correlated is not None:  # all of them are many
            parameters = [*parameters[:2], effects.correlated.moments.bias]
        assert torch.autograd.gradcheck(draws, parameters)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_without_sparsity(self, posterior):
        effects = self.make(posterior=posterior, mask_prior=1.0)
        assert effects.kl_divergence()["kl_mask"] == 0
        assert (effects.mask_probability() == 1).all()
        assert (effects.sample(5) != 0).all()
        assert not effects.mask_logits.requires_grad
        if posterior != "correlated":
            mean, variance = effects.moments()
            torch.testing.assert_close(mean, effects.slab_mean)
            expected = 0 if posterior == "point" else effects.slab_log_variance.exp()
            torch.testing.assert_close(variance, torch.zeros_like(mean) + expected)

    def test_without_sparsity_pairs_are_sparse(self):
        effects = self.make(mask_prior=1.0, n_pairs=2)
        with torch.no_grad():
            effects.mask_logits.fill_(-3.0)
        probability = effects.mask_probability()
        assert (probability[:40] == 1).all()
        assert (probability[40:] < 0.1).all()
        terms = effects.kl_divergence()
        terms["kl_mask"].backward()
        assert terms["kl_mask"] > 0
        assert not effects.mask_logits.grad[:40].any()
        assert effects.mask_logits.grad[40:].all()

    def test_frozen_rows_stay(self):
        effects = self.make()
        effects.frozen[:10] = True
        before = SpikeSlab(*(field.detach().clone() for field in effects.posterior))
        new = SpikeSlab(*(field + 1 for field in before))
        effects.assign(new)
        for field, old, wanted in zip(effects.posterior, before, new, strict=True):
            torch.testing.assert_close(field[:10], old[:10])
            torch.testing.assert_close(field[10:], wanted[10:])


def test_frozen_perturbations_get_no_gradient(tensors):
    module = make_module(
        embedding_posterior="correlated",
        dose_response="hill",
        interactions=[(0, 1), (1, 3)],
        targets=[0, 4, -1, 2],
    ).train()
    module.effects.frozen[[1, 2, 4]] = True  # the last of them a pair
    module.effects.correlated.freeze_network()
    tensors[DOSAGE] = torch.ones_like(tensors[DOSAGE])
    _, _, output = module(tensors)
    (output.loss + sum(module.global_divergences().values())).backward()
    gradients = [p.grad for p in module.global_parameters() if p.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    assert len(gradients) == 3 + 1 + 4 + 2  # effects, codes, dose responses, direct effects
    module.zero_frozen_gradients()
    free = ~module.effects.frozen.squeeze(1)
    for gradient, old in zip(gradients, before, strict=True):
        rows = free[: len(gradient)]
        assert not gradient[~rows].any()
        assert torch.equal(gradient[rows], old[rows])
        assert old[1].any()
