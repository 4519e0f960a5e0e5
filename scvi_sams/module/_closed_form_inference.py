"""Inference of masks, effects and frame from running statistics, without gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_sams.module._closed_form import (
    SpikeSlab,
    learned_spike_variance,
    procrustes,
    selection_penalty,
    sparse_rotation,
    spike_slab,
)
from scvi_sams.module._running_statistics import RunningStatistics
from scvi_sams.module._threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._functional import DosageEntries
    from scvi_sams.module._networks import Potential
    from scvi_sams.module._perturbation_effects import PerturbationEffects

__all__ = ["ClosedFormInference"]

_MAX_DAMPING = 0.7
_MAX_RELATIVE_WEIGHT = 2.0  # a perturbation with very many cells must not set the rotation alone
_SWITCH_ON_LOGIT = 8.0  # masks start on and are pruned
_SWITCH_ON_SWEEPS = 15


class ClosedFormInference(nn.Module):
    """Coordinate ascent over masks, effects and frame.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of the effects.
    n_batch
        Number of batches.
    mask_evidence_cells
        Evidence for a mask saturates at this many cells; ``None`` for no limit. An effect must
        stand out from a background of standard deviation ``mask_evidence_cells ** -0.5`` (in
        units of the basal standard deviation) to be called a mechanism.
    """

    basal_mean: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        *,
        n_batch: int = 1,
        mask_evidence_cells: float | None = 30.0,
    ) -> None:
        super().__init__()
        self.mask_floor_variance = 1 / mask_evidence_cells if mask_evidence_cells else 0.0
        self.statistics = RunningStatistics(n_perturbations, n_latent, n_batch)
        self.register_buffer("basal_mean", torch.zeros(n_batch, n_latent))

    @torch.no_grad()
    def observe(
        self,
        effects: PerturbationEffects,
        entries: DosageEntries,
        potential: Potential,
        shift: Tensor,
        batch_index: Tensor,
        n_training_cells: int,
    ) -> None:
        """Add the cells of a minibatch.

        Parameters
        ----------
        effects
            Posterior of the effects.
        entries
            Non-zero doses of the cells.
        potential
            Potentials of the cells, network frame, centred at the basal mean of their batch.
        shift
            Expected shifts of the cells, network frame.
        batch_index
            Batch of each cell, shape ``(n_cells,)``.
        n_training_cells
            Number of training cells.
        """
        mean, _ = effects.moments(entries.perturbation)
        of_entries = mean @ effects.frame
        statistics = self.statistics
        statistics.observe(entries, potential, shift, of_entries, n_training_cells)
        location = potential.location + self.basal_mean[batch_index]
        statistics.observe_basal(
            batch_index,
            potential._replace(location=location),
            shift,
            self._basal_information(effects, entries, n_training_cells),
            n_training_cells,
        )

    def _basal_information(
        self, effects: PerturbationEffects, entries: DosageEntries, n_training_cells: int
    ) -> Tensor:
        """How much each cell tells of the basal mean.

        All cells of a perturbation whose effect could be anything within its prior tell no more
        than one draw from that prior.

        Returns
        -------
        Between zero and one, shape ``(n_cells, 1)``.
        """
        rows = entries.perturbation
        n_cells = self.statistics.n_cells(n_training_cells, rows)[:, 0]
        prior_variance = effects.embedding_variance * effects.mask_prior.mean().mean()
        information = n_cells.new_ones(entries.n_cells)
        of_entries = 1 / (1 + n_cells * prior_variance)
        return information.scatter_reduce_(0, entries.cell, of_entries, "amin").unsqueeze(1)

    @torch.no_grad()
    @one_thread()
    def centre(self) -> None:
        """Move the basal means to where the cells are.

        An exact reparametrisation of the decoder. Without it an offset of the encoder, which costs
        little, looks like a shift that all perturbations share.
        """
        self.basal_mean.copy_(self.statistics.basal_mean())

    @torch.no_grad()
    @one_thread()
    def switch_on(
        self,
        effects: PerturbationEffects,
        n_training_cells: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start the masks after the warm-up: rotate dense shifts to sparse ones, then prune."""
        score, curvature, mean = self._statistics(effects, n_training_cells)
        shifts = (score + curvature * (mean @ effects.frame)) / (
            curvature + 1 / effects.embedding_variance
        )
        if effects.sparse:
            weight = curvature.mean(1, keepdim=True)
            weight = (weight / weight.mean()).sqrt().clamp(max=_MAX_RELATIVE_WEIGHT)
            rotation = sparse_rotation(shifts * weight, generator=generator)
            effects.frame.copy_(rotation.T)
            shifts = shifts @ rotation
        effects.slab_mean.copy_(shifts)
        effects.mask_logits.fill_(_SWITCH_ON_LOGIT)
        effects.masks_on.fill_(True)
        self.update(effects, n_training_cells, n_sweeps=_SWITCH_ON_SWEEPS)

    @torch.no_grad()
    @one_thread()
    def update(
        self, effects: PerturbationEffects, n_training_cells: int, n_sweeps: int = 1
    ) -> None:
        """Update frame, masks and effects from the statistics, damped.

        All perturbations move at once, so cells with several of them need a smaller step. The
        frame stays if the effects are dense, where it means nothing, or some are frozen.
        """
        free_frame = effects.sparse and not bool(effects.frozen.any())
        n_together = int(self.statistics.max_per_cell)
        damping = min(_MAX_DAMPING, 1 / n_together) if n_together > 2 else _MAX_DAMPING
        for _ in range(n_sweeps):
            if free_frame:
                _align_frame(effects, *self._statistics(effects, n_training_cells))
            score, curvature, mean = self._statistics(effects, n_training_cells)
            curvature = curvature @ effects.frame.T.square()
            log_on, log_off = effects.log_mask_prior()
            posterior = spike_slab(
                score @ effects.frame.T + curvature * mean,
                curvature,
                mask_prior_logit=log_on - log_off,
                embedding_variance=effects.embedding_variance,
                spike_variance=effects.background_variance(),
                mask_floor_variance=self.mask_floor_variance,
            )
            effects.assign(posterior, damping)
            if self.mask_floor_variance > 0:
                penalty = selection_penalty(
                    effects.mask_logits - effects.selection_penalty,
                    curvature,
                    embedding_variance=effects.embedding_variance,
                    mask_floor_variance=self.mask_floor_variance,
                )
                effects.selection_penalty.copy_(
                    torch.where(effects.frozen, effects.selection_penalty, penalty)
                )
            effects.update_mask_prior()
            if effects.learn_spike_scale and free_frame:
                of_perturbations = SpikeSlab(
                    *(field[: effects.n_perturbations] for field in effects.posterior)
                )
                effects.spike_variance.copy_(learned_spike_variance(of_perturbations))

    def _statistics(
        self, effects: PerturbationEffects, n_training_cells: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score and curvature in the network frame, expected effects in that of the masks."""
        mean, _ = effects.moments()
        score, curvature = self.statistics.score_and_curvature(
            mean @ effects.frame, n_training_cells
        )
        return score, curvature, mean


def _align_frame(
    effects: PerturbationEffects, score: Tensor, curvature: Tensor, mean: Tensor
) -> None:
    """Turn the frame so that the sparse effects explain the shifts that the cells show."""
    q = effects.posterior
    sparse = torch.sigmoid(q.mask_logits) * q.slab_mean
    weight = curvature.mean(1, keepdim=True)
    shown = score / curvature.clamp(min=1e-3) + mean @ effects.frame
    # The small multiple of the old frame decides for latents that no perturbation uses.
    effects.frame.copy_(procrustes((sparse * weight).T @ shown + 1e-6 * effects.frame))
