"""Updates of the global latents: when they are due, what they do, and for a query."""

from __future__ import annotations

import pytest
import torch
from scvi import REGISTRY_KEYS

from scvi_sams.module import ConditionalVAEModule, SAMSVAEModule
from scvi_sams.module.base import SAMS_REGISTRY_KEYS
from scvi_sams.train.global_updates import GlobalUpdates, infer_effects, summarise_globals

N_CELLS, N_GENES, N_PERTURBATIONS, N_LATENT = 120, 20, 5, 3
SIZES = {"n_latent": N_LATENT, "n_hidden": 16}
N_STEPS, EVERY = 23, 5


def make_module(**kwargs) -> SAMSVAEModule:
    module = SAMSVAEModule(N_GENES, N_PERTURBATIONS, **(SIZES | kwargs)).eval()
    module.n_training_cells = N_CELLS
    return module


def make_tensors() -> dict[str, torch.Tensor]:
    """Controls, and cells with one perturbation each."""
    label = torch.arange(N_CELLS) % (N_PERTURBATIONS + 1)
    given = (label < N_PERTURBATIONS).unsqueeze(1)
    return {
        REGISTRY_KEYS.X_KEY: torch.poisson(5 * torch.rand(N_CELLS, N_GENES)) + 1,
        REGISTRY_KEYS.BATCH_KEY: torch.zeros(N_CELLS, 1, dtype=torch.long),
        SAMS_REGISTRY_KEYS.PERTURBATION_KEY: torch.where(given, label.unsqueeze(1), 0),
        SAMS_REGISTRY_KEYS.DOSE_KEY: given.float(),
    }


def updates_of(module, mask_warmup_fraction: float = 0.5) -> GlobalUpdates:
    return GlobalUpdates(module, every=EVERY, mask_warmup_fraction=mask_warmup_fraction, seed=0)


def observed(module: SAMSVAEModule, tensors: dict[str, torch.Tensor]) -> SAMSVAEModule:
    """The module after it has seen the cells."""
    module.observe(module(tensors, compute_loss=False)[0])
    return module


class TestWhen:
    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    @pytest.mark.parametrize(
        ("fraction", "expected"),
        [
            (0.5, [5, 10, 12, 15, 20, 23]),
            (0.0, [1, 5, 10, 15, 20, 23]),
            (2.0, [5, 10, 15, 20]),
        ],
    )
    def test_steps(self, engine, fraction, expected):
        """Now and then, at the end of the warm-up, and at the last step if masks are on."""
        module = observed(make_module(global_inference=engine), make_tensors())
        updates, due = updates_of(module, fraction), []
        for step in range(1, N_STEPS + 1):
            if updates.is_due(step, N_STEPS):
                due.append(step)
                updates.update(step, N_STEPS)
        assert due == expected
        assert module.effects.masks_on is (fraction <= 1)

    def test_frozen_effects_are_left_alone(self):
        module = make_module()
        module.effects.freeze()
        assert not any(updates_of(module).is_due(step, 20) for step in range(1, 21))

    def test_without_effects_there_is_nothing_to_do(self):
        module = ConditionalVAEModule(N_GENES, N_PERTURBATIONS, **SIZES)
        updates = updates_of(module)
        assert not any(updates.is_due(step, 20) for step in range(1, 21))
        updates.update(5, 20)


