"""Which cells a perturbation took in, and how often each guide works, solved after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scvi import REGISTRY_KEYS
from torch.nn.functional import pad

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import PerturbationField
from scvi_sams.data.guides import guide_codes, padded_columns
from scvi_sams.model.read_outs import controls_of, require_effects
from scvi_sams.module.doses import Doses
from scvi_sams.module.efficacy import (
    Cells,
    Mixture,
    Prior,
    Projection,
    Solution,
    cell_probability,
    disagreement,
    efficacies,
    multiples_where_it_took,
    project,
    solve,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scvi_sams.model.samsvae import SAMSVAE


EffectOf: TypeAlias = Literal["as_labelled", "where_it_took"]
"""Of which cells with a label an effect is, see ``SAMSVAE.counterfactual``."""

_MIN_CONTROLS = 50  # of fewer, the variation among them is not known
_CELLS_AT_ONCE = 1024
_EVIDENCE_CELLS = 100.0  # as for masks, where the model says nothing else


class Efficacy(NamedTuple):
    """What was solved, as it is kept in ``model.efficacy_``.

    Attributes
    ----------
    guides, target
        Names of the guides, and the perturbation of each.
    n_cells
        Training cells of each guide.
    solution
        Efficacies and effects; probabilities of single cells are not kept.
    offset, variation
        Mean and variance of the multiple that controls show of each effect, in units of what
        they should be.
    shift
        Mean shift of the cells of each guide, weighted by gain, guides x dimensions.
    covariance
        Of the same in single controls.
    own_gene
        Whether the count of the target was part of the evidence.
    """

    guides: list[str]
    target: NDArray[np.int64]
    n_cells: NDArray[np.int64]
    solution: Solution
    offset: NDArray[np.float32]
    variation: NDArray[np.float32]
    shift: NDArray[np.float64]
    covariance: NDArray[np.float64]
    own_gene: bool


class _Guides(NamedTuple):
    """Guides of the cells of an AnnData: names, targets, and a code for each dose of a cell."""

    names: list[str]
    target: NDArray[np.int64]
    codes: NDArray[np.int64]


def _guides(manager: AnnDataManager, known: Efficacy | None = None) -> _Guides:
    """Guides of cells, by the codes of those that were solved, if they were.

    A perturbation whose guide is not known has one that stands for all of them.
    """
    state = manager.get_state_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    perturbations = list(map(str, state[PerturbationField.COLUMN_NAMES_KEY]))
    index = padded_columns(manager, SAMS_REGISTRY_KEYS.PERTURBATION_KEY).astype(np.int64)
    has = padded_columns(manager, SAMS_REGISTRY_KEYS.DOSE_KEY) > 0
    registered = guide_codes(manager)
    if registered is None:
        given, of_given = [], np.zeros(0, np.int64)
        codes = np.full(index.shape, -1)
        unknown = perturbations
    else:
        given, of_given = list(registered.names), registered.targets.astype(np.int64)
        codes = registered.codes.astype(np.int64)
        unknown = [f"{name} (guide unknown)" for name in perturbations]
    codes = np.where(codes >= 0, codes, len(given) + index)
    names, target = [*given, *unknown], np.append(of_given, np.arange(len(perturbations)))
    used, of_cells = np.unique(codes[has], return_inverse=True)
    if known is None:
        order = np.argsort(target[used], kind="stable")
        place = np.argsort(order)
        names, target = [names[code] for code in used[order]], target[used[order]]
    else:
        solved = {pair: k for k, pair in enumerate(zip(known.guides, known.target, strict=True))}
        for code in used:
            if (names[code], target[code]) not in solved:
                raise ScreenError(
                    f"Cells of {perturbations[target[code]]!r} have a guide that this model was "
                    "not trained with: leave them out, or fit it with them."
                )
        place = np.array([solved[names[code], target[code]] for code in used], np.int64)
        names, target = known.guides, known.target
    result = np.zeros(index.shape, np.int64)
    result[has] = place[of_cells] if len(used) else 0
    return _Guides(names, target, result)


def why_no_efficacy(model: SAMSVAE) -> str | None:
    """Why a model cannot tell in which cells perturbations took, if it cannot."""
    if model.module.effects is None:
        return "perturbations act through the networks, not by a shift."
    if model.module.encoder.basal_posterior in ("mean_field", "amortized"):
        return (
            "what the counts say of the shift has a closed form with basal_posterior='correlated' "
            "or 'residual' only."
        )
    return None


def efficacy_of(model: SAMSVAE, *, own_gene: bool = True) -> Efficacy:
    """Efficacies of a model, solved from its training cells where they were not yet.

    Parameters
    ----------
    model
        A trained model.
    own_gene
        Whether the count of a perturbation's own target is part of the evidence.

    Raises
    ------
    NotImplementedError
        If the model has no closed form for them.
    ScreenError
        If they were not solved before the model was saved, and it has no AnnData.
    """
    require_effects(model, "get_perturbed_probability")
    if reason := why_no_efficacy(model):
        raise NotImplementedError(f"get_perturbed_probability: {reason}")
    if model.efficacy_ is not None and model.efficacy_["own_gene"] == own_gene:
        return _unpacked(model.efficacy_)
    if model.adata is None:
        raise ScreenError(
            "Efficacies of guides are solved from the training cells, and the model was loaded "
            "without its AnnData: give it to load(), or call get_perturbed_probability() before "
            "the model is saved."
        )
    found = _solve(model, own_gene)
    model.efficacy_ = _packed(found)
    return found


@torch.inference_mode()
def _solve(model: SAMSVAE, own_gene: bool) -> Efficacy:
    manager = model.adata_manager
    guides = _guides(manager)
    trained = np.sort(np.asarray(model.train_indices))
    is_control = controls_of(model)[trained]
    offset, variation, mean, covariance = _of_controls(model, trained[is_control])
    cells = trained[~is_control]
    read, shift = _read(model, model.adata, cells, guides.codes, len(guides.names), own_gene)
    counts = np.bincount(read.guide[read.dose > 0].numpy().ravel(), minlength=len(guides.names))
    direct = getattr(model.module, "direct_effects", None)
    start = torch.zeros(len(model.perturbation_names))
    if direct is not None:
        start = direct.mean.detach().cpu().clone()
    target = torch.as_tensor(guides.target)
    solution = solve(
        _calibrated(read, offset, variation), target, start, background=_background(model)
    )
    return Efficacy(
        guides.names,
        guides.target,
        counts,
        solution._replace(probability=torch.zeros(0)),
        offset,
        variation,
        shift / np.maximum(counts, 1)[:, None] - mean,
        covariance,
        own_gene,
    )


def _background(model: SAMSVAE) -> float:
    """Variance of what counts as background when masks are judged, of guides too."""
    closed_form = model.module.closed_form
    n_cells = None if closed_form is None else closed_form.mask_evidence_cells
    return 1 / (n_cells or _EVIDENCE_CELLS)


def _network_effects(model: SAMSVAE) -> torch.Tensor:
    effects = model.module.effects
    return effects.to_network(effects.moments()[0])[: len(model.perturbation_names)]


def _of_controls(model: SAMSVAE, controls: NDArray[np.int64]) -> tuple[Any, ...]:
    """Mean and variance of the multiples that controls show, and of their weighted states."""
    effects = _network_effects(model)
    n_perturbations, n_latent = effects.shape
    total, products = np.zeros(n_latent), np.zeros((n_latent, n_latent))
    if len(controls) < _MIN_CONTROLS:
        nothing = np.zeros(n_perturbations, dtype=np.float32)
        return nothing, nothing + 1, total, np.eye(n_latent)
    loader = model._make_data_loader(model.adata, indices=controls, batch_size=_CELLS_AT_ONCE)
    scores, informations = [], []
    for tensors in loader:
        outputs = model.module.inference(**model.module._get_inference_input(tensors))
        potential = outputs["potential"]
        of_cells = potential.gain * potential.location
        scores.append((of_cells @ effects.T).cpu())
        informations.append((potential.gain @ effects.square().T).cpu())
        weighted = of_cells.double().cpu().numpy()
        total += weighted.sum(0)
        products += weighted.T @ weighted
    score, information = torch.cat(scores).double(), torch.cat(informations).double()
    offset = score.sum(0) / information.sum(0).clamp(min=1e-9)
    left = (score - offset * information).square().sum(0)
    variation = torch.where(
        information.sum(0) > 1e-6, left / information.sum(0).clamp(min=1e-6), 1.0
    )
    mean = total / len(controls)
    covariance = products / len(controls) - np.outer(mean, mean)
    return offset.float().numpy(), variation.float().numpy(), mean, covariance


@torch.inference_mode()
def _read(
    model: SAMSVAE,
    adata: AnnData,
    cells: NDArray[np.int64],
    codes: NDArray[np.int64],
    n_guides: int,
    own_gene: bool,
) -> tuple[Cells, NDArray[np.float64]]:
    """What perturbed cells say, and the sums of the shifts of the cells of each guide."""
    module = model.module
    target = _measured_targets(model) if own_gene else None
    n_columns = codes.shape[1]
    shifts = np.zeros((n_guides, module.n_latent))
    parts: list[tuple[torch.Tensor, ...]] = []
    loader = model._make_data_loader(adata, indices=cells, batch_size=_CELLS_AT_ONCE)
    start = 0
    for tensors in loader:
        inputs = module._get_inference_input(tensors)
        outputs = module.inference(**inputs)
        acting, effects = outputs["doses"], outputs["effect_of_dose"]
        potential = outputs["potential"]
        width = tensors[SAMS_REGISTRY_KEYS.DOSE_KEY].shape[1]  # of these cells, at most n_columns
        if acting.dose.shape[1] > width:  # what pairs add is taken as it is
            of_pairs = acting.dose[:, width:, None] * effects[:, width:]
            potential = potential._replace(location=potential.location - of_pairs.sum(1))
        doses = Doses(acting.perturbation[:, :width], acting.dose[:, :width])
        effects = effects[:, :width]
        projection = project(potential, doses, effects)
        n_cells = len(doses.dose)
        guide = torch.as_tensor(codes[cells[start : start + n_cells], :width])
        start += n_cells
        own = _own_counts(module, tensors, outputs, doses, target)
        # Of each perturbation, what the others leave.
        acting_effects = doses.dose.unsqueeze(-1) * effects
        others = acting_effects.sum(1, keepdim=True) - acting_effects
        left = potential.gain.unsqueeze(1) * (potential.location.unsqueeze(1) - others)
        has = (doses.dose > 0).cpu()
        np.add.at(shifts, guide[has].numpy(), left.cpu()[has].double().numpy())
        missing = n_columns - width
        fields = (projection.score, doses.perturbation, guide, doses.dose, *own)
        score, *rest = (pad(field.cpu(), (0, missing)) for field in fields)
        information = pad(projection.information.cpu(), (0, missing, 0, missing))
        parts.append((score, information, *rest))
    if not parts:
        empty = torch.zeros(0, n_columns)
        square = torch.zeros(0, n_columns, n_columns)
        long = empty.long()
        return Cells(Projection(empty, square), long, long, empty, empty, empty, empty), shifts
    score, information, *rest = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Cells(Projection(score, information), *rest), shifts


def _measured_targets(model: SAMSVAE) -> torch.Tensor | None:
    """Gene that each perturbation targets; none where its count is no negative binomial."""
    module = model.module
    if module.gene_likelihood not in ("nb", "poisson"):
        return None
    part = getattr(module, "direct_effects", None)
    if part is None:
        part = getattr(module, "gene_effects", None)
    return None if part is None or not (part.target >= 0).any() else part.target


def _own_counts(
    module: Any,
    tensors: dict[str, torch.Tensor],
    outputs: dict[str, Any],
    doses: Doses,
    target: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts of the targets of cells, expected counts at their states, dispersions."""
    nothing = torch.zeros_like(doses.dose, dtype=torch.float32)
    if target is None:
        return nothing, nothing, nothing
    gene = target[doses.perturbation]
    measured = (gene >= 0) & (doses.dose > 0)
    gene = gene.clamp(min=0)
    generative = module._get_generative_input(tensors, outputs)
    generative |= {"z": outputs["qz"].loc, "gene_effects": None}
    px = module.generative(**generative)["px"]
    mean = px.rate if module.gene_likelihood == "poisson" else px.mu
    dispersion = mean.new_zeros(()) if module.gene_likelihood == "poisson" else 1 / px.theta
    x = tensors[REGISTRY_KEYS.X_KEY].to(mean)
    return (
        x.gather(1, gene),
        mean.gather(1, gene) * measured,
        dispersion.expand_as(mean).gather(1, gene),
    )


