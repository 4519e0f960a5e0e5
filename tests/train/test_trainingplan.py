"""The training plan through ``train``: loss, history, schedules, restarts, checkpoints, steps."""

from __future__ import annotations

import math
import shutil
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from scvi.module.base import LossOutput
from scvi.train import SaveCheckpoint

import scvi_sams
from scvi_sams import TrainingDivergedError
from scvi_sams.module.closed_form import ClosedForm
from scvi_sams.train.schedules import pulse
from scvi_sams.train.trainingplan import EpochMeans

if TYPE_CHECKING:
    from scvi_sams.train import SAMSTrainingPlan

N_CELLS, N_TRAINING, BATCH_SIZE = 400, 360, 40
STEPS_PER_EPOCH = N_TRAINING // BATCH_SIZE


@pytest.fixture(scope="module")
def adata():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=N_CELLS, n_genes=60, n_perturbations=6, n_pairs=2, n_latent=3
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    return adata


@pytest.fixture
def make_model(adata):
    def make(seed: int = 0, **kwargs) -> scvi_sams.SAMSVAE:
        scvi.settings.seed = seed
        return scvi_sams.SAMSVAE(
            adata, **({"n_latent": 6, "n_hidden": 32, "dropout_rate": 0.0} | kwargs)
        )

    return make


def train(model, max_epochs: int = 10, **kwargs) -> None:
    plan_kwargs = {"mask_warmup_fraction": 0.4, "kl_warmup_fraction": 0.5}
    kwargs["plan_kwargs"] = plan_kwargs | kwargs.get("plan_kwargs", {})
    defaults = {
        "batch_size": BATCH_SIZE,
        "accelerator": "cpu",
        "check_val_every_n_epoch": 1,
        "enable_progress_bar": False,
        "logger": None,
    }
    model.train(max_epochs, **(defaults | kwargs))


def history(model, name: str) -> np.ndarray:
    return model.history[name].iloc[:, 0].to_numpy(dtype=float)


def plan_of(model) -> SAMSTrainingPlan:
    return model.trainer.lightning_module


def state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.module.state_dict().items()}


@pytest.fixture(scope="module")
def trained(adata) -> scvi_sams.SAMSVAE:
    """Ten epochs; not to be changed."""
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=32)
    train(model)
    return model


@pytest.fixture
def at_step(monkeypatch):
    """Call a function at some training steps of a model, and say how many there were."""

    def patch(model, name: str, change, steps) -> None:
        original, module, calls = getattr(model.module, name), model.module, []

        def patched(*args, **kwargs):
            outputs = original(*args, **kwargs)
            if not module.training:
                return outputs
            calls.append(None)
            return change(outputs) if len(calls) - 1 in steps else outputs

        monkeypatch.setattr(module, name, patched, raising=True)

    return patch


class TestLoss:
    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    @pytest.mark.parametrize("weight", [0.2, 1.0])
    def test_is_the_local_bound_plus_the_global_terms_per_training_cell(
        self, make_model, engine, weight
    ):
        model = make_model(global_inference=engine)
        train(model, 2, plan_kwargs={"mask_warmup_fraction": 0.0})
        plan, module = plan_of(model), model.module
        assert plan.n_obs_training == N_TRAINING == module.n_training_cells
        (tensors,) = model._make_data_loader(model.adata, batch_size=N_CELLS)
        _, _, output = plan.eval().forward(tensors, loss_kwargs={"kl_weight": weight})
        kl_global = sum(module.effects.kl().values())
        assert kl_global > 0
        expected = (
            output.reconstruction_loss["reconstruction_loss"].mean()
            + weight * output.kl_local["kl_basal"].mean()
            + kl_global / N_TRAINING
        )
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(output.kl_global_sum, kl_global)

    def test_global_weight(self, make_model):
        model = make_model()
        train(model, 2, plan_kwargs={"mask_warmup_fraction": 0.0, "kl_global_weight": 3.0})
        (tensors,) = model._make_data_loader(model.adata, batch_size=N_CELLS)
        _, _, output = plan_of(model).eval().forward(tensors, loss_kwargs={"kl_weight": 0.0})
        reconstruction = output.reconstruction_loss["reconstruction_loss"].mean()
        expected = 3 * output.kl_global_sum / N_TRAINING
        torch.testing.assert_close(output.loss - reconstruction, expected, atol=1e-4, rtol=1e-3)

    def test_gradient_engine_learns_from_the_global_terms(self, make_model):
        model = make_model(global_inference="gradient")
        train(model, 1)
        (tensors,) = model._make_data_loader(model.adata, batch_size=N_CELLS)
        plan, logits = plan_of(model).eval(), model.module.effects.mask_logits
        logits.grad = None
        plan.forward(tensors, loss_kwargs={"kl_weight": 1.0})[2].kl_global_sum.backward()
        assert logits.grad.abs().min() > 0


