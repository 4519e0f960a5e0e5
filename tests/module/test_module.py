"""The module: what it returns, its bound, its importance weights, against brute force."""

from __future__ import annotations

import copy
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

from scvi_sams.module import SAMSVAEModule
from scvi_sams.module.base import CellPopulation
from scvi_sams.module.likelihood import log_share
from scvi_sams.module.posteriors import POSTERIORS

from .minibatches import DOSE, PERTURBATION, columns, dosage_of, double, infer, minibatch, padded

if TYPE_CHECKING:
    from scvi_sams.module.base import GlobalDraws

N_CELLS, N_GENES, N_PERTURBATIONS, N_LATENT = 24, 7, 4, 3
FEW_CELLS = 6
BASAL = ("mean_field", "correlated", "residual", "amortized")
EMBEDDING = tuple(POSTERIORS)


def make_tensors(
    *, covariates: bool = False, size_factor: bool = False, n_cells: int = N_CELLS
) -> dict[str, torch.Tensor]:
    """A minibatch as scvi-tools' loader makes it: controls, singles, pairs."""
    dosage = torch.rand(n_cells, N_PERTURBATIONS) + 0.5
    dosage *= torch.rand(n_cells, N_PERTURBATIONS) < 0.35
    tensors = minibatch(torch.poisson(8 * torch.rand(n_cells, N_GENES)) + 1, dosage)
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
        "background_scale": 0.0,
        "dropout_rate": 0.0,
    } | kwargs
    module = SAMSVAEModule(N_GENES, N_PERTURBATIONS, **kwargs)
    with torch.no_grad():
        effects = module.effects
        effects.mask_logits.normal_()
        effects.slab_mean.normal_()
        effects.slab_log_variance.fill_(math.log(0.3))
        effects.rotation.copy_(torch.linalg.qr(torch.randn_like(effects.rotation))[0])
        effects.masks_on = masks_on
        module.px_r.normal_()
        if module.closed_form is not None:
            module.closed_form.basal_mean.normal_()
    return module.eval()


# Gene 2 is the target of two perturbations, and one has none.
EXTENSIONS = {
    "reference_doses": [0.5, 1.0, 1.5, 2.0],
    "interactions": [(0, 1), (1, 3)],
    "targets": [2, -1, 0, 2],
}


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
        locations = [infer(module, some)["potential"].location for some in (tensors, changed)]
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
        inference = infer(module, tensors, n_samples=100_000)
        torch.testing.assert_close(inference["z"].mean(0), inference["qz"].loc, atol=0.02, rtol=0)
        torch.testing.assert_close(inference["z"].std(0), inference["qz"].scale, rtol=0.02, atol=0)

    def test_state_is_basal_state_plus_shift(self):
        """Its two moments against draws of effects, then of the basal state given the shift."""
        module = make_module()
        tensors = make_tensors(n_cells=6)
        inference = infer(module, tensors)
        location, gain, variance = inference["potential"]
        effects = module.effects
        shift = dosage(tensors) @ effects.sample(200_000) @ effects.rotation
        basal = gain * (location - shift) + variance.sqrt() * torch.randn_like(shift)
        state = basal + shift
        torch.testing.assert_close(state.mean(0), inference["qz"].loc, atol=0.02, rtol=0)
        torch.testing.assert_close(state.std(0), inference["qz"].scale, atol=0.01, rtol=0)

    def test_effect_of_each_dose(self):
        module, tensors = make_module(), make_tensors()
        inference = infer(module, tensors)
        mean = module.effects.moments()[0] @ module.effects.rotation
        torch.testing.assert_close(inference["effect_of_dose"], inference["doses"].gather(mean))
        torch.testing.assert_close(inference["shift_mean"], dosage(tensors) @ mean)


