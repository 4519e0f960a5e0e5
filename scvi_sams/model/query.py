"""A fitted model at new cells: room for their batches and perturbations."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import unknown_perturbations
from scvi_sams.data.field import PerturbationField
from scvi_sams.module.posteriors import SpikeAndSlab

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_sams.model.samsvae import SAMSVAE
    from scvi_sams.module.base import PerturbationVAEModule


def added_perturbations(
    registry: dict[str, Any], adata: AnnData, new_perturbations: bool
) -> list[str]:
    """Perturbations of new cells that a model does not know; an error unless there may be some."""
    known = _known_perturbations(registry)
    names = inspect.signature(PerturbationField).parameters
    arguments = registry["setup_args"]
    field = PerturbationField(**{name: arguments[name] for name in names if name in arguments})
    added = field.unknown_names(adata, known)
    if added and not new_perturbations:
        raise unknown_perturbations(added, known)
    return added


def start_query(
    query: SAMSVAE, registry: dict[str, Any], added: list[str], unfrozen: bool
) -> None:
    """Bring a model that scvi-tools has taken to a query to where its training starts."""
    module, n_known = query.module, len(_known_perturbations(registry))
    if added and module.effects is None:
        raise NotImplementedError(
            f"{type(query).__name__} cannot add perturbations ({', '.join(added[:5])}): they act "
            "through the weights of its networks, which a query keeps frozen. Fit it to all "
            "cells, or use SAMSVAE."
        )
    if module.effects is not None:
        _align_rows(module, n_known)
        module.effects.freeze(frozen=not unfrozen)
        if added:
            _start_new_perturbations(module, n_known, unfrozen)
    known_categories = _categories_per_covariate(registry)
    has_new_categories = known_categories != _categories_per_covariate(query.registry)
    query.learns_effects_only_ = bool(added) and not (unfrozen or has_new_categories)
    _align_categories(module, known_categories)
    _start_new_batches(module)


def _known_perturbations(registry: dict[str, Any]) -> list[str]:
    state = registry["field_registries"][SAMS_REGISTRY_KEYS.PERTURBATION_KEY]["state_registry"]
    return list(state[PerturbationField.COLUMN_NAMES_KEY])


def _categories_per_covariate(registry: dict[str, Any]) -> list[int]:
    """Numbers of categories of the batch and of the further categorical covariates."""
    fields = registry["field_registries"]
    n_batch = len(fields[REGISTRY_KEYS.BATCH_KEY]["state_registry"]["categorical_mapping"])
    covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
    return [n_batch, *(int(n) for n in covariates.get("n_cats_per_key", ()))]


@torch.no_grad()
def _align_categories(module: PerturbationVAEModule, n_known: Sequence[int]) -> None:
    """Bring the weights of categories to where the networks look for them.

    scvi-tools appends those of new categories after all others, which moves those of every
    covariate but the last. New ones start at the mean of the known ones of their covariate.
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
def _start_new_batches(module: PerturbationVAEModule) -> None:
    """Start the basal means of batches that were never seen at the mean of the others."""
    if module.closed_form is not None:
        module.closed_form.fill_unseen()


# Tensors of effects and statistics with a row for each perturbation, pair and deviation. By name,
# as others may have as many rows by chance (a rotation of as many latents), and `given` is right
# as made.
ROW_TENSORS = frozenset(
    {
        *("mask_logits", "slab_mean", "slab_log_variance", "code"),
        *("spike_mean", "spike_variance", "spike_divergence", "selection_penalty"),
        *("linear", "others", "curvature", "n_together", "weight", "n_occurrences"),
    }
)


@torch.no_grad()
def _align_rows(module: PerturbationVAEModule, n_known: int) -> None:
    """Bring new perturbations before pairs and deviations; scvi-tools appends new rows last."""
    effects = module.effects
    if effects is None or effects.n_perturbations == n_known:
        return
    n_new = effects.n_perturbations - n_known
    first_new = effects.n_rows - n_new - n_new * effects.n_deviations // effects.n_perturbations
    order = [
        *range(n_known),
        *range(first_new, first_new + n_new),
        *range(n_known, first_new),
        *range(first_new + n_new, effects.n_rows),
    ]
    parts: list[torch.nn.Module] = [effects]
    if module.closed_form is not None:
        parts.append(module.closed_form.statistics)
    for part in parts:
        for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            if name in ROW_TENSORS:
                tensor.copy_(tensor[order])


@torch.no_grad()
def _start_new_perturbations(
    module: PerturbationVAEModule, n_known: int, unfrozen: bool = False
) -> None:
    """Leave the rows of new perturbations to training, from where training starts."""
    effects = module.effects
    if effects is None:
        return
    new = slice(n_known, effects.n_perturbations)
    n_contexts = effects.n_deviations // effects.n_perturbations
    first_deviation = effects.n_rows - n_contexts * (effects.n_perturbations - n_known)
    if isinstance(effects, SpikeAndSlab):
        effects.spike_variance[new] = effects.background_variance
    if unfrozen:
        return
    effects.freeze(slice(first_deviation, None), False)
    effects.freeze(new, False)
    for parameter in module.global_parameters():
        parameter.requires_grad_(True)
    module.n_training_cells = 0  # the bound is now that of the query
    if module.closed_form is not None:
        statistics = module.closed_form.statistics
        statistics.n_cells_seen.zero_()
        statistics.n_occurrences.zero_()
