"""Training plan of the family: schedules, global terms, global updates, and a guard."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS, settings
from scvi.train import TrainingPlan
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from scvi_sams._exceptions import TrainingDivergedError
from scvi_sams.train.distributed import (
    add_over_processes,
    equalise_globals,
    leave_globals_alone,
    mean_over_processes,
    n_processes,
    pool_statistics,
    seed_own_noise,
)
from scvi_sams.train.global_updates import GlobalUpdates, summarise_globals
from scvi_sams.train.guard import AdaptiveClipping, DivergenceGuard, describe_divergence
from scvi_sams.train.schedules import (
    cosine_learning_rate,
    default_pulse,
    default_warmups,
    linear_warmup,
    pulse,
    share_done,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi.module.base import LossOutput
    from torch import Tensor

    from scvi_sams.module.base import PerturbationVAEModule


def parameter_groups(module: PerturbationVAEModule, global_lr: float) -> list[dict[str, Any]]:
    """Networks, and a second group of global latents where gradients train these.

    Global latents are never decayed: their priors do that.
    """
    shared = {id(parameter) for parameter in module.global_parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trainable if id(p) not in shared]}]
    if len(groups[0]["params"]) < len(trainable):
        latents = [p for p in trainable if id(p) in shared]
        groups.append({"params": latents, "lr": global_lr, "weight_decay": 0.0})
    return groups


@torch.no_grad()
def initialize_from(dataloader: Any, module: PerturbationVAEModule, n_cells: int) -> None:
    """Initialise a module from the first training cells that a loader gives.

    Where several processes train together, each reads its part of these cells.
    """
    sums: dict[str, Tensor] = {}
    largest_share, n_read = torch.zeros(()), 0
    for batch in dataloader:
        counts = batch[REGISTRY_KEYS.X_KEY]
        counts = (counts if counts.layout == torch.strided else counts.to_dense()).double()
        inputs = torch.log1p(counts) if module.is_count_model else counts
        found = {"cells": counts.new_tensor(len(counts)), "counts": counts.sum(0)}
        found |= {"input": inputs.sum(0), "input squared": inputs.square().sum(0)}
        if module.use_size_factor_key:
            library = batch[REGISTRY_KEYS.SIZE_FACTOR_KEY].double().flatten()
            found["library"] = library.sum()
            largest_share = torch.maximum(largest_share, (counts.sum(1) / library).max())
        covariates = batch.get(REGISTRY_KEYS.CONT_COVS_KEY)
        if covariates is not None:
            covariates = covariates.double()
            found["covariates"] = covariates.sum(0)
            found["covariates squared"] = covariates.square().sum(0)
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        n_read += len(counts)
        if n_read >= -(-n_cells // n_processes()):
            break
    add_over_processes(sums.values())
    mean = {name: total / sums["cells"] for name, total in sums.items()}

    def mean_and_std(name: str) -> tuple[Tensor, Tensor]:
        variance = mean[f"{name} squared"] - mean[name].square()
        return mean[name], variance.clamp(min=0).sqrt()

    library_mean, largest = mean.get("library"), None
    if library_mean is not None:
        add_over_processes([largest_share], largest=True)
        largest = largest_share
    scales = mean_and_std("covariates") if "covariates" in mean else None
    module.initialize(mean["counts"], *mean_and_std("input"), library_mean, largest, scales)


class EpochMeans:
    """What scvi-tools logs at every step, summed and read once an epoch.

    The logging would cost as much as a step of these small networks. Steps count only once they
    are accepted, so that those that diverged can be left out.
    """

    def __init__(self) -> None:
        self._offered: list[tuple[dict[str, Tensor], int]] = []
        self._sums: dict[str, Tensor | float] = {}
        self._n_cells = 0

    def offer(self, output: LossOutput) -> None:
        """Note what a step found."""
        n_cells = output.n_obs_minibatch
        found = {
            "train_loss": output.loss.detach() * n_cells,
            "reconstruction_loss_train": output.reconstruction_loss_sum.detach(),
            "kl_local_train": output.kl_local_sum.detach(),
            "kl_global_train": output.kl_global_sum.detach() * n_cells,
        }
        self._offered.append((found, n_cells))

    def accept(self) -> None:
        """Let the steps that were offered count."""
        for found, n_cells in self._offered:
            for name, value in found.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._n_cells += n_cells
        self._offered = []

    def drop(self) -> None:
        """Forget the steps that were offered and not accepted."""
        self._offered = []

    def read(self, n_training_cells: int) -> dict[str, Tensor | float]:
        """Means by scvi-tools' names, and begin the next epoch; empty without a step."""
        if not self._n_cells:
            return {}
        means = {name: total / self._n_cells for name, total in self._sums.items()}
        means["elbo_train"] = (
            means["reconstruction_loss_train"]
            + means["kl_local_train"]
            + means["kl_global_train"] / n_training_cells
        )
        self._sums, self._n_cells = {}, 0
        return means


