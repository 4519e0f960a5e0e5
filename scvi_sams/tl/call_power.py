"""How surely an effect is called: scores of masks, thresholds, power, in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from scvi import REGISTRY_KEYS

from scvi_sams.data.conditions import Conditions
from scvi_sams.model.read_outs import inclusion_and_slab, require_effects
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl.effect_mixture import learn_effects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scvi_sams.model import SAMSVAE
    from scvi_sams.tl.effect_mixture import EffectMixture


_N_STATES = 50  # basal states over which what counts tell is averaged
_STEP = 0.2  # of a finite difference, in standard deviations of the basal state
_N_BISECTIONS = 60  # halve an interval to the last bits of a double


class CallingProblem(NamedTuple):
    """What the cells of perturbations can say of their masks, each perturbations x latents.

    The score of an effect e is ``Normal(curvature * e, variance)``, the log-odds of its mask
    ``at_zero + per_square * score**2``; ``score`` is that of the fit.
    """

    score: NDArray[np.float64]
    curvature: NDArray[np.float64]
    variance: NDArray[np.float64]
    at_zero: NDArray[np.float64]
    per_square: NDArray[np.float64]

    def log_odds(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds of the masks at scores, ``(..., n_perturbations, n_latent)``."""
        return self.at_zero + self.per_square * score**2

    def least_score(self, threshold: float) -> NDArray[np.float64]:
        """Size of the score from which a mask is called; infinite where none suffices."""
        with np.errstate(divide="ignore", invalid="ignore"):
            square = np.maximum(threshold - self.at_zero, 0) / self.per_square
        return np.sqrt(np.where(self.per_square > 0, square, np.inf))

    def power(self, effect: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
        """Probability that masks of effects are called."""
        spread = np.sqrt(np.maximum(self.variance, np.finfo(float).tiny))
        return power(self.curvature * effect / spread, self.least_score(threshold) / spread)

    def least_effect(self, threshold: float, wanted: float) -> NDArray[np.float64]:
        """Size of the effect whose mask is called with the wanted power."""
        spread = np.sqrt(np.maximum(self.variance, np.finfo(float).tiny))
        signal = least_effect(self.least_score(threshold) / spread, wanted)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.curvature > 0, signal * spread / self.curvature, np.inf)


@torch.no_grad()
def calling_problem(
    model: SAMSVAE,
    caller: str,
    factor: float = 1.0,
    control_factor: float = 1.0,
    depth_factor: NDArray[np.float64] | float = 1.0,
) -> CallingProblem:
    """How the masks of a fit are judged.

    Parameters
    ----------
    model
        A trained model whose masks follow from closed-form updates.
    caller
        Name of the function, for errors.
    factor, control_factor
        Of the numbers of cells of perturbations and of controls.
    depth_factor
        Of what a cell tells of each of the networks' coordinates.
    """
    effects = require_effects(model, caller, masks=True)
    closed_form, n_cells = model.module.closed_form, model.module.n_training_cells
    if closed_form is None:
        raise NotImplementedError(
            f"{caller}: how surely a mask is called follows from closed-form updates, and this "
            "model was fitted by gradients. Make it with global_inference='closed_form'."
        )
    if effects.is_query:
        raise NotImplementedError(
            f"{caller}: of a query, the cells of the reference are not there. Ask the model that "
            "the reference was fitted by, or fit all cells together."
        )
    n = effects.n_perturbations
    of_depth = torch.as_tensor(depth_factor, dtype=effects.slab_mean.dtype, device=model.device)
    evidence = closed_form.evidence(effects, n_cells, factor * of_depth)
    score, curvature, at_zero, per_square = (
        values.expand(effects.n_rows, -1)[:n].double().cpu().numpy()
        for values in (closed_form.scores(effects, n_cells), *evidence)
    )
    # As many cells a batch as controls have.
    batch = np.asarray(model.reference_cells_[REGISTRY_KEYS.BATCH_KEY]).ravel().astype(int)
    share = np.bincount(batch, minlength=model.summary_stats.n_batch) / len(batch)
    of_batch = torch.as_tensor(control_factor * n_cells * share).float().to(model.device)
    basal = closed_form.basal_curvature(effects, of_batch, of_depth).double().cpu().numpy()
    # Scores are against a basal mean that is learned from few cells, too.
    variance = curvature + curvature**2 / np.maximum(basal, 1e-12)
    return CallingProblem(score, curvature, variance, at_zero, per_square)


