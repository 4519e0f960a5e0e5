"""What the processes of a distributed training must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

from scvi_sams._compat import ignore_buffers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from scvi_sams.module.base import PerturbationVAEModule


def n_processes() -> int:
    """Processes that train one model together; 1 outside of distributed training."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def seed_own_noise(seed: int | None, rank: int) -> None:
    """Give each of several processes noise of its own; one keeps the stream of its seed."""
    if n_processes() > 1:
        torch.manual_seed((torch.initial_seed() if seed is None else seed) + rank)


@torch.no_grad()
def add_over_processes(tensors: Iterable[Tensor], *, largest: bool = False) -> None:
    """Replace each tensor by its sum, or elementwise maximum, over all processes, in place."""
    if n_processes() > 1:
        for tensor in tensors:
            distributed.all_reduce(
                tensor, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
            )


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, the same bits in each."""
    if n_processes() == 1:
        return value
    mean = value.detach().clone()
    add_over_processes([mean])
    return mean / n_processes()


def pool_statistics(module: PerturbationVAEModule) -> None:
    """Let the cells that each process saw enter the running statistics of all."""
    if module.closed_form is not None and module.closed_form.statistics.waits:
        add_over_processes(module.closed_form.statistics.sums)
        module.closed_form.statistics.absorb(module.n_training_cells)


@torch.no_grad()
def equalise_globals(module: PerturbationVAEModule) -> None:
    """Give every process the masks, effects, rotation and statistics of the first.

    Each computes the same from the same sums, but different processors may round differently.
    """
    if n_processes() > 1:
        for part in _global_parts(module):
            for tensor in (*part.parameters(), *part.buffers()):
                distributed.broadcast(tensor, src=0)


def leave_globals_alone(plan: torch.nn.Module, module: PerturbationVAEModule) -> None:
    """Keep torch from sending the global latents to every process at every step.

    They change only at a global update, and are sent then (:func:`equalise_globals`).
    """
    shared = {id(buffer) for part in _global_parts(module) for buffer in part.buffers()}
    ignore_buffers(plan, [n for n, buffer in plan.named_buffers() if id(buffer) in shared])


def _global_parts(module: PerturbationVAEModule) -> list[torch.nn.Module]:
    return [part for part in (module.effects, module.closed_form) if part is not None]
