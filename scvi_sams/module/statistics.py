"""Sufficient statistics of the perturbation effects, kept as running averages."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.doses import DosageEntries
    from scvi_sams.module.networks import Potential

__all__ = ["PendingStatistics", "RunningStatistics"]


class PendingStatistics(NamedTuple):
    """Sums over the cells that one process saw since the processes last pooled theirs.

    Sums of several processes add up; ``max_per_cell`` is the largest of theirs.
    """

    pull: Tensor
    others: Tensor
    curvature: Tensor
    n_occurrences: Tensor
    basal_pull: Tensor
    basal_gain: Tensor
    n_batch_cells: Tensor
    n_cells: Tensor
    max_per_cell: Tensor

    @property
    def sums(self) -> list[Tensor]:
        """What is to be added up over processes."""
        return list(self[:-1])


class RunningStatistics(nn.Module):
    """Sufficient statistics of the perturbation effects, averaged over recent cells.

    With the guide ``Normal(g (f - shift), v)`` the bound is quadratic in the shift: a cell with
    dose d of perturbation t contributes ``d g (f - others)`` to the score of the effect of t and
    ``d**2 g`` to its curvature, ``others`` being the shift of the cell's other perturbations.
    Averages forget over as many cells as the perturbation has, so that they follow the encoder;
    no cell is cached, memory is three numbers a perturbation and latent.

    The same is kept for the basal mean of each batch, from ``g (f - shift)`` and ``g``.

    Where several processes train together, each :meth:`defer` its cells: they are summed in
    :attr:`pending`, and enter the averages as if they were one minibatch by
    :meth:`absorb_pending`, once the sums of all processes have been added up.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of the effects.
    n_batch
        Number of batches.
    """

    pending: PendingStatistics | None

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
        self.pending = None

    @torch.no_grad()
    def defer(self, deferred: bool = True) -> None:
        """Keep the cells that follow aside, or no longer; what is pending is dropped.

        Parameters
        ----------
        deferred
            Whether cells wait for :meth:`absorb_pending`.
        """
        self.pending = None
        if deferred:
            self.pending = PendingStatistics(
                pull=torch.zeros_like(self.pull),
                others=torch.zeros_like(self.others),
                curvature=torch.zeros_like(self.curvature),
                n_occurrences=torch.zeros_like(self.n_occurrences),
                basal_pull=torch.zeros_like(self.basal_pull),
                basal_gain=torch.zeros_like(self.basal_gain),
                n_batch_cells=torch.zeros_like(self.basal_weight, dtype=torch.int64),
                n_cells=torch.zeros_like(self.n_cells_seen),
                max_per_cell=torch.ones_like(self.max_per_cell),
            )

    @torch.no_grad()
    def absorb_pending(self, n_training_cells: int) -> None:
        """Take the pending cells into the averages, as one minibatch.

        Parameters
        ----------
        n_training_cells
            Number of training cells.

        Raises
        ------
        ValueError
            If cells are not deferred.
        """
        pending = self.pending
        if pending is None:
            raise ValueError("No cells are pending: call defer() before they are observed.")
        self.defer()
        self.n_cells_seen += pending.n_cells
        self.max_per_cell.copy_(torch.maximum(self.max_per_cell, pending.max_per_cell))
        rows = pending.n_occurrences[:, 0].nonzero()[:, 0]
        self._absorb(
            rows,
            pending.n_occurrences[rows],
            [pending.pull[rows], pending.others[rows], pending.curvature[rows]],
            n_training_cells,
        )
        rows = pending.n_batch_cells[:, 0].nonzero()[:, 0]
        self._absorb_basal(
            rows,
            pending.n_batch_cells[rows],
            [pending.basal_pull[rows], pending.basal_gain[rows]],
            n_training_cells,
        )

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
        n_cells_seen = self.n_cells_seen
        if self.pending is not None:
            pending = self.pending.n_occurrences
            occurrences = occurrences + (pending if rows is None else pending[rows])
            n_cells_seen = n_cells_seen + self.pending.n_cells
        share = occurrences.double() / n_cells_seen.clamp(min=1)
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
        (self.n_cells_seen if self.pending is None else self.pending.n_cells).add_(entries.n_cells)
        if len(entries.cell) == 0:
            return
        gain, location = _gain(potential)[entries.cell], potential.location[entries.cell]
        dose = entries.dose.unsqueeze(1).to(gain.dtype)
        rows, index, count = entries.perturbation.unique(return_inverse=True, return_counts=True)
        per_cell = torch.bincount(entries.cell, minlength=1).max()
        max_per_cell = (self if self.pending is None else self.pending).max_per_cell
        max_per_cell.copy_(torch.maximum(max_per_cell, per_cell))
        weighted_gain = dose * gain
        totals = [
            values.new_zeros(len(rows), values.shape[1]).index_add_(0, index, values)
            for values in (
                weighted_gain * location,
                weighted_gain * (shift[entries.cell] - dose * effects),
                weighted_gain * dose,
            )
        ]
        count = count.unsqueeze(1)
        if self.pending is None:
            self._absorb(rows, count, totals, n_training_cells)
            return
        self.pending.n_occurrences[rows] += count
        for pending, total in zip(self.pending[:3], totals, strict=True):
            pending[rows] += total

    def _absorb(
        self, rows: Tensor, count: Tensor, totals: list[Tensor], n_training_cells: int
    ) -> None:
        """Take the sums over some cells of perturbations into their averages."""
        self.n_occurrences[rows] += count
        count = count.to(self.pull.dtype)
        memory = self.n_cells(n_training_cells, rows).clamp(min=1)
        weight = self.weight[rows] * torch.exp(-count / memory) + count
        self.weight[rows] = weight
        averages = (self.pull, self.others, self.curvature)
        for average, total in zip(averages, totals, strict=True):
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
        count = count.unsqueeze(1)
        gain = information * _gain(potential)
        totals = [
            torch.zeros_like(self.basal_pull[rows]).index_add_(0, index, values)
            for values in (gain * (potential.location - shift), gain)
        ]
        if self.pending is None:
            self._absorb_basal(rows, count, totals, n_training_cells)
            return
        self.pending.n_batch_cells[rows] += count
        self.pending.basal_pull[rows] += totals[0]
        self.pending.basal_gain[rows] += totals[1]

    def _absorb_basal(
        self, rows: Tensor, count: Tensor, totals: list[Tensor], n_training_cells: int
    ) -> None:
        """Take the sums over some cells of batches into their averages."""
        count = count.to(self.basal_weight.dtype)
        weight = self.basal_weight[rows] * torch.exp(-count / n_training_cells) + count
        self.basal_weight[rows] = weight
        for average, total in zip((self.basal_pull, self.basal_gain), totals, strict=True):
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