_EVIDENCE_CELLS = 100.0  # where a fit has no limit: the same background as by default
_UNKNOWN = 1e3  # error of an effect of which no cell tells, far beyond any effect


class LearnedEffects(NamedTuple):
    """What the scores of a fit say of all effects together.

    Attributes
    ----------
    rows, latents
        Perturbations that are no nulls and have cells, and latents that they use: those of the
        effects. No latents, and no effects, if no mask is on.
    effects
        Their distribution, and the excess of the noise.
    background
        Standard deviation of what is no mechanism.
    """

    rows: NDArray[np.int64]
    latents: NDArray[np.int64]
    effects: EffectMixture | None
    background: float

    @property
    def excess(self) -> float:
        """Variance of scores about their effects, in units of what it should be."""
        return 1.0 if self.effects is None else self.effects.excess


def learned_effects(model: SAMSVAE, problem: CallingProblem) -> LearnedEffects:
    """Learn the distribution of the effects of a fit from its scores."""
    names = model.perturbation_names
    rows = ~np.isin(names, null_perturbations(names)) & (problem.curvature > 0).any(1)
    on = inclusion_and_slab(model, "learned_effects")[0].to_numpy() > 0.5
    latents = on[rows].any(0)
    evidence_cells = model.module.closed_form.mask_evidence_cells
    background = (evidence_cells or _EVIDENCE_CELLS) ** -0.5
    effects = None
    if latents.any():
        chosen = np.ix_(rows, latents)
        curvature, known = problem.curvature[chosen], problem.curvature[chosen] > 1e-6
        curvature = np.where(known, curvature, 1.0)
        estimate = np.where(known, problem.score[chosen] / curvature, 0.0)
        error = np.where(known, np.sqrt(problem.variance[chosen]) / curvature, _UNKNOWN)
        effects = learn_effects(estimate, error, background / 2)
    return LearnedEffects(np.flatnonzero(rows), np.flatnonzero(latents), effects, background)


@torch.inference_mode()
def depth_factor(model: SAMSVAE, depth: float) -> NDArray[np.float64] | float:
    """How much more a cell tells of each of the networks' coordinates at another depth."""
    if depth == 1:
        return 1.0
    if not model.module.is_count_model:
        raise NotImplementedError("plan_screen: depth is of counts, and this model has none.")
    cells = model.counterfactual(n_cells=_N_STATES, seed=0)
    nothing = Conditions.from_request({}, model.perturbation_names)
    draws = cells.draw(1, nothing)
    px = cells.decode(nothing, 0, draws)
    mean = px.mean.squeeze(0)
    theta = getattr(px, "theta", None)
    dispersion = 0.0 if theta is None else 1 / theta.expand_as(px.mean).squeeze(0)
    basal = cells.population.basal
    information = torch.zeros(2, basal.shape[1])
    for coordinate in range(basal.shape[1]):
        step = torch.zeros_like(basal)
        step[:, coordinate] = _STEP / 2
        ends = [_mean_at(cells, basal + sign * step, nothing, draws) for sign in (-1.0, 1.0)]
        square = ((ends[1] - ends[0]) / _STEP).square()
        for row, k in enumerate((1.0, depth)):
            noise = mean.clamp(min=1e-8) / k + dispersion * mean.square()
            information[row, coordinate] = (square / noise).sum(1).mean()
    ratio = information[1] / information[0].clamp(min=1e-12)
    statistics = model.module.closed_form.statistics
    n_cells = statistics.n_cells(model.module.n_training_cells)
    gain = (n_cells * statistics.curvature).sum(0) / n_cells.sum()
    gain = gain.clamp(1e-6, 1 - 1e-4).cpu()
    precision = gain / (1 - gain)
    deeper = ratio * precision
    return (deeper / (1 + deeper) / gain).double().numpy()


def _mean_at(cells: Any, basal: torch.Tensor, nothing: Conditions, draws: Any) -> torch.Tensor:
    population = cells.population._replace(basal=basal)
    return replace(cells, population=population).decode(nothing, 0, draws).mean.squeeze(0)


