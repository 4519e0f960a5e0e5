"""Effects on single genes that latents leave over, by empirical Bayes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import nn

from scvi_sams._compat import HostState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from scvi_sams.module.doses import Doses


# -- what is kept, and drawn from -----------------------------------------------------------------


class ResidualDraws(NamedTuple):
    """Draws of all residual effects, as the seed that they are made from where they are needed.

    A table of them would take draws x perturbations x genes.

    Attributes
    ----------
    seed
        Seed of the noise.
    n_samples
        Number of draws that were made together.
    kept
        Which of them.
    """

    seed: int
    n_samples: int
    kept: slice = slice(None)

    def subset(self, start: int, stop: int) -> ResidualDraws:
        """Some of the draws."""
        kept = range(self.n_samples)[self.kept][start:stop]
        return self._replace(kept=slice(kept.start, kept.stop))


class ResidualEffects(HostState, nn.Module):
    r"""Log fold changes of all genes under each perturbation, beyond what the latents carry.

    They are added, times the dose, to the unnormalised log expression of predictions; training
    does not see them. Each is normal, :math:`\delta_{tg} \sim \mathrm{Normal}(\mu_{tg} -
    \sigma_{tg}^2 / 2, \sigma_{tg}^2)`, so that :math:`\mu` is the logarithm of the expected fold
    change: draws of a gene that is hardly seen, whose fold change is vague, would raise its
    expression otherwise.

    Parameters
    ----------
    n_perturbations, n_genes
        Their number.
    targets
        Gene that each perturbation targets, ``-1`` for none.

    Attributes
    ----------
    log_fold_change, std
        Mean and standard deviation, natural logarithm at dose one, perturbations x genes. The
        latter is of the whole prediction but for masks and effects, which have draws of their own.
    absorbed
        Share of the noise of the training cells, in variance, that the model has learned.
    lfsr
        Probability that an effect is zero or of the other sign.
    is_fitted
        Whether there are any.
    """

    host_state: ClassVar[tuple[str, ...]] = ("is_fitted",)
    log_fold_change: Tensor
    std: Tensor
    lfsr: Tensor
    absorbed: Tensor
    target: Tensor

    def __init__(
        self, n_perturbations: int, n_genes: int, targets: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.is_fitted = False
        shape = (n_perturbations, n_genes)
        self.register_buffer("log_fold_change", torch.zeros(shape))
        self.register_buffer("std", torch.zeros(shape))
        self.register_buffer("lfsr", torch.ones(shape))
        self.register_buffer("absorbed", torch.zeros(()))
        target = [-1] * n_perturbations if targets is None else list(targets)
        self.register_buffer("target", torch.tensor(target, dtype=torch.long), persistent=False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("log_fold_change", "std", "lfsr"):  # which 0.1.0 had not
            value = torch.full_like(getattr(self, name), float(name == "lfsr"))
            state_dict.setdefault(prefix + name, value)
        state_dict.setdefault(prefix + "absorbed", torch.zeros(()))
        state_dict.setdefault(prefix + "is_fitted", torch.tensor(False))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def set_rows(
        self, rows: np.ndarray, log_fold_change: Tensor, std: Tensor, lfsr: Tensor
    ) -> None:
        """Set the effects of some perturbations."""
        index = torch.as_tensor(rows, device=self.std.device)
        for name, value in (("log_fold_change", log_fold_change), ("std", std), ("lfsr", lfsr)):
            buffer = getattr(self, name)
            buffer[index] = value.to(buffer)
        self.is_fitted = bool((self.std > 0).any())

    def sample(self, n_samples: int) -> ResidualDraws | None:
        """Draw effects of all perturbations; ``None`` if there are none."""
        if not self.is_fitted:
            return None
        return ResidualDraws(int(torch.randint(2**31, ()).item()), n_samples)

    def expected(self, doses: Doses) -> Tensor:
        """Expected log fold changes under doses, shape ``(n_cells, n_genes)``."""
        weighted = doses.dose.unsqueeze(-1) * self.log_fold_change[doses.perturbation]
        return weighted.sum(-2)

    def of(self, doses: Doses, draws: ResidualDraws) -> Tensor:
        """Log fold changes under one condition, shape ``(n_samples, n_genes)``.

        Parameters
        ----------
        doses
            Doses (or responses) of the condition, a single row, of each draw or of all.
        draws
            Draws of :meth:`sample`.
        """
        n_kept = len(range(*draws.kept.indices(draws.n_samples)))
        total = self.std.new_zeros(n_kept, self.std.shape[1])
        for column, perturbation in enumerate(doses.perturbation[0].tolist()):
            dose = doses.dose[..., 0, column].unsqueeze(-1)
            if (dose > 0).any():
                spread = dose * self.std[perturbation]
                noise = self._noise(draws, perturbation)
                total += dose * self.log_fold_change[perturbation]
                total += spread * noise - 0.5 * spread.square()
        return total

    def _noise(self, draws: ResidualDraws, perturbation: int) -> Tensor:
        """Standard normal noise of one perturbation, the same each time it is asked for."""
        generator = torch.Generator().manual_seed(draws.seed + perturbation)
        shape = (draws.n_samples, self.std.shape[1])
        noise = torch.randn(shape, generator=generator)
        if draws.n_samples > 1:
            # Each draw stays standard normal, and their mean, which is reported, has no noise.
            noise = (noise - noise.mean(0)) * math.sqrt(draws.n_samples / (draws.n_samples - 1))
        return noise[draws.kept].to(self.std)


# -- adaptive shrinkage ---------------------------------------------------------------------------

_RATIO = 2.0  # of neighbouring scales: a mixture of them is close to any scale in between
_LEAST_SCALE = 1 / 8  # in standard errors: less cannot be told from zero
_NULL_COUNTS = 10.0  # that favour zero, as in Stephens (2017)
# Genes that the common weights are worth to those of a perturbation. With 10 or 40 the errors of
# effects move by less than a hundredth of themselves (Papalexi, simulated screens).
_ROW_COUNTS = 20.0
_N_SAMPLED = 30_000  # of all z that the common weights are learned from
_N_COMMON, _N_ROW = 100, 10  # steps of expectation maximisation


class ScaleMixture:
    r"""Prior of effects in units of their errors: a mixture of normals at zero (Stephens 2017).

    :math:`\delta_{tg} / s_{tg} \sim \sum_k \pi_{tk} \mathrm{Normal}(0, \sigma_k^2)` with
    :math:`\sigma_0 = 0` and a grid of scales. Weights are learned for all genes together, for each
    perturbation's own (drawn to those of all), and for the genes that perturbations target.

    Parameters
    ----------
    z
        Estimates divided by their errors, perturbations x genes.
    is_target
        Which of them are of a perturbation's own target.

    Examples
    --------
    >>> z = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    >>> mixture = ScaleMixture(z, torch.zeros(50, 200, dtype=torch.bool))
    >>> mean, variance, lfsr = mixture.posterior(z, torch.zeros(50, 200, dtype=torch.bool))
    >>> bool(mean.square().mean() < 0.01 * z.square().mean())
    True
    """

    def __init__(self, z: Tensor, is_target: Tensor) -> None:
        largest = z.abs().max().item()
        top = 2 * math.sqrt(max(largest**2 - 1, 1.0))
        n_scales = 1 + math.ceil(math.log(top / _LEAST_SCALE, _RATIO))
        grid = top * _RATIO ** -torch.arange(n_scales - 1, -1, -1, dtype=torch.float64)
        self.scales = torch.cat([grid.new_zeros(1), grid]).float()
        flat, is_own = z.reshape(-1), is_target.reshape(-1)
        rest = flat[~is_own]
        n_all = len(rest)
        if n_all > _N_SAMPLED:
            generator = torch.Generator().manual_seed(0)
            rest = rest[torch.randint(n_all, (_N_SAMPLED,), generator=generator)]
        # As many counts of the sample as they are of all.
        null = _NULL_COUNTS * len(rest) / max(n_all, 1)
        self.common = self._learned(rest, null)
        own = flat[is_own]
        self.of_targets = self._learned(own, 1.0) if len(own) else self.common

    def _likelihood(self, z: Tensor) -> Tensor:
        """Likelihood of each z under each component, up to a factor of each z."""
        variance = 1 + self.scales**2
        log = -0.5 * (variance.log() + z.unsqueeze(-1).square() / variance)
        return (log - log.max(-1, keepdim=True).values).exp_()

    def _learned(self, z: Tensor, null: float) -> Tensor:
        likelihood = self._likelihood(z)
        weights = torch.full_like(self.scales, 1 / len(self.scales))
        for _ in range(_N_COMMON):
            weights = weights * (likelihood / (likelihood @ weights).unsqueeze(-1)).sum(0)
            weights[0] += null
            weights = weights / weights.sum()
        return weights

    def posterior(self, z: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean and variance in units of the errors, and local false sign rates.

        Parameters
        ----------
        z, is_target
            Whole rows, perturbations x genes: the weights of a perturbation are those of its
            genes.
        """
        likelihood = self._likelihood(z)
        weights = self.common.expand(len(z), -1)
        # A target says nothing of the other genes.
        kept = likelihood * ~is_target.unsqueeze(-1)
        for _ in range(_N_ROW):
            evidence = torch.einsum("tgk,tk->tg", likelihood, weights).clamp(min=1e-30)
            weights = weights * torch.einsum("tgk,tg->tk", kept, 1 / evidence)
            weights = weights + _ROW_COUNTS * self.common
            weights = weights / weights.sum(-1, keepdim=True)
        share = likelihood * weights.unsqueeze(1)
        share[is_target] = likelihood[is_target] * self.of_targets
        share = share / share.sum(-1, keepdim=True)
        factor = self.scales**2 / (1 + self.scales**2)
        mean = (share @ factor) * z
        variance = (share @ factor + (share @ factor**2) * z.square() - mean.square()).clamp(min=0)
        below = torch.special.ndtr(-factor[1:].sqrt() * z.unsqueeze(-1))
        zero, negative = share[..., 0], (share[..., 1:] * below).sum(-1)
        lfsr = zero + torch.minimum(negative, 1 - negative - zero)
        return mean, variance, lfsr.clamp(0, 1)


