"""Whether a perturbation took in a cell, how often guides work: a mixture in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import special

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scvi_sams.module.doses import Doses
    from scvi_sams.module.networks import Potential


# -- what a cell says -----------------------------------------------------------------------------


class Projection(NamedTuple):
    """What the latent states of cells say of the multiples of their effects that they show.

    Attributes
    ----------
    score
        Effect times precision times location, shape ``(n_cells, n_columns)``.
    information
        Products of the effects of two columns under the precision, shape
        ``(n_cells, n_columns, n_columns)``; those of a column with itself on the diagonal.
    """

    score: Tensor
    information: Tensor


def project(potential: Potential, doses: Doses, effects: Tensor) -> Projection:
    r"""Reduce what counts say of a latent state to what they say of each effect's multiple.

    Given its shift a cell has :math:`f \sim \mathrm{Normal}(\mathrm{shift}, 1/g)` in each network
    dimension. Of a shift :math:`m \, d \, s` the likelihood is that of a normal in the one number
    m: ``exp(score * m - information * m**2 / 2)``.

    Parameters
    ----------
    potential
        Potentials of cells, centred at the basal mean of their batch.
    doses
        Doses (or responses) of the cells.
    effects
        Expected effect of each dose in the networks' coordinates, shape
        ``(n_cells, n_columns, n_latent)``.

    Returns
    -------
    Projection

    Raises
    ------
    ValueError
        If the potential has no gain, so that it does not depend on the shift.
    """
    if potential.gain is None:
        raise ValueError("A guide without a gain says nothing of the shift in closed form.")
    acting = doses.dose.unsqueeze(-1).to(effects.dtype) * effects
    weighted = acting * potential.gain.unsqueeze(1)
    score = (weighted @ potential.location.unsqueeze(-1)).squeeze(-1)
    return Projection(score, weighted @ acting.mT)


class Entries(NamedTuple):
    """A cell and one of its perturbations each.

    Attributes
    ----------
    score, information
        Of the multiple of its effect that the cell shows, shape ``(n_entries,)``: the log
        likelihood of a multiple m is ``score * m - information * m**2 / 2``.
    guide
        Codes of the guides, integers of shape ``(n_entries,)``.
    own
        Log-likelihood of the counts of single genes with the effects on them less that without,
        shape ``(n_entries,)``.
    """

    score: Tensor
    information: Tensor
    guide: Tensor
    own: Tensor


def without_others(projection: Projection, multiple: Tensor) -> tuple[Tensor, Tensor]:
    """Score and information of each column, given the expected multiples of the other columns.

    Parameters
    ----------
    projection
        Of ``n_cells`` cells.
    multiple
        Probability that the perturbation took times the multiple where it did, shape
        ``(n_cells, n_columns)``.
    """
    own = projection.information.diagonal(dim1=-2, dim2=-1)
    others = (projection.information @ multiple.unsqueeze(-1)).squeeze(-1) - own * multiple
    return projection.score - others, own


def log_ratio(
    score: Tensor, information: Tensor, multiple: Tensor | float, spread: Tensor | float
) -> Tensor:
    r"""Log-likelihood that the effect took less that it did not.

    Where it took, a cell shows a multiple :math:`m \sim \mathrm{Normal}(\mu, (\tau\mu)^2)` of the
    effect: a spread above zero is an effect that is graded, which without it would pass for cells
    that escaped. Where it did not take, m is zero.

    Parameters
    ----------
    score, information
        See :class:`Entries`.
    multiple, spread
        The mean :math:`\mu` and the relative standard deviation :math:`\tau`; broadcastable.

    Examples
    --------
    >>> log_ratio(torch.tensor([3.0]), torch.tensor([4.0]), 1.0, 0.0)
    tensor([1.])
    """
    variance = (multiple * spread) ** 2
    grown = 1 + variance * information
    quadratic = 2 * multiple * score - multiple**2 * information + variance * score**2
    return 0.5 * quadratic / grown - 0.5 * torch.as_tensor(grown).log()


def fold_log_ratio(
    counts: Tensor,
    mean: Tensor,
    dispersion: Tensor,
    log_fold: Tensor,
    excess: Tensor | float = 0.0,
) -> Tensor:
    """Log-likelihood of counts with a fold change less that without, elementwise.

    Parameters
    ----------
    counts, mean, log_fold
        Counts, their expected values without a fold change, and its natural logarithm.
    dispersion
        Of the negative binomial: the variance is ``mean + dispersion * mean**2``.
    excess
        What a fold change that differs between cells adds to the dispersion.

    Examples
    --------
    >>> nearly_poisson, to_nothing = torch.tensor(1e-6), torch.tensor(-1e3)
    >>> ratio = fold_log_ratio(torch.tensor(0.0), torch.tensor(2.0), nearly_poisson, to_nothing)
    >>> round(ratio.item(), 2)
    2.0
    """
    changed = _log_negative_binomial(counts, mean * log_fold.exp(), dispersion + excess)
    return changed - _log_negative_binomial(counts, mean, dispersion)


def _log_negative_binomial(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Up to terms of the counts alone."""
    theta = 1 / dispersion.clamp(min=1e-4)  # beyond, differences of gamma functions are not exact
    mean = mean.clamp(min=1e-8)
    rise = torch.lgamma(counts + theta) - torch.lgamma(theta) - counts * theta.log()
    return rise + counts * mean.log() - (counts + theta) * (mean / theta).log1p()