class TestHistory:
    NAMES = (
        "train_loss",
        "reconstruction_loss_train",
        "kl_local_train",
        "kl_global_train",
        "elbo_train",
        "validation_loss",
        "elbo_validation",
        "kl_weight",
        "kl_mask",
        "kl_embedding",
        "mask_density",
        "n_active_latents",
        "background_scale",
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_every_epoch_has_a_number(self, trained, name):
        values = history(trained, name)
        assert len(values) == 10
        assert np.isfinite(values).all()

    @pytest.mark.parametrize("part", ["train", "validation"])
    def test_bounds_divide_global_terms_by_the_training_cells(self, trained, part):
        kl_global = history(trained, f"kl_global_{part}")
        assert kl_global[-1] > 0
        expected = (
            history(trained, f"reconstruction_loss_{part}")
            + history(trained, f"kl_local_{part}")
            + kl_global / N_TRAINING
        )
        np.testing.assert_allclose(history(trained, f"elbo_{part}"), expected, rtol=1e-6)

    def test_global_terms_are_those_of_masks_and_embeddings(self, trained):
        total = history(trained, "kl_mask") + history(trained, "kl_embedding")
        np.testing.assert_allclose(history(trained, "kl_global_validation"), total, rtol=1e-5)
        assert (total > 0)[5:].all()  # masks are on

    def test_loss_is_the_bound_once_everything_is_on(self, trained):
        gap = history(trained, "elbo_train") - history(trained, "train_loss")
        weight = history(trained, "kl_weight")
        assert (gap[weight < 0.9] > 1e-3).all()
        np.testing.assert_allclose(gap[9:], 0, atol=1e-3)  # after the pulse

    def test_masks_are_counted(self, make_model, monkeypatch):
        """As they are in training; they are settled after the last epoch was logged."""
        monkeypatch.setattr(ClosedForm, "settle", lambda *_: None)
        model = make_model()
        train(model, 6)
        on = model.module.effects.mask_probability() > 0.5
        assert history(model, "mask_density")[-1] == pytest.approx(on.float().mean().item())
        assert history(model, "n_active_latents")[-1] == on.any(0).sum().item()

    def test_means_weigh_cells_alike(self, make_model):
        """With batches of 200 and 160, and a network that stands still."""
        model = make_model()
        train(model, 1, batch_size=200, plan_kwargs={"lr": 0.0, "mask_warmup_fraction": 2.0})
        loader = model._make_data_loader(
            model.adata, indices=model.train_indices, batch_size=N_TRAINING
        )
        (tensors,) = loader
        _, _, output = plan_of(model).eval().forward(tensors, loss_kwargs={"kl_weight": 1.0})
        kl_local = output.kl_local["kl_basal"].mean().item()
        assert history(model, "kl_local_train")[0] == pytest.approx(kl_local, rel=1e-4)


class TestSchedules:
    def test_masks_come_on_after_the_warm_up(self, trained):
        kl = history(trained, "kl_mask")
        assert not kl[:3].any()
        assert (kl[4:] > 0).all()
        assert trained.module.effects.masks_on

    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    def test_mask_warm_up_is_a_share_of_the_steps(self, make_model, engine):
        model = make_model(global_inference=engine)
        train(model, 10, plan_kwargs={"mask_warmup_fraction": 0.7})
        kl = history(model, "kl_mask")
        assert not kl[:6].any()
        assert (kl[7:] > 0).all()

    def test_no_mask_warm_up(self, make_model):
        model = make_model()
        train(model, 2, plan_kwargs={"mask_warmup_fraction": 0.0})
        assert (history(model, "kl_mask") > 0).all()

    def test_weight_rises_over_its_share(self, trained):
        weight = history(trained, "kl_weight")
        rise = [min(1.0, 0.01 + 0.99 * epoch / 5) for epoch in range(1, 11)]
        expected = [w * pulse(epoch / 10, 0.4, 6.0) for epoch, w in enumerate(rise, 1)]
        np.testing.assert_allclose(weight, expected, rtol=1e-5)

    def test_weight_by_epochs_as_in_scvi_tools(self, make_model):
        model = make_model()
        train(model, 4, plan_kwargs={"n_epochs_kl_warmup": 2, "min_kl_weight": 0.0})
        np.testing.assert_allclose(history(model, "kl_weight"), [0, 0.5, 1, 1], atol=0.01)

    def test_training_again_goes_on(self, make_model):
        model = make_model()
        train(model, 6)
        mask = model.get_perturbation_mask().to_numpy()
        train(model, 4)
        assert (history(model, "kl_mask")[6:] > 0).all()
        np.testing.assert_array_equal(history(model, "kl_weight")[6:], 1)
        after = model.get_perturbation_mask().to_numpy()
        assert ((mask > 0.9) & (after < 0.1)).mean() < 0.05

    def test_learning_rate_ends_low(self, trained):
        (group,) = trained.trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(0.02 * group["initial_lr"], rel=0.01)


class TestOptimizer:
    @pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
    def test_gradient_engine_has_a_group_for_the_global_latents(self, make_model, optimizer):
        model = make_model(global_inference="gradient")
        plan_kwargs = {"lr": 1e-3, "global_lr_factor": 7.0, "weight_decay": 0.1}
        train(model, 1, plan_kwargs=plan_kwargs | {"optimizer": optimizer})
        networks, effects = model.trainer.optimizers[0].param_groups
        assert networks["initial_lr"] == 1e-3
        assert effects["initial_lr"] == pytest.approx(7e-3)
        assert networks["weight_decay"] == 0.1
        assert effects["weight_decay"] == 0
        expected = {id(parameter) for parameter in model.module.effects.parameters()}
        assert {id(parameter) for parameter in effects["params"]} == expected
        everything = {id(parameter) for parameter in model.module.parameters()}
        assert {id(parameter) for parameter in networks["params"]} == everything - expected

    def test_closed_form_engine_trains_the_networks_only(self, trained):
        (group,) = trained.trainer.optimizers[0].param_groups
        trained_by_gradient = {id(parameter) for parameter in group["params"]}
        effects = {id(parameter) for parameter in trained.module.effects.parameters()}
        assert not trained_by_gradient & effects
        assert group["eps"] == 1e-8

    def test_the_prior_is_of_the_weights_of_both_networks_and_fades(self, make_model):
        model, seen = make_model(), []

        class Look(Callback):
            def on_before_optimizer_step(self, trainer, plan, optimizer):
                module = plan.module
                kept = {
                    n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None
                }
                plan.on_before_optimizer_step(optimizer)
                of_prior = {}
                for name, parameter in module.named_parameters():
                    if name in kept:
                        of_prior[name] = (parameter.grad - kept[name], parameter.detach().clone())
                        parameter.grad = kept[name]
                seen.append(of_prior)

        train(model, 4, plan_kwargs={"weight_precision": 5e3}, callbacks=[Look()])
        assert len(seen) > 10
        for step, of_prior in enumerate(seen):
            share = 5e3 * (1 - step / len(seen)) / len(model.train_indices)
            for name, (gradient, value) in of_prior.items():
                is_weight = name.startswith(("encoder", "decoder")) and value.dim() == 2
                expected = share * value if is_weight else torch.zeros_like(value)
                torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)

    def test_what_was_trained_before_has_no_prior(self, make_model):
        def trained(precision):
            scvi.settings.seed = 0
            model = make_model()
            train(model, 2, plan_kwargs={"weight_precision": 0.0})
            train(model, 2, plan_kwargs={"weight_precision": precision})
            return model.module.decoder.logits.weight

        torch.testing.assert_close(trained(0.0), trained(1e3), rtol=0, atol=0)

    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    def test_reduce_on_plateau(self, make_model, engine):
        model = make_model(global_inference=engine)
        plateau = {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1e6}
        train(model, 6, plan_kwargs=plateau | {"lr": 1e-3, "lr_factor": 0.5})
        assert model.trainer.optimizers[0].param_groups[0]["lr"] < 0.3e-3
        assert model.module.effects.masks_on