# -- what the fit has absorbed of the noise -------------------------------------------------------

_CENTRE = 2.0  # errors; beyond are effects that the model lacks
_LEAST_LEFT = 0.1  # of an error: below, nothing could be told from the noise


def absorbed_by_residuals(residual: Tensor, error: Tensor, told: Tensor) -> float:
    """Share of the noise, in variance, that is missing in the residuals of a fit.

    Most residuals are noise alone, and what is left of it has a smaller variance than the means
    of the cells have. Residuals within two errors are matched with a normal that is cut off
    there, so that the few large ones, which are effects, do not count.

    Parameters
    ----------
    residual, error
        Estimates and their standard errors, perturbations x genes. Perturbations weigh alike,
        and genes within them by their variance.
    told
        Where the error is one, and not a bound that is far from it.

    Examples
    --------
    >>> noise = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    >>> told = torch.ones_like(noise, dtype=torch.bool)
    >>> round(absorbed_by_residuals(0.8 * noise, torch.ones_like(noise), told), 2)
    0.36
    """
    variance = error.square() * told
    weight = told * (residual.abs() < _CENTRE * error) / variance.sum(1, keepdim=True)
    weight = weight.nan_to_num(posinf=0.0)
    if not weight.any():
        return 0.0
    observed = (weight * residual.square()).sum() / (weight * variance).sum()
    left = torch.linspace(_LEAST_LEFT, 1.0, 901)
    end = _CENTRE / left
    density = torch.exp(-0.5 * end.square()) / math.sqrt(2 * math.pi)
    of_normal = left.square() * (1 - 2 * end * density / (2 * torch.special.ndtr(end) - 1))
    best = int((of_normal - observed).abs().argmin().item())
    return 1 - left[best].item() ** 2