class Fold(NamedTuple):
    """Fold changes of the targets of perturbations, each of shape ``(n_perturbations,)``.

    Attributes
    ----------
    log_fold
        Natural logarithm at dose one.
    excess
        What it adds to the dispersion, as it differs between cells.
    """

    log_fold: Tensor
    excess: Tensor


_FOLD_VARIANCE = 4.0  # of the prior: a gene that is never seen has not fallen without end
_EXCESS_CELLS = 20.0  # that say that there is no excess: fewer know a variance to a third at best


def learned_fold(
    counts: Tensor,
    mean: Tensor,
    dispersion: Tensor,
    dose: Tensor,
    weight: Tensor,
    group: Tensor,
    fold: Fold,
) -> Fold:
    """One step of Fisher scoring for log fold changes, and their excess by moments.

    Parameters
    ----------
    counts, mean, dispersion
        See :func:`fold_log_ratio`, of entries.
    dose, weight, group
        Dose, weight (the probability that the perturbation took) and group of each entry.
    fold
        Where to start.
    """
    changed = mean * (dose * fold.log_fold[group]).exp()
    total = dispersion + fold.excess[group]
    over = 1 + changed * total

    def summed(values: Tensor) -> Tensor:
        return torch.zeros_like(fold.log_fold).index_add_(0, group, weight * values)

    slope = summed(dose * (counts - changed) / over) - fold.log_fold / _FOLD_VARIANCE
    curvature = summed(dose**2 * changed / over) + 1 / _FOLD_VARIANCE
    log_fold = (fold.log_fold + (slope / curvature).clamp(-1, 1)).clamp(-8, 8)
    # Of all entries, those with large means say most: their squares in units of their variance.
    share = changed**2 / (changed * over) ** 2
    beyond = (counts - changed).square() - changed - dispersion * changed**2
    excess = summed(share * beyond) / (
        summed(share * changed**2)
        * (1 + _EXCESS_CELLS / summed(torch.ones_like(dose)).clamp(min=1))
    ).clamp(min=1e-9)
    return Fold(log_fold, 0.5 * (fold.excess + excess.clamp(0, 4)))


# -- the mixture ----------------------------------------------------------------------------------


