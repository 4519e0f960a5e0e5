"""What the cells of each donor say of effects, and effects of an average donor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, counted, listed
from scvi_sams.model.read_outs import require_effects
from scvi_sams.module.closed_form import MAX_LOGIT
from scvi_sams.module.donors import SCALES, AcrossDonors, across_donors, of_average_donor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scvi_sams.model.samsvae import SAMSVAE

__all__ = ["effects_across_donors"]

_CELLS_AT_ONCE = 1024


@torch.inference_mode()
def effects_across_donors(model: SAMSVAE, donor_key: str) -> AcrossDonors:
    """Effects of an average donor, the networks and how cells are read being as they were trained.

    The model's own log-odds, means and variances are changed by what the spread between donors
    changes, so that without a spread they stay what they are. Rows are those of the effects.

    Parameters
    ----------
    model
        A trained model with its AnnData.
    donor_key
        Column of ``adata.obs``: what is a sample of its own, a donor or a replicate.

    Raises
    ------
    NotImplementedError
        If effects were not learned in closed form.
    ScreenError
        If the model has no AnnData, or the column is not there, has gaps, or is one donor's.
    """
    effects, closed_form = require_effects(model, "donor_key"), model.module.closed_form
    if closed_form is None:
        raise NotImplementedError(
            "donor_key: effects of donors take closed-form inference "
            "(global_inference='closed_form', the default of SAMSVAE and CPAVAE)."
        )
    score, curvature = _by_donor(model, _donors(model, donor_key))
    rotation = effects.rotation
    mean, _ = effects.moments()
    moved = effects.to_network(mean)
    n, n_deviations = effects.n_perturbations, effects.n_deviations
    if n_deviations > 0:  # what cells say of shared part or deviation is of the sum of the two
        by_context = (len(score), n, -1, score.shape[-1])
        deviation = (curvature * moved)[:, -n_deviations:].view(by_context).sum(2)
        shared = moved[:n].repeat_interleave(n_deviations // n, 0)
        score[:, -n_deviations:] -= curvature[:, -n_deviations:] * shared
        score[:, :n] -= deviation
    score = (score - curvature * moved) @ rotation.T
    curvature = curvature @ rotation.T.square()
    score = score + curvature * mean
    prior = closed_form._prior(effects)
    prior["mask_prior_logit"] = prior["mask_prior_logit"].clamp(-1e6, 1e6)  # of given masks
    found = across_donors(
        score,
        curvature,
        reference=_of_other_contexts(curvature, n, n_deviations) if n_deviations > 0 else None,
        **prior,
    )
    ignored = across_donors(
        score,
        curvature,
        weights=torch.tensor([1.0] + [0.0] * (len(SCALES) - 1)),
        **prior,
    )
    slab_mean, slab_variance = effects.slab_moments()
    return AcrossDonors(
        effects.mask_log_odds() + _bounded(found.log_odds) - _bounded(ignored.log_odds),
        slab_mean + found.slab_mean - ignored.slab_mean,
        slab_variance * found.slab_variance / ignored.slab_variance,
        found.spread,
        found.weights,
    )


def _bounded(log_odds: Tensor) -> Tensor:
    return log_odds.clamp(-MAX_LOGIT, MAX_LOGIT)


def _donors(model: SAMSVAE, donor_key: str) -> NDArray[np.int64]:
    """Donor of each cell, by number."""
    if model.adata is None:
        raise ScreenError(
            "donor_key: the model was loaded without its AnnData; give it to load()."
        )
    if donor_key not in model.adata.obs:
        raise ScreenError(
            f"donor_key: adata.obs has no column {donor_key!r}; there are "
            f"{listed(list(model.adata.obs), 20)}."
        )
    column = model.adata.obs[donor_key]
    if n_gaps := int(column.isna().sum()):
        raise ScreenError(
            f"donor_key: {counted(n_gaps, 'cell')} have no donor in adata.obs[{donor_key!r}]; "
            "name them or leave them out."
        )
    donors, codes = np.unique(column.astype(str), return_inverse=True)
    if len(donors) < 2:
        raise ScreenError(
            f"donor_key: adata.obs[{donor_key!r}] is {donors[0]!r} in all cells, and a spread "
            "takes two donors or more."
        )
    return codes


def _by_donor(model: SAMSVAE, donor: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Score at no effect and curvature of each effect, donors x rows x network dimensions.

    States are those about the mean basal state of the donor (in the context), from all its cells.
    """
    module, n_contexts = model.module, model.module.n_contexts
    n_rows, n_latent = module.effects.n_rows, module.n_latent
    n_groups = (int(donor.max()) + 1) * n_contexts
    score, linear, curvature = torch.zeros(3, n_groups * n_rows, n_latent, dtype=torch.float64)
    basal, gains = torch.zeros(2, n_groups, n_latent, dtype=torch.float64)
    cells = np.sort(np.asarray(model.train_indices))
    start = 0
    loader = model._make_data_loader(model.adata, indices=cells, batch_size=_CELLS_AT_ONCE)
    for tensors in loader:
        outputs = module.inference(**module._get_inference_input(tensors))
        doses, potential = outputs["doses"], outputs["potential"]
        effect, shift = outputs["effect_of_dose"], outputs["shift_mean"]
        n_cells = len(tensors[REGISTRY_KEYS.X_KEY])
        group = torch.as_tensor(donor[cells[start : start + n_cells]]) * n_contexts
        if n_contexts > 1:
            group = group + tensors[SAMS_REGISTRY_KEYS.CONTEXT_KEY].squeeze(1).long().cpu()
        start += n_cells
        gain, location = potential.gain, potential.location
        dose = doses.dose.unsqueeze(-1).to(gain.dtype)
        weight = dose * gain.unsqueeze(1)
        left = location.unsqueeze(1) - shift.unsqueeze(1) + dose * effect
        rows = (group.unsqueeze(1) * n_rows + doses.perturbation.cpu()).flatten()
        for total, values in (
            (score, weight * left),
            (linear, weight),
            (curvature, weight * dose),
        ):
            total.index_add_(0, rows, values.flatten(0, 1).double().cpu())
        for total, values in ((basal, gain * (location - shift)), (gains, gain)):
            total.index_add_(0, group, values.double().cpu())
    score, linear, curvature = (
        total.view(n_groups, n_rows, n_latent) for total in (score, linear, curvature)
    )
    score = score - linear * (basal / gains.clamp(min=1e-9)).unsqueeze(1)
    device, dtype = module.effects.rotation.device, module.effects.rotation.dtype
    return tuple(
        total.view(-1, n_contexts, n_rows, n_latent).sum(1).to(device, dtype)
        for total in (score, curvature)
    )


def _of_other_contexts(curvature: Tensor, n: int, n_deviations: int) -> Tensor:
    """At each scale, curvature of the effect of a perturbation in the other contexts.

    Infinite for what is no deviation: nothing is added to it.
    """
    n_rows, n_latent = curvature.shape[1:]
    found = curvature.new_full((len(SCALES), n_rows, n_latent), torch.inf, dtype=torch.float64)
    of_deviations = curvature[:, -n_deviations:].double()
    for number, scale in enumerate(SCALES):
        _, precision = of_average_donor(of_deviations, of_deviations, scale)
        precision = precision.view(n, -1, n_latent)
        others = precision.sum(1, keepdim=True) - precision
        found[number, -n_deviations:] = others.flatten(0, 1)
    return found
