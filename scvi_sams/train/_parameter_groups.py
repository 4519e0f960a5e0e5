"""Parameters by what their optimiser must know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scvi_sams.module import PerturbationVAEModule

__all__ = ["parameter_groups"]


def parameter_groups(module: PerturbationVAEModule, global_lr: float) -> list[dict[str, Any]]:
    """Networks, and a second group of global latents where gradients train these.

    Parameters
    ----------
    module
        The module to train.
    global_lr
        Learning rate of the global latents. They are never decayed: their priors do that.
    """
    shared = {id(parameter) for parameter in module.global_parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trainable if id(p) not in shared]}]
    if len(groups[0]["params"]) < len(trainable):
        latents = [p for p in trainable if id(p) in shared]
        groups.append({"params": latents, "lr": global_lr, "weight_decay": 0.0})
    return groups