def absorbed_by_validation(
    effect: Tensor, difference: Tensor, variance: Tensor, told: Tensor
) -> tuple[float, float]:
    """Share of the noise that the model has learned, and its standard error.

    The model's effects are correlated with the noise of the cells that they were learned from,
    and not with that of others (Efron 2004): the covariance of an effect with the difference of
    two means, one of training cells and one of validation cells, is what it took of the noise.

    Parameters
    ----------
    effect
        Of the model, perturbations x genes.
    difference
        Mean of the training cells minus mean of validation cells.
    variance
        Of the effect of the training cells. The noise of controls is in it and cancels in the
        difference: of that part the model is taken to have learned nothing.
    told
        Where that is a variance, and not a bound that is far from it.

    Examples
    --------
    >>> draw = lambda seed: torch.randn(100, 500, generator=torch.Generator().manual_seed(seed))
    >>> truth, noise, other = draw(0), draw(1), 3 * draw(2)
    >>> share, error = absorbed_by_validation(
    ...     truth + 0.2 * noise, noise - other, torch.ones_like(noise), noise < 9
    ... )
    >>> abs(share - 0.2) < 3 * error < 0.1
    True
    """
    noise = variance.mean(1, keepdim=True)
    # Strong effects tell little: their own size is noise here.
    weight = told / (noise * (noise + effect.square().mean(1, keepdim=True)))
    products = (weight * effect * difference).sum(1)
    variances = (weight * variance).sum(1)
    if not variances.any():
        return 0.0, math.inf
    share = products.sum() / variances.sum()
    spread = (products - share * variances).square().sum().sqrt() / variances.sum()
    return share.item(), spread.item()


