"""Taking a fitted model to new cells, batches and perturbations."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Self

import torch

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import unknown_perturbations
from scvi_sams.data import PerturbationField
from scvi_sams.model._base import SAMSModel
from scvi_sams.model._query import (
    align_categories,
    align_pair_rows,
    categories_per_covariate,
    start_new_batches,
    start_new_perturbations,
)

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["QueryMixin"]


class QueryMixin(SAMSModel):
    """``load_query_data`` of the family."""

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: str | Self,
        *,
        new_perturbations: bool = False,
        unfrozen: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Take a fitted model to cells of new batches or new perturbations (scArches).

        The effects of known perturbations stay as they are, and so do the networks but for their
        weights of new batches. What is new is learned by :meth:`train`: the weights of new
        batches by gradient, masks and embeddings of new perturbations as the model learned the
        others. The task is the transfer of Lopez et al. (CLeaR 2023). What no cell of the
        reference shows cannot be learned this way: the decoder does not know it, and the effect
        comes out too small. Fit all cells together then.

        Parameters
        ----------
        adata
            New cells, laid out as those the model was set up with. Perturbations that they lack
            are fine.
        reference_model
            The fitted model, or the folder it was saved in.
        new_perturbations
            Add the perturbations of ``adata`` that the model does not know. Otherwise they are an
            error, as a misspelt name would be.
        unfrozen
            Train everything on, known effects included.
        **kwargs
            Further arguments of :meth:`scvi.model.base.ArchesMixin.load_query_data`.

        Returns
        -------
        The model, to be trained on the query.

        Raises
        ------
        UnknownPerturbationError
            If a cell has a perturbation that the model has not seen, unless it is to be added.
        NotImplementedError
            If the model cannot take new perturbations without training its networks.

        Examples
        --------
        >>> query = SAMSVAE.load_query_data(new_adata, model)  # doctest: +SKIP
        >>> query.train(max_epochs=20)  # doctest: +SKIP
        """
        registry = (
            cls.load_registry(reference_model)  # type: ignore[attr-defined]
            if isinstance(reference_model, str)
            else reference_model.registry
        )
        state = registry["field_registries"][SAMS_REGISTRY_KEYS.PERTURBATION_KEY]["state_registry"]
        known = list(state[PerturbationField.COLUMN_NAMES_KEY])
        added = _perturbation_field(registry).unknown_names(adata, known)
        if isinstance(reference_model, str):  # by way of a model, which reads older files too
            with torch.random.fork_rng():  # parameters that are drawn only to be replaced
                reference_model = cls.load(reference_model, adata=False)  # type: ignore[attr-defined]
        if added and not new_perturbations:
            raise unknown_perturbations(added, known)
        query = super().load_query_data(  # type: ignore[misc]
            adata, reference_model, unfrozen=unfrozen, **kwargs
        )
        module = query.module
        if added and module.effects is None:
            raise NotImplementedError(
                f"{cls.__name__} cannot add perturbations ({', '.join(added[:5])}): they act "
                "through the weights of its networks, which a query keeps frozen. Fit it to all "
                "cells, or use SAMSVAE."
            )
        if module.effects is not None:
            align_pair_rows(module, len(known))
            module.effects.freeze(frozen=not unfrozen)
            if added:
                start_new_perturbations(module, len(known), unfrozen)
        known_categories = categories_per_covariate(registry)
        has_new_categories = known_categories != categories_per_covariate(query.registry)
        query.learns_effects_only_ = bool(added) and not (unfrozen or has_new_categories)
        align_categories(module, known_categories)
        start_new_batches(module)
        return query


def _perturbation_field(registry: dict[str, Any]) -> PerturbationField:
    """The field that a model was set up with."""
    names = inspect.signature(PerturbationField).parameters
    arguments = registry["setup_args"]
    return PerturbationField(**{name: arguments[name] for name in names if name in arguments})