class Prior(NamedTuple):
    """Beta prior of the efficacy of a guide."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        """Expected efficacy."""
        return self.a / (self.a + self.b)


class Mixture(NamedTuple):
    """Posterior on a grid of multiples and spreads, the same number of nodes for each.

    Attributes
    ----------
    multiple
        Shape ``(n_perturbations, n_nodes)``.
    spread
        Shape ``(n_nodes,)``.
    weight
        Posterior of the nodes, shape ``(n_perturbations, n_nodes)``.
    log_evidence
        Log marginal likelihood against that nothing took, shape ``(n_perturbations,)``.
    efficacy
        Expected efficacy at each node, shape ``(n_guides, n_nodes)``.
    edges, mass
        Bins of efficacies, shape ``(n_guides, n_bins + 1)``, and their posterior,
        ``(n_guides, n_bins)``.
    conditional
        Posterior of the bins at each node, shape ``(n_guides, n_bins, n_nodes)``.
    prior
        Prior of efficacies that was learned.
    """

    multiple: Tensor
    spread: Tensor
    weight: Tensor
    log_evidence: Tensor
    efficacy: Tensor
    edges: Tensor
    mass: Tensor
    conditional: Tensor
    prior: Prior


# An effect is at most this many times the mean effect of all cells with the label. If its guides
# work in fewer cells than the inverse, there is little to be learned of it.
_LARGEST_MULTIPLE, _SMALLEST_MULTIPLE = 8.0, 0.7
_SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0)  # relative to the mean; more, and it is no effect
_N_MULTIPLES, _N_BINS = 12, 16
_N_ROUNDS = 5
_NEGLIGIBLE = 1e-4  # of a posterior: outside, the grid is not refined
_MAX_CELLS = 1_000  # of a guide that the grid sees: they fix an efficacy to 0.02
_ELEMENTS_AT_ONCE = 4_000_000
_PRIOR_MEANS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_PRIOR_COUNTS = (2.0, 4.0, 8.0, 16.0)


def fit_mixture(
    entries: Entries,
    target: Tensor,
    base: Tensor,
    background: Tensor,
    prior: Prior | None = None,
    *,
    all_took: bool,
) -> Mixture:
    """Multiples, spreads and efficacies on grids that are refined where the posterior is.

    Parameters
    ----------
    entries
        Cells and their perturbations.
    target
        Perturbation of each guide, integers of shape ``(n_guides,)``.
    base
        Multiple of each perturbation that its cells show on average: the grid is in units of it.
    background
        Variance of what all cells of a guide show beside its effect, in multiples, shape
        ``(n_perturbations,)``.
    prior
        Prior of the efficacies; learned over all guides by default.
    all_took
        Whether every efficacy is one: the model of one component.
    """
    n_guides, n_perturbations = len(target), len(base)
    entries = _thinned(entries, n_guides)
    spread = torch.tensor(_SPREADS, dtype=torch.float64)
    n_spreads = len(spread)
    low = torch.full((n_perturbations,), math.log(_SMALLEST_MULTIPLE), dtype=torch.float64)
    high = torch.full_like(low, math.log(1.5 if all_took else _LARGEST_MULTIPLE))
    n_bins = 1 if all_took else _N_BINS
    # Narrow at both ends, where the guides are that work always or never.
    edges = torch.sin(torch.linspace(0, math.pi / 2, n_bins + 1, dtype=torch.float64)) ** 2
    edges = edges.expand(n_guides, -1).clone()
    learns, prior = prior is None, prior or Prior(0.9 * 4, 0.1 * 4)
    for number in range(_N_ROUNDS):
        step = (high - low) / (_N_MULTIPLES - 1)
        log_multiple = low[:, None] + step[:, None] * torch.arange(_N_MULTIPLES)
        multiple = base[:, None].double() * log_multiple.exp()
        nodes = multiple.repeat_interleave(n_spreads, 1)
        spreads = spread.repeat(_N_MULTIPLES)
        centres = (
            torch.ones(n_guides, 1).double() if all_took else (edges[:, 1:] + edges[:, :-1]) / 2
        )
        table = _log_likelihood(entries, target, nodes, spreads, centres, background)
        # Uniform in the logarithm of the multiple, over the whole range of the first round.
        node_prior = (step / math.log(_LARGEST_MULTIPLE / _SMALLEST_MULTIPLE)).log()[:, None]
        node_prior = node_prior - math.log(n_spreads)
        if learns and not all_took:
            prior = _learned_prior(table, edges, target, node_prior, n_perturbations)
        bins = torch.zeros(n_guides, 1).double() if all_took else _log_mass(prior, edges)
        joint = table + bins[:, :, None]  # guides x bins x nodes
        of_guide = joint.logsumexp(1)
        total = torch.zeros_like(nodes).index_add_(0, target, of_guide) + node_prior
        log_evidence = total.logsumexp(1)
        weight = (total - log_evidence[:, None]).exp()
        conditional = (joint - of_guide[:, None]).exp()
        mass = torch.einsum("kbj,kj->kb", conditional, weight[target])
        if number == _N_ROUNDS - 1:
            break
        by_multiple = weight.reshape(n_perturbations, _N_MULTIPLES, n_spreads).sum(2)
        first, last = _support(by_multiple)
        low, high = (
            low + step * (first - 1).clamp(min=0),
            low + step * (last + 1).clamp(max=_N_MULTIPLES - 1),
        )
        if not all_took:
            edges = _refined(edges, mass)
    efficacy = torch.einsum("kbj,kb->kj", conditional, centres)
    return Mixture(nodes, spreads, weight, log_evidence, efficacy, edges, mass, conditional, prior)


def _thinned(entries: Entries, n_guides: int) -> Entries:
    """At most so many entries of a guide, evenly spaced."""
    count = torch.bincount(entries.guide, minlength=n_guides)
    if len(entries.guide) == 0 or count.max() <= _MAX_CELLS:
        return entries
    order = torch.argsort(entries.guide, stable=True)
    first = torch.cumsum(count, 0) - count
    guide = entries.guide[order]
    place = torch.arange(len(order)) - first[guide]
    share = (_MAX_CELLS / count[guide]).clamp(max=1)
    kept = order[((place + 1) * share).floor() > (place * share).floor()]
    return Entries(*(field[kept] for field in entries))


def _log_likelihood(
    entries: Entries,
    target: Tensor,
    nodes: Tensor,
    spreads: Tensor,
    efficacy: Tensor,
    background: Tensor,
) -> Tensor:
    """Of the cells of each guide, against that nothing took, guides x efficacies x nodes.

    What all cells of a guide show beside the effect is integrated out: to second order in it, and
    the second derivative as if it were known which cells took.
    """
    n_guides, n_bins, n_nodes = len(target), efficacy.shape[1], nodes.shape[1]
    table, slope = torch.zeros(2, n_guides, n_bins, n_nodes, dtype=torch.float64)
    total = torch.zeros(n_guides, dtype=torch.float64)
    n_at_once = max(1, _ELEMENTS_AT_ONCE // n_bins)
    for start in range(0, len(entries.guide), n_at_once):
        score, information, guide, own = (f[start : start + n_at_once] for f in entries)
        rho = efficacy.to(score.dtype)[guide]
        logit = rho.log() - (1 - rho).clamp(min=1e-30).log()
        log_rest = (1 - rho).clamp(min=1e-30).log()
        perturbation = target[guide]
        total.index_add_(0, guide, information.double())
        for node in range(n_nodes):
            multiple = nodes[perturbation, node].to(score.dtype)
            spread = float(spreads[node])
            took = log_ratio(score, information, multiple, spread) + own
            variance = (multiple * spread) ** 2
            shown = (multiple + variance * score) / (1 + variance * information)
            if n_bins == 1:
                cells = took[:, None]
                off = (score - information * shown)[:, None]
            else:
                odds = logit + took[:, None]
                cells = torch.nn.functional.softplus(odds) + log_rest
                off = score[:, None] - (information * shown)[:, None] * torch.sigmoid(odds)
            table[:, :, node].index_add_(0, guide, cells.double())
            slope[:, :, node].index_add_(0, guide, off.double())
    variance = background.double()[target]
    return table + (0.5 * variance / (1 + variance * total))[:, None, None] * slope.square()


def _log_mass(prior: Prior, edges: Tensor) -> Tensor:
    below = special.betainc(prior.a, prior.b, edges.numpy())
    return torch.from_numpy(np.diff(below, axis=1)).clamp(min=1e-300).log()


def _learned_prior(
    table: Tensor, edges: Tensor, target: Tensor, node_prior: Tensor, n_perturbations: int
) -> Prior:
    """The Beta prior of the most evidence, among few."""
    best, found = -math.inf, Prior(1.0, 1.0)
    for mean in _PRIOR_MEANS:
        for count in _PRIOR_COUNTS:
            prior = Prior(mean * count, (1 - mean) * count)
            of_guide = (table + _log_mass(prior, edges)[:, :, None]).logsumexp(1)
            total = torch.zeros(n_perturbations, table.shape[2], dtype=torch.float64)
            total = total.index_add_(0, target, of_guide) + node_prior
            evidence = total.logsumexp(1).sum().item()
            if evidence > best:
                best, found = evidence, prior
    return found


def _support(mass: Tensor) -> tuple[Tensor, Tensor]:
    """First and last column that are not negligible, of each row."""
    here = mass > _NEGLIGIBLE * mass.max(1, keepdim=True).values
    first = here.to(torch.int8).argmax(1)
    last = here.shape[1] - 1 - here.flip(1).to(torch.int8).argmax(1)
    return first, last


def _refined(edges: Tensor, mass: Tensor) -> Tensor:
    """As many bins over the part of each guide's bins that is not negligible, and a neighbour."""
    n_bins = mass.shape[1]
    first, last = _support(mass)
    low = edges.gather(1, (first - 1).clamp(min=0)[:, None])
    high = edges.gather(1, (last + 2).clamp(max=n_bins)[:, None])
    # In the angle, so that ends stay narrow.
    low, high = (edge.sqrt().clamp(max=1).asin() for edge in (low, high))
    share = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)
    return torch.sin(low + (high - low) * share) ** 2