# -- from residuals of cells to effects of perturbations ------------------------------------------

_ROWS_AT_ONCE = 4_000_000  # z in a block of rows, whose mixture takes some fifteen times as much
_MAX_SWEEPS = 50
_TOLERANCE = 0.01  # of an error: nobody could tell


class Solution(NamedTuple):
    """Effects on the scale of the residuals, perturbations x genes."""

    mean: Tensor
    variance: Tensor
    lfsr: Tensor


def solve(score: Tensor, coupling: sparse.csr_matrix, error: Tensor, target: Tensor) -> Solution:
    r"""Effects of perturbations on all genes, from the residuals of cells with one or several.

    A cell i has the residual :math:`\sum_t d_{it} \delta_{tg}` and noise. Coordinate by
    coordinate, given the others, the estimate of :math:`\delta_{tg}` is
    :math:`(\mathrm{score}_{tg} - \sum_{u \ne t} A_{tu} \delta_{ug}) / A_{tt}`, which is shrunk by
    a :class:`ScaleMixture`; with one perturbation a cell there is nothing to iterate.

    Parameters
    ----------
    score
        Sum over cells of dose times residual, perturbations x genes.
    coupling
        :math:`A = D^\top D` of the doses of cells, perturbations x perturbations, with a positive
        diagonal.
    error
        Standard error of each estimate, perturbations x genes.
    target
        Gene that each perturbation targets, ``-1`` for none.
    """
    weight = torch.as_tensor(coupling.diagonal(), dtype=score.dtype).unsqueeze(1)
    is_target = _is_target(score, target)
    estimate = score / weight
    mean = torch.zeros_like(score)
    if several := coupling.nnz > coupling.shape[0]:
        off = coupling - sparse.diags(coupling.diagonal(), format="csr")
        for _ in range(_MAX_SWEEPS):
            mixture = ScaleMixture(estimate / error, is_target)
            largest = 0.0
            for rows in _blocks(score):
                estimate[rows] = (score[rows] - product(off[rows], mean)) / weight[rows]
                z = estimate[rows] / error[rows]
                new = mixture.posterior(z, is_target[rows])[0] * error[rows]
                # Perturbations of one block change together: undamped, they could overshoot.
                inside = np.abs(off[rows][:, rows]).sum(1)
                damping = weight[rows] / (weight[rows] + torch.as_tensor(inside).to(weight))
                step = damping * (new - mean[rows])
                mean[rows] += step
                largest = max(largest, (step / error[rows]).abs().max().item())
            if largest < _TOLERANCE:
                break
    solution = shrunk(estimate, error, target)
    return solution._replace(mean=mean) if several else solution