class GradientNorms(Callback):
    """Norms of the gradients as they reach the optimizer."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, plan, *args) -> None:
        gradients = [p.grad for p in plan.module.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())


class TestClipping:
    def test_fixed(self, make_model):
        model, norms = make_model(), GradientNorms()
        train(model, 2, gradient_clip_val=0.01, callbacks=[norms])
        np.testing.assert_allclose(norms.norms, 0.01, rtol=1e-3)

    def test_adaptive_cuts_a_spike(self, make_model, at_step):
        model, norms = make_model(), GradientNorms()
        at_step(model, "kl_basal", lambda kl: 1 + kl + 1e5 * (kl - kl.detach()), {12})
        train(model, 3, callbacks=[norms], plan_kwargs={"clip_factor": 2.0, "kl_pulse": 1.0})
        usual = max(norms.norms[:12])
        assert norms.norms[12] <= 2 * usual * 1.01
        assert norms.norms[12] > norms.norms[11]

    def test_step_with_gradients_that_are_not_finite_is_skipped(self, make_model):
        """The loss is finite, so that the guard has nothing to say."""
        model = make_model()
        hook = model.module.px_r.register_hook(lambda gradient: gradient * math.nan)
        before = model.module.encoder.location.weight.detach().clone()
        train(model, 1)
        hook.remove()
        assert torch.equal(before, model.module.encoder.location.weight)
        assert np.isfinite(history(model, "train_loss")).all()


class TestDivergence:
    TERMS = (
        ("kl_basal", lambda kl: kl * math.nan, "KL divergence of the basal state"),
        (
            "generative",
            lambda outputs: outputs | {"log_dispersion": outputs["log_dispersion"] * math.nan},
            "reconstruction loss",
        ),
    )

    def test_values_that_are_not_finite_at_the_end_are_not_kept_in_silence(self, make_model):
        def spoil(trainer, plan, *_):
            if trainer.global_step == trainer.estimated_stepping_batches:
                plan.module.px_r.data.fill_(math.nan)

        model = make_model()
        with pytest.raises(TrainingDivergedError, match="px_r hold values that are not finite"):
            train(model, max_epochs=1, callbacks=[LambdaCallback(on_train_batch_end=spoil)])

    @pytest.mark.parametrize(("name", "change", "term"), TERMS)
    def test_one_bad_step_is_mended(self, make_model, at_step, name, change, term):
        model = make_model()
        at_step(model, name, change, {2 * STEPS_PER_EPOCH + 3})
        with pytest.warns(UserWarning, match=f"epoch 3 .*{term} is not finite.*halved"):
            train(model)
        assert plan_of(model).n_restarts == 1
        assert len(history(model, "train_loss")) == 10
        for series in TestHistory.NAMES:
            assert np.isfinite(history(model, series)).all(), series
        assert all(torch.isfinite(value.float()).all() for value in state(model).values())
        (group,) = model.trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(0.5 * 0.02 * group["initial_lr"], rel=0.01)

    @pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1.0}])
    def test_bad_first_step(self, make_model, at_step, clip):
        model = make_model()
        at_step(model, "kl_basal", lambda kl: kl * math.nan, {0})
        with pytest.warns(UserWarning, match="epoch 1 "):
            train(model, 2, **clip)
        assert np.isfinite(history(model, "train_loss")).all()

    def test_bad_step_after_the_masks_are_on(self, make_model, at_step):
        model = make_model()
        at_step(model, "kl_basal", lambda kl: kl * math.nan, {8 * STEPS_PER_EPOCH})
        with pytest.warns(UserWarning, match="epoch 9 "):
            train(model)
        assert model.module.effects.masks_on
        assert np.isfinite(model.get_perturbation_effect().to_numpy()).all()

    def test_explosion(self, make_model, at_step):
        model = make_model()
        at_step(model, "kl_basal", lambda kl: kl + 1e9, {7 * STEPS_PER_EPOCH})
        with pytest.warns(UserWarning, match="epoch 8 .*the loss is"):
            train(model)
        assert history(model, "train_loss").max() < 1e6

    @pytest.mark.parametrize(("name", "change", "term"), TERMS)
    def test_without_end_training_stops(self, make_model, at_step, name, change, term):
        model = make_model()
        at_step(model, name, change, range(STEPS_PER_EPOCH, 10_000))
        with (
            pytest.warns(UserWarning, match="Restored the last healthy state"),
            pytest.raises(TrainingDivergedError, match="epoch 2 ") as caught,
        ):
            train(model)
        message = str(caught.value)
        assert term in message
        assert "plan_kwargs={'lr':" in message
        assert "basal_posterior='residual'" in message

    def test_healthy_training_says_nothing(self, make_model):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Training diverged")
            train(make_model(), 2)


class TestEarlyStopping:
    def test_stops_after_the_masks_are_on(self, make_model):
        model = make_model()
        train(
            model,
            30,
            early_stopping=True,
            early_stopping_patience=1,
            early_stopping_min_delta=1e6,
        )
        n_epochs = len(history(model, "train_loss"))
        assert 12 < n_epochs < 30
        assert model.module.effects.masks_on

    def test_warm_up_of_ones_own(self, make_model):
        model = make_model()
        train(
            model,
            30,
            early_stopping=True,
            early_stopping_patience=1,
            early_stopping_min_delta=1e6,
            early_stopping_warmup_epochs=2,
        )
        assert len(history(model, "train_loss")) < 10


class SaveAfter(Callback):
    """Write a Lightning checkpoint after some epochs."""

    def __init__(self, n_epochs: int, path) -> None:
        self.n_epochs, self.path = n_epochs, path

    def on_train_epoch_end(self, trainer, plan) -> None:
        if trainer.current_epoch + 1 == self.n_epochs:
            trainer.save_checkpoint(self.path)


class TestCheckpoints:
    def test_best_model_is_restored(self, make_model, tmp_path):
        model = make_model()
        checkpoint = SaveCheckpoint(
            dirpath=str(tmp_path), monitor="elbo_validation", load_best_on_end=True
        )
        train(model, 6, callbacks=[checkpoint])
        saved = scvi_sams.SAMSVAE.load(checkpoint.best_model_path, model.adata)
        for key, value in state(saved).items():  # masks are settled after it was written
            if key.startswith(("encoder", "decoder", "px_r")):
                assert torch.equal(value, state(model)[key]), key

    def test_enable_checkpointing(self, make_model, tmp_path):
        model = make_model()
        folder = scvi.settings.logging_dir
        scvi.settings.logging_dir = str(tmp_path)
        try:
            train(model, 2, enable_checkpointing=True)
        finally:
            scvi.settings.logging_dir = folder
        assert list(tmp_path.rglob("model.pt"))

    @pytest.mark.parametrize(
        ("engine", "plan"),
        [
            ("closed_form", {}),
            ("gradient", {}),
            # Lightning writes a checkpoint before the scheduler of a plateau has seen its epoch.
            ("closed_form", {"reduce_lr_on_plateau": True, "lr_patience": 1, "lr_threshold": 1e6}),
        ],
    )
    # Before the masks are on, between two updates, and after.
    @pytest.mark.parametrize("n_epochs", [2, 5, 8])
    def test_resumes_bit_for_bit(self, make_model, tmp_path, engine, plan, n_epochs):
        path, arguments = tmp_path / "part.ckpt", {"global_inference": engine, "dropout_rate": 0.1}
        whole = make_model(**arguments)
        train(whole, 10, callbacks=[SaveAfter(n_epochs, path)], plan_kwargs=plan)
        resumed = make_model(**arguments)
        torch.randn(7)  # another place of the stream of random numbers
        train(resumed, 10, ckpt_path=path, plan_kwargs=plan)
        assert resumed.trainer.global_step == whole.trainer.global_step
        for name in ("train_loss", "elbo_train", "elbo_validation", "kl_weight", "kl_mask"):
            unbroken = history(whole, name)[n_epochs:]
            np.testing.assert_array_equal(history(resumed, name), unbroken, err_msg=name)
        for key, value in state(whole).items():
            assert torch.equal(value, state(resumed)[key]), key
        lr = [m.trainer.optimizers[0].param_groups[0]["lr"] for m in (whole, resumed)]
        assert lr[0] == lr[1]
        if "lr_patience" in plan:
            assert lr[0] < 1e-3  # it was cut more than once

    def test_cells_of_many_perturbations_resume_bit_for_bit(self, tmp_path):
        """What the closed form remembers of effects that moved is in the checkpoint."""
        doses = np.random.default_rng(0).random((200, 6)) < 0.6
        adata = scvi_sams.datasets.simulated_screen(
            n_cells=200, n_genes=20, n_perturbations=6, n_latent=3
        )
        adata.obsm["doses"] = doses.astype(np.float32)
        adata.uns["names"] = [f"P{k}" for k in range(6)]
        keys = {"dosage_key": "doses", "perturbation_names_uns_key": "names"}
        scvi_sams.SAMSVAE.setup_anndata(adata, **keys)
        path, models = tmp_path / "part.ckpt", []
        for arguments in ({"callbacks": [SaveAfter(5, path)]}, {"ckpt_path": path}):
            scvi.settings.seed = 0
            models.append(scvi_sams.SAMSVAE(adata, n_latent=3, n_hidden=16))
            train(models[-1], 8, **arguments, plan_kwargs={"global_update_every": 2})
        whole, resumed = models
        assert (whole.module.closed_form.statistics.n_together > 2).all()
        assert whole.module.closed_form.seen_effects.abs().max() > 0
        for key, value in state(whole).items():
            assert torch.equal(value, state(resumed)[key]), key

    def test_other_training_cells_are_told(self, make_model, tmp_path):
        path = tmp_path / "part.ckpt"
        train(make_model(), 2, callbacks=[SaveAfter(1, path)])
        other = make_model(seed=7)
        with pytest.warns(UserWarning, match="of 360 training cells are not those of the check"):
            train(other, 2, ckpt_path=path)

    def test_a_second_training_resumes_without_a_warm_up(self, make_model, tmp_path):
        path = tmp_path / "half.ckpt"
        model = make_model()
        train(model, 6)
        train(model, 8, callbacks=[SaveAfter(2, path)])
        resumed = make_model()
        train(resumed, 8, ckpt_path=path)
        np.testing.assert_array_equal(history(resumed, "kl_weight"), 1)
        assert (history(resumed, "kl_mask") > 0).all()


class TestSeeds:
    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    def test_same_seed_same_bits(self, make_model, engine):
        first, second = (make_model(seed=3, global_inference=engine) for _ in range(2))
        for model in (first, second):
            scvi.settings.seed = 3
            train(model, 4, plan_kwargs={"mask_warmup_fraction": 0.3})
        for key, value in state(first).items():
            assert torch.equal(value, state(second)[key]), key
        assert first.history["elbo_train"].equals(second.history["elbo_train"])

    @pytest.mark.parametrize("placement", ["device", "host"])
    def test_validation_does_not_change_the_fit(self, make_model, placement):
        often, never = make_model(dropout_rate=0.1), make_model(dropout_rate=0.1)
        for model, every in ((often, 1), (never, None)):
            scvi.settings.seed = 3
            train(model, 3, check_val_every_n_epoch=every, data_placement=placement)
        for key, value in state(often).items():
            assert torch.equal(value, state(never)[key]), key
        assert "elbo_validation" in often.history
        assert "elbo_validation" not in never.history

    def test_another_seed_another_model(self, make_model):
        models = [make_model(seed=seed) for seed in (3, 4)]
        for model in models:
            train(model, 1)
        weights = [model.module.decoder.logits.weight for model in models]
        assert not torch.equal(*weights)


class TestFrozenGlobals:
    def test_masks_and_effects_stay(self, make_model):
        model = make_model()
        train(model, 4, plan_kwargs={"mask_warmup_fraction": 0.2})
        model.module.effects.freeze()
        before = state(model)
        train(model, 2)
        after = state(model)
        for key, value in before.items():
            if key.startswith(("effects.", "closed_form.")):
                assert torch.equal(value, after[key]), key
        assert not torch.equal(before["px_r"], after["px_r"])


class JudgeEvery(Callback):
    """As on a device that has to be waited for."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def on_train_start(self, trainer, plan) -> None:
        plan.judge_every = self.n_steps


