"""One population of cells under any condition, draw by draw of what is uncertain."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import anndata as ad
import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._arguments import checked
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.data.loader import cells_of
from scvi_sams.model.read_outs import context_code, controls_of, field_state
from scvi_sams.module.base import CellPopulation
from scvi_sams.module.doses import Doses
from scvi_sams.module.likelihood import expected_expression, expected_log_normalized_expression

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvi_sams.model.samsvae import SAMSVAE
    from scvi_sams.module.base import GlobalDraws, PerturbationVAEModule
    from scvi_sams.module.likelihood import Observation


Basal: TypeAlias = "Literal['prior', 'control'] | ad.AnnData | Sequence[int]"
"""Where basal states come from, see ``SAMSVAE.predict``."""

ExpressionScale: TypeAlias = Literal["log_normalized", "mean"]
"""Scales of effects, see ``SAMSVAE.get_average_treatment_effect``."""

COUNTS_PER = 1e4
_LEAST_TAIL = 1e-7  # probability beyond the outermost state: scrambled points may be 0
MAX_DECODED_ELEMENTS = 20_000_000  # of one tensor (draws, cells, genes)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed and leave all generators as they were; from torch's stream without one."""
    seed = checked("seed", seed)
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@dataclass(frozen=True)
class Counterfactual:
    """One population of cells, to be put under any condition.

    Made by ``model.counterfactual()``. Every analysis that is given it compares conditions over
    these cells, and draws masks and effects from where the draw of the cells ended: the same each
    time, unless there is no seed.

    Attributes
    ----------
    module
        Module of the model.
    perturbations
        Names of its perturbations.
    population
        Basal states, library sizes and covariates of the cells.
    cell_names
        Names of the cells, where they are real.
    seed
        Seed of all draws; ``None`` for torch's own stream.
    random_state
        State of the generators after the draw of the cells.
    gene_effects
        Whether conditions have the effects on single genes that latents leave over.
    multiple
        What the effects of perturbations are multiplied with to be those where they took, of each
        perturbation; ``None`` for effects as labelled.
    context
        Position of the context whose effects conditions have; ``None`` for what contexts share.

    Examples
    --------
    >>> controls = model.counterfactual("control", batch="replicate_1")  # doctest: +SKIP
    >>> scvi_sams.tl.pair_interactions(
    ...     model, ["KLF1+CEBPA"], counterfactual=controls
    ... )  # doctest: +SKIP
    """

    module: PerturbationVAEModule
    perturbations: list[str]
    population: CellPopulation
    cell_names: list[str] | None
    seed: int | None
    random_state: list[torch.Tensor]
    gene_effects: bool = True
    multiple: torch.Tensor | None = None
    context: int | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.population.basal)

    @property
    def device(self) -> torch.device:
        """Where the cells are."""
        return self.population.basal.device

    @property
    def states(self) -> torch.Tensor:
        """Basal states, cells x latents."""
        basal = self.population.basal
        return self.module.to_latents(basal, basal)[0]

    @property
    def units(self) -> str:
        """Units of effects."""
        if self.module.is_count_model:
            return f"log2(1 + {COUNTS_PER:.0f} x / library)"
        return "units of the features"

    @contextmanager
    def random(self) -> Iterator[None]:
        """Draw from where the draw of the cells ended, each time anew."""
        with seeded(self.seed, self.device):
            if self.seed is not None:
                torch.set_rng_state(self.random_state[0])
                for state in self.random_state[1:]:
                    torch.cuda.set_rng_state(state, self.device)
            yield

    @torch.inference_mode()
    def draw(self, n_samples: int, *conditions: Conditions, centred: bool = True) -> GlobalDraws:
        """Draw what conditions share from its posterior, of their perturbations only.

        Centred draws have the posterior expectation as their mean, which is for means of effects;
        draws as they are leave an effect that is zero at zero, which is for their signs.
        """
        named = np.unique(np.concatenate([asked.index[asked.dose > 0] for asked in conditions]))
        used = torch.as_tensor(named, dtype=torch.long, device=self.device)
        with self.random():
            draws = self.module.sample_globals(n_samples, used)
        if centred:
            draws = about_expectation(self.module, draws)
        draws = draws._replace(multiple=self.multiple)
        return draws if self.gene_effects else draws._replace(residual=None)

    @torch.inference_mode()
    def decode(
        self, conditions: Conditions, row: int, draws: GlobalDraws, one_draw_a_cell: bool = False
    ) -> Observation:
        """Distribution of genes under one of the conditions.

        Of shape draws x cells x genes, or cells x genes with one draw a cell.
        """
        index, dose = (
            torch.as_tensor(column[[row]], device=self.device)
            for column in (conditions.index, conditions.dose)
        )
        context = None
        if self.context is not None:
            context = torch.full((1, 1), self.context, device=self.device)
        return self.module.decode_condition(
            self.population, Doses(index, dose, context), draws, one_draw_a_cell
        )

    @torch.inference_mode()
    def unperturbed(
        self, latent: int | None = None, move: torch.Tensor | float = 0.0
    ) -> np.ndarray:
        """Expression of the cells without a perturbation, one latent moved if named; by gene."""
        nothing = Conditions.from_request({}, self.perturbations)
        population = self.population
        if latent is not None:
            moved = torch.zeros_like(population.basal)
            moved[:, latent] = move
            basal = population.basal + self.module.to_network(moved)
            population = population._replace(basal=basal)
        px = replace(self, population=population).decode(nothing, 0, self.draw(1, nothing))
        return np.asarray(self.expression(px).squeeze(0).cpu().numpy())

    def expression(self, px: Observation, scale: ExpressionScale | None = None) -> torch.Tensor:
        """Expected expression on the scale of effects, log-normalised by default where counts."""
        if scale is None:
            scale = "log_normalized" if self.module.is_count_model else "mean"
        if scale == "log_normalized":
            return expected_log_normalized_expression(px, self.population.library, COUNTS_PER)
        values = expected_expression(px)
        return COUNTS_PER * values if self.module.is_count_model else values

    @torch.inference_mode()
    def means(
        self,
        conditions: Conditions,
        row: int,
        draws: GlobalDraws,
        scale: ExpressionScale | None = None,
    ) -> np.ndarray:
        """Mean expression over the cells, draws x genes (one row if all draws are alike)."""
        # Without a perturbation, or a posterior, all draws are the same.
        is_certain = conditions.is_control[row] or self.module.effects is None
        n_draws = 1 if is_certain else draws.n_samples
        n_elements = self.n_cells * len(self.module.px_r)
        n_at_once = max(1, MAX_DECODED_ELEMENTS // n_elements)
        means = []
        for start in range(0, n_draws, n_at_once):
            drawn = draws.subset(start, min(start + n_at_once, n_draws))
            px = self.decode(conditions, row, drawn)
            means.append(self.expression(px, scale).mean(1))
        return np.asarray(torch.cat(means).cpu().numpy())


@torch.inference_mode()
def draw_cells(
    model: SAMSVAE,
    basal: Basal,
    n_cells: int,
    batch: str | None,
    library_size: float | None,
    seed: int | None,
    gene_effects: bool = True,
    multiple: torch.Tensor | None = None,
    context: str | None = None,
) -> Counterfactual:
    """See ``SAMSVAE.counterfactual``."""
    n_cells, seed = checked("n_cells", n_cells), checked("seed", seed)
    library_size = checked("library_size", library_size)
    gene_effects = checked("gene_effects", gene_effects)
    if isinstance(library_size, str):
        raise ScreenError(f"library_size={library_size!r} is no number: library sizes are given.")
    code = context_code(model, context)
    with seeded(seed, model.device):
        population, names = _population(model, basal, n_cells, code)
        state = _random_state(model.device)
    if batch is not None:
        batches = batch_names(model)
        if str(batch) not in batches:
            raise ScreenError(
                f"batch={batch!r} is not a batch of this model; it knows {', '.join(batches)}."
            )
        batch_index = torch.full_like(
            population.library, batches.index(str(batch)), dtype=torch.long
        )
        population = population._replace(batch_index=batch_index)
    if library_size is not None:
        library = torch.full_like(population.library, library_size)
        population = population._replace(library=library)
    return Counterfactual(
        model.module,
        model.perturbation_names,
        population,
        names,
        seed,
        state,
        gene_effects,
        multiple,
        code,
    )


def batch_names(model: SAMSVAE) -> list[str]:
    """Batches that a model was trained on, by their codes."""
    return list(map(str, field_state(model, REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]))


def _population(
    model: SAMSVAE, basal: Basal, n_cells: int, context: int | None
) -> tuple[CellPopulation, list[str] | None]:
    """Basal states and covariates of cells, with the names of those that are real."""
    is_prior = isinstance(basal, str) and basal == "prior"
    if model.adata is None and not (is_prior or isinstance(basal, ad.AnnData)):
        raise ScreenError(
            f"basal={basal!r} needs the cells, and the model was loaded without its AnnData; "
            "use basal='prior' or give an AnnData."
        )
    if is_prior:
        reference = model.reference_cells_
        if context is not None:
            reference = _of_context(reference, context)
        library = np.asarray(reference[REGISTRY_KEYS.SIZE_FACTOR_KEY]).ravel()
        drawn, states = prior_cells(n_cells, model.module.n_latent, library)
        states = states.to(model.device)
        tensors = {key: torch.as_tensor(values[drawn]) for key, values in reference.items()}
        return _on_device(model.module.to_network(states), tensors, model.device), None
    if isinstance(basal, ad.AnnData):
        return _given_cells(model, basal, None)
    if not isinstance(basal, str):
        return _given_cells(model, model.adata, basal)
    if basal != "control":
        raise ScreenError(
            f"basal={basal!r} is unknown; use 'prior', 'control', an AnnData or indices."
        )
    controls = np.flatnonzero(controls_of(model))
    if model.train_indices is not None:
        controls = np.intersect1d(controls, model.train_indices)
    if context is not None:
        contexts = model.adata_manager.get_from_registry(SAMS_REGISTRY_KEYS.CONTEXT_KEY)
        controls = controls[np.asarray(contexts).ravel()[controls] == context]
    if len(controls) == 0:
        where = "" if context is None else " of this context"
        raise ScreenError(
            f"basal='control' needs control cells{where}, and the model was trained without any; "
            "use basal='prior' or give the cells."
        )
    return _given_cells(
        model, model.adata, controls[torch.randint(len(controls), (n_cells,)).numpy()]
    )


def _of_context(reference: dict[str, np.ndarray], context: int) -> dict[str, np.ndarray]:
    """Reference cells of a context, or all of them moved there where it has none."""
    contexts = reference[SAMS_REGISTRY_KEYS.CONTEXT_KEY]
    if not (there := contexts.ravel() == context).any():
        return reference | {SAMS_REGISTRY_KEYS.CONTEXT_KEY: np.full_like(contexts, context)}
    return {key: values[there] for key, values in reference.items()}


def prior_cells(
    n_cells: int, n_latent: int, library: np.ndarray
) -> tuple[np.ndarray, torch.Tensor]:
    """Cells of the model's own making: their places among reference cells, and basal states.

    They are a scrambled Sobol sequence: each cell is drawn from the prior, and all together fill
    it evenly, so that means over them have less noise than those of several times as many
    independent cells.
    """
    seed = int(torch.randint(2**31, ()).item())
    engine = torch.quasirandom.SobolEngine(n_latent + 1, scramble=True, seed=seed)
    points = engine.draw(n_cells, dtype=torch.float64)
    # In no order: a part of the cells is to be like the whole.
    points = points[torch.randperm(n_cells)].clamp(_LEAST_TAIL, 1 - _LEAST_TAIL)
    place = (points[:, 0] * len(library)).long().numpy()
    drawn = np.argsort(library, kind="stable")[place]
    return drawn, torch.special.ndtri(points[:, 1:]).float()


def about_expectation(module: PerturbationVAEModule, draws: GlobalDraws) -> GlobalDraws:
    """Move several draws of effects together, so that their mean is the posterior expectation.

    A mean over 25 draws would have a fifth of the posterior's spread as noise.
    """
    if module.effects is None or draws.effects is None or draws.n_samples == 1:
        return draws
    rows = slice(None) if draws.rows is None else draws.rows
    expected = module.effects.to_network(module.effects.moments(rows)[0])
    return draws._replace(effects=draws.effects + (expected - draws.effects.mean(0)))


def _given_cells(
    model: SAMSVAE, adata: ad.AnnData, indices: Sequence[int] | None
) -> tuple[CellPopulation, list[str]]:
    """Basal states drawn from the posterior of given cells, with their own covariates."""
    adata = model._validate_anndata(adata)
    cells = cells_of(adata, indices)
    module = model.module
    basal, covariates = [], []
    for tensors in model._make_data_loader(adata, indices=cells):
        outputs = module.inference(**module._get_inference_input(tensors))
        basal.append(module.sample_basal(outputs))
        tensors = {key: value for key, value in tensors.items() if value is not None}
        covariates.append(tensors | {REGISTRY_KEYS.SIZE_FACTOR_KEY: outputs["library"]})
    stacked = {
        key: torch.cat([part[key] for part in covariates]) for key in model.reference_cells_
    }
    population = _on_device(torch.cat(basal), stacked, model.device)
    return population, adata.obs_names[cells].tolist()


def _on_device(
    basal: torch.Tensor, tensors: dict[str, torch.Tensor], device: torch.device
) -> CellPopulation:
    def moved(key: str, dtype: torch.dtype) -> torch.Tensor | None:
        return tensors[key].to(device, dtype) if key in tensors else None

    return CellPopulation(
        basal.to(device),
        tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY].to(device, torch.float32),
        moved(REGISTRY_KEYS.BATCH_KEY, torch.long),
        moved(REGISTRY_KEYS.CAT_COVS_KEY, torch.long),
        moved(REGISTRY_KEYS.CONT_COVS_KEY, torch.float32),
        moved(SAMS_REGISTRY_KEYS.CONTEXT_KEY, torch.long),
    )