def probability(entries: Entries, target: Tensor, mixture: Mixture) -> Tensor:
    """Probability that each perturbation took, averaged over multiples and spreads."""
    perturbation = target[entries.guide]
    total = torch.zeros_like(entries.score)
    for node in range(mixture.multiple.shape[1]):
        weight = mixture.weight[perturbation, node].to(total.dtype)
        if weight.max() <= 1e-6:
            continue
        multiple = mixture.multiple[perturbation, node].to(total.dtype)
        took = log_ratio(entries.score, entries.information, multiple, float(mixture.spread[node]))
        rho = mixture.efficacy[entries.guide, node].to(total.dtype).clamp(1e-6, 1 - 1e-6)
        total += weight * torch.sigmoid(took + entries.own + torch.logit(rho))
    return total


# -- effect and efficacy together -----------------------------------------------------------------


class Cells(NamedTuple):
    """What is known of perturbed cells, a column for each of their perturbations.

    Attributes
    ----------
    projection
        See :func:`project`, in units of the variation among controls.
    perturbation, guide
        Codes, integers of shape ``(n_cells, n_columns)``.
    dose
        Doses (or responses), shape ``(n_cells, n_columns)``; zero fills up the columns.
    counts, mean, dispersion
        Counts of the gene that each perturbation targets, what is expected without an effect on
        it alone, and the dispersion, each of shape ``(n_cells, n_columns)``; a mean of
        zero where there is no such gene.
    """

    projection: Projection
    perturbation: Tensor
    guide: Tensor
    dose: Tensor
    counts: Tensor
    mean: Tensor
    dispersion: Tensor