def power(
    signal: NDArray[np.float64] | float, least: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    r"""Probability that :math:`|z| \ge c` for :math:`z \sim \mathrm{Normal}(\mu, 1)`.

    Examples
    --------
    >>> power(2.8, 1.96).round(2)
    np.float64(0.8)
    """
    return ndtr(np.abs(signal) - least) + ndtr(-np.abs(signal) - least)


def least_effect(least: NDArray[np.float64] | float, wanted: float) -> NDArray[np.float64]:
    r"""Smallest :math:`\mu \ge 0` for which :math:`|z| \ge c` has the wanted probability.

    Examples
    --------
    >>> least_effect(1.96, 0.8).round(2)
    np.float64(2.8)
    """
    least = np.asarray(least, dtype=np.float64)
    finite = np.where(np.isfinite(least), least, 0.0)
    low, high = np.zeros_like(finite), finite + 10.0
    for _ in range(_N_BISECTIONS):
        middle = (low + high) / 2
        enough = power(middle, finite) >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    high = np.where(power(0.0, finite) >= wanted, 0.0, high)
    return np.where(np.isfinite(least), high, np.inf)[()]


# -- thresholds -----------------------------------------------------------------------------------


def calling_threshold(log_odds: NDArray[np.float64], fdr: float) -> float:
    r"""Log-odds that one entry more would need to be called by :func:`bayesian_q_value`.

    Examples
    --------
    >>> round(calling_threshold(np.array([-9.0]), 0.1), 2)  # 10% are the odds of 1 to 9
    2.2
    """
    error = np.sort(1 / (1 + np.exp(np.minimum(log_odds.ravel(), 700))))
    number = np.arange(len(error) + 1)
    total = np.concatenate([[0.0], np.cumsum(error)])
    # Between its neighbours, an entry may have the error that keeps the mean at the rate.
    most = fdr * (number + 1) - total
    follows = np.concatenate([[0.0], error])
    allowed = np.minimum(most, np.append(error, 1.0))
    possible = (most >= follows) & (allowed > 0)
    largest = min(float(allowed[possible].max()), 1 - 1e-12)
    return float(np.log((1 - largest) / largest))


def null_threshold(real: NDArray[np.float64], null: NDArray[np.float64], fdr: float) -> float:
    """Log-odds that one perturbation more would need to be called against a null.

    By the estimate of :func:`calibrated_q_value`; infinite where no log-odds suffice.

    Parameters
    ----------
    real, null
        Log-odds, perturbations x latents.
    """
    n_real, n_null = len(real), len(null)
    threshold = np.concatenate([[-np.inf], np.unique(null)])  # it must be above one of these

    def rate(of_real: NDArray[np.float64], of_null: NDArray[np.float64]) -> NDArray[np.float64]:
        more, false = (
            len(values) - np.searchsorted(np.sort(values), threshold, side="right")
            for values in (of_real, of_null)
        )
        return (1 + false) / (n_null + 1) * (n_real + 1) / (more + 1)

    estimate = np.maximum(rate(real.max(1), null.max(1)), rate(real.ravel(), null.ravel()))
    enough = estimate <= fdr
    return float(threshold[enough].min()) if enough.any() else np.inf


def bh_threshold(p_value: NDArray[np.float64], fdr: float) -> float:
    """p-value that one test more would need to be called by Benjamini and Hochberg.

    Examples
    --------
    >>> bh_threshold(np.array([0.001, 0.4, 0.5, 0.9]), 0.1)
    0.04
    """
    ordered = np.sort(p_value)
    number = np.arange(1, len(ordered) + 2)
    level = fdr * number / len(number)
    n_below = np.searchsorted(ordered, level, side="right")
    return float(level[n_below >= number - 1].max())


def bayesian_calls(log_odds: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """Calls of :func:`bayesian_q_value`, without its tables, for scores that do not tie."""
    error = 1 / (1 + np.exp(np.clip(log_odds, -700, 700)))
    ordered = np.sort(error, axis=None)
    n_called = int((np.cumsum(ordered) <= fdr * np.arange(1, len(ordered) + 1)).sum())
    return error <= ordered[n_called - 1] if n_called else np.zeros_like(error, dtype=bool)
