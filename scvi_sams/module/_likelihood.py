"""Negative binomial log-likelihood with a gradient of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from scvi_sams.module._share import log_share

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["negative_binomial_log_likelihood"]


@torch.compiler.disable  # the number of counts that are not zero changes from step to step
def negative_binomial_log_likelihood(
    logits: Tensor,
    log_inverse_dispersion: Tensor,
    counts: Tensor,
    library: Tensor,
    n_dispersion_cells: int | None = None,
    ceiling: Tensor | None = None,
    nonzero: Tensor | None = None,
) -> Tensor:
    r"""Log-likelihood of each cell under a negative binomial whose mean is a share of a library.

    The mean is :math:`\mu_{ig} = l_i \rho_{ig}` with the shares of
    :func:`~scvi_sams.module._share.log_share`, and the variance :math:`\mu + \mu^2 / \theta_g`.
    Gradients with respect to the logits are

    .. math:: \frac{\theta (x - \mu)}{\theta + \mu} - \frac{\rho}{c} \sum_h \frac{\theta (x -
       \mu)}{\theta + \mu},

    with no logarithm or gamma function, which makes a training step several times cheaper than
    automatic differentiation of the same expression.

    Parameters
    ----------
    logits
        Unnormalised log expression, shape ``(..., n_cells, n_genes)``.
    log_inverse_dispersion
        Logarithm of theta, shape ``(n_genes,)`` or ``(n_cells, n_genes)``.
    counts
        Counts, shape ``(n_cells, n_genes)``.
    library
        Library size or size factor, shape ``(n_cells, 1)``.
    n_dispersion_cells
        Estimate the gradient of the dispersion from this many leading cells (scaled up), since
        its digamma functions are the most expensive part and the dispersion is shared by all
        cells. The cells of a minibatch are in random order, so the estimate is unbiased. ``None``
        uses all of them.
    ceiling
        What the genes can reach per unit of library, :math:`c`; 1 where ``None``, and then the
        shares add up to it.
    nonzero
        Positions in the flattened counts of those that are not zero, where they are known: the
        gamma functions, the most expensive part, cancel at all others.

    Returns
    -------
    Log-likelihood summed over genes, shape ``(..., n_cells)``.

    Examples
    --------
    >>> counts = torch.tensor([[1.0, 0.0]])
    >>> negative_binomial_log_likelihood(
    ...     torch.zeros(1, 2), torch.zeros(2), counts, torch.tensor([[2.0]])
    ... )
    tensor([-2.0794])
    """
    return _NegativeBinomialLogLikelihood.apply(
        logits, log_inverse_dispersion, counts, library, n_dispersion_cells, ceiling, nonzero
    )


class _NegativeBinomialLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        log_inverse_dispersion: Tensor,
        counts: Tensor,
        library: Tensor,
        n_dispersion_cells: int | None,
        ceiling: Tensor | None,
        nonzero: Tensor | None,
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)  # never in half precision
        log_theta = log_inverse_dispersion.to(dtype)
        counts, theta = counts.to(dtype), log_theta.exp()
        # Each step overwrites the last: a new array of this size costs more than its values.
        terms = log_share(logits.to(dtype), ceiling).add_(library.to(dtype).log())
        mean = terms.exp()
        terms.mul_(counts).addcmul_(counts + theta, (mean + theta).log_(), value=-1)
        log_likelihood = (
            terms.sum(-1) + (theta * log_theta).sum(-1) + _gamma_terms(counts, theta, nonzero)
        )
        total_library = library if ceiling is None else library * ceiling
        ctx.save_for_backward(log_theta, counts, mean, total_library)
        ctx.n_dispersion_cells = n_dispersion_cells
        ctx.dtypes = logits.dtype, log_inverse_dispersion.dtype
        return log_likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        log_theta, counts, mean, total_library = ctx.saved_tensors
        theta = log_theta.exp()
        logits_gradient = theta_gradient = None
        if ctx.needs_input_grad[0]:
            weight = gradient.unsqueeze(-1)
            residual = (counts - mean).mul_(theta).div_(mean + theta)
            excess = residual.sum(-1, keepdim=True)
            residual.mul_(weight).addcmul_(mean, excess * weight / total_library, value=-1)
            logits_gradient = residual.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            n_cells = counts.shape[0]
            k = min(ctx.n_dispersion_cells or n_cells, n_cells)
            some, some_mean = counts[:k], mean[..., :k, :]
            is_per_cell = theta.dim() > 1
            if is_per_cell:
                theta, log_theta = theta[:k], log_theta[:k]
            slope = (
                _digamma_rise(some, theta)
                + log_theta
                + 1
                - (some_mean + theta).log()
                - (some + theta) / (some_mean + theta)
            )
            weighted = slope * gradient[..., :k].unsqueeze(-1)
            n_kept = 2 if is_per_cell else 1
            if weighted.dim() > n_kept:
                weighted = weighted.flatten(0, -n_kept - 1).sum(0)
            theta_gradient = (theta * weighted * (n_cells / k)).to(ctx.dtypes[1])
            if is_per_cell:
                theta_gradient = torch.nn.functional.pad(theta_gradient, (0, 0, 0, n_cells - k))
        return logits_gradient, theta_gradient, None, None, None, None, None


def _gamma_terms(counts: Tensor, theta: Tensor, nonzero: Tensor | None) -> Tensor:
    """``log Gamma(x + theta) - log Gamma(theta) - log x!`` of each cell, summed over genes."""
    if nonzero is None:
        rising = torch.lgamma(counts + theta) - torch.lgamma(counts + 1)
        return rising.sum(-1) - torch.lgamma(theta).sum(-1)
    cell = torch.div(nonzero, counts.shape[1], rounding_mode="floor")
    gene = nonzero - cell * counts.shape[1]
    some, log_gamma = counts.flatten().index_select(0, nonzero), torch.lgamma(theta)
    index = nonzero if theta.dim() > 1 else gene
    theta, log_gamma = (field.flatten().index_select(0, index) for field in (theta, log_gamma))
    rising = torch.lgamma(some + theta) - log_gamma - torch.lgamma(some + 1)
    return rising.new_zeros(len(counts)).index_add_(0, cell, rising)


def _digamma_rise(counts: Tensor, theta: Tensor) -> Tensor:
    """``digamma(counts + theta) - digamma(theta)``, worked out only where counts are not zero."""
    rise = torch.zeros_like(counts)
    cell, gene = counts.nonzero(as_tuple=True)
    theta = theta.expand_as(counts)[cell, gene]
    rise[cell, gene] = torch.digamma(counts[cell, gene] + theta) - torch.digamma(theta)
    return rise