def _calibrated(
    cells: Cells, offset: NDArray[np.float32], variation: NDArray[np.float32]
) -> Cells:
    """Scores and information in units of the variation among controls."""
    score, information = cells.projection
    own = information.diagonal(dim1=-2, dim2=-1)
    score = score - torch.as_tensor(offset)[cells.perturbation] * own
    scale = torch.as_tensor(variation)[cells.perturbation].clamp(min=0.1)
    return cells._replace(projection=Projection(score / scale, information / scale.unsqueeze(-1)))


def multiples_of(model: SAMSVAE, effect: str) -> torch.Tensor | None:
    """What effects are multiplied with to be those of some of the cells with their label."""
    if effect == "as_labelled":
        return None
    if effect != "where_it_took":
        raise ScreenError(f"effect={effect!r} is unknown; use 'as_labelled' or 'where_it_took'.")
    found = efficacy_of(model)
    target = torch.as_tensor(found.target)
    return multiples_where_it_took(found.solution, target).to(model.device)


# -- tables ---------------------------------------------------------------------------------------


def perturbed_probability(
    model: SAMSVAE, adata: AnnData, indices: Sequence[int] | None, own_gene: bool
) -> pd.DataFrame:
    """See ``SAMSVAE.get_perturbed_probability``."""
    found = efficacy_of(model, own_gene=own_gene)
    manager = model.get_anndata_manager(adata, required=True)
    cells = np.arange(adata.n_obs) if indices is None else np.asarray(indices)
    dose = padded_columns(manager, SAMS_REGISTRY_KEYS.DOSE_KEY)
    perturbed = cells[(dose[cells] > 0).any(1)]
    guides = _guides(manager, found)
    read, _ = _read(model, adata, perturbed, guides.codes, len(found.guides), own_gene)
    probability = cell_probability(
        _calibrated(read, found.offset, found.variation),
        torch.as_tensor(found.target),
        found.solution,
    )
    row, column = np.nonzero(dose[perturbed] > 0)
    names = np.asarray(model.perturbation_names)
    table = pd.DataFrame(
        {
            "perturbation": names[read.perturbation.numpy()[row, column]],
            "guide": np.asarray(found.guides)[read.guide.numpy()[row, column]],
            "probability": probability.numpy()[row, column],
        },
        index=pd.Index(adata.obs_names[perturbed[row]], name="cell"),
    )
    return table