def dosage(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return dosage_of(tensors, N_PERTURBATIONS)


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
        module = make_module(background_scale=0.2)
        tensors = make_tensors(n_cells=8)
        inference = infer(module, tensors)
        location, gain, variance = inference["potential"]
        shift = dosage(tensors) @ module.effects.sample(100_000) @ module.effects.rotation
        guide = Normal(gain * (location - shift), variance.sqrt())
        divergence = kl_divergence(guide, Normal(torch.zeros_like(location), 1.0)).sum(-1)
        torch.testing.assert_close(
            module.kl_basal(inference), divergence.mean(0), rtol=0.02, atol=0.02
        )

    @pytest.mark.parametrize("extensions", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    def test_does_not_depend_on_how_columns_are_filled_up(self, no_noise, training, extensions):
        """Nor on their order or number."""
        kwargs = EXTENSIONS if extensions else {}
        module = make_module(**kwargs).double().train(training)
        tensors = double(make_tensors())
        more = columns(dosage(tensors), n_columns=7)
        filling = torch.randint(0, N_PERTURBATIONS, more[PERTURBATION].shape)
        more[PERTURBATION] = torch.where(more[DOSE] > 0, more[PERTURBATION], filling)
        order = torch.rand(N_CELLS, 7).argsort(1)
        more = {key: value.gather(1, order) for key, value in more.items()}
        _, _, output = module(tensors)
        _, _, again = module(tensors | more)
        torch.testing.assert_close(again.loss, output.loss)
        gradients = []
        for loss in (output.loss, again.loss):
            parameters = [p for p in module.parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(theirs, ours)

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
    def test_moments_in_the_coordinates_of_the_networks(self):
        module = make_module(background_scale=0.2)
        tensors = make_tensors(n_cells=8)
        inference = infer(module, tensors)
        draws = dosage(tensors) @ module.effects.sample(200_000) @ module.effects.rotation
        torch.testing.assert_close(draws.mean(0), inference["shift_mean"], atol=0.03, rtol=0)
        torch.testing.assert_close(draws.var(0), inference["shift_variance"], atol=0.02, rtol=0.03)

    def test_cells_without_a_perturbation_do_not_move(self):
        module = make_module()
        tensors = make_tensors() | columns(torch.zeros(N_CELLS, N_PERTURBATIONS))
        inference = infer(module, tensors)
        assert not inference["shift_mean"].any()
        assert not inference["shift_variance"].any()

    def test_turning_rotation_and_effects_together_changes_nothing(self, no_noise):
        """But for the latents that users see, which turn along."""
        module = make_module().double()
        effects = module.effects
        effects.mask_logits.fill_(200.0)  # a mask that could be off would not turn along
        tensors = double(make_tensors())
        before, decoded, output = module(tensors)
        latents, variances = module.to_latents(before["qz"].loc, before["qz"].variance)
        turn = torch.linalg.qr(torch.rand(N_LATENT, N_LATENT, dtype=torch.float64))[0]
        with torch.no_grad():
            effects.slab_mean.copy_(effects.slab_mean @ turn)
            effects.rotation.copy_(turn.T @ effects.rotation)
        after, decoded_after, output_after = module(tensors)
        torch.testing.assert_close(after["z"], before["z"])
        found, _ = module.to_latents(after["qz"].loc, after["qz"].variance)
        torch.testing.assert_close(found, latents @ turn)
        assert not torch.allclose(found, latents)
        torch.testing.assert_close(decoded_after["decoded"].logits, decoded["decoded"].logits)
        torch.testing.assert_close(output_after.loss, output.loss)

    def test_latents_and_back(self):
        module = make_module()
        z = torch.randn(N_CELLS, N_LATENT)
        u = module.to_network(z)
        torch.testing.assert_close(u, z @ module.effects.rotation)
        torch.testing.assert_close(module.to_latents(u, torch.ones_like(u))[0], z)

    def test_expected_shift_is_in_latents(self):
        module = make_module(**EXTENSIONS)
        conditions = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.3, 0.4, 0.0, 2.0]])
        outputs = infer(module, make_tensors(n_cells=2) | columns(conditions))
        shift = module.expected_shift(padded(conditions))
        torch.testing.assert_close(module.to_network(shift), outputs["shift_mean"])

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
        tensors |= columns(dosage(tensors) * torch.tensor([1.0, 0.0, 1.0, 1.0]))
        _, _, output = module(tensors)
        output.loss.backward()
        touched = module.effects.mask_logits.grad.abs().sum(1) > 0
        assert touched.tolist() == [True, False, True, True]

    def test_cells_of_a_perturbation_share_one_draw(self, module):
        tensors = make_tensors()
        tensors |= columns(torch.eye(N_PERTURBATIONS)[torch.arange(N_CELLS) % N_PERTURBATIONS])
        shift = infer(module, tensors)["shift_mean"]
        again = infer(module, tensors)["shift_mean"]
        torch.testing.assert_close(shift[:4], shift[4:8])
        assert not torch.allclose(shift, again)

    def test_sampled_bound_averages_to_the_closed_form(self, module):
        """Training draws the shift, evaluation integrates it: the same divergence."""
        tensors = make_tensors(n_cells=4)
        with torch.no_grad():
            sampled = torch.stack([module.kl_basal(infer(module, tensors)) for _ in range(4_000)])
            exact = module.eval().kl_basal(infer(module, tensors))
        error = sampled.std(0) / 4_000**0.5
        assert ((sampled.mean(0) - exact).abs() < 5 * error + 1e-4).all()

    def test_observes_nothing(self, module):
        inference, _, _ = module(make_tensors())
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.observe(inference)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def log_mean_exp(log_weights: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


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
        shift = dosage(tensors) @ effects
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
        tensors |= columns(torch.zeros(6, N_PERTURBATIONS, dtype=torch.float64))
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
        assert module.initialized is True
        assert module.counts_per_cell == counts.sum().item()

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


class TestObserve:
    def test_statistics_see_the_cells_once(self):
        module = make_module().train()
        module.n_training_cells = N_CELLS
        inference, _, _ = module(make_tensors())
        module.observe(inference)
        assert int(module.closed_form.statistics.n_cells_seen) == N_CELLS

    def test_frozen_globals_observe_nothing(self):
        module = make_module().train()
        module.effects.freeze()
        inference, _, _ = module(make_tensors())
        module.observe(inference)
        assert int(module.closed_form.statistics.n_cells_seen) == 0


def make_member(n_latent: int = 3, **kwargs) -> SAMSVAEModule:
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
        effects.rotation.copy_(torch.linalg.qr(torch.randn_like(effects.rotation))[0])
        if kwargs.get("embedding_posterior") == "correlated":
            effects.to_moments.weight.normal_(std=0.3)
        effects.masks_on = True
        module.px_r.normal_()
    return module.double().eval()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    given = torch.rand(FEW_CELLS, N_PERTURBATIONS, dtype=torch.float64) + 0.5
    given *= torch.rand(FEW_CELLS, N_PERTURBATIONS) < 0.5
    given[0], given[1, 0] = 0, 1
    return minibatch(torch.poisson(8 * torch.rand(FEW_CELLS, N_GENES).double()) + 1, given)


@pytest.mark.parametrize("embedding", EMBEDDING)
@pytest.mark.parametrize("basal", BASAL)
class TestEverySetting:
    def test_trains(self, basal, embedding, tensors):
        module = make_member(basal_posterior=basal, embedding_posterior=embedding).train()
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
        module = make_member(basal_posterior=basal, embedding_posterior=embedding).train()
        module.encoder.hidden.eval()  # without dropout
        with torch.no_grad():
            _, _, many = module(tensors, inference_kwargs={"n_samples": 4_000})
            single = torch.stack([module(tensors)[2].loss for _ in range(400)])
        assert abs(single.mean() - many.loss) < 5 * single.std() / 20

    def test_importance_weights_meet_the_evidence(self, basal, embedding, tensors):
        module = make_member(1, basal_posterior=basal, embedding_posterior=embedding)
        module.encoder.variance_logit.bias.data += 2.5  # a guide wider than the posterior
        draws = module.sample_globals(1)
        n_particles = 40_000
        # Small shifts: the residual guide is off by the whole of them.
        draws = draws._replace(effects=0.2 * draws.effects)
        shared = draws._replace(
            n_samples=n_particles, effects=draws.effects.expand(n_particles, -1, -1)
        )
        weights = module.log_importance_weights(tensors, shared)
        expected = log_evidence_without_centre(module, tensors, draws.effects[0])
        np.testing.assert_allclose(log_mean_exp(weights), expected, atol=0.05)


def log_evidence_without_centre(module, tensors, effects) -> np.ndarray:
    """``log p(x | effects)`` of each cell by a sum over a grid of basal states."""
    grid = torch.linspace(-7, 7, 2_001, dtype=torch.float64)
    shift = dosage(tensors) @ effects
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
    module = make_member(1, gene_likelihood=gene_likelihood)
    module.encoder.variance_logit.bias.data += 2.5
    if gene_likelihood == "normal":
        tensors[REGISTRY_KEYS.X_KEY] = torch.randn(FEW_CELLS, N_GENES).double()
        module.px_r.data.abs_()  # no posterior far narrower than the guide
    else:
        tensors[REGISTRY_KEYS.X_KEY][:, 0] = 0
    if gene_likelihood == "zinb":
        module.decoder.zero_inflation_logits.bias.data += 3  # as many zeros as not
    draws = module.sample_globals(1)
    shared = draws._replace(n_samples=40_000, effects=draws.effects.expand(40_000, -1, -1))
    weights = module.log_importance_weights(tensors, shared)
    expected = log_evidence_without_centre(module, tensors, draws.effects[0])
    np.testing.assert_allclose(log_mean_exp(weights), expected, atol=0.05)


@pytest.mark.parametrize("basal", BASAL[:3])
def test_basal_divergence_is_expected_over_the_shift(basal, tensors):
    module = make_member(basal_posterior=basal)
    outputs = infer(module, tensors)
    potential = outputs["potential"]
    draws = module.effects.sample(50_000)
    shift = dosage(tensors) @ draws @ module.effects.rotation
    mean = potential.basal_mean(shift).expand_as(shift)
    guide = Normal(mean, potential.variance.sqrt())
    estimates = kl_divergence(guide, Normal(0.0, 1.0)).sum(-1)
    error = estimates.std(0) / 50_000**0.5
    assert ((estimates.mean(0) - module.kl_basal(outputs)).abs() < 5 * error + 1e-8).all()


def test_network_sees_the_shift(tensors):
    """Its guide is that of a drawn shift, and so is the divergence."""
    module = make_member(basal_posterior="amortized").train()
    module.encoder.hidden.eval()  # without dropout
    outputs = infer(module, tensors, n_samples=3)
    location, gain, variance = outputs["potential"]
    assert gain is None
    assert location.shape == outputs["shift_mean"].shape == (3, FEW_CELLS, 3)
    for particle in range(3):
        alone = module.encoder(
            tensors[REGISTRY_KEYS.X_KEY], side_input=outputs["shift_mean"][particle]
        )
        torch.testing.assert_close(location[particle], alone.location)
        torch.testing.assert_close(variance[particle], alone.variance)
    expected = kl_divergence(Normal(location, variance.sqrt()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(module.kl_basal(outputs), expected)
    perturbed = dosage(tensors).any(1)
    moved = (location[0] != location[1]).all(1)
    assert torch.equal(moved, perturbed)


def test_frozen_perturbations_get_no_gradient(tensors):
    module = make_member(
        embedding_posterior="correlated", **EXTENSIONS | {"targets": [0, 4, -1, 2]}
    ).train()
    module.effects.freeze(torch.tensor([1, 2, 4]))  # the last of them a pair
    tensors |= columns(torch.ones(FEW_CELLS, N_PERTURBATIONS, dtype=torch.float64))
    _, _, output = module(tensors)
    (output.loss + sum(module.global_divergences().values())).backward()
    gradients = [p.grad for p in module.global_parameters() if p.grad is not None]
    before = [gradient.clone() for gradient in gradients]
    assert len(gradients) == 3 + 1 + 4 + 2  # effects, codes, dose responses, direct effects
    module.drop_frozen_gradients()
    free = ~module.effects.frozen.squeeze(1)
    for gradient, old in zip(gradients, before, strict=True):
        rows = free[: len(gradient)]
        assert not gradient[~rows].any()
        assert torch.equal(gradient[rows], old[rows])
        assert old[1].any()


N_BATCH, N_DRAWS = 2, 5


def make_extended(n_latent: int = 3, *, simple: bool = False, **kwargs) -> SAMSVAEModule:
    if not simple:
        kwargs |= EXTENSIONS
    module = SAMSVAEModule(
        N_GENES, N_PERTURBATIONS, n_latent=n_latent, n_hidden=16, n_batch=N_BATCH, **kwargs
    )
    with torch.no_grad():
        effects = module.effects
        effects.mask_logits.normal_(1)
        effects.slab_mean.normal_()
        effects.rotation.copy_(torch.linalg.qr(torch.randn_like(effects.rotation))[0])
        effects.masks_on = True
        if module.closed_form is not None:
            module.closed_form.basal_mean.normal_()
        module.px_r.normal_()
        if not simple:
            module.direct_effects.mean.normal_()
            module.dose_response.log_slope_mean.normal_()
    return module.double().eval()


def by_hand(module, draws, k: int, doses) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and log fold changes of the genes under one draw."""
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
        for t, gene in enumerate(EXTENSIONS["targets"]):
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
@pytest.mark.parametrize("n_columns", [None, 5])
def test_decoded_by_hand(simple, global_inference, doses, n_columns, population):
    module = make_extended(simple=simple, global_inference=global_inference)
    draws = module.sample_globals(N_DRAWS)
    condition = torch.tensor([doses], dtype=torch.float64)
    given = padded(condition, n_columns)
    expected = []
    for k in range(N_DRAWS):
        shift, fold_change = by_hand(module, draws, k, condition[0])
        u = population.basal + shift
        if module.closed_form is not None:
            u = u + module.closed_form.basal_mean[population.batch_index[:, 0]]
        logits = module.decoder(u, population.batch_index).logits + fold_change
        expected.append(population.library * torch.softmax(logits, -1))
    expected = torch.stack(expected)

    every_draw = module.decode_condition(population, given, draws)
    torch.testing.assert_close(every_draw.mu.expand_as(expected), expected)
    one_each = module.decode_condition(population, given, draws, one_draw_a_cell=True)
    torch.testing.assert_close(one_each.mu, expected[range(N_DRAWS), range(N_DRAWS)])
    some = module.decode_condition(population, given, draws.subset(1, 3))
    torch.testing.assert_close(some.mu.expand_as(expected[1:3]), expected[1:3])


@torch.no_grad()
@pytest.mark.parametrize("n_columns", [None, 5])
def test_draws_of_the_perturbations_asked_for(n_columns, population):
    """They are those of the condition, and of all pairs."""
    module = make_extended()
    asked = torch.tensor([1, 3])
    draws = module.sample_globals(N_DRAWS, asked)
    assert draws.rows.tolist() == [1, 3, 4, 5]
    n_rows = module.effects.n_rows
    everything = torch.full((N_DRAWS, n_rows, 3), 1e9).double()
    everything[:, draws.rows] = draws.effects
    whole = draws._replace(effects=everything, rows=torch.arange(n_rows))
    given = padded(torch.tensor([[0.0, 1.5, 0.0, 0.8]], dtype=torch.float64), n_columns)
    torch.testing.assert_close(
        module.decode_condition(population, given, draws).mu,
        module.decode_condition(population, given, whole).mu,
    )
    mean, _ = module.effects.moments(draws.rows)
    many = module.sample_globals(20_000, asked).effects
    torch.testing.assert_close(many.mean(0), module.to_network(mean), atol=0.05, rtol=0)


@torch.no_grad()
def test_draws_are_in_the_coordinates_of_the_networks():
    module = make_extended()
    torch.manual_seed(5)
    effects = module.sample_globals(N_DRAWS).effects
    torch.manual_seed(5)
    torch.testing.assert_close(effects, module.effects.sample(N_DRAWS) @ module.effects.rotation)


@torch.no_grad()
def test_controls_need_no_draws(population):
    """Of a condition without a perturbation, of a module without pairs."""
    module = make_extended(simple=True)
    draws = module.sample_globals(N_DRAWS, torch.empty(0, dtype=torch.long))
    assert draws.rows.numel() == 0
    given = padded(torch.zeros(1, N_PERTURBATIONS, dtype=torch.float64))
    found = module.decode_condition(population, given, draws)
    expected = module.decode_condition(population, given, module.sample_globals(N_DRAWS))
    torch.testing.assert_close(found.mu, expected.mu)


@torch.no_grad()
@pytest.mark.parametrize("global_inference", ["closed_form", "gradient"])
def test_importance_weights_meet_the_evidence_with_extensions(global_inference):
    """Against a sum over a grid of two latents, with shift and fold changes by hand."""
    n_cells, n_particles = 4, 40_000
    module = make_extended(2, global_inference=global_inference)
    module.encoder.variance_logit.bias += 2.5  # a guide wider than the posterior
    given = torch.rand(n_cells, N_PERTURBATIONS, dtype=torch.float64) + 0.2
    given[0], given[1, 1:] = 0, 0
    counts = torch.poisson(8 * torch.rand(n_cells, N_GENES).double()) + 1
    batch = torch.randint(0, N_BATCH, (n_cells, 1))
    tensors = minibatch(counts, given, **{REGISTRY_KEYS.BATCH_KEY: batch})
    one = module.sample_globals(1)
    many = one._replace(
        n_samples=n_particles,
        effects=one.effects.expand(n_particles, -1, -1),
        direct=one.direct.expand(n_particles, -1),
        hill=type(one.hill)(*(field.expand(n_particles, -1) for field in one.hill)),
    )
    weights = module.log_importance_weights(tensors, many)

    shifts, fold_changes = zip(*(by_hand(module, one, 0, doses) for doses in given), strict=True)
    axis = torch.linspace(-6, 6, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    u = grid[:, None] + torch.stack(shifts)
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


class TestState:
    """What is saved is what is loaded, and states of version 0.1.0 are understood."""

    SETTINGS = (
        {},
        {"mask_prior": 1.0, **EXTENSIONS},
        {"global_inference": "gradient", "embedding_posterior": "mean_field"},
        {"global_inference": "gradient", "embedding_posterior": "correlated"},
        {"global_inference": "gradient", "embedding_posterior": "point", "mask_prior": 1.0},
    )
    RENAMED = {
        "effects.rotation": "effects.frame",
        "effects.background_variance": "effects.spike_variance",
        "effects.spike_variance": "effects.spike_posterior_variance",
        "effects.code": "effects.correlated.code",
        "effects.from_mask.weight": "effects.correlated.from_mask.weight",
        "effects.from_mask.bias": "effects.correlated.from_mask.bias",
        "effects.to_moments.weight": "effects.correlated.moments.weight",
        "effects.to_moments.bias": "effects.correlated.moments.bias",
        "closed_form.statistics.linear": "closed_form.statistics.pull",
        "closed_form.statistics.basal_linear": "closed_form.statistics.basal_pull",
    }

    @pytest.fixture(params=SETTINGS, ids=["default", "given", "mean_field", "correlated", "point"])
    def settings(self, request) -> dict:
        return request.param

    @staticmethod
    def trained(settings) -> SAMSVAEModule:
        """A module that has seen cells, with a row frozen."""
        module = make_module(**settings).train()
        module.n_training_cells, module.counts_per_cell = N_CELLS, 1_234.1
        module.initialized = True
        if module.closed_form is not None:
            module.closed_form.settled = module.effects.masks_on
        module.effects.freeze(torch.tensor([2]))
        module.effects.set_mask_logits(torch.randn_like(module.effects.mask_logits))
        module.observe(module(make_tensors())[0])
        return module.eval()

    def of_version_0_1_0(self, module) -> dict[str, torch.Tensor]:
        """Its state as that version wrote it: a field for every family, other names."""
        state = {}
        for name, value in module.state_dict().items():
            state[self.RENAMED.get(name, name)] = value
        del state["effects.n_frozen"]
        state["counts_per_cell"] = state["counts_per_cell"].float()
        zeros = torch.zeros_like(state["effects.slab_mean"])
        for name in ("spike_mean", "spike_posterior_variance", "selection_penalty"):
            state.setdefault(f"effects.{name}", zeros.clone())
        state.setdefault("effects.spike_variance", torch.tensor(0.0))
        if not module.effects.sparse:  # whose log-odds were left alone
            state["effects.mask_logits"] = state["effects.mask_logits"].clone()
            state["effects.mask_logits"][:N_PERTURBATIONS] = 8.0
        if "closed_form.statistics.n_together" in state:
            del state["closed_form.statistics.n_together"]
            state["closed_form.statistics.max_per_cell"] = torch.tensor(3)
        return state

    @staticmethod
    def assert_same(module, other, but=()) -> None:
        theirs = other.state_dict()
        assert module.state_dict().keys() == theirs.keys()
        for name, value in module.state_dict().items():
            if name not in but:
                torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, msg=name)

    def test_is_loaded_as_it_was_saved(self, settings, tmp_path):
        module, other = self.trained(settings), make_module(masks_on=False, **settings)
        torch.save(module.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        self.assert_same(module, other)
        for name in ("n_training_cells", "counts_per_cell", "initialized"):
            expected = getattr(module, name)
            assert getattr(other, name) == expected
            assert type(getattr(other, name)) is type(expected)
        assert other.effects.masks_on
        assert other.effects.is_query

    def test_of_version_0_1_0(self, settings):
        module, other = self.trained(settings), make_module(masks_on=False, **settings)
        state = self.of_version_0_1_0(module)
        before = dict(state)
        other.load_state_dict(state)
        assert state.keys() == before.keys()
        different = {"counts_per_cell", "closed_form.statistics.n_together"}
        self.assert_same(module, other, different)
        assert other.counts_per_cell == pytest.approx(1_234.1)
        assert other.effects.n_frozen == 1
        if not other.effects.sparse:
            assert (other.effects.mask_probability()[:N_PERTURBATIONS] == 1).all()
        if other.closed_form is not None:
            assert (other.closed_form.statistics.n_together == 3).all()
        tensors = make_tensors()
        torch.manual_seed(1)
        expected = module(tensors)[2].loss
        torch.manual_seed(1)
        torch.testing.assert_close(other(tensors)[2].loss, expected)

    def test_of_version_0_1_0_inside_of_a_checkpoint(self, settings):
        module = self.trained(settings)
        state = self.of_version_0_1_0(module)
        plan = torch.nn.ModuleDict({"module": make_module(masks_on=False, **settings)})
        plan.load_state_dict({f"module.{name}": value for name, value in state.items()})
        self.assert_same(
            module, plan["module"], {"counts_per_cell", "closed_form.statistics.n_together"}
        )

    def test_a_copy_understands_it_by_itself(self, settings):
        module = self.trained(settings)
        other = copy.deepcopy(make_module(masks_on=False, **settings))
        other.load_state_dict(self.of_version_0_1_0(module))
        assert other.effects.masks_on
        assert other.n_training_cells == N_CELLS

    def test_goes_with_a_copy(self, settings):
        module = self.trained(settings)
        other = copy.deepcopy(module)
        self.assert_same(module, other)
        other.n_training_cells = 7
        other.effects.freeze(frozen=False)
        assert module.n_training_cells == N_CELLS
        assert module.effects.n_frozen == 1

    @pytest.mark.parametrize("name", ["n_training_cells", "effects.masks_on"])
    def test_what_is_missing_is_said(self, name):
        module = make_module()
        state = module.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            module.load_state_dict(state)
