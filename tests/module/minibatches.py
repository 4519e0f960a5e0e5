"""Doses and minibatches for the tests of modules, from dense matrices of doses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS

from scvi_sams.module.base import SAMS_REGISTRY_KEYS
from scvi_sams.module.doses import Doses

if TYPE_CHECKING:
    from torch import Tensor

PERTURBATION, DOSE = SAMS_REGISTRY_KEYS.PERTURBATION_KEY, SAMS_REGISTRY_KEYS.DOSE_KEY
NONZERO = SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY


def padded(dosage: Tensor, n_columns: int | None = None) -> Doses:
    """Columns of doses, at the left; those that are filled up name the first perturbation."""
    n_columns = n_columns or max(1, int((dosage != 0).sum(1).max()))
    perturbation = torch.zeros(len(dosage), n_columns, dtype=torch.long)
    dose = dosage.new_zeros(len(dosage), n_columns)
    for cell, doses in enumerate(dosage):
        (given,) = doses.nonzero(as_tuple=True)
        perturbation[cell, : len(given)] = given
        dose[cell, : len(given)] = doses[given]
    return Doses(perturbation, dose)


def dense(doses: Doses, n_rows: int) -> Tensor:
    """The matrix of doses, cells x perturbations (and pairs)."""
    matrix = doses.dose.new_zeros(len(doses.perturbation), n_rows)
    return matrix.scatter_add(1, doses.perturbation, doses.dose)


def columns(dosage: Tensor, n_columns: int | None = None) -> dict[str, Tensor]:
    """Doses by their keys in a minibatch."""
    doses = padded(dosage, n_columns)
    return {PERTURBATION: doses.perturbation, DOSE: doses.dose}


def minibatch(x: Tensor, dosage: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """Counts and doses of cells of one batch, as the loaders give them."""
    one_batch = torch.zeros(len(x), 1, dtype=torch.long)
    return {
        REGISTRY_KEYS.X_KEY: x,
        **columns(dosage),
        REGISTRY_KEYS.BATCH_KEY: one_batch,
        **others,
    }


def dosage_of(tensors: dict[str, Tensor], n_perturbations: int) -> Tensor:
    """The matrix of doses of a minibatch."""
    return dense(Doses(tensors[PERTURBATION], tensors[DOSE]), n_perturbations)


def infer(module: Any, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
    """Inference of a minibatch alone."""
    return module.inference(
        tensors[REGISTRY_KEYS.X_KEY],
        tensors[PERTURBATION],
        tensors[DOSE],
        library=tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY),
        batch_index=tensors.get(REGISTRY_KEYS.BATCH_KEY),
        cat_covs=tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
        cont_covs=tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
        **kwargs,
    )


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The minibatch in double precision."""
    return {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
