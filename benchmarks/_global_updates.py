"""Seconds of the closed-form steps against latents and perturbations, on sparse effects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks._speed import clock
from scvi_sams.module import SAMSVAEModule

__all__ = ["time_global_updates"]

_N_CELLS = 100  # of each perturbation
_N_UPDATES = 5


def time_global_updates(n_latent: int, n_perturbations: int, seed: int = 0) -> dict[str, Any]:
    """Time the frame as the masks come on, one update in training, and the end of a fit.

    Statistics are those of cells whose effects are sparse on axes that are turned against the
    networks', one latent in twenty and at least one, two standard deviations large.

    Parameters
    ----------
    n_latent, n_perturbations
        Sizes of the problem.
    seed
        Of the effects and of the starts of the frame.

    Returns
    -------
    dict
        Processor seconds, and the masks that are on at the end, over those that are true.
    """
    generator = torch.Generator().manual_seed(seed)
    module = SAMSVAEModule(10, n_perturbations, n_hidden=8, n_latent=n_latent)
    shape = (n_perturbations, n_latent)
    mask = torch.rand(shape, generator=generator) < 0.05
    mask[torch.arange(n_perturbations), torch.arange(n_perturbations) % n_latent] = True
    turn = torch.linalg.qr(torch.randn(n_latent, n_latent, generator=generator))[0]
    effects = (2 * mask * torch.randn(shape, generator=generator).sign()) @ turn
    gain = 0.7 + 0.1 * torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator) * (gain / _N_CELLS).sqrt()
    statistics, solver = module.closed_form.statistics, module.closed_form
    statistics.linear.copy_(gain * effects + noise)
    statistics.curvature.copy_(gain)
    statistics.n_together.fill_(1)
    statistics.weight.fill_(_N_CELLS)
    statistics.n_occurrences.fill_(_N_CELLS)
    statistics.n_cells_seen.fill_(_N_CELLS * n_perturbations)
    n_cells = _N_CELLS * n_perturbations

    def seconds(step: Any) -> float:
        start = clock("cpu")
        step()
        return clock("cpu") - start

    found = {"switch on": seconds(lambda: solver.switch_on(module.effects, n_cells, generator))}
    updates = [seconds(lambda: solver.update(module.effects, n_cells)) for _ in range(_N_UPDATES)]
    found["an update"] = float(np.median(updates))
    found["settle"] = seconds(lambda: solver.settle(module.effects, n_cells, generator))
    on = (module.effects.mask_probability() > 0.5).sum()
    return {f"{name}, seconds": value for name, value in found.items()} | {
        "masks on / true": float(on / mask.sum())
    }
