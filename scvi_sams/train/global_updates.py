"""The driver of masks, effects and rotation: when they are updated, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.utils import track

from scvi_sams.train.distributed import equalise_globals, pool_statistics
from scvi_sams.train.schedules import share_done

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.base import PerturbationVAEModule
    from scvi_sams.module.posteriors import EffectsPosterior, SpikeAndSlab

_QUERY_SWEEPS = 10  # after each pass over the cells of a query, whose networks stay as they are


class GlobalUpdates:
    """Updates of the global latents between the steps of the networks, every so many of them."""

    def __init__(
        self, module: PerturbationVAEModule, *, every: int, mask_warmup_fraction: float, seed: int
    ) -> None:
        self.module, self.every, self.mask_warmup_fraction = module, every, mask_warmup_fraction
        self.seed = seed  # of the rotation's random starts, which must not shift the cells' noise

    def is_due(self, step: int, n_steps: int) -> bool:
        """Whether there is anything to do after `step` of `n_steps` steps."""
        effects = self.module.effects
        if effects is None or effects.is_frozen:
            return False
        return self._is_periodic(step, n_steps) or self._switches_on(step, n_steps)

    def _is_periodic(self, step: int, n_steps: int) -> bool:
        # The last step takes in what was seen since the last update.
        is_last = step == n_steps and self.module.effects.masks_on  # type: ignore[union-attr]
        return is_last or step % self.every == 0

    def _switches_on(self, step: int, n_steps: int) -> bool:
        masks_on = self.module.effects.masks_on  # type: ignore[union-attr]
        return not masks_on and share_done(step, n_steps) >= self.mask_warmup_fraction

    def update(self, step: int, n_steps: int) -> None:
        """Switch the masks on, or update the global latents, whichever is due."""
        module, n_cells = self.module, self.module.n_training_cells
        effects, closed_form = module.effects, module.closed_form
        if effects is None:
            return
        pool_statistics(module)
        switches_on = self._switches_on(step, n_steps)
        if closed_form is None:
            if switches_on:
                effects.masks_on = True
            elif effects.masks_on:
                effects.update_mask_prior()
        else:
            solved: SpikeAndSlab = effects  # type: ignore[assignment]
            if self._is_periodic(step, n_steps) and not effects.is_query:
                closed_form.centre(solved, n_cells)
            if switches_on:
                closed_form.switch_on(solved, n_cells, self._generator())
            elif effects.masks_on:
                closed_form.update(solved, n_cells)
        equalise_globals(module)

    def finish(self) -> None:
        """Settle masks, effects and the order of latents, once the networks are trained."""
        module = self.module
        if module.closed_form is not None:
            solved: SpikeAndSlab = module.effects  # type: ignore[assignment]
            module.closed_form.settle(solved, module.n_training_cells, self._generator())
            equalise_globals(module)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@torch.no_grad()
def infer_effects(module: PerturbationVAEModule, dataloader: Any, n_passes: int) -> None:
    """Infer masks and effects of new perturbations, with every network as it is.

    For a query by closed form, from so many passes over its minibatches.
    """
    module.eval()
    effects: SpikeAndSlab = module.effects  # type: ignore[assignment]
    solver: Any = module.closed_form
    for _ in track(range(n_passes), description="Infer effects"):
        for tensors in dataloader:
            module.observe(module.inference(**module._get_inference_input(tensors)))
        solver.share(effects, module.n_training_cells)
        solver.update(effects, module.n_training_cells, n_sweeps=_QUERY_SWEEPS)


@torch.no_grad()
def summarise_globals(effects: EffectsPosterior) -> dict[str, Tensor]:
    """Share of masks on, latents that any perturbation moves, and the scale of the background."""
    on = effects.mask_probability() > 0.5
    summary = {"mask_density": on.float().mean(), "n_active_latents": on.any(0).float().sum()}
    background = getattr(effects, "background_variance", None)
    return summary if background is None else summary | {"background_scale": background.sqrt()}
