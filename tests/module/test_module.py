"""The module: what it returns, its bound, its importance weights, against brute force."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput
from torch.distributions import Normal, kl_divergence

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module import Potential, SAMSVAEModule
from scvi_sams.module.doses import log_mean_exp
from scvi_sams.module.likelihood import log_share

if TYPE_CHECKING:
    from scvi_sams.module import GlobalDraws

N_CELLS, N_GENES, N_PERTURBATIONS, N_LATENT = 24, 7, 4, 3
DOSAGE = SAMS_REGISTRY_KEYS.PERTURBATION_KEY

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def make_tensors(
    *, covariates: bool = False, size_factor: bool = False, n_cells: int = N_CELLS
) -> dict[str, torch.Tensor]:
    """A minibatch as scvi-tools' loader makes it: controls, singles, pairs."""
    dosage = torch.rand(n_cells, N_PERTURBATIONS) + 0.5
    dosage *= torch.rand(n_cells, N_PERTURBATIONS) < 0.35
    tensors = {
        REGISTRY_KEYS.X_KEY: torch.poisson(8 * torch.rand(n_cells, N_GENES)) + 1,
        DOSAGE: dosage,
        REGISTRY_KEYS.BATCH_KEY: torch.zeros(n_cells, 1, dtype=torch.long),
    }
    if size_factor:
        tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY] = 50 + 100 * torch.rand(n_cells, 1)
    if covariates:
        tensors[REGISTRY_KEYS.BATCH_KEY] = torch.randint(0, 3, (n_cells, 1))
        tensors[REGISTRY_KEYS.CAT_COVS_KEY] = torch.randint(0, 2, (n_cells, 2))
        tensors[REGISTRY_KEYS.CONT_COVS_KEY] = torch.randn(n_cells, 1)
    return tensors


def make_module(*, covariates: bool = False, masks_on: bool = True, **kwargs) -> SAMSVAEModule:
    """A module with random weights and random effects."""
    if covariates:
        kwargs |= {"n_batch": 3, "n_cats_per_cov": [2, 2], "n_continuous_cov": 1}
    kwargs = {
        "n_hidden": 16,
        "n_latent": N_LATENT,
        "spike_scale": 0.0,
        "dropout_rate": 0.0,
    } | kwargs
    module = SAMSVAEModule(N_GENES, N_PERTURBATIONS, **kwargs)
    with torch.no_grad():
        effects = module.effects
        effects.mask_logits.normal_()
        effects.slab_mean.normal_()
        effects.slab_log_variance.fill_(math.log(0.3))
        effects.frame.copy_(torch.linalg.qr(torch.randn_like(effects.frame))[0])
        effects.masks_on.fill_(masks_on)
        module.px_r.normal_()
        if module.closed_form is not None:
            module.closed_form.basal_mean.normal_()
    return module.eval()


def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}


@pytest.fixture
def no_noise(monkeypatch):
    """The latent state of every cell is at the mean of its posterior."""

    def zeros(*size, **kwargs):
        kwargs.pop("generator", None)
        return torch.zeros(*size, **kwargs)

    monkeypatch.setattr(torch, "randn", zeros)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


