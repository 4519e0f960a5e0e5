"""From the doses of cells to what acts on them: responses, pairs, shifts, single genes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "DirectEffects",
    "DosageEntries",
    "GeneEffects",
    "HillDoseResponse",
    "HillDraws",
    "PairInteractions",
    "add_gene_effects",
    "additive_shift",
    "dosage_entries",
    "kl_bernoulli_log_prior",
    "kl_centred_normal",
    "log_mean_exp",
    "relaxed_bernoulli",
]


class DosageEntries(NamedTuple):
    """The non-zero entries of a dosage matrix, the only part of it that costs anything.

    Attributes
    ----------
    cell
        Row of each entry, shape ``(n_entries,)``.
    perturbation
        Column of each entry, shape ``(n_entries,)``.
    dose
        Value of each entry, shape ``(n_entries,)``.
    n_cells
        Number of rows of the matrix, those without an entry (controls) included.
    """

    cell: Tensor
    perturbation: Tensor
    dose: Tensor
    n_cells: int


def dosage_entries(dosage: Tensor) -> DosageEntries:
    """List the non-zero entries of a dosage matrix.

    Parameters
    ----------
    dosage
        Doses, shape ``(n_cells, n_perturbations)``, strided, ``torch.sparse_csr`` or coalesced
        ``torch.sparse_coo``.

    Returns
    -------
    The entries, in row order.

    Examples
    --------
    >>> dosage_entries(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).perturbation
    tensor([1])
    """
    if dosage.layout == torch.sparse_coo:
        cell, perturbation = dosage.indices()
        return DosageEntries(cell, perturbation, dosage.values(), len(dosage))
    if dosage.layout == torch.sparse_csr:
        starts, dose = dosage.crow_indices(), dosage.values()
        cell = torch.repeat_interleave(
            torch.arange(len(dosage), device=dosage.device), starts.diff().long()
        )
        return DosageEntries(cell, dosage.col_indices().long(), dose, len(dosage))
    cell, perturbation = dosage.nonzero(as_tuple=True)
    return DosageEntries(cell, perturbation, dosage[cell, perturbation], len(dosage))


def additive_shift(entries: DosageEntries, effects: Tensor, power: int = 1) -> Tensor:
    """Sum the effects of each cell's perturbations, weighted by dose.

    The sum over the perturbations t of a cell of ``dose**power * effect_t``: the mean shift from
    the means of the effects with ``power=1``, its variance from their variances with ``power=2``.

    Parameters
    ----------
    entries
        Non-zero doses of ``n_cells`` cells.
    effects
        Effect that each entry doses, ``table[entries.perturbation]``, shape
        ``(..., n_entries, n_latent)``.
    power
        Power of the dose.

    Returns
    -------
    Shape ``(..., n_cells, n_latent)``.

    Examples
    --------
    >>> entries = dosage_entries(torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
    >>> additive_shift(entries, torch.tensor([[1.0], [4.0]])[entries.perturbation])
    tensor([[3.],
            [0.]])
    """
    weight = (entries.dose if power == 1 else entries.dose**power).to(effects.dtype)
    shift = effects.new_zeros(*effects.shape[:-2], entries.n_cells, effects.shape[-1])
    return shift.index_add_(-2, entries.cell, weight.unsqueeze(-1) * effects)


def kl_bernoulli_log_prior(logits: Tensor, log_on: Tensor, log_off: Tensor) -> Tensor:
    """Divergence of Bernoulli distributions from their prior, elementwise.

    Parameters
    ----------
    logits
        Log-odds of the posterior, any shape.
    log_on, log_off
        (Expected) logarithms of the prior probabilities of one and of zero, broadcastable.

    Returns
    -------
    ``E log q(m) - E log p(m)`` in nats.

    Examples
    --------
    >>> half = torch.tensor(0.5).log()
    >>> kl_bernoulli_log_prior(torch.tensor(0.0), half, half)
    tensor(0.)
    """
    probability = torch.sigmoid(logits)
    return (probability * (logits - log_on + log_off) - F.softplus(logits) - log_off).clamp(min=0)


def kl_centred_normal(mean: Tensor, variance: Tensor, prior_variance: Tensor | float) -> Tensor:
    """Divergence of normal distributions from one centred at zero, elementwise.

    Parameters
    ----------
    mean, variance
        Moments of the posterior, any shape.
    prior_variance
        Variance of the prior, broadcastable.

    Returns
    -------
    ``KL(Normal(mean, variance) || Normal(0, prior_variance))`` in nats.

    Examples
    --------
    >>> kl_centred_normal(torch.tensor(2.0), torch.tensor(1.0), 1.0)
    tensor(2.)
    """
    ratio = variance / prior_variance
    return 0.5 * (ratio + mean.square() / prior_variance - 1 - ratio.log())


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Logarithm of the mean of exponentials along a dimension."""
    return torch.logsumexp(log_weights, dim) - torch.tensor(log_weights.shape[dim]).log()


def relaxed_bernoulli(logits: Tensor, temperature: float) -> Tensor:
    """Draw zeros and ones with a gradient: straight-through relaxed Bernoulli.

    The forward value is an exact Bernoulli draw; the gradient is that of the binary concrete
    relaxation of the same draw (Jang et al. 2017; Maddison et al. 2017).

    Parameters
    ----------
    logits
        Log-odds, any shape.
    temperature
        Temperature of the relaxation; smaller is less biased and noisier.

    Returns
    -------
    Zeros and ones, the shape of ``logits``.

    Examples
    --------
    >>> relaxed_bernoulli(torch.full((2,), 50.0), 1.0)
    tensor([1., 1.])
    """
    uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is zero, so that the sum is exact


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
    n_perturbations
        Number of perturbations.

    Attributes
    ----------
    log_reference_dose
        Logarithm of the median positive dose of each perturbation, shape ``(n_perturbations,)``.
    """

    log_reference_dose: Tensor

    def __init__(self, n_perturbations: int) -> None:
        super().__init__()
        self.register_buffer("log_reference_dose", torch.zeros(n_perturbations))
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
    def respond(entries: DosageEntries, parameters: HillDraws) -> DosageEntries:
        """Replace doses by responses between zero and one.

        Returns
        -------
        Entries with responses of shape ``([n_samples,] n_entries)``.
        """
        rows = entries.perturbation
        slope = parameters.log_slope[..., rows].exp()
        excess = entries.dose.to(slope.dtype).log() - parameters.log_ec50[..., rows]
        return entries._replace(dose=torch.sigmoid(slope * excess))

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
    >>> from scvi_sams.module.doses import dosage_entries
    >>> interactions = PairInteractions(3, [(0, 2)])
    >>> entries = interactions(dosage_entries(torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])))
    >>> entries.perturbation
    tensor([0, 2, 0, 1, 3])
    >>> entries.dose
    tensor([1.0000, 0.5000, 1.0000, 1.0000, 0.5000])
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

    def forward(self, entries: DosageEntries) -> DosageEntries:
        """Append the pairs of each cell to its doses, which are in row order."""
        if len(self.pairs) == 0 or len(entries.cell) < 2:
            return entries
        cells, rows, doses = [entries.cell], [entries.perturbation], [entries.dose]
        lag = 1
        while lag < len(entries.cell):
            same_cell = entries.cell[lag:] == entries.cell[:-lag]
            if not same_cell.any():
                break
            left = torch.where(same_cell)[0]
            right = left + lag
            a, b = entries.perturbation[left], entries.perturbation[right]
            code = torch.minimum(a, b) * self.n_perturbations + torch.maximum(a, b)
            place = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
            known = self.codes[place] == code
            cells.append(entries.cell[left][known])
            rows.append(self.n_perturbations + place[known])
            doses.append((entries.dose[..., left] * entries.dose[..., right])[..., known])
            lag += 1
        return DosageEntries(
            torch.cat(cells), torch.cat(rows), torch.cat(doses, -1), entries.n_cells
        )


class GeneEffects(NamedTuple):
    """Log fold changes of single genes.

    Attributes
    ----------
    cell
        Cell of each, shape ``(n_effects,)``; ``None`` where all cells have them.
    gene
        Gene of each, shape ``(n_effects,)``.
    value
        Natural logarithm of the fold change, shape ``(..., n_effects)``; for all cells
        ``([n_samples, 1,] n_effects)`` or ``(n_cells, n_effects)``.
    """

    cell: Tensor | None
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
        """Draw effects, with gradients.

        Returns
        -------
        Shape ``([n_samples,] n_perturbations)``; without an axis of draws by default.
        """
        shape = self.mean.shape if n_samples is None else (n_samples, *self.mean.shape)
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def of(self, entries: DosageEntries, draws: Tensor) -> GeneEffects:
        """Effects of the doses of cells.

        Parameters
        ----------
        entries
            Doses (or responses) of cells, those of pairs ignored.
        draws
            Shape ``([n_samples,] n_perturbations)``.
        """
        is_single = entries.perturbation < len(self.target)
        gene = self.target[entries.perturbation.clamp(max=len(self.target) - 1)]
        kept = torch.where(is_single & (gene >= 0))[0]
        value = entries.dose[..., kept] * draws[..., entries.perturbation[kept]]
        return GeneEffects(entries.cell[kept], gene[kept], value)

    def kl_divergence(self) -> Tensor:
        """Divergence of the posterior of all effects from the prior, a scalar in nats."""
        kl = kl_centred_normal(self.mean, self.log_variance.exp(), self.prior_variance)
        return kl[self.target >= 0].sum()


@torch.compiler.disable  # the number of effects changes from step to step
def add_gene_effects(logits: Tensor, effects: GeneEffects) -> Tensor:
    """Add log fold changes of single genes to log expression.

    Parameters
    ----------
    logits
        Shape ``(..., n_cells, n_genes)``.
    effects
        What to add.

    Returns
    -------
    The sum, of the shape of ``logits``.

    Examples
    --------
    >>> effects = GeneEffects(torch.tensor([1]), torch.tensor([0]), torch.tensor([-2.0]))
    >>> add_gene_effects(torch.zeros(2, 2), effects)
    tensor([[ 0.,  0.],
            [-2.,  0.]])
    """
    if len(effects.gene) == 0:
        return logits
    value = effects.value.to(logits.dtype)
    if effects.cell is None:
        value = value.expand(*logits.shape[:-1], value.shape[-1])
        return logits.index_add(-1, effects.gene, value)
    index = effects.cell * logits.shape[-1] + effects.gene
    flat = logits.flatten(-2)
    value = value.expand(*flat.shape[:-1], value.shape[-1])
    return flat.index_add(-1, index, value).view(logits.shape)
