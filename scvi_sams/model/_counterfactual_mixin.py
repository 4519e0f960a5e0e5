"""The same basal states under different conditions, draw by draw of what is uncertain."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_sams.model._prediction_mixin import PredictionMixin
from scvi_sams.module.likelihood import expected_expression, expected_log_normalized_expression

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scipy import sparse

    from scvi_sams.module.base import CellPopulation, GlobalDraws
    from scvi_sams.module.likelihood import Observation

    Statistic = Callable[[Observation, torch.Tensor], torch.Tensor]

__all__ = ["CounterfactualMixin"]

COUNTS_PER = 1e4
_MAX_DECODED_ELEMENTS = 20_000_000


class CounterfactualMixin(PredictionMixin):
    """Steps that effects, gene programmes, differential expression, distances and pairs share."""

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Draw from a seed of its own, and leave the state of all generators as it was."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _expression_scale(self, px: Observation, library: torch.Tensor) -> torch.Tensor:
        """Expression on the scale of effects: log2 of normalised counts, or features."""
        if self.module.is_count_model:
            return expected_log_normalized_expression(px, library, COUNTS_PER)
        return expected_expression(px)

    @property
    def _expression_units(self) -> str:
        if self.module.is_count_model:
            return f"log2(1 + {COUNTS_PER:.0f} x / library)"
        return "units of the features"

    def _population_means(
        self,
        population: CellPopulation,
        dosage: sparse.csr_matrix,
        row: int,
        draws: GlobalDraws,
        statistic: Statistic | None = None,
    ) -> np.ndarray:
        """Mean over a population under one condition, draws x genes (one row if all are alike)."""
        statistic = self._expression_scale if statistic is None else statistic
        # Without a perturbation, or a posterior, all draws are the same.
        is_certain = dosage[row].nnz == 0 or self.module.effects is None
        n_draws = 1 if is_certain else draws.n_samples
        doses = self._doses(dosage, row)
        n_elements = len(population.basal) * self.summary_stats.n_vars
        n_at_once = max(1, _MAX_DECODED_ELEMENTS // n_elements)
        means = []
        for start in range(0, n_draws, n_at_once):
            drawn = draws.subset(start, min(start + n_at_once, n_draws))
            px = self.module.decode_condition(population, doses, drawn)
            means.append(statistic(px, population.library).mean(1))
        return np.asarray(torch.cat(means).cpu().numpy())
