"""Divergence of the posterior of masks and embeddings from their prior."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_sams.module._functional import kl_bernoulli_log_prior, kl_centred_normal

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._closed_form import SpikeSlab
    from scvi_sams.module._perturbation_effects import PerturbationEffects

__all__ = ["effects_divergence"]

_MAX_DIVERGENCE_ROWS = 1_024  # a step costs the same however many perturbations there are


def effects_divergence(effects: PerturbationEffects, temperature: float) -> dict[str, Tensor]:
    """Divergences of masks, and of effects given masks, in nats.

    See :meth:`~scvi_sams.module.PerturbationEffects.kl_divergence`.

    Parameters
    ----------
    effects
        Posterior and prior.
    temperature
        Temperature of the relaxed draws of masks, for the correlated posterior.

    Returns
    -------
    ``"kl_mask"`` and ``"kl_embedding"``, scalars.
    """
    if not effects.masks_on:
        zero = effects.slab_mean.new_zeros(())
        return {"kl_mask": zero, "kl_embedding": zero}
    rows, weight = None, 1.0
    if effects.trainable and effects.training and effects.n_rows > _MAX_DIVERGENCE_ROWS:
        device = effects.slab_mean.device
        rows = torch.randint(effects.n_rows, (_MAX_DIVERGENCE_ROWS,), device=device)
        weight = effects.n_rows / _MAX_DIVERGENCE_ROWS
    q = effects._rows(rows)
    on = effects._inclusion(q.mask_logits, rows)
    log_on, log_off = effects.log_mask_prior(rows)
    is_given, log_off = log_off.isinf(), log_off.clamp(min=-1e6)
    kl_mask = kl_bernoulli_log_prior(q.mask_logits, log_on, log_off)
    if not effects.sparse:  # masks of perturbations are given, those of pairs are not
        kl_mask = torch.where(is_given, 0.0, kl_mask)
    return {
        "kl_mask": weight * kl_mask.sum() + effects.mask_prior.kl_probability(),
        "kl_embedding": weight * _kl_embedding(effects, q, on, rows, temperature).sum(),
    }


def _kl_embedding(
    effects: PerturbationEffects,
    q: SpikeSlab,
    on: Tensor,
    rows: Tensor | None,
    temperature: float,
) -> Tensor:
    """Divergence of each effect given the masks, shape ``(n_rows, n_latent)``."""
    if effects.posterior_family == "point":
        return torch.zeros_like(q.slab_mean)
    if effects.correlated is not None:
        index = torch.arange(effects.n_rows, device=on.device) if rows is None else rows
        masks = effects._relaxed_masks(q.mask_logits, index, temperature)
        moments = effects._embedding_given(q, masks, index)
        return kl_centred_normal(*moments, effects.embedding_variance)
    if effects.posterior_family == "mean_field":
        return kl_centred_normal(q.slab_mean, q.slab_variance, effects.embedding_variance)
    background = effects.background_variance()
    if rows is not None and background.dim() > 0:
        background = background[rows]
    kl_slab = kl_centred_normal(
        q.slab_mean, q.slab_variance, effects.embedding_variance + background
    )
    if not effects.spike_variance > 0:
        return on * kl_slab
    kl_spike = kl_centred_normal(q.spike_mean, q.spike_variance, background.clamp(min=1e-30))
    return on * kl_slab + (1 - on) * torch.where(background > 0, kl_spike, 0.0)
