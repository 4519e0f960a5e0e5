"""From the arguments of a model's constructor to its module."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError, listed, unknown_perturbations
from scvi_sams.data import Conditions
from scvi_sams.data.field import registered_conditions, registered_dosage
from scvi_sams.model.read_outs import context_names, field_state, pairs_together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.model.samsvae import SAMSVAE


logger = logging.getLogger(__name__)

_NO_TARGETS = (
    "No perturbation is named like a gene, so that none has an effect of its own on its target: "
    "say which gene each targets by direct_effects, a dict, an obs column or a key of uns."
)
_NOT_SHOWN = {"targets", "interactions", "reference_doses", "n_contexts", "context_prior"}


def make_module(model: SAMSVAE, **settings: Any) -> None:
    """Make the module for the registered data."""
    settings = {name: _checked(name, value) for name, value in settings.items()}
    arguments, stats = model.registry["setup_args"], model.summary_stats
    gene_likelihood = settings["gene_likelihood"]
    if gene_likelihood != "normal" and not arguments.get("is_count_data", True):
        raise ScreenError(
            f"gene_likelihood={gene_likelihood!r} is for counts, and the data were set up with "
            "is_count_data=False; use gene_likelihood='normal', or set up the counts."
        )
    if context_names(model) and "n_contexts" not in settings:
        raise ScreenError(
            f"{type(model).__name__} has no effects that could depend on a context: leave "
            "context_key out, or use SAMSVAE."
        )
    n_cats_per_cov = None
    if stats.get("n_extra_categorical_covs", 0) > 0:
        n_cats_per_cov = list(field_state(model, REGISTRY_KEYS.CAT_COVS_KEY)["n_cats_per_key"])
    model.module = model._module_cls(
        n_input=stats.n_vars,
        n_perturbations=stats.n_perturbation,
        n_batch=stats.n_batch,
        n_cats_per_cov=n_cats_per_cov,
        n_continuous_cov=stats.get("n_extra_continuous_covs", 0),
        use_size_factor_key=arguments.get("size_factor_key") is not None,
        **settings,
    )
    shown = {k: v for k, v in settings.items() if k not in _NOT_SHOWN}
    model._model_summary_string = (
        f"{type(model).__name__} with {stats.n_perturbation} perturbations, "
        + ", ".join(f"{name}={value!r}" for name, value in shown.items())
    )


def _checked(name: str, value: Any) -> Any:
    if name == "background_scale":
        return checked("spike_scale", value)
    return value if name == "embedding_posterior" and value == "point" else checked(name, value)


def choose_inference(
    global_inference: Literal["closed_form", "gradient"] | None,
    basal_posterior: str,
    embedding_posterior: str,
) -> Literal["closed_form", "gradient"]:
    """The engine of masks and effects, closed form where the posteriors have it."""
    basal_posterior = checked("basal_posterior", basal_posterior)
    embedding_posterior = _checked("embedding_posterior", embedding_posterior)
    has_closed_form = (
        basal_posterior in {"correlated", "residual"} and embedding_posterior == "spike_and_slab"
    )
    if global_inference == "closed_form" and not has_closed_form:
        raise ValueError(
            f"global_inference='closed_form' needs a bound that is quadratic in the shift and "
            f"effects given masks, not basal_posterior={basal_posterior!r} with "
            f"embedding_posterior={embedding_posterior!r}: use basal_posterior='correlated' or "
            "'residual' and embedding_posterior='spike_and_slab', or global_inference='gradient'."
        )
    return global_inference or ("closed_form" if has_closed_form else "gradient")


def named_targets(
    model: SAMSVAE, direct_effects: bool | str | Mapping[str, str] | None
) -> bool | dict[str, str] | None:
    """Genes that perturbations target, by name, where a column or an entry of uns says them."""
    if direct_effects is None or isinstance(direct_effects, bool):
        return direct_effects
    if isinstance(direct_effects, Mapping):
        return dict(direct_effects)
    if not isinstance(direct_effects, str):
        raise ScreenError(
            f"direct_effects={direct_effects!r} cannot be used: give True, False, None, a dict of "
            "perturbations to genes, or the obs column or uns key that has them."
        )
    adata, key = model.adata, direct_effects
    if adata is None:
        raise ScreenError(f"direct_effects={key!r} needs the AnnData; give a dict instead.")
    if key in adata.uns:
        table = adata.uns[key]
        if not hasattr(table, "items") or hasattr(table, "columns"):
            raise ScreenError(
                f"adata.uns[{key!r}] is a {type(table).__name__}: it must be a dict, or a Series, "
                "of the gene that each perturbation targets."
            )
        known = set(model.perturbation_names)  # a library may hold guides that no cell has
        targets = {str(k): str(v) for k, v in table.items() if str(k) in known and pd.notna(v)}
    elif key in adata.obs:
        targets = _targets_of_cells(model, key)
    else:
        raise ScreenError(
            f"direct_effects={key!r} is neither a column of adata.obs nor a key of adata.uns."
        )
    genes = set(map(str, model.get_var_names()))
    # Of a panel of genes most targets are not measured, which is no error, as a typing slip is.
    measured = {name: gene for name, gene in targets.items() if gene in genes}
    if not measured:
        raise ScreenError(
            f"direct_effects={key!r} names no gene of adata.var_names "
            f"(but {listed(sorted(set(targets.values()))) or 'nothing'}): give genes by the names "
            "that they have there, or leave it out."
        )
    return measured


def _targets_of_cells(model: SAMSVAE, key: str) -> dict[str, str]:
    """The value of an obs column in the cells that have a perturbation and no other."""
    conditions = registered_conditions(model.adata_manager)
    alone = np.flatnonzero((conditions.dose > 0).sum(1) == 1)
    place = pd.Series(conditions.index[alone, 0], index=alone)
    column = model.adata.obs[key]
    pairs = pd.DataFrame({"row": conditions.codes, "gene": column.to_numpy(object)}).dropna()
    pairs = pairs[pairs["row"].isin(place.index)]
    pairs = pairs.assign(row=place[pairs["row"]].to_numpy(), gene=pairs["gene"].astype(str))
    pairs = pairs.drop_duplicates().sort_values(["row", "gene"])
    names = model.perturbation_names
    if (twice := pairs["row"].duplicated(keep=False)).any():
        row = int(pairs["row"][twice].iloc[0])
        genes = pairs["gene"][pairs["row"] == row]
        raise ScreenError(
            f"adata.obs[{key!r}] names {listed(genes)} for cells of {names[row]!r}: a "
            "perturbation has one target."
        )
    return {names[row]: gene for row, gene in zip(pairs["row"], pairs["gene"], strict=True)}


def target_genes(
    model: SAMSVAE, direct_effects: bool | Mapping[str, str] | None
) -> list[int] | None:
    """Index of the gene that each perturbation targets, -1 for none; ``None`` if none does."""
    genes = {str(gene): index for index, gene in enumerate(model.get_var_names())}
    names = model.perturbation_names
    if direct_effects is None or isinstance(direct_effects, bool):
        targets = [genes.get(name, -1) for name in names]
        if max(targets) >= 0:
            return targets
        if not direct_effects:
            if direct_effects is None:
                logger.info(_NO_TARGETS)
            return None
        raise ScreenError(
            "direct_effects=True, but no perturbation is named like a gene of adata.var_names; "
            "give a dict of perturbations to genes, or the obs column or uns key that has them."
        )
    target_of = {str(name): str(gene) for name, gene in direct_effects.items()}
    if unknown := [name for name in target_of if name not in names]:
        raise unknown_perturbations(unknown, names)
    if absent := [gene for gene in target_of.values() if gene not in genes]:
        raise ScreenError(
            "direct_effects names genes that are not in adata.var_names: "
            f"{', '.join(absent[:5])}. Correct or leave them out."
        )
    return [genes[target_of[name]] if name in target_of else -1 for name in names]


def named_interactions(
    model: SAMSVAE, interactions: bool | Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Names of the pairs that get an interaction."""
    names = model.perturbation_names
    given: Any = interactions  # by anybody
    if isinstance(given, str) or not isinstance(given, bool | Collection):
        raise ScreenError(
            f"interactions={interactions!r} cannot be used: give True, False or pairs of names."
        )
    if interactions is False or (interactions is not True and len(interactions) == 0):
        return []
    if interactions is True:
        if model.adata is None:
            raise ScreenError("interactions=True needs the AnnData; name the pairs instead.")
        pairs = pairs_together(model)
        if not pairs:
            raise ScreenError(
                "interactions=True, but no cell has two perturbations; leave it out."
            )
        return [(names[a], names[b]) for a, b in pairs]
    pairs_given: list[tuple[str, str]] = []
    pair: Any
    for pair in interactions:
        if isinstance(pair, str) or not isinstance(pair, Collection) or len(pair) != 2:
            raise ScreenError(f"interactions holds {pair!r}: give pairs of two names.")
        first, second = map(str, pair)
        pairs_given.append((first, second))
    Conditions.from_request([{a: 1.0, b: 1.0} for a, b in pairs_given], names)
    return pairs_given


def median_doses(model: SAMSVAE, dose_response: str) -> list[float] | None:
    """Median dose of each perturbation, about which the prior of its EC50 lies; if it has one."""
    if checked("dose_response", dose_response) != "hill":
        return None
    medians = [1.0] * len(model.perturbation_names)
    if model.adata is not None:
        dosage = registered_dosage(model.adata_manager).tocsc()
        for column in range(dosage.shape[1]):
            doses = dosage.data[dosage.indptr[column] : dosage.indptr[column + 1]]
            if len(doses):
                medians[column] = float(np.median(doses))
    return medians
