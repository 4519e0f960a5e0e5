"""Pairs of perturbations with an effect of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_sams.module._functional import DosageEntries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PairInteractions"]


class PairInteractions(nn.Module):
    r"""Lists a measured pair as one more perturbation of the cells that have both of its parts.

    The shift of a cell becomes :math:`\sum_t d_t \, m_t e_t + \sum_{ab} d_a d_b \, m_{ab} e_{ab}`
    over the pairs given here. A pair has a row of effects after those of the perturbations, and
    its dose is the product of the doses, so that inference of sparse effects serves it unchanged.

    Parameters
    ----------
    n_perturbations
        Number of perturbations.
    pairs
        Two perturbations each, different ones.

    Examples
    --------
    >>> from scvi_sams.module._functional import dosage_entries
    >>> interactions = PairInteractions(3, [(0, 2)])
    >>> entries = interactions(dosage_entries(torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])))
    >>> entries.perturbation
    tensor([0, 2, 0, 1, 3])
    >>> entries.dose
    tensor([1.0000, 0.5000, 1.0000, 1.0000, 0.5000])
    """

    codes: Tensor

    def __init__(self, n_perturbations: int, pairs: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        ordered = [(min(pair), max(pair)) for pair in pairs]
        if len(set(ordered)) < len(ordered) or any(a == b for a, b in ordered):
            raise ValueError("Pairs must be distinct and of two different perturbations.")
        self.pairs = sorted(ordered)
        codes = [first * n_perturbations + second for first, second in self.pairs]
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.long), persistent=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def forward(self, entries: DosageEntries) -> DosageEntries:
        """Append the pairs of each cell to its doses, which are in row order."""
        if len(self.pairs) == 0 or len(entries.cell) < 2:
            return entries
        cells, rows, doses = [entries.cell], [entries.perturbation], [entries.dose]
        lag = 1
        while lag < len(entries.cell):
            same_cell = entries.cell[lag:] == entries.cell[:-lag]
            if not same_cell.any():
                break
            left = torch.where(same_cell)[0]
            right = left + lag
            a, b = entries.perturbation[left], entries.perturbation[right]
            code = torch.minimum(a, b) * self.n_perturbations + torch.maximum(a, b)
            place = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
            known = self.codes[place] == code
            cells.append(entries.cell[left][known])
            rows.append(self.n_perturbations + place[known])
            doses.append((entries.dose[..., left] * entries.dose[..., right])[..., known])
            lag += 1
        return DosageEntries(
            torch.cat(cells), torch.cat(rows), torch.cat(doses, -1), entries.n_cells
        )
