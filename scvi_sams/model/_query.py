"""Room for new batches and new perturbations in a fitted module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

from scvi_sams.module.posteriors import SpikeAndSlab

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.module.base import PerturbationVAEModule

__all__ = [
    "align_categories",
    "align_pair_rows",
    "categories_per_covariate",
    "start_new_batches",
    "start_new_perturbations",
]


def categories_per_covariate(registry: dict[str, Any]) -> list[int]:
    """Numbers of categories of the batch and of the further categorical covariates."""
    fields = registry["field_registries"]
    n_batch = len(fields[REGISTRY_KEYS.BATCH_KEY]["state_registry"]["categorical_mapping"])
    covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
    return [n_batch, *(int(n) for n in covariates.get("n_cats_per_key", ()))]


@torch.no_grad()
def align_categories(module: PerturbationVAEModule, n_known: Sequence[int]) -> None:
    """Bring the weights of categories to where the networks look for them.

    scvi-tools appends the weights of new categories after all others, which moves those of every
    covariate but the last one. New categories start at the mean of the known ones of their
    covariate.

    Parameters
    ----------
    module
        Module that :meth:`~scvi.model.base.ArchesMixin.load_query_data` has filled.
    n_known
        Numbers of categories of each covariate in the reference.
    """
    for network in module.modules():
        if not isinstance(network, FCLayers) or not network.n_cat_list:
            continue
        n_columns = sum(network.n_cat_list)  # a covariate of one category has none
        for number, layer in enumerate(network.fc_layers):
            if n_columns and network.inject_into_layer(number):
                columns = layer[0].weight[:, -n_columns:]
                columns.copy_(_aligned(columns, n_known, network.n_cat_list))


def _aligned(
    columns: torch.Tensor, n_known: Sequence[int], n_columns: Sequence[int]
) -> torch.Tensor:
    blocks, start = [], 0
    for known, after in zip(n_known, n_columns, strict=True):
        if known > 1:
            block = columns[:, start : start + known]
            start += known
        else:
            block = torch.zeros_like(columns[:, :1])
        if after:
            new = block.mean(1, keepdim=True).expand(-1, after - known)
            blocks.append(torch.cat([block, new], dim=1))
    return torch.cat(blocks, dim=1)


@torch.no_grad()
def start_new_batches(module: PerturbationVAEModule) -> None:
    """Start the basal means of batches that were never seen at the mean of the others."""
    if module.closed_form is not None:
        seen = module.closed_form.statistics.basal_weight.squeeze(1) > 0
        basal_mean = module.closed_form.basal_mean
        basal_mean[~seen] = basal_mean[seen].mean(0)


@torch.no_grad()
def align_pair_rows(module: PerturbationVAEModule, n_known: int) -> None:
    """Bring the effects of pairs to where they are looked for, after all perturbations.

    scvi-tools appends the rows of new perturbations after all others.

    Parameters
    ----------
    module
        Module that :meth:`~scvi.model.base.ArchesMixin.load_query_data` has filled.
    n_known
        Number of perturbations of the reference.
    """
    effects = module.effects
    if effects is None or effects.n_pairs == 0 or effects.n_perturbations == n_known:
        return
    first_new = n_known + effects.n_pairs
    order = [
        *range(n_known),
        *range(first_new, effects.n_rows),
        *range(n_known, first_new),
    ]
    parts: list[torch.nn.Module] = [effects]
    if module.closed_form is not None:
        parts.append(module.closed_form.statistics)
    for part in parts:
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.dim() > 0 and len(tensor) == effects.n_rows:
                tensor.copy_(tensor[order])


@torch.no_grad()
def start_new_perturbations(
    module: PerturbationVAEModule, n_known: int, unfrozen: bool = False
) -> None:
    """Leave the rows of new perturbations to training, from where training starts.

    Parameters
    ----------
    module
        Module with the rows of known perturbations first.
    n_known
        Number of perturbations of the reference.
    unfrozen
        Whether all else is trained on too.
    """
    effects = module.effects
    if effects is None:
        return
    new = slice(n_known, effects.n_perturbations)
    if isinstance(effects, SpikeAndSlab):
        effects.spike_variance[new] = effects.background_variance
    if unfrozen:
        return
    effects.freeze(new, False)
    for parameter in module.global_parameters():
        parameter.requires_grad_(True)
    module.n_training_cells = 0  # the bound is now that of the query
    if module.closed_form is not None:
        statistics = module.closed_form.statistics
        statistics.n_cells_seen.zero_()
        statistics.n_occurrences.zero_()
