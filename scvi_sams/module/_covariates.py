"""Covariates of cells: from a minibatch to the networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scvi import REGISTRY_KEYS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["covariates_of", "network_covariates"]


def covariates_of(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Covariates of a minibatch, under the names of the modules' arguments."""
    return {
        "batch_index": tensors.get(REGISTRY_KEYS.BATCH_KEY),
        "cat_covs": tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
        "cont_covs": tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
    }


def network_covariates(
    batch_index: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Split covariates into the columns that scvi-tools' layers take."""
    columns = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    return (batch_index, *columns), cont_covs
