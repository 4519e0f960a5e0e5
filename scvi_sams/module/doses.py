"""From the doses of cells to what acts on them: responses, pairs, shifts, single genes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Doses(NamedTuple):
    """What cells received: as many columns as the most perturbations of a cell.

    Minibatches of cells with more than eight leave out, by eights, the columns that none of
    their cells fills.

    Attributes
    ----------
    perturbation
        Rows of the effects, integers of shape ``(n_cells, n_columns)``.
    dose
        Doses, shape ``([n_samples,] n_cells, n_columns)``; zero fills up the columns.
    context
        Context of each cell, integers of shape ``(n_cells, 1)``; ``None`` for what contexts share.
    """

    perturbation: Tensor
    dose: Tensor
    context: Tensor | None = None

    def gather(self, effects: Tensor) -> Tensor:
        """Effect of each dose, from ``(..., n_rows, n_latent)`` to ``(..., *shape, n_latent)``."""
        return effects[..., self.perturbation, :]


def additive_shift(doses: Doses, effects: Tensor, power: int = 1) -> Tensor:
    """Sum the effects of each cell's perturbations, weighted by dose.

    The sum over the perturbations t of a cell of ``dose**power * effect_t``: the mean shift from
    the means of the effects with ``power=1``, its variance from their variances with ``power=2``.

    Parameters
    ----------
    doses
        Doses of ``n_cells`` cells.
    effects
        Effect of each dose, shape ``(..., n_cells, n_columns, n_latent)``, as ``doses.gather``
        gives them.
    power
        Power of the dose.

    Returns
    -------
    Tensor
        Shape ``(..., n_cells, n_latent)``.

    Examples
    --------
    >>> doses = Doses(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
    >>> additive_shift(doses, doses.gather(torch.tensor([[1.0], [4.0]])))
    tensor([[3.],
            [0.]])
    """
    weight = (doses.dose if power == 1 else doses.dose**power).to(effects.dtype)
    return (weight.unsqueeze(-1) * effects).sum(-2)


_LOG_EC50_SCALE = 1.5  # prior: a factor of 4.5 either way of the median dose
_LOG_SLOPE_SCALE = 0.5


class HillDraws(NamedTuple):
    """Draws of the parameters of all curves, each of shape ``([n_samples,] n_perturbations)``."""

    log_ec50: Tensor
    log_slope: Tensor


class HillDoseResponse(nn.Module):
    r"""Monotone saturating response :math:`g_t(d) = d^{h_t} / (d^{h_t} + \mathrm{EC50}_t^{h_t})`.

    It takes the place of the dose: the shift is :math:`g_t(d) \, (m_t \odot e_t)`, so that the
    effect is the one of a saturating dose. Priors are log-normal, of EC50 about the median dose
    of the perturbation, of the slope about one; posteriors are normal in the logarithms, learned
    by gradient.

    Parameters
    ----------
    reference_doses
        Median positive dose of each perturbation.
    """

    log_reference_dose: Tensor

    def __init__(self, reference_doses: Sequence[float]) -> None:
        super().__init__()
        n_perturbations = len(reference_doses)
        self.register_buffer("log_reference_dose", torch.tensor(list(reference_doses)).log())
        initial = math.log(0.2**2)
        # Relative to the prior mean.
        self.log_ec50_offset = nn.Parameter(torch.zeros(n_perturbations))
        self.log_ec50_log_variance = nn.Parameter(torch.full((n_perturbations,), initial))
        self.log_slope_mean = nn.Parameter(torch.zeros(n_perturbations))
        self.log_slope_log_variance = nn.Parameter(torch.full((n_perturbations,), initial))

    def mean(self) -> HillDraws:
        """Posterior means of the logarithms."""
        return HillDraws(self.log_reference_dose + self.log_ec50_offset, self.log_slope_mean)

    def std(self) -> HillDraws:
        """Posterior standard deviations of the logarithms."""
        return HillDraws(
            (0.5 * self.log_ec50_log_variance).exp(), (0.5 * self.log_slope_log_variance).exp()
        )

    def rsample(self, n_samples: int | None = None) -> HillDraws:
        """Draw parameters, with gradients; without an axis of draws by default."""
        draws = []
        for mean, std in zip(self.mean(), self.std(), strict=True):
            shape = mean.shape if n_samples is None else (n_samples, *mean.shape)
            draws.append(mean + std * torch.randn(shape, dtype=mean.dtype, device=mean.device))
        return HillDraws(*draws)

    @staticmethod
    def respond(doses: Doses, parameters: HillDraws) -> Doses:
        """Replace doses by responses between zero and one, zero where there is no dose."""
        slope = parameters.log_slope[..., doses.perturbation].exp()
        given = doses.dose > 0
        # The logarithm of a dose that fills up a column would have no gradient.
        log_dose = torch.where(given, doses.dose, 1.0).to(slope.dtype).log()
        excess = log_dose - parameters.log_ec50[..., doses.perturbation]
        return doses._replace(dose=torch.where(given, torch.sigmoid(slope * excess), 0.0))

    def kl_divergence(self) -> Tensor:
        """Divergence of the posterior of all curves from the prior, a scalar in nats."""
        total = self.log_ec50_offset.new_zeros(())
        for mean, log_variance, scale in (
            (self.log_ec50_offset, self.log_ec50_log_variance, _LOG_EC50_SCALE),
            (self.log_slope_mean, self.log_slope_log_variance, _LOG_SLOPE_SCALE),
        ):
            ratio = log_variance.exp() / scale**2
            total = total + 0.5 * (ratio + (mean / scale).square() - 1 - ratio.log()).sum()
        return total


class PairInteractions(nn.Module):
    r"""Lists a measured pair as one more perturbation of the cells that have both of its parts.

    The shift of a cell becomes :math:`\sum_t d_t \, m_t e_t + \sum_{ab} d_a d_b \, m_{ab} e_{ab}`
    over the pairs given here. A pair has a row of effects after those of the perturbations, and
    its dose is the product of the doses, so that inference of sparse effects serves it unchanged.

    Parameters
    ----------
    n_perturbations
        Number of perturbations.
    pairs
        Two perturbations each, different ones.

    Examples
    --------
    >>> interactions = PairInteractions(3, [(0, 2)])
    >>> doses = interactions(Doses(torch.tensor([[0, 2], [0, 1]]), torch.ones(2, 2) / 2))
    >>> doses.perturbation
    tensor([[0, 2, 3],
            [0, 1, 3]])
    >>> doses.dose
    tensor([[0.5000, 0.5000, 0.2500],
            [0.5000, 0.5000, 0.0000]])
    """

    codes: Tensor

    def __init__(self, n_perturbations: int, pairs: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        ordered = [(min(pair), max(pair)) for pair in pairs]
        if len(set(ordered)) < len(ordered) or any(a == b for a, b in ordered):
            raise ValueError("Pairs must be distinct and of two different perturbations.")
        self.pairs = sorted(ordered)
        codes = [first * n_perturbations + second for first, second in self.pairs]
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.long), persistent=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def forward(self, doses: Doses) -> Doses:
        """Append a column for each two columns, with a dose where they are a pair given here."""
        n_columns = doses.perturbation.shape[-1]
        if len(self.pairs) == 0 or n_columns < 2:
            return doses
        left, right = torch.triu_indices(n_columns, n_columns, 1, device=self.codes.device)
        a, b = doses.perturbation[:, left], doses.perturbation[:, right]
        code = torch.minimum(a, b) * self.n_perturbations + torch.maximum(a, b)
        place = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
        dose = doses.dose[..., left] * doses.dose[..., right] * (self.codes[place] == code)
        return Doses(
            torch.cat([doses.perturbation, self.n_perturbations + place], -1),
            torch.cat([doses.dose, dose], -1),
        )


class GeneEffects(NamedTuple):
    """Log fold changes of single genes.

    Attributes
    ----------
    gene
        Genes, shape ``(n_cells, n_columns)``, or ``(1, n_columns)`` where all cells have them.
    value
        Natural logarithm of the fold change, zero for none, shape
        ``([n_samples,] n_cells, n_columns)``.
    """

    gene: Tensor
    value: Tensor


class DirectEffects(nn.Module):
    r"""Log fold change of a perturbation on the one gene that it targets.

    :math:`\delta_t \sim \mathrm{Normal}(0, s^2)` is added, times the dose, to the unnormalised
    log expression of that gene, so that the knock-down of the target itself need not pass through
    latents that perturbations share. The posterior is normal, learned by gradient.

    Parameters
    ----------
    targets
        Index of the gene that each perturbation targets, ``-1`` for none.
    prior_scale
        Standard deviation s, in natural log fold change at dose one.
    """

    target: Tensor

    def __init__(self, targets: Sequence[int], prior_scale: float = 1.0) -> None:
        super().__init__()
        self.prior_variance = prior_scale**2
        self.register_buffer("target", torch.tensor(list(targets), dtype=torch.long))
        self.mean = nn.Parameter(torch.zeros(len(targets)))
        self.log_variance = nn.Parameter(torch.full((len(targets),), math.log(1e-2)))

    def rsample(self, n_samples: int | None = None) -> Tensor:
        """Draw effects with gradients, shape ``([n_samples,] n_perturbations)``."""
        shape = self.mean.shape if n_samples is None else (n_samples, *self.mean.shape)
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def of(self, doses: Doses, draws: Tensor) -> GeneEffects:
        """Effects of doses (or responses) of cells, those of pairs left out."""
        gene = self.target[doses.perturbation]
        value = doses.dose * draws[..., doses.perturbation] * (gene >= 0)
        return GeneEffects(gene.clamp(min=0), value)

    def kl_divergence(self) -> Tensor:
        """Divergence of the posterior of all effects from the prior, a scalar in nats."""
        ratio = self.log_variance.exp() / self.prior_variance
        kl = 0.5 * (ratio + self.mean.square() / self.prior_variance - 1 - ratio.log())
        return (kl * (self.target >= 0)).sum()


def add_gene_effects(logits: Tensor, effects: GeneEffects) -> Tensor:
    """Add log fold changes of single genes to log expression ``(..., n_cells, n_genes)``.

    Examples
    --------
    >>> effects = GeneEffects(torch.tensor([[1], [0]]), torch.tensor([[0.0], [-2.0]]))
    >>> add_gene_effects(torch.zeros(2, 2), effects)
    tensor([[ 0.,  0.],
            [-2.,  0.]])
    """
    shape = (*logits.shape[:-1], effects.gene.shape[-1])
    value = effects.value.to(logits.dtype).expand(shape)
    return logits.scatter_add(-1, effects.gene.expand(shape), value)
