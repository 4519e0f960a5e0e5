"""Masks, effects and frame: their updates between the steps of the networks, their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_sams.train.distributed import equalise_globals, pool_statistics
from scvi_sams.train.schedules import share_done

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module import PerturbationEffects, PerturbationVAEModule

__all__ = ["is_query", "summarise_globals", "update_globals"]


def is_query(module: PerturbationVAEModule) -> bool:
    """Whether some perturbations are known from a reference and stay as they are."""
    return module.effects is not None and bool(module.effects.frozen.any())


def update_globals(
    module: PerturbationVAEModule,
    *,
    step: int,
    n_steps: int,
    every: int,
    mask_warmup_fraction: float,
    seed: int,
) -> bool:
    """Switch the masks on, or update the global latents, if it is time.

    Parameters
    ----------
    module
        The module in training.
    step, n_steps
        Steps done, and steps in all.
    every
        Steps between two updates.
    mask_warmup_fraction
        Share of the steps after which the masks are switched on.
    seed
        Of the rotation's random starts, which must not shift the noise of the cells.

    Returns
    -------
    bool
        Whether anything was updated.
    """
    effects, closed_form = module.effects, module.closed_form
    if effects is None or bool(effects.frozen.all()):
        return False
    n_cells = int(module.n_training_cells)
    has_masks = bool(effects.masks_on)
    # The last step takes in what was seen since the last update.
    is_due = (step == n_steps and has_masks) or step % every == 0
    switches_on = not has_masks and share_done(step, n_steps) >= mask_warmup_fraction
    if not (is_due or switches_on):
        return False
    pool_statistics(module, n_cells)
    if closed_form is not None and is_due and not is_query(module):
        closed_form.centre()
    if switches_on and closed_form is None:
        effects.masks_on.fill_(True)
    elif switches_on and closed_form is not None:
        closed_form.switch_on(effects, n_cells, torch.Generator().manual_seed(seed))
    elif has_masks and closed_form is not None:
        closed_form.update(effects, n_cells)
    elif has_masks:
        effects.update_mask_prior()
    equalise_globals(module)
    return True


@torch.no_grad()
def summarise_globals(effects: PerturbationEffects) -> dict[str, Tensor]:
    """Share of masks on, latents that any perturbation moves, and the scale of the background."""
    on = effects.mask_probability() > 0.5
    return {
        "mask_density": on.float().mean(),
        "n_active_latents": on.any(0).float().sum(),
        "spike_scale": effects.spike_variance.sqrt(),
    }
