"""What the cells of each donor say of effects, and effects of an average donor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._arguments import checked
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, counted
from scvi_sams.data.conditions import obs_column
from scvi_sams.model.read_outs import require_effects
from scvi_sams.module.closed_form import MAX_LOGIT
from scvi_sams.module.donors import SCALES, AcrossDonors, across_donors, of_average_donor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scvi_sams.model.samsvae import SAMSVAE


_CELLS_AT_ONCE = 1024
_LEAST_PAIRED = 0.25  # of what donors tell, for each to be held against itself


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
    first = effects.n_rows - n_deviations
    # A spread of effects is one thing, that of differences between contexts another.
    parts: list[tuple[slice, Tensor, Tensor, Tensor | None]]
    parts = [(slice(first), score[:, :first], curvature[:, :first], None)]
    if n_deviations > 0:
        of_deviations = [
            values[..., first:, :].unflatten(-2, (n, -1)) for values in (score, curvature, mean)
        ]
        parts.append((slice(first, effects.n_rows), *_contrasts(*of_deviations)))
    changes = [
        _change(score, curvature, reference, _of_rows(prior, rows, effects.n_rows))
        for rows, score, curvature, reference in parts
    ]
    log_odds, slab_mean, variance_ratio, spread = (
        torch.cat(values) for values in zip(*changes, strict=True)
    )
    own_mean, own_variance = effects.slab_moments()
    return AcrossDonors(
        effects.mask_log_odds() + log_odds,
        own_mean + slab_mean,
        own_variance * variance_ratio,
        spread,
    )


def _change(
    score: Tensor, curvature: Tensor, reference: Tensor | None, prior: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What a spread changes of log-odds, mean and (as a factor) variance, and the spread."""
    found = across_donors(score, curvature, reference=reference, **prior)
    none = torch.tensor([1.0] + [0.0] * (len(SCALES) - 1))
    ignored = across_donors(score, curvature, weights=none, **prior)
    return (
        # That less is known brings masks that are off nearer to their prior; nothing is called
        # for that.
        (_bounded(found.log_odds) - _bounded(ignored.log_odds)).clamp(max=0),
        found.slab_mean - ignored.slab_mean,
        found.slab_variance / ignored.slab_variance,
        found.spread,
    )


def _of_rows(prior: dict[str, Any], rows: slice, n_rows: int) -> dict[str, Any]:
    """The prior of some rows."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and len(value) == n_rows else value
        for name, value in prior.items()
    }


def _contrasts(score: Tensor, curvature: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score and curvature of differences from the other contexts, and the curvature of those.

    Where donors are in several contexts each is held against itself, and what it shows in all of
    them is no difference; else donors of the other contexts add their spread.

    Parameters
    ----------
    score, curvature
        Of deviations, shape ``(n_donors, n_perturbations, n_contexts, n_latent)``.
    mean
        Expected deviations, shape ``(n_perturbations, n_contexts, n_latent)``.
    """
    left = score - curvature * mean
    left_of_others = left.sum(2, keepdim=True) - left
    others = curvature.sum(2, keepdim=True) - curvature
    both = (curvature + others).clamp(min=1e-12)
    paired = curvature * others / both
    is_paired = paired.sum(0) > _LEAST_PAIRED * curvature.sum(0)
    reference = torch.stack(
        [of_average_donor(curvature, curvature, scale)[1].double() for scale in SCALES]
    )
    reference = reference.sum(2, keepdim=True) - reference
    reference = torch.where(is_paired, torch.inf, reference)  # nothing is added to it
    held_against = (others * score - curvature * left_of_others) / both
    return (
        torch.where(is_paired, held_against, score).flatten(1, 2),
        torch.where(is_paired, paired, curvature).flatten(1, 2),
        reference.flatten(1, 2),
    )


def _bounded(log_odds: Tensor) -> Tensor:
    return log_odds.clamp(-MAX_LOGIT, MAX_LOGIT)


def _donors(model: SAMSVAE, donor_key: str) -> NDArray[np.int64]:
    """Donor of each cell, by number."""
    if model.adata is None:
        raise ScreenError(
            "donor_key: the model was loaded without its AnnData; give it to load()."
        )
    column = obs_column(model.adata, checked("donor_key", donor_key))
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
