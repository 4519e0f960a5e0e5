"""One module in all its settings: divergences and importance weights against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from scvi import REGISTRY_KEYS
from torch.distributions import Normal, kl_divergence

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module import PerturbationEffects, SAMSVAEModule, _perturbation_effects
from scvi_sams.module._functional import log_mean_exp

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
        if effects.correlated is not None:
            effects.correlated.moments.weight.normal_(std=0.3)
        effects.masks_on.fill_(True)
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
    counts, batch = tensors[REGISTRY_KEYS.X_KEY], tensors[REGISTRY_KEYS.BATCH_KEY]
    with torch.no_grad():
        logits = module.decoder(grid[:, None, None] + shift, batch).logits
        mean = counts.sum(1, keepdim=True) * torch.softmax(logits, -1)
        theta = module.px_r.exp().numpy()
    log_likelihood = scipy.stats.nbinom.logpmf(
        counts.numpy(), theta, theta / (theta + mean.numpy())
    ).sum(-1)
    log_joint = log_likelihood + scipy.stats.norm.logpdf(grid.numpy())[:, None]
    return scipy.special.logsumexp(log_joint, axis=0) + math.log(grid[1] - grid[0])


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

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_moments_match_draws(self, posterior, monkeypatch):
        monkeypatch.setattr(_perturbation_effects, "_N_MOMENT_DRAWS", 20_000)
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
            monkeypatch.setattr(_perturbation_effects, "_MAX_DIVERGENCE_ROWS", 10)
            some = torch.stack([sum(effects.kl_divergence().values()) for _ in range(3_000)])
        error = math.hypot(whole.std() / 300**0.5, some.std() / 3_000**0.5)
        assert some.std() > 0
        assert abs(some.mean() - whole.mean()) < 5 * error

    def test_correlated_embeddings_depend_on_their_masks(self):
        effects = self.make(posterior="correlated")
        rows = torch.arange(40)
        on = effects.correlated(rows, torch.ones(40, 3).double())[0]
        off = effects.correlated(rows, torch.zeros(40, 3).double())[0]
        assert not torch.allclose(on, off)

    def test_correlated_starts_at_mean_field(self):
        effects = PerturbationEffects(5, 3, posterior="correlated", trainable=True)
        moments = effects.correlated(torch.arange(5), torch.ones(5, 3))
        assert not any(moment.any() for moment in moments)

    @pytest.mark.parametrize("posterior", EMBEDDING)
    def test_without_sparsity(self, posterior):
        effects = self.make(posterior=posterior, mask_prior=1.0)
        assert effects.kl_divergence()["kl_mask"] == 0
        assert (effects.mask_probability() == 1).all()
        assert (effects.sample(5) != 0).all()
        assert not effects.mask_logits.requires_grad

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
        new = effects.posterior._replace(slab_mean=effects.slab_mean + 1)
        before = effects.slab_mean.detach().clone()
        effects.assign(new)
        torch.testing.assert_close(effects.slab_mean[:10], before[:10])
        torch.testing.assert_close(effects.slab_mean[10:], before[10:] + 1)