_MAX_RESTARTS = 5
_JUDGE_EVERY = 10  # steps, on a device that has to be waited for


class SAMSTrainingPlan(TrainingPlan):
    """Train the networks by gradient and the global latents by either engine.

    Adds to the local loss of the module the divergences of masks and embeddings, divided by the
    number of training cells, so that the loss is the negative bound per cell. Validation uses the
    training number too (scvi-tools divides by that of the validation cells).

    Every schedule is a function of the share of steps done. Training starts as a plain VAE; the
    masks are switched on after ``mask_warmup_fraction`` of it. From then on the closed-form engine
    updates rotation, masks and effects every ``global_update_every`` steps.

    Several processes (``strategy="ddp_find_unused_parameters_true"``) train one model: gradients
    are averaged and the closed-form updates see the cells of all processes, so that parameters
    and global latents stay equal. A step then takes in ``batch_size`` cells of each process.

    Parameters
    ----------
    module
        The module to train.
    lr
        Learning rate of the networks at its peak.
    global_lr_factor
        Learning rate of masks and embeddings, relative to ``lr``; gradient engine only. The
        gradient of one perturbation is diluted by all cells that do not carry it.
    eps
        Epsilon of Adam. scvi-tools' 0.01 would freeze the global latents.
    weight_decay
        Weight decay of the networks; never applied to masks and embeddings.
    weight_precision
        Precision of a normal prior of the networks' weights at the start of a first training; it
        falls linearly to zero at the end. It prunes hidden units that the counts do not pay for,
        so that small and shallow screens are not learned by heart; what is left at the end is
        not shrunk.
    kl_warmup_fraction, min_kl_weight
        The weight on the divergence of the basal state rises from ``min_kl_weight`` to one over
        this share of training; 0.8 by default for screens of fewer than 1,000 counts a cell, 0.4
        for others. In shallow cells a plain VAE at full weight has no latent for a perturbation
        of few cells; in deep ones a slow rise splits one mechanism over several latents.
        ``n_epochs_kl_warmup`` or ``n_steps_kl_warmup``, if given, take the place of the share.
    kl_pulse
        Factor on that weight when the masks come on, for 15% of training; over the next 15% it
        returns to one. Latents that only spell out how strong perturbations bend the latent space
        do not survive it, while shifts are free of that cost. 6 by default, 1 (none) for shallow
        screens, features, Hill responses and the gradient engine.
    mask_warmup_fraction
        Share of training before the masks are switched on; 0.4 by default for shallow screens,
        0.5 for others, 0 for the gradient engine.
    kl_global_weight
        Weight on the divergences of the global latents.
    global_update_every
        Steps between two closed-form updates.
    n_initialization_cells
        Training cells read for the scale of the encoder's input and the decoder's bias.
    clip_factor
        Gradients are clipped to this multiple of their running mean norm, unless
        ``gradient_clip_val`` is passed to ``train``.
    n_particles
        Draws of the latents that the gradient is averaged over.
    **kwargs
        Further arguments of :class:`scvi.train.TrainingPlan`.

    Attributes
    ----------
    judge_every
        Steps after which the guard asks for their losses: a GPU is not waited for at each.

    Raises
    ------
    TrainingDivergedError
        If the loss diverged more often than restarts from a snapshot could mend.
    """

    module: PerturbationVAEModule

    def __init__(
        self,
        module: PerturbationVAEModule,
        *,
        lr: float = 4e-3,
        global_lr_factor: float = 10.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_precision: float = 200.0,
        kl_warmup_fraction: float | None = None,
        kl_pulse: float | None = None,
        min_kl_weight: float = 0.01,
        n_epochs_kl_warmup: int | None = None,
        n_steps_kl_warmup: int | None = None,
        mask_warmup_fraction: float | None = None,
        kl_global_weight: float = 1.0,
        global_update_every: int = 20,
        n_initialization_cells: int = 20_000,
        clip_factor: float = 2.0,
        n_particles: int = 1,
        **kwargs: Any,
    ) -> None:
        self.kl_warmup_fraction = kl_warmup_fraction
        self.kl_pulse = kl_pulse
        self.weight_precision = weight_precision
        self.mask_warmup_fraction = mask_warmup_fraction
        self._n_steps = 0
        self._warm_start = self._trained_before = False
        self._missed_by_plateau: float | None = None
        super().__init__(
            module,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            min_kl_weight=min_kl_weight,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            **kwargs,
        )
        self.global_lr_factor = global_lr_factor
        self.kl_global_weight = kl_global_weight
        self.global_update_every = global_update_every
        self.n_initialization_cells = n_initialization_cells
        self.n_particles = n_particles
        self.clipping = AdaptiveClipping(clip_factor)
        self.guard = DivergenceGuard()
        self.n_restarts = 0
        self._epoch_means = EpochMeans()
        self._global_terms: dict[str, Tensor] | None = None
        self._last_terms: dict[str, Tensor] = {}
        self._surplus: Tensor | float = 0.0
        self.judge_every = 1
        self._losses: list[Tensor] = []
        self._updates: GlobalUpdates | None = None

    # -- schedules -----------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the training steps done."""
        return share_done(self.global_step, self._n_steps)

    @property
    def kl_weight(self) -> Tensor:
        """Weight on the divergence of the basal state."""
        if self.n_epochs_kl_warmup is not None or self.n_steps_kl_warmup is not None:
            return super().kl_weight
        weight = 1.0
        if self.kl_warmup_fraction is None:  # not known before training starts
            weight = self.min_kl_weight
        elif not self._warm_start:
            weight = linear_warmup(self.progress, self.kl_warmup_fraction, self.min_kl_weight)
            weight *= self._pulse
        # Not torch.tensor, which would wait for the device to take it.
        return torch.full((), self.max_kl_weight * weight, device=self.device)

    @property
    def _pulse(self) -> float:
        """Factor on that weight for a while after the masks have come on."""
        if self._warm_start or self.kl_pulse is None:
            return 1.0
        return pulse(self.progress, self.mask_warmup_fraction or 0.0, self.kl_pulse)

    def initialize_val_metrics(self) -> None:
        """Scale the global terms of the validation bound by the training cells."""
        (
            self.elbo_val,
            self.rec_loss_val,
            self.kl_local_val,
            self.kl_global_val,
            self.val_metrics,
        ) = self._create_elbo_metric_components(mode="validation", n_total=self.n_obs_training)
        self.elbo_val.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """Two groups of parameters, and a learning rate that follows the share of steps."""
        groups = parameter_groups(self.module, self.lr * self.global_lr_factor)
        if self.optimizer_name == "Adam":
            optimizer = torch.optim.Adam(
                groups,
                lr=self.lr,
                eps=self.eps,
                weight_decay=self.weight_decay,
                fused=self.device.type in {"cpu", "cuda"},
            )
        else:
            optimizer = self.get_optimizer_creator()(groups)
        if self.reduce_lr_on_plateau:
            plateau = ReduceLROnPlateau(
                optimizer,
                patience=self.lr_patience,
                factor=self.lr_factor,
                threshold=self.lr_threshold,
                min_lr=self.lr_min,
                threshold_mode="abs",
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": self.lr_scheduler_metric},
            }
        self._n_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _learning_rate_factor(self, step: int) -> float:
        return cosine_learning_rate(step, self._n_steps) * 0.5**self.n_restarts

    # -- one step ------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a minibatch; what it found is logged once an epoch."""
        if self.on_step:
            return super().training_step(batch, batch_idx)
        self.loss_kwargs["kl_weight"] = self.kl_weight
        inference_kwargs = {"n_samples": self.n_particles} if self.n_particles > 1 else None
        _, _, output = self.forward(
            batch, loss_kwargs=self.loss_kwargs, inference_kwargs=inference_kwargs
        )
        self._epoch_means.offer(output)
        return output.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Validate with draws of its own, so that how often it is done does not change the fit.

        They are the same in every epoch, which the bounds of epochs can thus be compared by.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            super().validation_step(batch, batch_idx)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, LossOutput]:
        """Run the module and add the divergences of the global latents to its loss."""
        inference_outputs, generative_outputs, local = super().forward(*args, **kwargs)
        if self.training:
            self.module.observe(inference_outputs)
        terms = self._global_divergences() or {"kl_global": torch.zeros_like(local.loss)}
        kl_global = torch.stack(list(terms.values())).sum()
        loss = local.loss + self.kl_global_weight * kl_global / self.n_obs_training
        self._surplus = 0.0
        if self.training and (factor := self._pulse) != 1:
            # What the pulse adds is no divergence for the guard.
            share = self.kl_weight * (1 - 1 / factor) / local.n_obs_minibatch
            self._surplus = share * local.kl_local_sum.detach()
        # Detached: the graph of the last minibatch must not outlive its step.
        self._last_terms = {
            "reconstruction loss": local.reconstruction_loss_sum.detach(),
            "KL divergence of the basal state": local.kl_local_sum.detach(),
            "KL divergence of masks and embeddings": kl_global.detach(),
        }
        return (
            inference_outputs,
            generative_outputs,
            replace(local, loss=loss, kl_global=terms, kl_global_sum=None),
        )

    def _global_divergences(self) -> dict[str, Tensor]:
        """The global terms; those of effects do not change between closed-form updates."""
        effects = self.module.effects
        if effects is None or self.module.closed_form is None:
            return self.module.global_divergences()
        if self._global_terms is None:
            with torch.no_grad():
                self._global_terms = effects.kl()
        return self.module.global_divergences(self._global_terms)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to a multiple of the running mean norm; skip the step if it is not finite."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.clipping(parameters)

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Say what the processes of a distributed training need not send at every step."""
        leave_globals_alone(self, self.module)

    def on_fit_start(self) -> None:
        """Give every process noise of its own; one process keeps the stream of its seed."""
        seed_own_noise(settings.seed, self.global_rank)

    def on_train_start(self) -> None:
        """Read what the module must know of the training cells before the first step."""
        self._n_steps = int(self.trainer.estimated_stepping_batches)
        module, effects = self.module, self.module.effects
        if self.global_step == 0:
            self._warm_start = effects is not None and effects.masks_on
            self._trained_before = module.initialized
        if effects is None or not effects.is_frozen:  # else their bound stays as it is
            module.n_training_cells = self.n_obs_training
        if not module.initialized:
            initialize_from(self.trainer.train_dataloader, module, self.n_initialization_cells)
        kl_warmup, mask_warmup = default_warmups(
            module.counts_per_cell, module.closed_form is not None
        )
        if self.kl_warmup_fraction is None:
            self.kl_warmup_fraction = kl_warmup
        if self.mask_warmup_fraction is None:
            self.mask_warmup_fraction = mask_warmup
        if self.kl_pulse is None:
            # A curve of doses would take up the bend that the pulse takes from the decoder.
            prunes = module.closed_form is not None and module.dose_response is None
            self.kl_pulse = default_pulse(module.counts_per_cell, prunes)
        if module.closed_form is not None:
            module.closed_form.resume(effects)  # type: ignore[arg-type]
        self._updates = GlobalUpdates(
            module,
            every=self.global_update_every,
            mask_warmup_fraction=self.mask_warmup_fraction,
            seed=settings.seed or 0,
        )
        self.judge_every = 1 if self.device.type == "cpu" else _JUDGE_EVERY
        self._global_terms = None
        equalise_globals(module)
        if self._missed_by_plateau is not None:
            self.lr_schedulers().step(self._missed_by_plateau)
            self._missed_by_plateau = None
        self._let_statistics_wait(n_processes() > 1)
        self.guard.keep(module, self._optimizer)

    def on_train_end(self) -> None:
        """Let the last cells that the processes saw into the running statistics."""
        pool_statistics(self.module)
        self._let_statistics_wait(False)
        broken = [n for n, p in self.module.named_parameters() if not p.isfinite().all()]
        if broken or (self._n_steps > 0 and self.guard.n_healthy == 0):
            raise TrainingDivergedError(
                (f"{' and '.join(broken[:3])} hold values that are not finite. " if broken else "")
                + "Training ended without a healthy state: try a smaller learning rate "
                f"(plan_kwargs={{'lr': {self.lr / 4:.2g}}})."
            )
        if self._updates is not None:
            self._updates.finish()
            self._global_terms = None

    def on_after_backward(self) -> None:
        """Leave the known perturbations of a query as they are."""
        if self.module.effects is not None and self.module.effects.is_query:
            self.module.drop_frozen_gradients()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the prior of the networks' weights, while it lasts."""
        if self._trained_before or self.weight_precision == 0:
            return
        networks = self.module.encoder, self.module.decoder
        # The loss is a mean over cells, of which the prior is given once.
        precision = self.weight_precision * (1 - self.progress) / self.n_obs_training
        for network in networks:
            for parameter in network.parameters():
                if parameter.dim() == 2 and parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=precision)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Guard against divergence, then update the global latents if it is time."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        # The mean, so that all processes decide alike.
        self._losses.append(mean_over_processes(loss.detach() - self._surplus))
        step, updates = self.global_step, self._updates
        is_due = updates is not None and updates.is_due(step, self._n_steps)
        # Validation, and what is logged, are of a module that was judged.
        is_last = self.trainer.is_last_batch or step == self._n_steps
        if len(self._losses) < self.judge_every and not is_due and not is_last:
            return
        if self._is_healthy() and updates is not None and is_due:
            updates.update(step, self._n_steps)
            self._global_terms = None

    def _is_healthy(self) -> bool:
        """Judge the last steps; keep what they led to, or go back."""
        losses, self._losses = torch.stack(self._losses).tolist(), []
        for loss in losses:
            if self.guard.is_divergent(loss):
                self._epoch_means.drop()
                self._restart(loss)
                return False
        self._epoch_means.accept()
        # Before an update, so that a restart undoes one that went wrong.
        self.guard.keep(self.module, self._optimizer)
        return True

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch and the state of the global latents."""
        means = self._epoch_means.read(self.n_obs_training)
        for name, value in means.items():
            self.log(name, value, prog_bar=name == "train_loss", sync_dist=self.use_sync_dist)
        if means:
            self.log("kl_weight", self.kl_weight, sync_dist=self.use_sync_dist)
        if self.module.effects is None:
            return
        with torch.no_grad():
            terms = self._global_divergences()
        for name, value in (terms | summarise_globals(self.module.effects)).items():
            self.log(name, value, on_step=False, on_epoch=True, sync_dist=self.use_sync_dist)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run must know."""
        checkpoint["sams_training"] = {
            "n_restarts": self.n_restarts,
            "warm_start": self._warm_start,
            "trained_before": self._trained_before,
            "gradient_norm": float(self.clipping.mean_norm),
            "guard": self.guard.state_dict(),
            "random_state": torch.get_rng_state(),
            "training_cells": self._training_cells(),
            "unsaved_buffers": dict(self._unsaved_buffers()),
            "missed_by_plateau": self._next_of_plateau(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was written, with the random numbers that came next there.

        A checkpoint of the end of an epoch thus leads, on a CPU, to the bits of the unbroken fit.
        """
        state = checkpoint["sams_training"]
        self.n_restarts = state["n_restarts"]
        self._warm_start = state["warm_start"]
        self._trained_before = state["trained_before"]
        self.clipping.mean_norm = state["gradient_norm"]
        self.guard.load_state_dict(state["guard"])
        self._missed_by_plateau = state.get("missed_by_plateau")
        found = state.get("unsaved_buffers", {})
        for name, buffer in self._unsaved_buffers():
            if name in found:
                buffer.copy_(found[name])
        then, now = state.get("training_cells"), self._training_cells()
        if then is not None and now is not None and not torch.equal(then, now):
            warnings.warn(
                f"{int((~torch.isin(now, then)).sum())} of {len(now)} training cells are not "
                "those of the checkpoint: what was trained on then is held out now. Set "
                "scvi.settings.seed to what it was then, or give the cells "
                "(datasplitter_kwargs={'external_indexing': [...]}).",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )
        # Those of 0.1.0 have none; several processes would all draw the noise of the first.
        if "random_state" in state and n_processes() == 1:
            torch.set_rng_state(state["random_state"])

    def _unsaved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What the module holds in training, and model files leave out."""
        saved = self.module.state_dict()
        return ((n, b) for n, b in self.module.named_buffers() if n not in saved)

    def _next_of_plateau(self) -> float | None:
        """What the scheduler of a plateau is still to be told of an epoch that is over.

        Lightning steps it after all that may write a checkpoint, and not again on resuming.
        """
        progress = self.trainer.fit_loop.epoch_progress.current
        found = self.trainer.callback_metrics.get(self.lr_scheduler_metric)
        if not self.reduce_lr_on_plateau or found is None:
            return None
        return float(found) if progress.processed > progress.completed else None

    def _training_cells(self) -> Tensor | None:
        """Positions of the training cells, unless the minibatches come from elsewhere."""
        indices = getattr(getattr(self.trainer, "datamodule", None), "train_idx", None)
        return None if indices is None else torch.as_tensor(indices).sort().values

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)

    def _let_statistics_wait(self, waits: bool) -> None:
        """Let this process keep what it sees aside until all pool it, or no longer."""
        if self.module.closed_form is not None:
            self.module.closed_form.statistics.waits = waits
            self.module.closed_form.statistics.drop_sums()

    def _restart(self, loss: float) -> None:
        """Go back to the last healthy state with half the learning rate."""
        found = describe_divergence(loss, self._last_terms)
        where = f"epoch {self.current_epoch + 1} (step {self.global_step})"
        if self.n_restarts == _MAX_RESTARTS:
            raise TrainingDivergedError(
                f"Training diverged in {where}: {found}, after {_MAX_RESTARTS} restarts with "
                f"smaller learning rates. Try a smaller learning rate "
                f"(plan_kwargs={{'lr': {self.lr / 4:.2g}}}), the residual guide "
                "(basal_posterior='residual'), or look for cells with extreme counts."
            )
        self.guard.restore(self.module, self._optimizer)
        self._let_statistics_wait(n_processes() > 1)  # drops what diverged steps saw
        self.n_restarts += 1
        if self.reduce_lr_on_plateau:  # otherwise the schedule does it
            for group in self._optimizer.param_groups:
                group["lr"] *= 0.5
        self._global_terms = None
        warnings.warn(
            f"Training diverged in {where}: {found}. Restored the last healthy state and halved "
            "the learning rate.",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
