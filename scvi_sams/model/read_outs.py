"""What a trained model is read by: its registry, its posterior with labels, states and bounds."""

from __future__ import annotations

import functools
import inspect
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from importlib.metadata import version
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
import torch
from scvi import REGISTRY_KEYS
from scvi.dataloaders import AnnDataLoader
from scvi.utils import track
from torch.utils.data import DataLoader

from scvi_sams._arguments import check_names, checked
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed, nearest, unknown_perturbations
from scvi_sams.data import Conditions
from scvi_sams.data.checks import check_covariates
from scvi_sams.data.field import PerturbationField, registered_conditions
from scvi_sams.data.loader import cells_of
from scvi_sams.data.matrices import is_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scvi_sams.data import ConditionsLike
    from scvi_sams.model.samsvae import SAMSVAE
    from scvi_sams.module.donors import AcrossDonors
    from scvi_sams.module.posteriors import EffectsPosterior


MAX_WEIGHT_ELEMENTS = 20_000_000  # of one decoded (particles, cells, genes) tensor
MAX_EFFECT_ELEMENTS = 50_000_000  # of the draws of all effects held at once


def field_state(model: SAMSVAE, registry_key: str) -> dict[str, Any]:
    """State of a registered field, with or without the AnnData."""
    return model.registry["field_registries"][registry_key]["state_registry"]


def controls_of(model: SAMSVAE) -> NDArray[np.bool_]:
    """Whether each cell of a model is a control, from its registered doses as they are."""
    doses = model.adata_manager.get_from_registry(SAMS_REGISTRY_KEYS.DOSE_KEY)
    return np.asarray((doses > 0).sum(axis=1)).ravel() == 0


def pairs_together(model: SAMSVAE) -> list[tuple[int, int]]:
    """Pairs of perturbations that some cell has both of, by their positions, in order."""
    conditions = registered_conditions(model.adata_manager)
    together: set[tuple[int, int]] = set()
    for index, dose in zip(conditions.index, conditions.dose, strict=True):
        together.update(combinations(index[dose > 0].tolist(), 2))
    return sorted(together)