class TestSeveralStepsAreJudgedAtOnce:
    """All of an epoch here, unless a global update is due."""

    PLAN = {"global_update_every": 1_000}

    def train(self, model, max_epochs: int = 10, **plan) -> None:
        train(
            model,
            max_epochs,
            callbacks=[JudgeEvery(STEPS_PER_EPOCH)],
            plan_kwargs=self.PLAN | plan,
        )

    def test_healthy_training_is_the_same(self, make_model):
        one_by_one, together = make_model(), make_model()
        scvi.settings.seed = 0
        train(one_by_one, 6, plan_kwargs=self.PLAN)
        scvi.settings.seed = 0
        self.train(together, 6)
        for key, value in state(one_by_one).items():
            assert torch.equal(value, state(together)[key]), key
        assert one_by_one.history["elbo_train"].equals(together.history["elbo_train"])
        assert plan_of(together).guard.n_healthy == 6 * STEPS_PER_EPOCH

    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    def test_one_bad_step_is_mended(self, make_model, at_step, engine):
        """And what it led to until it was noticed; nothing of it is logged."""
        model = make_model(global_inference=engine)
        at_step(model, "kl_basal", lambda kl: kl + 1e9, {7 * STEPS_PER_EPOCH + 2})
        with pytest.warns(UserWarning, match="epoch 8 .*the loss is.*halved"):
            self.train(model)
        assert plan_of(model).n_restarts == 1
        assert history(model, "train_loss").max() < 1e6
        assert history(model, "validation_loss").max() < 1e6
        for name, value in state(model).items():
            assert torch.isfinite(value.float()).all(), name

    def test_bad_step_that_is_not_finite(self, make_model, at_step):
        model = make_model()
        at_step(model, "kl_basal", lambda kl: kl * math.nan, {2 * STEPS_PER_EPOCH + 3})
        with pytest.warns(UserWarning, match="epoch 3 .*halved"):
            self.train(model)
        for series in TestHistory.NAMES:
            assert np.isfinite(history(model, series)).all(), series

    def test_an_epoch_is_judged_at_its_end(self, make_model):
        model = make_model(global_inference="gradient")
        train(model, 1, callbacks=[JudgeEvery(1_000)], plan_kwargs=self.PLAN)
        assert plan_of(model).guard.n_healthy == STEPS_PER_EPOCH
        assert np.isfinite(history(model, "train_loss")).all()

    def test_training_that_stops_within_an_epoch_is_judged(self, make_model):
        model = make_model(global_inference="gradient")
        train(model, 3, max_steps=4, callbacks=[JudgeEvery(1_000)], plan_kwargs=self.PLAN)
        assert plan_of(model).guard.n_healthy == 4