def shrunk(estimate: Tensor, error: Tensor, target: Tensor) -> Solution:
    """Effects of which estimates have independent errors, by a :class:`ScaleMixture`.

    Parameters
    ----------
    estimate, error
        Perturbations x genes.
    target
        Gene that each perturbation targets, ``-1`` for none.
    """
    is_target = _is_target(estimate, target)
    mixture = ScaleMixture(estimate / error, is_target)
    mean, variance, lfsr = (torch.zeros_like(estimate) for _ in range(3))
    for rows in _blocks(estimate):
        z_mean, z_variance, lfsr[rows] = mixture.posterior(
            estimate[rows] / error[rows], is_target[rows]
        )
        mean[rows] = z_mean * error[rows]
        variance[rows] = z_variance * error[rows].square()
    return Solution(mean, variance, lfsr)


def _is_target(table: Tensor, target: Tensor) -> Tensor:
    is_target = torch.zeros(table.shape, dtype=torch.bool)
    has_target = (target >= 0).nonzero().squeeze(1)
    is_target[has_target, target[has_target]] = True
    return is_target


def _blocks(table: Tensor) -> Iterator[slice]:
    n_rows = max(1, _ROWS_AT_ONCE // (15 * table.shape[1]))
    for start in range(0, len(table), n_rows):
        yield slice(start, min(start + n_rows, len(table)))


def product(matrix: sparse.csr_matrix, table: Tensor) -> Tensor:
    """A sparse matrix of perturbations times a table of perturbations x genes."""
    return torch.from_numpy(matrix @ table.numpy()).to(table.dtype)


# -- from effects on log expression to fold changes -----------------------------------------------


class ExpressionCurve:
    """Mean log expression of each gene as a function of a log fold change, and back.

    Between points of the grid the logarithm of ``2**y - 1`` is interpolated, y being the mean of
    ``log2(1 + 1e4 x / library)``: it is nearly linear whether a gene is rare or abundant.

    Parameters
    ----------
    log_fold_change
        Grid, increasing, natural logarithm.
    expected
        Mean log expression at each, grid x genes.

    Examples
    --------
    >>> grid = torch.linspace(-2, 2, 9)
    >>> curve = ExpressionCurve(grid, torch.log2(1 + grid.exp()).unsqueeze(1))
    >>> curve.at(torch.log2(torch.tensor([[2.0, 3.0]]).T))[:, 0]
    tensor([0.0000, 0.6931])
    """

    def __init__(self, log_fold_change: Tensor, expected: Tensor) -> None:
        self.grid = log_fold_change
        self._height = self._rise(expected).T.contiguous()

    @staticmethod
    def _rise(level: Tensor) -> Tensor:
        return torch.expm1(level.clamp(min=1e-9) * math.log(2)).log()

    def at(self, level: Tensor) -> Tensor:
        """Log fold changes that lead to mean log expressions, rows x genes, within the grid."""
        return self._inverse(level)[0]

    def slope(self, level: Tensor) -> Tensor:
        """Change of mean log expression with the log fold change, where it is at a level."""
        per_rise = self._inverse(level)[1]
        return (1 - torch.exp2(-level.clamp(min=1e-9))) / math.log(2) / per_rise

    def _inverse(self, level: Tensor) -> tuple[Tensor, Tensor]:
        rise = self._rise(level).T.contiguous()
        right = torch.searchsorted(self._height, rise).clamp(1, len(self.grid) - 1)
        low, high = (self._height.gather(1, place) for place in (right - 1, right))
        step = self.grid[right] - self.grid[right - 1]
        per_rise = step / (high - low).clamp(min=1e-9)
        found = self.grid[right - 1] + (rise - low) * per_rise
        return found.clamp(self.grid[0], self.grid[-1]).T, per_rise.T
