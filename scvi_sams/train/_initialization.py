"""What a module must know of the training cells before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS

if TYPE_CHECKING:
    from scvi_sams.module import SAMSVAEModule

__all__ = ["initialize_from"]


@torch.no_grad()
def initialize_from(dataloader: Any, module: SAMSVAEModule, n_cells: int) -> None:
    """Initialise a module from the first training cells that a loader gives."""
    total = log_total = log_squares = torch.zeros(())
    n_read = 0
    for batch in dataloader:
        counts = batch[REGISTRY_KEYS.X_KEY]
        counts = (counts if counts.layout == torch.strided else counts.to_dense()).double()
        log_counts = torch.log1p(counts)
        total = total + counts.sum(0)
        log_total = log_total + log_counts.sum(0)
        log_squares = log_squares + log_counts.square().sum(0)
        n_read += len(counts)
        if n_read >= n_cells:
            break
    log_mean = log_total / n_read
    variance = (log_squares / n_read - log_mean.square()).clamp(min=0)
    module.initialize(total / n_read, log_mean, variance.sqrt())
