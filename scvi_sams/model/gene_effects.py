"""What cells say of single genes beyond a fitted model: sums, fit after training, table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from scvi import REGISTRY_KEYS

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import unknown_perturbations
from scvi_sams.data.conditions import padded_to_csr
from scvi_sams.data.field import registered_conditions
from scvi_sams.data.matrices import CHUNK_CELLS, DiskMatrix, is_on_disk, rows_at_once
from scvi_sams.data.tables import log_expression
from scvi_sams.model.counterfactual import COUNTS_PER, draw_cells
from scvi_sams.model.prediction import compared_means
from scvi_sams.module.base import CellPopulation
from scvi_sams.module.doses import Doses
from scvi_sams.module.gene_effects import (
    ExpressionCurve,
    absorbed_by_residuals,
    absorbed_by_validation,
    product,
    shrunk,
    solve,
)
from scvi_sams.module.likelihood import expected_log_normalized_expression

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from scvi_sams.data import Conditions
    from scvi_sams.model.samsvae import SAMSVAE


_MIN_CONTROLS = 50  # of fewer, their own noise is most of every difference from them
# Weight of a gene's pooled variance: fewer cells know a variance to a third at best. With 10 or 40
# the errors of effects move by less than a hundredth of themselves (Papalexi, simulated screens).
_PRIOR_CELLS = 20
_RIDGE = 1e-6  # of the information on a perturbation, or what is not told apart has no solution


# -- one pass over the training cells -------------------------------------------------------------


class ResponseSums(NamedTuple):
    """Sums over perturbed cells, in ``log2(1 + 1e4 x / library)`` against the mean of controls.

    Attributes
    ----------
    score
        Of dose times difference from the controls of the cell's batch, perturbations x genes.
    squares
        Of squared differences of the cells of each perturbation, perturbations x genes.
    coupling
        Of products of doses, perturbations x perturbations.
    weight, n_cells
        Of doses, and number of cells, perturbations x batches.
    n_controls
        Controls that each batch is compared with; all where it has none.
    control_variance, control_dof
        Pooled variance of controls within batches, by gene, and its degrees of freedom.
    one_count
        What a single count adds to the log expression of a cell of median library.
    """

    score: NDArray[np.float64]
    squares: NDArray[np.float64]
    coupling: sparse.csr_matrix
    weight: NDArray[np.float64]
    n_cells: NDArray[np.float64]
    n_controls: NDArray[np.float64]
    control_variance: NDArray[np.float64]
    control_dof: float
    one_count: float

    def errors(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Standard errors of effects at dose one, and which of them the counts tell.

        The variance of a gene within a perturbation is drawn to that of all. No mean of cells is
        known better than to one count among them: where that is more, it is a bound.
        """
        information = self.coupling.diagonal()[:, None]
        n_cells = self.n_cells.sum(1)[:, None]
        residual = np.maximum(self.squares - self.score**2 / np.maximum(information, 1e-12), 0)
        dof = np.maximum(n_cells - 1, 0)
        of_controls = self.control_dof * self.control_variance
        pooled = (residual.sum(0) + of_controls) / (dof.sum() + self.control_dof)
        variance = (_PRIOR_CELLS * pooled + residual) / (_PRIOR_CELLS + dof)
        least = self.one_count**2 / np.maximum(n_cells, 1)
        is_told = variance > least
        variance = np.maximum(variance, least)
        share = ((self.weight / np.maximum(information, 1e-12)) ** 2 / self.n_controls).sum(1)
        control = (_PRIOR_CELLS * pooled + of_controls) / (_PRIOR_CELLS + self.control_dof)
        control = np.maximum(control, self.one_count**2 / self.n_controls.sum())
        variance = variance / np.maximum(information, 1e-12) + share[:, None] * control
        return np.sqrt(variance), is_told


