"""Draws of what all cells share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from scvi_sams.module._dose_response import HillDraws

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GlobalDraws"]


class GlobalDraws(NamedTuple):
    """Draws from the posterior of perturbations, the same for every cell.

    Attributes
    ----------
    n_samples
        Number of draws.
    effects
        Latent effects of perturbations (and pairs), shape ``(n_samples, n_rows, n_latent)``.
    rows
        Which perturbations (and pairs) those are, sorted, shape ``(n_rows,)``.
    direct
        Log fold changes of target genes, shape ``(n_samples, n_perturbations)``.
    hill
        Parameters of dose responses, each of shape ``(n_samples, n_perturbations)``.
    """

    n_samples: int
    effects: Tensor | None = None
    rows: Tensor | None = None
    direct: Tensor | None = None
    hill: HillDraws | None = None

    def of_rows(self, rows: Tensor) -> Tensor:
        """Effects of perturbations or pairs, shape ``(n_samples, len(rows), n_latent)``."""
        if self.effects is None or self.rows is None:
            raise ValueError("These draws hold no effects.")
        return self.effects[:, torch.searchsorted(self.rows, rows)]

    def subset(self, start: int, stop: int) -> GlobalDraws:
        """Some of the draws."""
        kept = slice(start, stop)
        return GlobalDraws(
            len(range(*kept.indices(self.n_samples))),
            None if self.effects is None else self.effects[kept],
            self.rows,
            None if self.direct is None else self.direct[kept],
            None if self.hill is None else HillDraws(*(field[kept] for field in self.hill)),
        )