class TestClosedForm:
    def test_centres_before_the_masks_are_on(self):
        module = observed(make_module(), make_tensors())
        updates_of(module).update(EVERY, N_STEPS)
        expected = module.closed_form.statistics.basal_mean()
        assert expected.any()
        torch.testing.assert_close(module.closed_form.basal_mean, expected)
        assert not module.effects.slab_mean.any()

    def test_switches_the_masks_on(self):
        module = observed(make_module(), make_tensors())
        updates_of(module).update(12, N_STEPS)
        assert module.effects.masks_on
        assert module.effects.slab_mean.abs().min() > 0
        assert not module.closed_form.basal_mean.any()  # not its turn

    def test_the_search_for_a_rotation_leaves_the_noise_of_cells_alone(self):
        states = []
        for _ in range(2):
            torch.manual_seed(0)
            module = observed(make_module(), make_tensors())
            before = torch.get_rng_state()
            updates_of(module).update(12, N_STEPS)
            assert torch.equal(torch.get_rng_state(), before)
            states.append(module.effects.rotation)
        assert torch.equal(*states)

    def test_updates_masks_and_effects(self):
        module = observed(make_module(), make_tensors())
        updates = updates_of(module)
        updates.update(12, N_STEPS)
        before = module.effects.mask_logits.clone()
        updates.update(15, N_STEPS)
        assert not torch.equal(module.effects.mask_logits, before)

    def test_takes_in_what_waits(self):
        module = make_module()
        module.closed_form.statistics.waits = True
        observed(module, make_tensors())
        assert int(module.closed_form.statistics.n_cells_seen) == 0
        updates_of(module).update(EVERY, N_STEPS)
        assert int(module.closed_form.statistics.n_cells_seen) == N_CELLS

    def test_a_query_keeps_its_basal_means_and_what_is_frozen(self):
        module = observed(make_module(), make_tensors())
        updates = updates_of(module)
        updates.update(12, N_STEPS)
        module.effects.freeze(slice(2))
        effects, rotation = module.effects.slab_mean.clone(), module.effects.rotation.clone()
        updates.update(15, N_STEPS)
        assert not module.closed_form.basal_mean.any()
        assert torch.equal(module.effects.rotation, rotation)
        same = (module.effects.slab_mean == effects).all(1)
        assert same.tolist() == [True, True, False, False, False]


class TestGradientEngine:
    def test_switches_the_masks_on_and_learns_their_prior(self):
        module = make_module(global_inference="gradient", mask_prior=(1.0, 3.0))
        updates, prior = updates_of(module), module.effects.mask_prior
        before = prior.mean()
        updates.update(12, N_STEPS)
        assert module.effects.masks_on
        assert torch.equal(prior.mean(), before)
        updates.update(15, N_STEPS)
        n_masks = N_PERTURBATIONS * N_LATENT
        assert prior.mean().item() == pytest.approx((1 + n_masks / 2) / (4 + n_masks))


class TestQuery:
    @pytest.fixture
    def module(self) -> SAMSVAEModule:
        module = make_module(dropout_rate=0.5).train()
        module.effects.masks_on = True
        module.effects.freeze(slice(3))
        return module

    def test_effects_are_inferred_and_all_else_stays(self, module):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        tensors = make_tensors()
        pieces = torch.randperm(N_CELLS).split(40)
        loader = [{key: value[piece] for key, value in tensors.items()} for piece in pieces]
        infer_effects(module, loader, n_passes=2)
        assert not module.training
        after = module.state_dict()
        for name, value in before.items():
            if name in {"effects.slab_mean", "effects.mask_logits"}:
                moved = (after[name] != value).any(1)
                assert moved.tolist() == [False, False, False, True, True], name
            elif not name.startswith(("effects.", "closed_form.statistics.")):
                assert torch.equal(after[name], value), name
        assert torch.equal(after["effects.rotation"], before["effects.rotation"])
        assert int(module.closed_form.statistics.n_cells_seen) == 2 * N_CELLS

    def test_many_passes_end_at_the_optimum(self, module):
        """Of effects, whose statistics the networks as they are give."""
        tensors = make_tensors()
        infer_effects(module, [tensors], n_passes=60)
        effects, solver = module.effects, module.closed_form
        before = effects.slab_mean.clone()
        solver.update(effects, N_CELLS, n_sweeps=10)
        torch.testing.assert_close(effects.slab_mean, before, atol=1e-3, rtol=0)
        assert before[3:].abs().min() > 1e-3


class TestSummary:
    def test_masks_that_are_on(self):
        module = make_module()
        effects = module.effects
        assert summarise_globals(effects)["mask_density"] == 0
        effects.masks_on = True
        effects.set_mask_logits(-3.0)
        effects.mask_logits[0, 1] = effects.mask_logits[4, 1] = effects.mask_logits[2, 0] = 3
        summary = {name: value.item() for name, value in summarise_globals(effects).items()}
        assert summary == pytest.approx(
            {"mask_density": 3 / 15, "n_active_latents": 2, "background_scale": 0.1}
        )

    def test_families_without_a_background(self):
        module = make_module(global_inference="gradient", embedding_posterior="mean_field")
        assert set(summarise_globals(module.effects)) == {"mask_density", "n_active_latents"}