class TestInterface:
    @pytest.mark.parametrize("encode_covariates", [False, True])
    @pytest.mark.parametrize("covariates", [False, True])
    @pytest.mark.parametrize("n_samples", [1, 3])
    def test_keys_and_shapes(self, n_samples, covariates, encode_covariates):
        module = make_module(covariates=covariates, encode_covariates=encode_covariates)
        tensors = make_tensors(covariates=covariates)
        inference, generative, output = module(tensors, inference_kwargs={"n_samples": n_samples})
        draws = () if n_samples == 1 else (n_samples,)
        assert inference["z"].shape == (*draws, N_CELLS, N_LATENT)
        assert inference["qz"].loc.shape == inference["qz"].scale.shape == (N_CELLS, N_LATENT)
        assert inference["library"].shape == (N_CELLS, 1)
        for name in ("shift_mean", "shift_variance"):
            assert inference[name].shape == (N_CELLS, N_LATENT)
        assert all(field.shape == (N_CELLS, N_LATENT) for field in inference["potential"])
        assert generative["px"].mean.shape == (*draws, N_CELLS, N_GENES)
        assert generative["decoded"].logits.shape == (*draws, N_CELLS, N_GENES)
        assert isinstance(output, LossOutput)
        assert output.loss.shape == ()
        assert output.kl_local["kl_basal"].shape == (N_CELLS,)

    def test_covariates_reach_the_decoder(self):
        module = make_module(covariates=True)
        tensors = make_tensors(covariates=True)
        z, library = torch.randn(N_CELLS, N_LATENT), torch.ones(N_CELLS, 1)
        before = module.generative(z, library, **covariates_of(tensors))["decoded"].logits
        changes = {
            REGISTRY_KEYS.BATCH_KEY: lambda t: (t + 1) % 3,
            REGISTRY_KEYS.CAT_COVS_KEY: lambda t: 1 - t,
            REGISTRY_KEYS.CONT_COVS_KEY: lambda t: t + 1,
        }
        for key, change in changes.items():
            changed = tensors | {key: change(tensors[key])}
            after = module.generative(z, library, **covariates_of(changed))["decoded"].logits
            assert not torch.allclose(before, after)

    @pytest.mark.parametrize("encode_covariates", [False, True])
    def test_encoder_sees_covariates_if_it_should(self, encode_covariates):
        module = make_module(covariates=True, encode_covariates=encode_covariates)
        module.closed_form.basal_mean.zero_()
        tensors = make_tensors(covariates=True)
        changed = tensors | {REGISTRY_KEYS.CONT_COVS_KEY: tensors[REGISTRY_KEYS.CONT_COVS_KEY] + 1}
        locations = [
            module.inference(**module._get_inference_input(some))["potential"].location
            for some in (tensors, changed)
        ]
        assert torch.equal(*locations) is not encode_covariates

    def test_transform_batch_decodes_all_cells_as_of_one(self):
        module = make_module(covariates=True)
        tensors = make_tensors(covariates=True)
        z, library = torch.randn(N_CELLS, N_LATENT), torch.ones(N_CELLS, 1)
        one = tensors | {REGISTRY_KEYS.BATCH_KEY: torch.full((N_CELLS, 1), 2)}
        expected = module.generative(z, library, **covariates_of(one))["decoded"].logits
        actual = module.generative(z, library, **covariates_of(tensors), transform_batch=2)
        assert torch.equal(actual["decoded"].logits, expected)

    def test_library_is_the_total_or_the_size_factor(self):
        module = make_module()
        for size_factor in (False, True):
            tensors = make_tensors(size_factor=size_factor)
            key = REGISTRY_KEYS.SIZE_FACTOR_KEY if size_factor else REGISTRY_KEYS.X_KEY
            inference, generative, _ = module(tensors)
            expected = tensors[key].sum(1, keepdim=True)
            assert torch.equal(inference["library"], expected)
            torch.testing.assert_close(generative["px"].mean.sum(1, keepdim=True), expected)

    def test_posterior_predictive_draws(self):
        module = make_module()
        tensors = make_tensors()
        assert module.sample(tensors).shape == (N_CELLS, N_GENES)
        assert module.sample(tensors, n_samples=4).shape == (N_CELLS, N_GENES, 4)

    def test_posterior_of_the_state_is_that_of_its_draws(self):
        """Means and standard deviations of ``z``, over the guide and over the effects."""
        module = make_module()
        tensors = make_tensors()
        inference = module.inference(**module._get_inference_input(tensors), n_samples=100_000)
        torch.testing.assert_close(inference["z"].mean(0), inference["qz"].loc, atol=0.02, rtol=0)
        torch.testing.assert_close(inference["z"].std(0), inference["qz"].scale, rtol=0.02, atol=0)

    def test_state_is_basal_state_plus_shift(self):
        """Its two moments against draws of effects, then of the basal state given the shift."""
        module = make_module()
        module.effects.frame.copy_(torch.eye(N_LATENT))  # latents are independent in this frame
        tensors = make_tensors(n_cells=6)
        inference = module.inference(**module._get_inference_input(tensors))
        location, gain, variance = inference["potential"]
        shift = tensors[DOSAGE] @ module.effects.sample(200_000)
        basal = gain * (location - shift) + variance.sqrt() * torch.randn_like(shift)
        state = basal + shift
        torch.testing.assert_close(state.mean(0), inference["qz"].loc, atol=0.02, rtol=0)
        torch.testing.assert_close(state.std(0), inference["qz"].scale, atol=0.01, rtol=0)