def response_sums(
    model: SAMSVAE, cells: NDArray[np.int64], doses: sparse.csr_matrix
) -> ResponseSums:
    """Sum up what cells received and how they differ from controls; each is read once.

    Parameters
    ----------
    model
        A model with its AnnData, sparse, dense or backed.
    cells
        Positions of the cells, increasing.
    doses
        What all cells of the AnnData received, cells x perturbations.
    """
    manager = model.adata_manager
    n_contexts, n_genes = model.module.n_contexts, model.summary_stats.n_vars
    n_batch = model.summary_stats.n_batch * n_contexts
    batch = np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY)).ravel().astype(int)
    batch = batch * n_contexts + _contexts(model)  # controls are those of batch and context
    received = np.diff(doses.indptr) > 0
    controls, perturbed = cells[~received[cells]], cells[received[cells]]

    total, squares, n_controls = (np.zeros((n_batch, n)) for n in (n_genes, n_genes, 1))
    libraries = []
    for rows, y, library in _log_expression(model, controls):
        member = _member(batch[rows], n_batch)
        total += (member @ y).toarray()
        squares += (member @ y.power(2)).toarray()
        n_controls += member.sum(1).reshape(-1, 1)
        libraries.append(library)
    mean = np.where(n_controls > 0, total, total.sum(0)) / np.where(
        n_controls > 0, n_controls, n_controls.sum()
    )
    deviations = np.maximum((squares - n_controls * mean**2 * (n_controls > 0)).sum(0), 0)
    control_dof = max(float(n_controls.sum() - (n_controls > 0).sum()), 1.0)

    n_perturbations = doses.shape[1]
    score, of_squares = np.zeros((2, n_perturbations, n_genes))
    coupling = sparse.csr_matrix((n_perturbations, n_perturbations))
    weight, n_cells = np.zeros((2, n_perturbations, n_batch))
    for rows, y, library in _log_expression(model, perturbed):
        dose = doses[rows].astype(np.float64)
        has = dose.copy()
        has.data[:] = 1
        known = np.unique(dose.indices)
        score[known] += (dose[:, known].T @ y).toarray()
        # About the mean of controls, which is subtracted where there are no counts below.
        centred = y.copy()
        row_of_entry = np.repeat(batch[rows], np.diff(y.indptr))
        centred.data = y.data * (y.data - 2 * mean[row_of_entry, y.indices])
        of_squares[known] += (has[:, known].T @ centred).toarray()
        coupling = coupling + dose.T @ dose
        of_batch = _member(batch[rows], n_batch).T
        weight += (dose.T @ of_batch).toarray()
        n_cells += (has.T @ of_batch).toarray()
        libraries.append(library)
    score -= weight @ mean
    of_squares += n_cells @ mean**2
    return ResponseSums(
        score,
        of_squares,
        coupling.tocsr(),
        weight,
        n_cells,
        np.where(n_controls > 0, n_controls, n_controls.sum()).ravel(),
        deviations / control_dof,
        control_dof,
        float(np.log2(1 + COUNTS_PER / np.median(np.concatenate(libraries)))),
    )


def of_each_alone(score: NDArray[np.float64], coupling: sparse.csr_matrix) -> NDArray[np.float64]:
    """Least squares effects of perturbations; those that always come together share theirs."""
    ridge = coupling + _RIDGE * sparse.diags(coupling.diagonal())
    return spsolve(ridge.tocsc(), score).reshape(score.shape)


def _contexts(model: SAMSVAE) -> NDArray[np.int64]:
    """Context of each cell, zero where there are none."""
    if model.module.n_contexts == 1:
        return np.zeros(model.adata.n_obs, dtype=np.int64)
    codes = model.adata_manager.get_from_registry(SAMS_REGISTRY_KEYS.CONTEXT_KEY)
    return np.asarray(codes).ravel().astype(np.int64)


def _member(row: NDArray[np.int64], n_rows: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(row)), (row, np.arange(len(row)))), (n_rows, len(row)))


def _log_expression(
    model: SAMSVAE, cells: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], sparse.csr_matrix, NDArray[np.float64]]]:
    """Chunks of cells, their log expression and their libraries."""
    manager = model.adata_manager
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    if is_on_disk(counts):
        counts = DiskMatrix(counts)
    elif sparse.issparse(counts):
        counts = counts.tocsr()
    sizes = None
    if REGISTRY_KEYS.SIZE_FACTOR_KEY in manager.data_registry:
        sizes = np.asarray(manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY)).ravel()
    is_sparse = getattr(counts, "is_sparse", sparse.issparse(counts))
    n_at_once = CHUNK_CELLS if is_sparse else rows_at_once(counts)
    for start in range(0, len(cells), n_at_once):
        rows = cells[start : start + n_at_once]
        y = sparse.csr_matrix(counts[rows], dtype=np.float64)
        library = np.asarray(y.sum(1)).ravel() if sizes is None else sizes[rows].astype(float)
        known = library > 0
        yield rows, log_expression(y, np.where(known, library, np.inf), COUNTS_PER), library[known]


# -- the fit --------------------------------------------------------------------------------------

