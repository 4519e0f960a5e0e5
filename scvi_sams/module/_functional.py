"""Pure functions of tensors: doses, shifts and divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DosageEntries",
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