def covariates_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "batch_index": tensors[REGISTRY_KEYS.BATCH_KEY],
        "cat_covs": tensors[REGISTRY_KEYS.CAT_COVS_KEY],
        "cont_covs": tensors[REGISTRY_KEYS.CONT_COVS_KEY],
    }


class TestLocalBound:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("covariates", [False, True])
    def test_minibatches_are_unbiased(self, no_noise, training, covariates):
        """The mean over a partition is the loss of all cells."""
        module = make_module(covariates=covariates).double().train(training)
        tensors = double(make_tensors(covariates=covariates))
        _, _, full = module(tensors)
        pieces = torch.randperm(N_CELLS).split(6)
        losses = torch.stack(
            [module({key: t[piece] for key, t in tensors.items()})[2].loss for piece in pieces]
        )
        torch.testing.assert_close(losses.mean(), full.loss)
        assert losses.std() > 0

    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_loss_is_its_two_terms(self, weight):
        module = make_module()
        _, generative, output = module(make_tensors(), loss_kwargs={"kl_weight": weight})
        (reconstruction,) = output.reconstruction_loss.values()
        expected = (reconstruction + weight * output.kl_local["kl_basal"]).mean()
        torch.testing.assert_close(output.loss, expected)

    def test_reconstruction_is_the_likelihood_of_px(self):
        module = make_module().double()
        tensors = double(make_tensors(size_factor=True))
        _, generative, output = module(tensors)
        (reconstruction,) = output.reconstruction_loss.values()
        expected = -generative["px"].log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)
        torch.testing.assert_close(reconstruction, expected, rtol=1e-6, atol=0)

    def test_basal_divergence_matches_monte_carlo_over_the_shift(self):
        module = make_module(spike_scale=0.2)
        tensors = make_tensors(n_cells=8)
        inference = module.inference(**module._get_inference_input(tensors))
        location, gain, variance = inference["potential"]
        shift = tensors[DOSAGE] @ module.effects.sample(100_000) @ module.effects.frame
        guide = Normal(gain * (location - shift), variance.sqrt())
        divergence = kl_divergence(guide, Normal(torch.zeros_like(location), 1.0)).sum(-1)
        torch.testing.assert_close(
            module.kl_basal(inference), divergence.mean(0), rtol=0.02, atol=0.02
        )

    def test_dense_and_csr_doses_agree(self, no_noise):
        module = make_module()
        tensors = make_tensors()
        _, _, dense = module(tensors)
        _, _, sparse = module(tensors | {DOSAGE: tensors[DOSAGE].to_sparse_csr()})
        assert torch.equal(dense.loss, sparse.loss)

    def test_gradients_match_finite_differences(self, no_noise):
        module = make_module().double()
        tensors = double(make_tensors(n_cells=5))
        _, _, output = module(tensors)
        output.loss.backward()
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            direction = torch.ones_like(parameter) / parameter.numel() ** 0.5
            step, values = 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * step * direction
                    values.append(module(tensors)[2].loss.item())
                    parameter -= sign * step * direction
            numerical = (values[0] - values[1]) / (2 * step)
            analytic = (parameter.grad * direction).sum().item()
            assert analytic == pytest.approx(numerical, rel=1e-4, abs=1e-6), name


class TestShift:
    def test_moments_in_the_frame_of_the_networks(self):
        module = make_module(spike_scale=0.2)
        tensors = make_tensors(n_cells=8)
        entries = module.inference(**module._get_inference_input(tensors))["entries"]
        mean, variance = module.shift_moments(entries)
        draws = tensors[DOSAGE] @ module.effects.sample(200_000) @ module.effects.frame
        torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
        torch.testing.assert_close(draws.var(0), variance, atol=0.02, rtol=0.03)

    def test_cells_without_a_perturbation_do_not_move(self):
        module = make_module()
        tensors = make_tensors() | {DOSAGE: torch.zeros(N_CELLS, N_PERTURBATIONS)}
        inference = module.inference(**module._get_inference_input(tensors))
        assert not inference["shift_mean"].any()
        assert not inference["shift_variance"].any()

    def test_turning_frame_and_effects_together_changes_nothing(self, no_noise):
        module = make_module().double()
        effects = module.effects
        effects.mask_logits.fill_(200.0)  # a mask that could be off would not turn with the frame
        tensors = double(make_tensors())
        before, decoded, output = module(tensors)
        turn = torch.linalg.qr(torch.rand(N_LATENT, N_LATENT, dtype=torch.float64))[0]
        with torch.no_grad():
            effects.slab_mean.copy_(effects.slab_mean @ turn)
            effects.frame.copy_(turn.T @ effects.frame)
        after, decoded_after, output_after = module(tensors)
        torch.testing.assert_close(after["z"], before["z"] @ turn)
        assert not torch.allclose(after["z"], before["z"])
        torch.testing.assert_close(decoded_after["decoded"].logits, decoded["decoded"].logits)
        torch.testing.assert_close(output_after.loss, output.loss)

    def test_centring_moves_encoder_and_decoder_alike(self, no_noise):
        """In the residual guide the state of a cell, and what it decodes to, stays put."""
        module = make_module(basal_posterior="residual")
        tensors = make_tensors()
        _, before, _ = module(tensors)
        module.closed_form.basal_mean.add_(1.0)
        _, after, _ = module(tensors)
        torch.testing.assert_close(before["decoded"].logits, after["decoded"].logits)


