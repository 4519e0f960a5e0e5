"""What the cells say about each perturbation, kept as running averages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._functional import DosageEntries
    from scvi_sams.module._networks import Potential

__all__ = ["RunningStatistics"]


class RunningStatistics(nn.Module):
    """Sufficient statistics of the perturbation effects, averaged over recent cells.

    With the guide ``Normal(g (f - shift), v)`` the bound is quadratic in the shift: a cell with
    dose d of perturbation t contributes ``d g (f - others)`` to the score of the effect of t and
    ``d**2 g`` to its curvature, ``others`` being the shift of the cell's other perturbations.
    Averages forget over as many cells as the perturbation has, so that they follow the encoder;
    no cell is cached, memory is three numbers a perturbation and latent.

    The same is kept for the basal mean of each batch, from ``g (f - shift)`` and ``g``.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of the effects.
    n_batch
        Number of batches.
    """

    basal_pull: Tensor
    basal_gain: Tensor
    basal_weight: Tensor
    pull: Tensor
    others: Tensor
    curvature: Tensor
    weight: Tensor
    n_occurrences: Tensor
    n_cells_seen: Tensor
    max_per_cell: Tensor

    def __init__(self, n_perturbations: int, n_latent: int, n_batch: int = 1) -> None:
        super().__init__()
        self.register_buffer("basal_pull", torch.zeros(n_batch, n_latent))
        self.register_buffer("basal_gain", torch.zeros(n_batch, n_latent))
        self.register_buffer("basal_weight", torch.zeros(n_batch, 1))
        shape = (n_perturbations, n_latent)
        self.register_buffer("pull", torch.zeros(shape))  # mean of d g f
        self.register_buffer("others", torch.zeros(shape))  # mean of d g (shift of the others)
        self.register_buffer("curvature", torch.zeros(shape))  # mean of d^2 g
        self.register_buffer("weight", torch.zeros(n_perturbations, 1))
        # Counted in integers: float32 stops counting at 16 million.
        self.register_buffer("n_occurrences", torch.zeros(n_perturbations, 1, dtype=torch.int64))
        self.register_buffer("n_cells_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("max_per_cell", torch.ones((), dtype=torch.int64))

    def n_cells(self, n_training_cells: int, rows: Tensor | None = None) -> Tensor:
        """Number of training cells of perturbations, extrapolated during the first epoch.

        Parameters
        ----------
        n_training_cells
            Number of training cells.
        rows
            Perturbations, shape ``(n_rows,)``; all by default. A step asks for those of its
            minibatch only, so that it costs the same however many there are.

        Returns
        -------
        Shape ``(n_rows, 1)``.
        """
        occurrences = self.n_occurrences if rows is None else self.n_occurrences[rows]
        share = occurrences.double() / self.n_cells_seen.clamp(min=1)
        return (share * n_training_cells).to(self.pull.dtype)

    @torch.no_grad()
    def observe(
        self,
        entries: DosageEntries,
        potential: Potential,
        shift: Tensor,
        effects: Tensor,
        n_training_cells: int,
    ) -> None:
        """Add the cells of a minibatch.

        Parameters
        ----------
        entries
            Their non-zero doses.
        potential
            Their potentials, network frame.
        shift
            Their expected shifts, network frame, shape ``(n_cells, n_latent)``.
        effects
            Expected effects of the perturbations of ``entries``, network frame, shape
            ``(n_entries, n_latent)``.
        n_training_cells
            Number of training cells.
        """
        self.n_cells_seen += entries.n_cells
        if len(entries.cell) == 0:
            return
        gain, location = _gain(potential)[entries.cell], potential.location[entries.cell]
        dose = entries.dose.unsqueeze(1).to(gain.dtype)
        rows, index, count = entries.perturbation.unique(return_inverse=True, return_counts=True)
        self.n_occurrences[rows] += count.unsqueeze(1)
        per_cell = torch.bincount(entries.cell, minlength=1).max()
        self.max_per_cell.copy_(torch.maximum(self.max_per_cell, per_cell))

        count = count.unsqueeze(1).to(gain.dtype)
        memory = self.n_cells(n_training_cells, rows).clamp(min=1)
        weight = self.weight[rows] * torch.exp(-count / memory) + count
        self.weight[rows] = weight
        weighted_gain = dose * gain
        for average, values in (
            (self.pull, weighted_gain * location),
            (self.others, weighted_gain * (shift[entries.cell] - dose * effects)),
            (self.curvature, weighted_gain * dose),
        ):
            total = values.new_zeros(len(rows), values.shape[1]).index_add_(0, index, values)
            average[rows] += (total - count * average[rows]) / weight

    @torch.no_grad()
    def observe_basal(
        self,
        batch_index: Tensor,
        potential: Potential,
        shift: Tensor,
        information: Tensor,
        n_training_cells: int,
    ) -> None:
        """Add the cells of a minibatch to the basal means of their batches.

        Parameters
        ----------
        batch_index
            Batch of each cell, shape ``(n_cells,)``.
        potential
            Their potentials, network frame, not centred.
        shift
            Their expected shifts, network frame, shape ``(n_cells, n_latent)``.
        information
            How much each cell tells of the basal mean, shape ``(n_cells, 1)``.
        n_training_cells
            Number of training cells.
        """
        rows, index, count = batch_index.unique(return_inverse=True, return_counts=True)
        count = count.unsqueeze(1).to(shift.dtype)
        weight = self.basal_weight[rows] * torch.exp(-count / n_training_cells) + count
        self.basal_weight[rows] = weight
        gain = information * _gain(potential)
        for average, values in (
            (self.basal_pull, gain * (potential.location - shift)),
            (self.basal_gain, gain),
        ):
            total = torch.zeros_like(average[rows]).index_add_(0, index, values)
            average[rows] += (total - count * average[rows]) / weight

    def basal_mean(self) -> Tensor:
        """Mean basal state of each batch under a standard normal prior for it.

        Returns
        -------
        Network frame, shape ``(n_batch, n_latent)``; zero for a batch that was not seen.
        """
        return self.basal_pull / (self.basal_gain + 1 / self.basal_weight.clamp(min=1))

    def score_and_curvature(self, effects: Tensor, n_training_cells: int) -> tuple[Tensor, Tensor]:
        """Gradient and curvature of the bound of all training cells, at the given effects.

        Parameters
        ----------
        effects
            Expected effects, network frame, shape ``(n_perturbations, n_latent)``.
        n_training_cells
            Number of training cells.

        Returns
        -------
        Score and diagonal curvature, each of shape ``(n_perturbations, n_latent)``.
        """
        n_cells = self.n_cells(n_training_cells)
        score = n_cells * (self.pull - self.others - self.curvature * effects)
        return score, n_cells * self.curvature


def _gain(potential: Potential) -> Tensor:
    if potential.gain is None:
        raise ValueError("A guide without a gain says nothing of the shift in closed form.")
    return potential.gain