def loss_output(loss: float, reconstruction: list[float], kl_local: list[float]) -> LossOutput:
    return LossOutput(
        loss=torch.tensor(loss),
        reconstruction_loss=torch.tensor(reconstruction),
        kl_local=torch.tensor(kl_local),
        kl_global=torch.tensor(20.0),
    )


class TestEpochMeans:
    """Against sums by hand."""

    def test_cells_weigh_alike_and_global_terms_are_spread(self):
        means = EpochMeans()
        means.offer(loss_output(4.0, [1.0, 2.0, 6.0], [0.0, 1.0, 2.0]))
        means.accept()
        means.offer(loss_output(8.0, [7.0], [5.0]))
        means.accept()
        found = means.read(n_training_cells=10)
        assert {name: float(value) for name, value in found.items()} == {
            "train_loss": 5.0,
            "reconstruction_loss_train": 4.0,
            "kl_local_train": 2.0,
            "kl_global_train": 20.0,
            "elbo_train": 4.0 + 2.0 + 20.0 / 10,
        }
        assert means.read(10) == {}

    def test_a_step_that_is_not_accepted_does_not_count(self):
        means = EpochMeans()
        means.offer(loss_output(float("nan"), [float("nan")], [0.0]))
        means.drop()
        means.offer(loss_output(3.0, [1.0], [2.0]))
        means.accept()
        assert means.read(10)["train_loss"] == pytest.approx(3.0)

    def test_steps_are_accepted_together(self):
        means, one_by_one = EpochMeans(), EpochMeans()
        for loss in (4.0, 8.0, 1.0):
            for some in (means, one_by_one):
                some.offer(loss_output(loss, [loss, 1.0], [0.0, 1.0]))
            one_by_one.accept()
        assert means.read(10) == {}  # nothing is accepted yet
        means.accept()
        assert means.read(10) == one_by_one.read(10)