_MAX_SHARE_ERROR = 0.1  # of a share from validation cells: it widens an interval by a twentieth
_MAX_ABSORBED = 0.9  # beyond, the residuals would be nothing but effects
# Of the noise that a model absorbed, what its effects have as an error: all of it in a projection,
# less in a fit that shrinks. Measured on seven screens, effects are best at a third to one.
_OWN_NOISE = 0.5
_LEAST_NOISE = 1e-3  # which nobody could tell
_N_STATES = 50  # basal states; effects are differences of the same states, which vary little
_ROWS_AT_ONCE = 2_000_000  # elements of decoded states x genes
_GRID = torch.arange(-8.0, 8.5, 0.5)  # log fold changes, as far as counts per 10,000 reach


def fit_gene_effects(model: SAMSVAE) -> str | None:
    """Learn what the latents leave over of each perturbation and gene, from the training cells.

    Returns
    -------
    A sentence on why there is nothing to learn from, or ``None``.
    """
    module = model.module
    if module.gene_effects is None:
        return "gene_effects=False."
    if not module.is_count_model:
        return "Effects on single genes are of counts, and this model has none."
    if model.adata is None:
        return "Effects on single genes are learned from the cells of an AnnData; there is none."
    conditions = registered_conditions(model.adata_manager)
    cells = np.sort(np.asarray(model.train_indices))
    n_controls = int(conditions.is_control[conditions.codes[cells]].sum())
    if n_controls < _MIN_CONTROLS:
        return (
            f"Effects on single genes are differences from controls, of which {n_controls} were "
            f"trained on: at least {_MIN_CONTROLS} are needed."
        )
    responses = _responses(model, conditions)
    doses = padded_to_csr(conditions.index, responses, len(model.perturbation_names))
    sums = response_sums(model, cells, doses[conditions.codes])
    free = sums.coupling.diagonal() > 0
    if module.effects is not None:
        free &= ~module.effects.frozen[: len(free), 0].cpu().numpy()
    rows = np.flatnonzero(free)
    if len(rows) == 0:
        return None  # a query without new perturbations, whose effects are known
    fitted = module.gene_effects
    nothing = torch.zeros(len(rows), model.summary_stats.n_vars)
    fitted.set_rows(rows, nothing, nothing, nothing + 1)
    predicted = _predicted(model, conditions, responses, cells)
    weight = torch.from_numpy(sums.weight.sum(1)[rows]).float().unsqueeze(1)
    information = torch.from_numpy(sums.coupling.diagonal()[rows]).float().unsqueeze(1)
    score = torch.from_numpy(sums.score[rows]).float() - predicted.score[rows]
    error, told = (torch.from_numpy(table[rows]) for table in sums.errors())
    error = error.float()
    absorbed = absorbed_by_residuals(score / information, error, told)
    held_out = _held_out_residuals(model, conditions, responses, doses, cells, rows)
    if held_out is not None:
        seen, residual = held_out
        share, error_of_share = absorbed_by_validation(
            (predicted.score[rows] / information)[seen],
            (score / information)[seen] - residual,
            error[seen].square(),
            told[seen],
        )
        if error_of_share < _MAX_SHARE_ERROR:
            absorbed = min(max(share, 0.0), _MAX_ABSORBED)
    fitted.absorbed.fill_(absorbed)
    coupling, target = sums.coupling[rows][:, rows], fitted.target[rows].cpu()
    denoised = _denoised(predicted.score[rows], coupling, _OWN_NOISE * absorbed, error, target)
    solution = solve(score - product(coupling, denoised), coupling, error, target)
    # Where the cells of the perturbation are: at their mean dose, of which an effect is a share.
    dose = information / weight
    before = (predicted.at_rest[rows] + predicted.score[rows]) / weight
    at_rest = predicted.at_rest[rows] / weight
    cleaned = torch.maximum(before + dose * denoised, torch.minimum(before, at_rest))
    # The residuals hold the noise that the model did not absorb; the rest is an error of its own
    # effect, whose draws of masks and effects take the networks as known.
    variance = (1 - absorbed) * solution.variance + absorbed * error.square()
    spread = dose * variance.sqrt()
    # No level is known that is below the error that it is known to: fold changes from nothing, or
    # to nothing, are not.
    after = torch.maximum(cleaned + dose * solution.mean, spread)
    change = predicted.curve.at(cleaned) - predicted.curve.at(before)
    change += predicted.curve.at(after) - predicted.curve.at(torch.maximum(cleaned, spread))
    # A fold change is log-normal: its relative variance is that of the expression.
    relative = spread / predicted.curve.slope(after)
    std = relative.square().log1p().sqrt()
    fitted.set_rows(rows, change / dose, std / dose, solution.lfsr)
    return None