class Solution(NamedTuple):
    """Efficacies and effects.

    Attributes
    ----------
    one, two
        Posterior if every perturbation took in every cell, and if efficacies are free.
    log_fold, excess
        Of the targets under each, see :class:`Fold`, shape ``(2, n_perturbations)``.
    free
        Probability that efficacies of a perturbation are free, shape ``(n_perturbations,)``.
    base
        Multiple of its effect that the cells of a perturbation show on average.
    probability
        That each perturbation took, shape ``(n_cells, n_columns)``; zero in columns without.
    """

    one: Mixture
    two: Mixture
    log_fold: Tensor
    excess: Tensor
    free: Tensor
    base: Tensor
    probability: Tensor


_N_STEPS = 40  # of expectation maximisation
_START_SPREAD = 0.3
_EVEN_EFFECTS = 10.0  # effects without a spread that its prior counts, as null effects elsewhere
_START_PRIOR = Prior(3.6, 0.4)  # weak, until it is learned
_KNOWN = 2.0  # standard errors that an average multiple must be off zero to be a unit


def solve(
    cells: Cells,
    target: Tensor,
    log_fold: Tensor,
    *,
    background: float = 0.01,
    prior: Prior | None = None,
) -> Solution:
    r"""Solve efficacies, multiples of effects and folds of targets together, networks being fixed.

    First by expectation maximisation, in which the perturbations of a cell see what the others
    are expected to add; then on a grid (:func:`fit_mixture`), for one component (every
    perturbation took) and for two. Where the evidence for two is thin, efficacies stay near one.

    Parameters
    ----------
    cells
        Perturbed cells.
    target
        Perturbation of each guide, shape ``(n_guides,)``.
    log_fold
        Log fold changes of the targets to start from, shape ``(n_perturbations,)``.
    background
        Variance, in the units of the basal state, of what all cells of a guide may show beside
        the effect of its perturbation.
    prior
        Prior of the efficacies; learned over all guides by default.
    """
    information = cells.projection.information.diagonal(dim1=-2, dim2=-1)
    has = cells.dose > 0
    n_perturbations = len(log_fold)
    row = cells.perturbation[has]
    n_cells = torch.bincount(row, minlength=n_perturbations)
    total = torch.zeros(n_perturbations).index_add_(0, row, information[has])
    in_multiples = background * n_cells / total.clamp(min=1e-9)
    n_guides = torch.bincount(target, minlength=n_perturbations)
    error = (1 / total.clamp(min=1e-9) + in_multiples / n_guides.clamp(min=1)).sqrt()

    start = Fold(log_fold.clone(), torch.zeros_like(log_fold))
    multiple = torch.ones(n_perturbations)
    result = has.float()
    for _ in range(5 if cells.dose.shape[1] > 1 else 1):
        score, _ = without_others(cells.projection, result * multiple[cells.perturbation])
        estimate = torch.zeros(n_perturbations).index_add_(0, row, score[has])
        estimate = estimate / total.clamp(min=1e-9)
        multiple = torch.where(estimate > _KNOWN * error, estimate, 1.0)
    base, fold_of_one = multiple, start
    for _ in range(_N_STEPS // 2):
        fold_of_one = _updated_fold(cells, torch.ones_like(information[has]), fold_of_one)

    rho = torch.full((len(target),), _START_PRIOR.mean)
    result, fold = rho[0] * has.float(), start
    for _ in range(_N_STEPS):
        score, _ = without_others(cells.projection, result * multiple[cells.perturbation])
        entries = _entries(cells, score, information, fold)
        took = log_ratio(entries.score, entries.information, multiple[row], _START_SPREAD)
        odds = took + entries.own + torch.logit(rho)[entries.guide]
        r = torch.sigmoid(odds)
        result = torch.zeros_like(cells.dose)
        result[has] = r
        n = torch.bincount(entries.guide, minlength=len(target))
        sums = torch.zeros(len(target)).index_add_(0, entries.guide, r)
        rho = (sums + _START_PRIOR.a) / (n + _START_PRIOR.a + _START_PRIOR.b)
        weight = r / (1 + (_START_SPREAD * multiple[row]) ** 2 * entries.information)
        r_score = torch.zeros(n_perturbations).index_add_(0, row, weight * entries.score)
        r_information = torch.zeros(n_perturbations).index_add_(
            0, row, weight * entries.information
        )
        multiple = (r_score / r_information.clamp(min=1e-9)).clamp(
            min=_SMALLEST_MULTIPLE * base, max=_LARGEST_MULTIPLE * base
        )
        fold = _updated_fold(cells, r, fold)
    one, two = (
        fit_mixture(
            _entries(cells, score, information, of_target),
            target,
            base,
            in_multiples,
            prior,
            all_took=all_took,
        )
        for all_took, of_target in ((True, fold_of_one), (False, fold))
    )
    one, two, free = _weighed(one, two, target)
    solution = Solution(
        one,
        two,
        torch.stack([fold_of_one.log_fold, fold.log_fold]),
        torch.stack([fold_of_one.excess, fold.excess]),
        free,
        base,
        torch.zeros_like(cells.dose),
    )
    return solution._replace(probability=cell_probability(cells, target, solution))


def _weighed(one: Mixture, two: Mixture, target: Tensor) -> tuple[Mixture, Mixture, Tensor]:
    """Learn how often there are two components, and how graded effects are, over the screen.

    Whether an effect is graded or did not take in some cells is hard to say of one perturbation,
    and easy to say of those with strong effects.
    """
    by_spread = [_log_evidence_by_spread(mixture) for mixture in (one, two)]
    n_spreads = len(_SPREADS)
    share = torch.full((), 0.5, dtype=torch.float64)
    weight = torch.full((n_spreads,), 1 / n_spreads, dtype=torch.float64)
    for _ in range(100):
        joint = torch.stack([e + weight.log() for e in by_spread])  # components first
        joint = joint + torch.stack([1 - share, share]).log()[:, None, None]
        posterior = torch.softmax(joint.permute(1, 0, 2).flatten(1), 1)
        posterior = posterior.reshape(-1, 2, n_spreads)
        free = posterior[:, 1].sum(1)
        share = (free.sum() + 1) / (len(free) + 2)
        weight = posterior.sum((0, 1)) + 1 / n_spreads
        weight[0] += _EVEN_EFFECTS
        weight = weight / weight.sum()
    change = (n_spreads * weight).log()
    return _reweighted(one, target, change), _reweighted(two, target, change), free


def _log_evidence_by_spread(mixture: Mixture) -> Tensor:
    """Log evidence of each perturbation at each spread, perturbations x spreads."""
    n_spreads = len(_SPREADS)
    by_spread = mixture.weight.reshape(len(mixture.weight), -1, n_spreads).sum(1)
    return mixture.log_evidence[:, None] + (n_spreads * by_spread).clamp(min=1e-300).log()


def _reweighted(mixture: Mixture, target: Tensor, change: Tensor) -> Mixture:
    """Under another prior of the spreads."""
    n_nodes = mixture.weight.shape[1]
    changed = mixture.weight * change.exp().repeat(n_nodes // len(change))
    total = changed.sum(1, keepdim=True).clamp(min=1e-300)
    weight = changed / total
    return mixture._replace(
        weight=weight,
        log_evidence=mixture.log_evidence + total.squeeze(1).log(),
        mass=torch.einsum("kbj,kj->kb", mixture.conditional, weight[target]),
        conditional=torch.zeros(0),
    )


def cell_probability(cells: Cells, target: Tensor, solution: Solution) -> Tensor:
    """Probability that each perturbation of cells took, shape ``(n_cells, n_columns)``."""
    information = cells.projection.information.diagonal(dim1=-2, dim2=-1)
    multiple = (solution.two.multiple * solution.two.weight).sum(1).float()[cells.perturbation]
    fold = Fold(solution.log_fold[1], solution.excess[1])
    has = cells.dose > 0
    result = has.float()
    for _ in range(1 if cells.dose.shape[1] == 1 else 10):
        score, _ = without_others(cells.projection, result * multiple)
        entries = _entries(cells, score, information, fold)
        free = solution.free.float()[target[entries.guide]]
        new = free * probability(entries, target, solution.two) + (1 - free)
        result = torch.zeros_like(result)
        result[has] = new
    return result


def _entries(cells: Cells, score: Tensor, information: Tensor, fold: Fold) -> Entries:
    has = cells.dose > 0
    log_fold = cells.dose * fold.log_fold[cells.perturbation]
    excess = fold.excess[cells.perturbation]
    own = fold_log_ratio(cells.counts, cells.mean, cells.dispersion, log_fold, excess)
    own = torch.where(cells.mean > 0, own, 0.0)
    return Entries(score[has], information[has], cells.guide[has], own[has])


def _updated_fold(cells: Cells, weight: Tensor, fold: Fold) -> Fold:
    has = cells.dose > 0
    measured = cells.mean[has] > 0
    if not measured.any():
        return fold
    fields = (cells.counts, cells.mean, cells.dispersion, cells.dose)
    counts, mean, dispersion, dose = (field[has][measured] for field in fields)
    group = cells.perturbation[has][measured]
    return learned_fold(counts, mean, dispersion, dose, weight[measured], group, fold)


class Efficacies(NamedTuple):
    """Posterior of the efficacies of guides, each of shape ``(n_guides,)``.

    Attributes
    ----------
    mean, lower, upper
        Mean and ends of an interval.
    can_be_told
        Whether the cells have at least halved the interval that the prior has.
    """

    mean: Tensor
    lower: Tensor
    upper: Tensor
    can_be_told: Tensor


def efficacies(solution: Solution, target: Tensor, level: float = 0.95) -> Efficacies:
    """Efficacies of guides, averaged over one component and two."""
    two, free = solution.two, solution.free[target]
    centre = (two.edges[:, 1:] + two.edges[:, :-1]) / 2
    mean = free * (two.mass * centre).sum(1) + 1 - free
    below = torch.nn.functional.pad(two.mass.cumsum(1), (1, 0))
    tails = (1 - level) / 2, (1 + level) / 2
    lower, upper = (_quantile(two.edges, free[:, None] * below, tail) for tail in tails)
    share = (solution.free.sum() + 1) / (len(solution.free) + 2)
    low, high = (
        special.betaincinv(two.prior.a, two.prior.b, min(tail / share.item(), 1.0))
        for tail in tails
    )
    return Efficacies(mean, lower, upper, upper - lower < 0.5 * (high - low))


def _quantile(edges: Tensor, below: Tensor, level: float) -> Tensor:
    """Where distributions reach a level; one, if there is not so much in their bins."""
    right = torch.searchsorted(below, torch.full_like(below[:, :1], level)).squeeze(1)
    beyond = right >= below.shape[1]
    right = right.clamp(1, below.shape[1] - 1)[:, None]
    low, high = below.gather(1, right - 1), below.gather(1, right)
    share = ((level - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    left = edges.gather(1, right - 1)
    found = (left + share * (edges.gather(1, right) - left)).squeeze(1)
    return torch.where(beyond, 1.0, found)


def multiples_where_it_took(solution: Solution, target: Tensor) -> Tensor:
    """How many times the effect as labelled each effect is where it took.

    One where no guide of the perturbation lets it be told.
    """
    two = (solution.two.multiple * solution.two.weight).sum(1) / solution.base
    told = torch.zeros(len(two)).index_add_(
        0, target, efficacies(solution, target).can_be_told.float()
    )
    return torch.where(told > 0, solution.free * two + 1 - solution.free, 1.0).float()


# -- do guides agree ------------------------------------------------------------------------------


def disagreement(
    mean: NDArray[np.float64],
    n_cells: NDArray[np.float64],
    covariance: NDArray[np.float64],
    target: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Test each guide's shift against that of the other guides of its target.

    Guides that differ in efficacy alone have shifts in one direction, of different lengths. Of
    two means :math:`a, b` with covariances :math:`\Sigma / n_a, \Sigma / n_b`, the least distance
    to any line through zero is the smaller eigenvalue of the Gram matrix of
    :math:`\sqrt{n_a} \Sigma^{-1/2} a` and :math:`\sqrt{n_b} \Sigma^{-1/2} b`, which is
    :math:`\chi^2` with one degree of freedom less than there are dimensions; less than that where
    there is no shift at all.

    Parameters
    ----------
    mean
        Mean shift of the cells of each guide, shape ``(n_guides, n_dimensions)``.
    n_cells
        Their number.
    covariance
        Of single cells.
    target
        What each guide targets.

    Returns
    -------
    p-values and similarities (cosines of the shifts in units of the variation), NaN for the only
    guide of a target.
    """
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-6 * values.max()
    whitened = mean @ (vectors[:, kept] / np.sqrt(values[kept]))
    p, similarity = np.full((2, len(mean)), np.nan)
    freedom = max(int(kept.sum()), 2) - 1
    for guide in range(len(mean)):
        others = np.flatnonzero((target == target[guide]) & (n_cells > 0))
        others = others[others != guide]
        if len(others) == 0 or n_cells[guide] == 0:
            continue
        a, n = whitened[guide], n_cells[guide]
        m = n_cells[others].sum()
        b = n_cells[others] @ whitened[others] / m
        cross = math.sqrt(n * m) * (a @ b)
        gram = np.array([[n * (a @ a), cross], [cross, m * (b @ b)]])
        p[guide] = special.gammaincc(freedom / 2, np.linalg.eigvalsh(gram)[0] / 2)
        similarity[guide] = a @ b / max(math.sqrt((a @ a) * (b @ b)), 1e-12)
    return p, similarity
