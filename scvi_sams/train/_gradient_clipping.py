"""Gradients clipped to what their norms have been."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["AdaptiveClipping"]

_MEMORY = 0.98


class AdaptiveClipping:
    """Clip gradients to a multiple of the running mean of their norm.

    Parameters
    ----------
    factor
        The multiple.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.mean_norm = math.nan

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Clip in place, or drop gradients that are not finite, so that the step is skipped."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
            return
        value = norm.item()
        if math.isnan(self.mean_norm):
            self.mean_norm = value
        limit = self.factor * self.mean_norm
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        self.mean_norm += (1 - _MEMORY) * (min(value, limit) - self.mean_norm)