def guide_table(model: SAMSVAE, credible_level: float, own_gene: bool) -> pd.DataFrame:
    """See :func:`scvi_sams.tl.guides`."""
    found = efficacy_of(model, own_gene=own_gene)
    target = torch.as_tensor(found.target)
    known = efficacies(found.solution, target, credible_level)
    names = np.asarray(model.perturbation_names)
    size = _network_effects(model).norm(dim=1).cpu() * found.solution.base
    took = multiples_where_it_took(found.solution, target)
    p_value, similarity = disagreement(
        found.shift, found.n_cells.astype(float), found.covariance, found.target
    )
    table = pd.DataFrame(
        {
            "target": names[found.target],
            "n_cells": found.n_cells,
            "efficacy": known.mean,
            "efficacy_lower": known.lower,
            "efficacy_upper": known.upper,
            "can_be_told": known.can_be_told,
            "effect_where_it_took": (size * took)[target],
            "similarity": similarity,
            "p_value": p_value,
        },
        index=pd.Index(found.guides, name="guide"),
    )
    tested = table["p_value"].notna()
    table["q_value"] = np.nan
    if tested.any():
        table.loc[tested, "q_value"] = stats.false_discovery_control(table.loc[tested, "p_value"])
    return table


# -- kept in the model ----------------------------------------------------------------------------


def _packed(found: Efficacy) -> dict[str, Any]:
    """Plain data, as the file of a model holds it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Prior):
            return [float(value.a), float(value.b)]
        if hasattr(value, "_asdict"):
            return {name: plain(field) for name, field in value._asdict().items()}
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return plain(found)


def _unpacked(kept: dict[str, Any]) -> Efficacy:
    def mixture(fields: dict[str, Any]) -> Mixture:
        tensors = {k: torch.as_tensor(v) for k, v in fields.items() if k != "prior"}
        return Mixture(**tensors, prior=Prior(*fields["prior"]))

    fields = dict(kept)
    given = dict(fields.pop("solution"))
    solution = Solution(
        one=mixture(given.pop("one")),
        two=mixture(given.pop("two")),
        **{name: torch.as_tensor(value) for name, value in given.items()},
    )
    return Efficacy(**fields, solution=solution)
