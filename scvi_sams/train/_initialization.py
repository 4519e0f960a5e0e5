"""What a module must know of the training cells before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS

from scvi_sams.train._processes import add_over_processes, largest_over_processes, n_processes

if TYPE_CHECKING:
    from scvi_sams.module import PerturbationVAEModule

__all__ = ["initialize_from"]


@torch.no_grad()
def initialize_from(dataloader: Any, module: PerturbationVAEModule, n_cells: int) -> None:
    """Initialise a module from the first training cells that a loader gives.

    Where several processes train together, each reads its part of these cells.
    """
    total = input_total = input_squares = library_total = largest_share = torch.zeros(())
    n_read = 0
    n_own_cells = -(-n_cells // n_processes())
    for batch in dataloader:
        counts = batch[REGISTRY_KEYS.X_KEY]
        counts = (counts if counts.layout == torch.strided else counts.to_dense()).double()
        inputs = torch.log1p(counts) if module.is_count_model else counts
        total = total + counts.sum(0)
        input_total = input_total + inputs.sum(0)
        input_squares = input_squares + inputs.square().sum(0)
        if module.use_size_factor_key:
            library = batch[REGISTRY_KEYS.SIZE_FACTOR_KEY].double().flatten()
            library_total = library_total + library.sum()
            largest_share = torch.maximum(largest_share, (counts.sum(1) / library).max())
        n_read += len(counts)
        if n_read >= n_own_cells:
            break
    if n_processes() > 1:
        read = total.new_tensor(n_read)
        library_total, largest_share = library_total.to(total), largest_share.to(total)
        add_over_processes([read, total, input_total, input_squares, library_total])
        largest_over_processes(largest_share)
        n_read = int(read)
    input_mean = input_total / n_read
    variance = (input_squares / n_read - input_mean.square()).clamp(min=0)
    libraries = (library_total / n_read, largest_share) if module.use_size_factor_key else ()
    module.initialize(total / n_read, input_mean, variance.sqrt(), *libraries)