def _denoised(
    score: torch.Tensor,
    coupling: sparse.csr_matrix,
    noise: float,
    error: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """What is to be added to effects of the model that are noise of the cells learned by heart.

    Its effects on single genes are shrunk as residuals are, with the error that they have.
    """
    if noise < _LEAST_NOISE:
        return torch.zeros_like(score)
    effect = torch.from_numpy(of_each_alone(score.double().numpy(), coupling)).float()
    return shrunk(effect, math.sqrt(noise) * error, target).mean - effect


def _held_out_residuals(
    model: SAMSVAE,
    conditions: Conditions,
    responses: NDArray[np.float32],
    doses: sparse.csr_matrix,
    cells: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which of the perturbations have validation cells, and the mean residuals of these.

    Against the controls that were trained on, whose noise is then in both residuals.
    """
    others = model.validation_indices
    if others is None or len(others) == 0:
        return None
    is_control = conditions.is_control[conditions.codes]
    others = np.asarray(others)
    others = np.sort(others[~is_control[others]])
    if len(others) == 0:
        return None
    both = np.sort(np.concatenate([cells[is_control[cells]], others]))
    sums = response_sums(model, both, doses[conditions.codes])
    predicted = _predicted(model, conditions, responses, others)
    information = torch.from_numpy(sums.coupling.diagonal()[rows]).float().unsqueeze(1)
    residual = torch.from_numpy(sums.score[rows]).float() - predicted.score[rows]
    seen = information.squeeze(1) > 0
    return seen, residual[seen] / information[seen]


def _responses(model: SAMSVAE, conditions: Conditions) -> NDArray[np.float32]:
    device = model.device
    doses = Doses(
        torch.as_tensor(conditions.index, dtype=torch.long, device=device),
        torch.as_tensor(conditions.dose, device=device),
    )
    with torch.inference_mode():
        return model.module.expected_responses(doses).dose.cpu().numpy()


class _Predicted(NamedTuple):
    """What the model says of the cells that it was trained on.

    Attributes
    ----------
    score
        Sum over cells of dose times effect, perturbations x genes.
    at_rest
        Sum over cells of dose times log expression without a perturbation, perturbations x genes.
    curve
        Mean log expression without a perturbation as a function of a fold change of its gene.
    """

    score: torch.Tensor
    at_rest: torch.Tensor
    curve: ExpressionCurve


@torch.inference_mode()
def _predicted(
    model: SAMSVAE,
    conditions: Conditions,
    responses: NDArray[np.float32],
    cells: NDArray[np.int64],
) -> _Predicted:
    """Sum up effects of conditions over few basal states, the same for all.

    No condition has more states than cells: a single cell is noisier than a state.
    """
    module, device = model.module, model.device
    drawn = draw_cells(model, "prior", _N_STATES, None, None, seed=0)
    population = drawn.population
    with drawn.random():
        noise = torch.randn_like(population.basal)
    states = torch.arange(_N_STATES, device=device)
    nothing = torch.zeros(_N_STATES, 1, dtype=torch.long, device=device)

    def decoded(state: torch.Tensor, doses: Doses) -> tuple[CellPopulation, object]:
        fields: Any = (None if f is None else f[state] for f in population)
        of_cells = CellPopulation(*fields)
        if doses.context is not None:
            of_cells = of_cells._replace(context=doses.context)
        return of_cells, module.decode_cells(of_cells, doses, noise[state])

    at_rest, px = decoded(states, Doses(nothing, nothing.float()))
    levels = [
        expected_log_normalized_expression(px, at_rest.library, COUNTS_PER, math.exp(lfc)).cpu()
        for lfc in _GRID.tolist()
    ]
    unperturbed = expected_log_normalized_expression(px, at_rest.library, COUNTS_PER)
    curve = ExpressionCurve(_GRID, torch.stack([level.mean(0) for level in levels]))

    # States in the contexts that the cells of a condition are in, by their shares.
    n_contexts, contexts = module.n_contexts, _contexts(model)
    if n_contexts > 1:
        at_rest_in = [Doses(nothing, nothing.float(), nothing + c) for c in range(n_contexts)]
        unperturbed = torch.cat(
            [
                expected_log_normalized_expression(px, of_cells.library, COUNTS_PER)
                for of_cells, px in (decoded(states, doses) for doses in at_rest_in)
            ]
        )
    in_order = np.lexsort((contexts[cells], conditions.codes[cells]))
    context_of_cell = contexts[cells][in_order]
    n_cells = np.bincount(conditions.codes[cells], minlength=len(conditions.labels))
    n_cells[conditions.is_control] = 0
    n_states = np.minimum(n_cells, _N_STATES)
    row_condition = np.repeat(np.arange(len(n_cells)), n_states)
    row_state = np.arange(len(row_condition)) - np.repeat(np.cumsum(n_states) - n_states, n_states)
    first_cell = np.cumsum(np.bincount(conditions.codes[cells], minlength=len(n_cells)))
    first_cell -= np.bincount(conditions.codes[cells], minlength=len(n_cells))
    at_share = (row_state + 0.5) * np.repeat(n_cells / np.maximum(n_states, 1), n_states)
    row_context = context_of_cell[first_cell[row_condition] + at_share.astype(np.int64)]
    n_perturbations, n_genes = len(model.perturbation_names), unperturbed.shape[1]
    score, level = np.zeros((2, n_perturbations, n_genes))
    n_at_once = max(1, _ROWS_AT_ONCE // n_genes)
    for start in range(0, len(row_condition), n_at_once):
        rows = row_condition[start : start + n_at_once]
        state = torch.as_tensor(row_state[start : start + n_at_once], device=device)
        context = torch.as_tensor(row_context[start : start + n_at_once], device=device)
        doses = Doses(
            torch.as_tensor(conditions.index[rows], dtype=torch.long, device=device),
            torch.as_tensor(conditions.dose[rows], device=device),
            context.unsqueeze(1) if n_contexts > 1 else None,
        )
        of_cells, px = decoded(state, doses)
        effect = expected_log_normalized_expression(px, of_cells.library, COUNTS_PER)
        before = unperturbed[context * _N_STATES + state]
        change, rest = (effect - before).cpu().numpy(), before.cpu().numpy()
        share = (n_cells[rows] / n_states[rows]).astype(np.float32)
        of_row = padded_to_csr(
            conditions.index[rows], responses[rows] * share[:, None], n_perturbations
        )
        known = np.unique(of_row.indices)
        of_known = of_row[:, known].T
        score[known] += of_known @ change
        level[known] += of_known @ rest
    summed = torch.from_numpy(score).float(), torch.from_numpy(level).float()
    return _Predicted(*summed, curve)


# -- the table ------------------------------------------------------------------------------------


def gene_effects_table(
    model: SAMSVAE, perturbations: Sequence[str] | None, n_samples: int, seed: int | None
) -> pd.DataFrame:
    """See ``SAMSVAE.get_gene_effects``."""
    model._check_if_trained(warn=False)
    fitted = model.module.gene_effects
    if fitted is None or not fitted.is_fitted:
        reason = model.gene_effects_absent_ or "gene_effects=False."
        raise NotImplementedError(f"get_gene_effects: this model has none. {reason}")
    names = model.perturbation_names
    asked = names if perturbations is None else [str(name) for name in perturbations]
    if unknown := [name for name in asked if name not in names]:
        raise unknown_perturbations(unknown, names)
    genes = np.asarray(model.get_var_names())
    cells = model.counterfactual(n_cells=_N_STATES, seed=seed)
    conditions = [{name: 1.0} for name in asked]
    compared = compared_means(model, conditions, None, n_samples, "mean", cells)
    tables = []
    for name, (_, _, means, against) in zip(asked, compared, strict=True):
        row = names.index(name)
        change = np.log2(means) - np.log2(against)
        tables.append(
            pd.DataFrame(
                {
                    "perturbation": name,
                    "gene": genes,
                    "log2_fold_change": change.mean(0),
                    "sd": change.std(0),
                    "residual_log2_fold_change": _of(fitted.log_fold_change, row) / math.log(2),
                    "residual_sd": _of(fitted.std, row) / math.log(2),
                    "lfsr": _of(fitted.lfsr, row),
                    "is_target": np.arange(len(genes)) == int(fitted.target[row]),
                }
            )
        )
    return pd.concat(tables).sort_values("lfsr", kind="stable", ignore_index=True)


def _of(table: torch.Tensor, row: int) -> NDArray[np.float32]:
    return table[row].cpu().numpy()