class TestGradientEngine:
    @pytest.fixture
    def module(self) -> SAMSVAEModule:
        return make_module(global_inference="gradient").train()

    def test_reaches_the_global_latents(self, module):
        module.effects.mask_logits.data.fill_(2.0)
        _, _, output = module(make_tensors())
        output.loss.backward()
        effects = module.effects
        for parameter in (effects.mask_logits, effects.slab_mean):
            assert parameter.grad.abs().sum(1).min() > 0

    def test_leaves_perturbations_outside_the_minibatch_alone(self, module):
        tensors = make_tensors()
        tensors[DOSAGE][:, 1] = 0
        _, _, output = module(tensors)
        output.loss.backward()
        touched = module.effects.mask_logits.grad.abs().sum(1) > 0
        assert touched.tolist() == [True, False, True, True]

    def test_cells_of_a_perturbation_share_one_draw(self, module):
        tensors = make_tensors()
        tensors[DOSAGE] = torch.eye(N_PERTURBATIONS)[torch.arange(N_CELLS) % N_PERTURBATIONS]
        shift = module.inference(**module._get_inference_input(tensors))["shift_mean"]
        again = module.inference(**module._get_inference_input(tensors))["shift_mean"]
        torch.testing.assert_close(shift[:4], shift[4:8])
        assert not torch.allclose(shift, again)

    def test_sampled_bound_averages_to_the_closed_form(self, module):
        """Training draws the shift, evaluation integrates it: the same divergence."""
        tensors = make_tensors(n_cells=4)
        with torch.no_grad():
            inputs = module._get_inference_input(tensors)
            sampled = torch.stack(
                [module.kl_basal(module.inference(**inputs)) for _ in range(4_000)]
            )
            exact = module.eval().kl_basal(module.inference(**inputs))
        error = sampled.std(0) / 4_000**0.5
        assert ((sampled.mean(0) - exact).abs() < 5 * error + 1e-4).all()

    def test_observes_nothing(self, module):
        inference, _, _ = module(make_tensors())
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.observe(inference)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def one_draw(module, n_particles: int) -> GlobalDraws:
    """The same draw of the effects for every particle."""
    draws = module.sample_globals(1)
    return draws._replace(n_samples=n_particles, effects=draws.effects.expand(n_particles, -1, -1))


