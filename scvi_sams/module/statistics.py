"""Sufficient statistics of the perturbation effects, kept as running averages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.doses import Doses
    from scvi_sams.module.networks import Potential


class RunningStatistics(nn.Module):
    """Sufficient statistics of the perturbation effects, averaged over recent cells.

    With the guide ``Normal(g (f - shift), v)`` the bound is quadratic in the shift: a cell with
    dose d of perturbation t contributes ``d g (f - others)`` to the score of the effect of t and
    ``d**2 g`` to its curvature, ``others`` being the shift of the cell's other perturbations.
    Averages forget over as many cells as the perturbation has, so that they follow the encoder;
    no cell is cached, memory is six numbers a perturbation and latent.

    The same is kept for the basal mean of each batch, from ``g (f - shift)`` and ``g``.

    What cells add is summed, then taken into the averages: at once, or by :meth:`absorb` after
    the sums of several processes that train together have been added up, as if all had seen one
    minibatch.

    Parameters
    ----------
    n_rows, n_latent
        Shape of the effects.
    n_batch
        Number of batches.

    Attributes
    ----------
    waits
        Whether the sums wait for :meth:`absorb`.
    n_together
        Mean number of perturbations of the cells that have one, shape ``(n_rows, 1)``.
    """

    linear: Tensor
    others: Tensor
    curvature: Tensor
    n_together: Tensor
    weight: Tensor
    n_occurrences: Tensor
    n_cells_seen: Tensor
    basal_linear: Tensor
    basal_gain: Tensor
    basal_weight: Tensor

    def __init__(self, n_rows: int, n_latent: int, n_batch: int = 1) -> None:
        super().__init__()
        self.waits = False
        shape = (n_rows, n_latent)
        self.register_buffer("linear", torch.zeros(shape))  # mean of d g f
        self.register_buffer("others", torch.zeros(shape))  # mean of d g (shift of the others)
        self.register_buffer("curvature", torch.zeros(shape))  # mean of d^2 g
        self.register_buffer("n_together", torch.zeros(n_rows, 1))
        self.register_buffer("weight", torch.zeros(n_rows, 1))
        # Counted in integers: float32 stops counting at 16 million.
        self.register_buffer("n_occurrences", torch.zeros(n_rows, 1, dtype=torch.int64))
        self.register_buffer("n_cells_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("basal_linear", torch.zeros(n_batch, n_latent))
        self.register_buffer("basal_gain", torch.zeros(n_batch, n_latent))
        self.register_buffer("basal_weight", torch.zeros(n_batch, 1))
        for name, average in self._averages().items():
            self.register_buffer(f"sum_of_{name}", torch.zeros_like(average), persistent=False)
        for name, counter in (
            ("occurrences", self.n_occurrences),
            ("cells", self.n_cells_seen),
            ("batch_cells", torch.zeros(n_batch, 1, dtype=torch.int64)),
        ):
            self.register_buffer(f"sum_of_{name}", torch.zeros_like(counter), persistent=False)

    def _averages(self) -> dict[str, Tensor]:
        names = ("linear", "others", "curvature", "n_together", "basal_linear", "basal_gain")
        return {name: getattr(self, name) for name in names}

    def _sum(self, name: str) -> Tensor:
        return getattr(self, f"sum_of_{name}")

    @property
    def sums(self) -> list[Tensor]:
        """What waits for :meth:`absorb`; those of several processes add up."""
        return [sums for name, sums in self.named_buffers() if name.startswith("sum_of_")]

    def drop_sums(self) -> None:
        """Forget what waits."""
        for sums in self.sums:
            sums.zero_()

    def n_cells(self, n_training_cells: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Number of training cells of rows, extrapolated during the first epoch.

        Shape ``(*rows.shape, 1)``.
        """
        occurrences = self.n_occurrences[rows] + self._sum("occurrences")[rows]
        n_cells_seen = self.n_cells_seen + self._sum("cells")
        share = occurrences.double() / n_cells_seen.clamp(min=1)
        return (share * n_training_cells).to(self.linear.dtype)

    @torch.no_grad()
    def observe(
        self,
        doses: Doses,
        potential: Potential,
        shift: Tensor,
        effects: Tensor,
        n_training_cells: int,
    ) -> None:
        """Add the cells of a minibatch.

        Parameters
        ----------
        doses
            Doses of the cells.
        potential
            Potentials of the cells, networks' coordinates.
        shift
            Expected shifts of the cells, shape ``(n_cells, n_latent)``.
        effects
            Expected effect of each dose, shape ``(n_cells, n_columns, n_latent)``.
        n_training_cells
            Number of training cells.
        """
        rows, dose = doses.perturbation.flatten(), doses.dose.unsqueeze(-1)
        gain = _gain(potential).unsqueeze(1)
        dose = dose.to(gain.dtype)
        weighted_gain = dose * gain
        present = doses.dose > 0
        n_together = (present * present.sum(-1, keepdim=True)).unsqueeze(-1).to(gain.dtype)
        for name, values in (
            ("linear", weighted_gain * potential.location.unsqueeze(1)),
            ("others", weighted_gain * (shift.unsqueeze(1) - dose * effects)),
            ("curvature", weighted_gain * dose),
            ("n_together", n_together),
            ("occurrences", present.unsqueeze(-1).to(torch.int64)),
        ):
            self._sum(name).index_add_(0, rows, values.flatten(0, 1))
        self._sum("cells").add_(len(shift))
        if not self.waits:
            self._absorb_cells()
            self._absorb_rows(rows, n_training_cells)

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
        potential, shift
            Potentials, not centred at the basal mean, and expected shifts.
        information
            Weight of each cell, shape ``(n_cells, 1)``.
        n_training_cells
            Number of training cells.
        """
        gain = information * _gain(potential)
        for name, values in (
            ("basal_linear", gain * (potential.location - shift)),
            ("basal_gain", gain),
            ("batch_cells", torch.ones_like(batch_index).unsqueeze(1)),
        ):
            self._sum(name).index_add_(0, batch_index, values)
        if not self.waits:
            self._absorb_batches(n_training_cells)

    @torch.no_grad()
    def absorb(self, n_training_cells: int) -> None:
        """Take the sums that wait into the averages."""
        self._absorb_cells()
        self._absorb_rows(slice(None), n_training_cells)
        self._absorb_batches(n_training_cells)

    def _absorb_cells(self) -> None:
        self.n_cells_seen += self._sum("cells")
        self._sum("cells").zero_()

    def _absorb_rows(self, rows: Tensor | slice, n_training_cells: int) -> None:
        """Take the sums of rows into their averages; a row that is named twice is taken once."""
        count = self._sum("occurrences")[rows]
        n_cells = self.n_cells(n_training_cells, rows)
        self.n_occurrences[rows] = self.n_occurrences[rows] + count
        names = ("linear", "others", "curvature", "n_together")
        self._average(names, rows, count, n_cells, self.weight)
        for name in (*names, "occurrences"):
            self._sum(name)[rows] = 0

    def _absorb_batches(self, n_training_cells: int) -> None:
        count = self._sum("batch_cells")
        names = ("basal_linear", "basal_gain")
        memory = torch.full_like(self.basal_weight, n_training_cells)
        self._average(names, slice(None), count, memory, self.basal_weight)
        for name in (*names, "batch_cells"):
            self._sum(name).zero_()

    def _average(
        self,
        names: tuple[str, ...],
        rows: Tensor | slice,
        count: Tensor,
        memory: Tensor,
        weights: Tensor,
    ) -> None:
        """Move averages towards the sums of `count` cells, forgetting over `memory` cells."""
        count = count.to(weights.dtype)
        weight = weights[rows] * torch.exp(-count / memory.clamp(min=1)) + count
        weights[rows] = weight
        for name in names:
            average = getattr(self, name)
            # Rows without a cell have a weight of any size, and nothing to add.
            change = (self._sum(name)[rows] - count * average[rows]) / weight.clamp(min=1)
            average[rows] = average[rows] + change

    def basal_mean(self) -> Tensor:
        """Mean basal state of each batch under a standard normal prior for it.

        Shape ``(n_batch, n_latent)``.
        """
        return self.basal_linear / (self.basal_gain + 1 / self.basal_weight.clamp(min=1))

    def score_and_curvature(self, effects: Tensor, n_training_cells: int) -> tuple[Tensor, Tensor]:
        """Gradient and curvature of the bound of all training cells, at the given effects.

        Parameters
        ----------
        effects
            Effects, shape ``(n_rows, n_latent)``.
        n_training_cells
            Number of training cells.

        Returns
        -------
        tuple of Tensor
            Each of the shape of the effects.
        """
        n_cells = self.n_cells(n_training_cells)
        score = n_cells * (self.linear - self.others - self.curvature * effects)
        return score, n_cells * self.curvature


def _gain(potential: Potential) -> Tensor:
    if potential.gain is None:
        raise ValueError("A guide without a gain says nothing of the shift in closed form.")
    return potential.gain