def delimiter_of(model: SAMSVAE) -> str:
    """What joins the parts of a label."""
    state = field_state(model, SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    return state[PerturbationField.DELIMITER_KEY] or "+"


def context_names(model: SAMSVAE) -> list[str]:
    """Names of the contexts of a model by their codes; none without a ``context_key``."""
    if SAMS_REGISTRY_KEYS.CONTEXT_KEY not in model.registry["field_registries"]:
        return []
    state = field_state(model, SAMS_REGISTRY_KEYS.CONTEXT_KEY)
    return list(map(str, state["categorical_mapping"]))


def context_code(model: SAMSVAE, context: object) -> int | None:
    """Position of a context that somebody names; ``None`` for what contexts share."""
    if context is None:
        return None
    if not (names := context_names(model)):
        raise ScreenError(
            f"context={context!r}: this model knows no contexts. Name the column of adata.obs "
            "that has them, setup_anndata(context_key=...), and fit again."
        )
    _check_key("context: the model has no", context, names)
    return names.index(str(context))


def latent_names(model: SAMSVAE) -> list[str]:
    """Names of the latents."""
    return [f"latent_{latent}" for latent in range(model.module.n_latent)]


def provenance(model: SAMSVAE, seed: int | None = None) -> dict[str, Any]:
    """What every file written from a model says of its origin."""
    packages = ("scvi-sams", "scvi-tools", "torch", "anndata")
    seed = scvi.settings.seed if seed is None else seed
    return {
        "model": type(model).__name__,
        "seed": -1 if seed is None else seed,
        "python": platform.python_version(),
        **{package.replace("-", "_"): version(package) for package in packages},
    }


def parse_conditions(model: SAMSVAE, conditions: ConditionsLike) -> Conditions:
    """Read conditions that a user asks for; those of equal doses are one, with several rows."""
    state = field_state(model, SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    names = model.perturbation_names
    asked = Conditions.from_request(
        conditions,
        names,
        state[PerturbationField.CONTROL_KEY],
        state[PerturbationField.DELIMITER_KEY],
    )
    if model.registry["setup_args"].get("combinations") == "own":
        several = np.flatnonzero((asked.dose > 0).sum(1) > 1)
        if len(several):  # a combination is a perturbation of its own, and not one that is known
            raise unknown_perturbations([asked.labels[row] for row in several], names)
    return asked


def parse_distinct(model: SAMSVAE, conditions: ConditionsLike) -> Conditions:
    """Read conditions of which each is asked for once."""
    asked = parse_conditions(model, conditions)
    if repeated := [label for label, n in Counter(asked.cell_labels).items() if n > 1]:
        raise ScreenError(
            f"Conditions must differ, but {', '.join(repeated)} repeats. Ask for each once."
        )
    return asked


def check_level(credible_level: float) -> None:
    """Raise if a level is not between 0 and 1."""
    checked("credible_level", credible_level)


# -- masks and effects -------------------------------------------------------------------------


def require_effects(
    model: SAMSVAE,
    caller: str,
    *,
    masks: bool = False,
    pairs: bool = False,
    contexts: bool = False,
) -> EffectsPosterior:
    """The effects of a trained model; raise if it has none of those that are asked for."""
    model._check_if_trained(warn=False)
    effects, name = model.module.effects, type(model).__name__
    if effects is None:
        raise NotImplementedError(
            f"{caller}: in {name} perturbations act through the networks, not by a latent shift. "
            "See get_average_treatment_effect() for what they do to genes, or use SAMSVAE or "
            "CPAVAE."
        )
    if masks and not effects.sparse:
        raise NotImplementedError(
            f"{caller}: {name} as it was made has no masks, every perturbation moves every "
            "latent. Its effects are in get_perturbation_effect(); for masks use SAMSVAE with a "
            "mask_prior below one."
        )
    if pairs and effects.n_pairs == 0:
        raise NotImplementedError(
            f"{caller}: this model has no interactions, pairs act by the sum of their parts; make "
            "SAMSVAE with interactions=True."
        )
    if contexts and effects.n_deviations == 0:
        raise NotImplementedError(
            f"{caller}: this model has no effects by context; set it up with context_key, a "
            "column of adata.obs with two levels or more."
        )
    return effects


def require_part(model: SAMSVAE, name: str, absent: str) -> Any:
    """A part of the module of a trained model; raise if it was made without."""
    model._check_if_trained(warn=False)
    part = getattr(model.module, name, None)
    if part is None:
        raise NotImplementedError(f"{name}: this {type(model).__name__} {absent}")
    return part


def perturbation_table(model: SAMSVAE, values: torch.Tensor) -> pd.DataFrame:
    """Rows of perturbations, of those of all effects, perturbations x latents."""
    index = pd.Index(model.perturbation_names, name="perturbation")
    array = values[: len(index)].detach().cpu().numpy()
    return pd.DataFrame(array, index=index, columns=latent_names(model))


def pair_table(model: SAMSVAE, values: torch.Tensor) -> pd.DataFrame:
    """Rows of pairs, of those of all effects, pairs x latents."""
    names, join = model.perturbation_names, delimiter_of(model).join
    index = pd.Index([join((names[a], names[b])) for a, b in model.module.interactions.pairs])
    array = values[len(names) : len(names) + len(index)].detach().cpu().numpy()
    return pd.DataFrame(array, index=index, columns=latent_names(model))


def deviation_table(model: SAMSVAE, values: torch.Tensor) -> pd.DataFrame:
    """Rows of deviations, of those of all effects, perturbations x (contexts x latents)."""
    names, contexts = model.perturbation_names, context_names(model)
    columns = pd.MultiIndex.from_product(
        [contexts, latent_names(model)], names=["context", "latent"]
    )
    array = values[-len(names) * len(contexts) :].detach().cpu().numpy()
    index = pd.Index(names, name="perturbation")
    return pd.DataFrame(array.reshape(len(names), -1), index=index, columns=columns)


@torch.no_grad()
def inclusion_and_slab(
    model: SAMSVAE, caller: str, across: AcrossDonors | None = None
) -> tuple[pd.DataFrame, ...]:
    """Inclusion probability, its log-odds, mean and standard deviation where the mask is one.

    Each perturbations x latents; of an average donor, if those of all rows are given.
    """
    effects = require_effects(model, caller, masks=True)
    # Not by way of the probability, which float32 rounds to one.
    log_odds = effects.mask_log_odds().double() if across is None else across.log_odds
    mean, variance = effects.slab_moments() if across is None else across[1:3]
    fields = (torch.sigmoid(log_odds), log_odds, mean, variance.sqrt())
    return tuple(perturbation_table(model, values.double()) for values in fields)


# -- cells -------------------------------------------------------------------------------------


def _prepared(
    method: Callable[..., Any], prepare: Callable[[SAMSVAE, dict[str, Any]], None]
) -> Any:
    """A method whose arguments are checked, and changed in place, before it is called."""

    @functools.wraps(method)
    def prepared_method(model: SAMSVAE, *args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(method).bind(model, *args, **kwargs)
        prepare(model, asked.arguments)
        return method(*asked.args, **asked.kwargs)

    return prepared_method


def of_cells(method: Callable[..., Any]) -> Any:
    """Have a method of given cells take them, and its other arguments, as all methods do.

    Cells are checked against the model, indices turned into positions, numbers into Python's.
    """
    return _prepared(method, _prepare_cells)


def _prepare_cells(model: SAMSVAE, given: dict[str, Any]) -> None:
    for name, value in given.items():
        given[name] = checked(name, value)
    model._check_if_trained(warn=False)
    if given.get("dataloader") is not None:
        twice = [n for n in ("adata", "indices") if given.get(n) is not None]
        if twice:
            raise ScreenError(
                f"{' and '.join(twice)} beside dataloader, whose minibatches are all that is "
                "read: give one or the other."
            )
        return
    given["adata"] = adata = model._validate_anndata(given.get("adata"))
    if given.get("indices") is not None:
        given["indices"] = cells_of(adata, given["indices"])
    if given.get("gene_list") is not None:
        given["gene_list"] = _genes(given["gene_list"], adata.var_names)


def of_groups(method: Callable[..., Any]) -> Any:
    """Have scvi-tools' comparison of groups of cells take them as all methods do."""
    return _prepared(method, _prepare_groups)


def _prepare_groups(model: SAMSVAE, given: dict[str, Any]) -> None:
    model._check_if_trained(warn=False)
    given["adata"] = adata = model._validate_anndata(given.get("adata"))
    weights, by = given.get("weights"), given.get("groupby")
    if weights not in (None, "uniform"):
        raise NotImplementedError(
            f"weights={weights!r}: scvi-tools' weights need a bound that draws masks and "
            "effects for each cell anew. Leave weights='uniform', or see "
            "scvi_sams.tl.differential_expression for conditions."
        )
    if by is not None:
        _check_key("adata.obs has no column", by, adata.obs)
        for name in ("group1", "group2"):
            groups = given.get(name)
            for group in [groups] if isinstance(groups, str) else groups or ():
                _check_key(f"{name}: adata.obs[{by!r}] has no", group, set(adata.obs[by]))
    for name in ("idx1", "idx2"):
        if given.get(name) is not None and not isinstance(given[name], str):
            given[name] = cells_of(adata, given[name])
    counts = model.get_anndata_manager(adata).get_from_registry(REGISTRY_KEYS.X_KEY)
    if is_on_disk(counts) and given.get("all_stats", True):
        raise ScreenError(
            "Statistics of raw counts are not computed from disk: give all_stats=False, or "
            "`adata.to_memory()`."
        )


def of_samples(method: Callable[..., Any]) -> Any:
    """Have scvi-tools' comparison of samples refuse those that are not there."""
    return _prepared(method, _prepare_samples)


def _prepare_samples(model: SAMSVAE, given: dict[str, Any]) -> None:
    model._check_if_trained(warn=False)
    if (key := given.get("sample_key")) is None:
        raise ScreenError("sample_key is missing: name the column of adata.obs with samples.")
    for name in ("adata", "adata_sub"):  # the second is of scvi-tools 1.5
        if name == "adata" or given.get(name) is not None:
            given[name] = adata = model._validate_anndata(given.get(name))
            check_covariates(adata, categorical=[key])


def _genes(asked: Any, known: pd.Index) -> list[str]:
    """Names of genes that somebody asked for."""
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, Iterable) or not (genes := list(map(str, asked))):
        raise ScreenError(f"gene_list={asked!r} names no gene: give names of the model's genes.")
    for gene in genes:
        _check_key("gene_list: the model has no", gene, known)
    return genes


def _check_key(lacks: str, key: Any, known: Iterable[Any]) -> None:
    if str(key) not in (names := [str(name) for name in known]):
        close = nearest(str(key), names)
        hint = f"The nearest is {listed(close)}" if close else f"There are {listed(names)}"
        raise ScreenError(f"{lacks} {key!r}. {hint}.")


def minibatches(
    model: SAMSVAE,
    adata: AnnData | None,
    indices: Sequence[int] | None,
    batch_size: int | None,
    dataloader: Iterable[dict[str, torch.Tensor]] | None,
    data_loader_kwargs: dict[str, Any],
) -> Iterable[dict[str, torch.Tensor]]:
    """Minibatches of cells that :func:`of_cells` has checked, or those that were given."""
    known = {n for f in (DataLoader, AnnDataLoader) for n in inspect.signature(f).parameters}
    check_names(data_loader_kwargs, known - {"args", "kwargs", "sampler"}, "the data loader")
    if dataloader is not None:
        return dataloader
    return model._make_data_loader(
        adata, indices=indices, batch_size=batch_size, **data_loader_kwargs
    )


@torch.inference_mode()
def latent_representation(
    model: SAMSVAE, loader: Any, representation: str, give_mean: bool, return_dist: bool
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """See ``SAMSVAE.get_latent_representation``."""
    module = model.module
    has_shift = module.effects is not None
    values, variances = [], []
    for tensors in loader:
        outputs = module.inference(**module._get_inference_input(tensors))
        if representation != "full" and has_shift:
            shift = outputs["shift_mean"]
            state = outputs["qz"].loc - shift if representation == "basal" else shift
        else:
            state = outputs["qz"].loc if give_mean or return_dist else outputs["z"]
        mean, variance = module.to_latents(state, outputs["qz"].variance)
        values.append(mean)
        variances.append(variance)
    latent = torch.cat(values).cpu().numpy()
    return (latent, torch.cat(variances).cpu().numpy()) if return_dist else latent


@torch.inference_mode()
def log_importance_weights(
    model: SAMSVAE, loader: Iterable[dict[str, torch.Tensor]], n_particles: int
) -> torch.Tensor:
    """Weights of cells under draws of what all cells share, particles x cells, on the CPU."""
    batches = list(loader) if isinstance(loader, Iterator) else loader  # as they may be read twice
    n_batches = len(batches) if isinstance(batches, Sized) else 0
    module = model.module
    n_held = max(1, MAX_EFFECT_ELEMENTS // module.n_global_elements)
    chunks = []
    for start in range(0, n_particles, n_held):
        draws = module.sample_globals(min(n_held, n_particles - start))
        cells = []
        for tensors in track(batches, description="Importance weights", disable=n_batches < 50):
            n_cells, n_genes = tensors[REGISTRY_KEYS.X_KEY].shape
            n_at_once = max(1, MAX_WEIGHT_ELEMENTS // (n_cells * n_genes))
            parts = [
                module.log_importance_weights(tensors, draws.subset(k, k + n_at_once)).cpu()
                for k in range(0, draws.n_samples, n_at_once)
            ]
            cells.append(torch.cat(parts))
        chunks.append(torch.cat(cells, dim=1))
    return torch.cat(chunks)