@pytest.fixture(scope="module")
def larger():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=1_200, n_genes=80, n_perturbations=6, n_pairs=2, n_latent=3
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    return adata


class TestPrecision:
    @staticmethod
    def fit(adata, **kwargs) -> scvi_sams.SAMSVAE:
        scvi.settings.seed = 0
        model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=32)
        model.train(15, accelerator="cpu", enable_progress_bar=False, logger=None, **kwargs)
        return model

    def test_half_precision_trains_to_the_same_bound(self, larger):
        full, mixed = self.fit(larger), self.fit(larger, precision="bf16-mixed")
        losses = [model.history["train_loss"].iloc[-1, 0] for model in (full, mixed)]
        assert losses[0] != losses[1]  # it was indeed another precision
        np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)
        assert all(p.dtype == torch.float32 for p in mixed.module.parameters())
        effects = [
            model.get_average_treatment_effect(n_samples=2, n_cells=50) for model in (full, mixed)
        ]
        assert scvi_sams.evaluation.effect_correlation(effects[1], effects[0]) > 0.95


@pytest.fixture(scope="module")
def screen():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=500, n_genes=40, n_perturbations=6, n_pairs=2, n_latent=3
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    return adata


# Torch's own: it looks at every tensor it meets, and uses what it has deprecated.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
class TestCompile:
    """The same figures with ``torch.compile``, compiled once and not at every step."""

    BATCH_SIZE = 100
    PAPER = {"basal_posterior": "amortized", "embedding_posterior": "correlated"}

    @pytest.fixture(autouse=True)
    def as_it_was(self):
        """scvi-tools tells the compiler to hide errors, for good; none must hide here."""
        torch._dynamo.reset()
        before = torch._dynamo.config.suppress_errors
        yield
        torch._dynamo.config.suppress_errors = before
        torch._dynamo.reset()

    def fit(self, adata, settings, callback=None, **plan) -> scvi_sams.SAMSVAE:
        scvi.settings.seed = 0
        model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16, **settings)
        model.train(
            4,
            batch_size=self.BATCH_SIZE,  # divides the cells: each minibatch has the same shape
            train_size=1.0,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=None,
            callbacks=[] if callback is None else [callback],
            plan_kwargs={"mask_warmup_fraction": 0.0} | plan,
        )
        return model

    @pytest.mark.parametrize(
        ("settings", "plan"),
        [
            ({}, {}),
            pytest.param(
                {"direct_effects": False, **PAPER}, {"n_particles": 2}, marks=pytest.mark.slow
            ),
            pytest.param({"gene_likelihood": "zinb"}, {}, marks=pytest.mark.slow),
        ],
        ids=["default", "paper", "zinb"],
    )
    def test_nothing_is_compiled_again(self, screen, settings, plan):
        """Doses, counts that are not zero and pairs have other numbers in every minibatch."""
        steps, graphs = [], []

        def backend(graph, inputs):
            graphs.append(len(steps))
            return graph.forward

        compiled = self.fit(
            screen,
            settings,
            LambdaCallback(on_train_batch_end=lambda *args: steps.append(1)),
            compile=True,
            compile_kwargs={"backend": backend},
            **plan,
        )
        plain = self.fit(screen, settings, **plan)
        assert len(steps) == 4 * 500 / self.BATCH_SIZE
        # With the first step, and once more with the masks on.
        assert set(graphs) == {0, 1}
        np.testing.assert_allclose(
            history(compiled, "train_loss"), history(plain, "train_loss"), rtol=1e-6
        )

    @pytest.mark.slow  # the compiler of C++ works for a minute
    @pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))),
        reason="torch.compile needs a C++ compiler, and none is installed",
    )
    def test_compiled_training_gives_the_same_figures(self, screen):
        plain = self.fit(screen, {})
        with torch._inductor.config.patch(fallback_random=True):  # the same draws
            compiled = self.fit(screen, {}, compile=True)
        assert compiled.module.training is False
        np.testing.assert_allclose(
            history(compiled, "train_loss"), history(plain, "train_loss"), rtol=1e-4
        )
        products = []  # of effects, as rounding may exchange latents
        for model in (plain, compiled):
            effect = model.get_perturbation_effect().to_numpy()
            products.append(effect @ effect.T)
        np.testing.assert_allclose(products[1], products[0], atol=0.01 * products[0].max())