class TestImportanceWeights:
    """One latent and a guide that is known, so that a grid over it gives the evidence."""

    @pytest.fixture
    def module(self) -> SAMSVAEModule:
        module = make_module(n_latent=1).double()
        # A guide wider than the posterior, so that no weight is far above the others.
        module.encoder.variance_logit.bias.data += 2.5
        return module

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return double(make_tensors(n_cells=6))

    @staticmethod
    def log_evidence(module, tensors, effects) -> np.ndarray:
        """``log p(x | effects)`` of each cell by a sum over a grid of basal states."""
        grid = torch.linspace(-7, 7, 2_001, dtype=torch.float64)
        shift = tensors[DOSAGE] @ effects @ module.effects.frame
        u = grid[:, None, None] + shift + module.closed_form.basal_mean
        counts = tensors[REGISTRY_KEYS.X_KEY]
        with torch.no_grad():
            batch = tensors[REGISTRY_KEYS.BATCH_KEY]
            mean = counts.sum(1, keepdim=True) * torch.softmax(module.decoder(u, batch).logits, -1)
            theta = module.px_r.exp().numpy()
        log_likelihood = scipy.stats.nbinom.logpmf(
            counts.numpy(), theta, theta / (theta + mean.numpy())
        ).sum(-1)
        log_joint = log_likelihood + scipy.stats.norm.logpdf(grid.numpy())[:, None]
        return scipy.special.logsumexp(log_joint, axis=0) + math.log(grid[1] - grid[0])

    def test_many_particles_meet_the_evidence(self, module, tensors):
        draws = one_draw(module, 50_000)
        weights = module.log_importance_weights(tensors, draws)
        assert weights.shape == (50_000, 6)
        expected = self.log_evidence(module, tensors, draws.effects[0])
        np.testing.assert_allclose(log_mean_exp(weights), expected, atol=0.02)

    def test_bound_rises_with_particles_to_the_evidence(self, module, tensors):
        draws = one_draw(module, 20_000)
        weights = module.log_importance_weights(tensors, draws)
        bounds = [log_mean_exp(weights.reshape(k, -1, 6)).mean().item() for k in (1, 5, 50, 1_000)]
        assert bounds == sorted(bounds)
        assert bounds[0] < bounds[1] - 0.01
        evidence = self.log_evidence(module, tensors, draws.effects[0]).mean()
        assert bounds[-1] < evidence + 0.01

    def test_one_particle_is_the_local_bound(self, module, tensors):
        """Without doses nothing is left to draw but the basal state."""
        tensors[DOSAGE].zero_()
        draws = one_draw(module, 20_000)
        weights = module.log_importance_weights(tensors, draws)
        _, _, output = module(tensors, inference_kwargs={"n_samples": 20_000})
        (reconstruction,) = output.reconstruction_loss.values()
        elbo = -(reconstruction + output.kl_local["kl_basal"])
        error = weights.std(0) / 20_000**0.5
        assert ((weights.mean(0) - elbo).abs() < 7 * error).all()


class TestInitialize:
    def test_decoder_starts_at_the_mean_profile(self):
        module = make_module()
        module.closed_form.basal_mean.zero_()
        counts = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 0.5, 0.5])
        module.initialize(counts, torch.zeros(N_GENES), torch.ones(N_GENES))
        share = torch.softmax(module.decoder.logits.bias, 0)
        torch.testing.assert_close(share, counts / counts.sum(), atol=2e-4, rtol=0)
        assert share[0] > 0
        assert module.initialized

    def test_decoder_starts_at_the_mean_profile_of_size_factors(self):
        module = make_module(use_size_factor_key=True)
        module.closed_form.basal_mean.zero_()
        mean = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 0.5, 0.5])
        library_mean, largest_share = torch.tensor(40.0), torch.tensor(0.6)
        module.initialize(
            mean, torch.zeros(N_GENES), torch.ones(N_GENES), library_mean, largest_share
        )
        decoded = log_share(module.decoder.logits.bias, module.library_ceiling).exp()
        torch.testing.assert_close(library_mean * decoded, mean, rtol=1e-3, atol=0)

    def test_encoder_standardises(self):
        module = make_module()
        constant = torch.zeros(N_GENES)
        module.initialize(torch.ones(N_GENES), constant, constant)
        potential = module.encoder(make_tensors()[REGISTRY_KEYS.X_KEY])
        assert all(torch.isfinite(field).all() for field in potential)


class TestEncoder:
    @pytest.mark.parametrize("basal_gain", ["correlated", "residual"])
    def test_gain_and_variance(self, basal_gain):
        module = make_module(basal_posterior=basal_gain)
        potential = module.encoder(1_000 * make_tensors()[REGISTRY_KEYS.X_KEY])
        assert isinstance(potential, Potential)
        assert (potential.variance > 0).all()
        assert (potential.variance < 1).all()
        assert (potential.location.abs() <= 10).all()
        gain = torch.ones(()) if basal_gain == "residual" else 1 - potential.variance
        assert torch.equal(potential.gain, gain.expand_as(potential.gain))


class TestObserve:
    def test_statistics_see_the_cells_once(self):
        module = make_module().train()
        module.n_training_cells.fill_(N_CELLS)
        inference, _, _ = module(make_tensors())
        module.observe(inference)
        assert int(module.closed_form.statistics.n_cells_seen) == N_CELLS

    def test_frozen_globals_observe_nothing(self):
        module = make_module().train()
        module.effects.frozen.fill_(True)
        inference, _, _ = module(make_tensors())
        module.observe(inference)
        assert int(module.closed_form.statistics.n_cells_seen) == 0
