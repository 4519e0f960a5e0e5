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

__all__ = ["GlobalUpdates", "infer_effects", "summarise_globals"]

_QUERY_SWEEPS = 10  # after each pass over the cells of a query, whose networks stay as they are


class GlobalUpdates:
    """Updates of the global latents between the steps of the networks.

    Parameters
    ----------
    module
        The module in training.
    every
        Steps between two updates.
    mask_warmup_fraction
        Share of the steps after which the masks are switched on.
    seed
        Of the rotation's random starts, which must not shift the noise of the cells.
    """

    def __init__(
        self,
        module: PerturbationVAEModule,
        *,
        every: int,
        mask_warmup_fraction: float,
        seed: int,
    ) -> None:
        self.module = module
        self.every = every
        self.mask_warmup_fraction = mask_warmup_fraction
        self.seed = seed

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
        module = self.module
        effects, closed_form = module.effects, module.closed_form
        if effects is None:
            return
        pool_statistics(module)
        if closed_form is None:
            if self._switches_on(step, n_steps):
                effects.masks_on = True
            elif effects.masks_on:
                effects.update_mask_prior()
        else:
            solved: SpikeAndSlab = effects  # type: ignore[assignment]
            if self._is_periodic(step, n_steps) and not effects.is_query:
                closed_form.centre(solved, module.n_training_cells)
            if self._switches_on(step, n_steps):
                generator = torch.Generator().manual_seed(self.seed)
                closed_form.switch_on(solved, module.n_training_cells, generator)
            elif effects.masks_on:
                closed_form.update(solved, module.n_training_cells)
        equalise_globals(module)

    def finish(self) -> None:
        """Settle masks, effects and the order of latents, once the networks are trained."""
        module = self.module
        if module.closed_form is not None:
            solved: SpikeAndSlab = module.effects  # type: ignore[assignment]
            generator = torch.Generator().manual_seed(self.seed)
            module.closed_form.settle(solved, module.n_training_cells, generator)
            equalise_globals(module)


@torch.no_grad()
def infer_effects(module: PerturbationVAEModule, dataloader: Any, n_passes: int) -> None:
    """Infer masks and effects of new perturbations, with every network as it is.

    Parameters
    ----------
    module
        Module of a query, by closed form.
    dataloader
        Minibatches of the cells of the query.
    n_passes
        Passes over them.
    """
    module.eval()
    effects: SpikeAndSlab = module.effects  # type: ignore[assignment]
    for _ in track(range(n_passes), description="Infer effects"):
        for tensors in dataloader:
            module.observe(module.inference(**module._get_inference_input(tensors)))
        module.closed_form.share(effects, module.n_training_cells)  # type: ignore[union-attr]
        module.closed_form.update(  # type: ignore[union-attr]
            effects, module.n_training_cells, n_sweeps=_QUERY_SWEEPS
        )


@torch.no_grad()
def summarise_globals(effects: EffectsPosterior) -> dict[str, Tensor]:
    """Share of masks on, latents that any perturbation moves, and the scale of the background."""
    on = effects.mask_probability() > 0.5
    summary = {"mask_density": on.float().mean(), "n_active_latents": on.any(0).float().sum()}
    background = getattr(effects, "background_variance", None)
    return summary if background is None else summary | {"background_scale": background.sqrt()}
