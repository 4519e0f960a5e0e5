"""Distributions of what is measured in a cell, given the output of the decoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.networks import Decoded


def log_share(logits: Tensor, ceiling: Tensor | None = None) -> Tensor:
    r"""Logarithm of the mean expression of each gene per unit of library.

    Where the library is the sum of the genes' counts, their shares must add up to one: a softmax.
    A size factor that the user gives is another matter, since it may count genes that were left
    out, or be on a scale of its own. There the shares are those of a softmax with one more
    category, whose logit is zero and which nobody measures,

    .. math:: \rho_{ig} = c \, \frac{\exp(a_{ig})}{1 + \sum_h \exp(a_{ih})},

    so that no gene has to take up what the others leave.

    Parameters
    ----------
    logits
        Unnormalised log expression :math:`a`, shape ``(..., n_genes)``.
    ceiling
        What all genes together can reach per unit of library, :math:`c`, a scalar; ``None`` if
        the library is the sum of the counts.

    Returns
    -------
    Shape of ``logits``.

    Examples
    --------
    >>> log_share(torch.zeros(3)).exp()
    tensor([0.3333, 0.3333, 0.3333])
    >>> log_share(torch.zeros(3), ceiling=torch.tensor(2.0)).exp()
    tensor([0.5000, 0.5000, 0.5000])
    """
    if ceiling is None:
        return torch.log_softmax(logits, -1)
    of_all = torch.nn.functional.softplus(torch.logsumexp(logits, -1, keepdim=True))
    return logits - (of_all - ceiling.log().to(logits.dtype))


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
    :func:`~scvi_sams.module.likelihood.log_share`, variance :math:`\mu + \mu^2 / \theta_g`.
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


_MAX_LOG_THETA = 30.0  # beyond, counts are Poisson in float32, and theta would overflow
# From here Stirling's series is exact in float32, and differences of gamma functions are not.
_LEAST_SERIES_THETA = 50.0


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
        log_theta = log_inverse_dispersion.to(dtype).clamp(-_MAX_LOG_THETA, _MAX_LOG_THETA)
        counts, theta = counts.to(dtype), log_theta.exp()
        # Each step overwrites the last: a new array of this size costs more than its values.
        terms = log_share(logits.to(dtype), ceiling).add_(library.to(dtype).log())
        mean = terms.exp()
        # Not log(mean + theta), of which next to nothing is left of a mean far below theta.
        terms.mul_(counts).addcmul_(counts + theta, (mean / theta).log1p_(), value=-1)
        log_likelihood = terms.sum(-1) + _gamma_terms(counts, theta, nonzero)
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
                - (some_mean / theta).log1p()
                + (some_mean - some) / (some_mean + theta)
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
    """``log Gamma(x + theta) / (Gamma(theta) theta^x x!)`` of each cell, summed over genes."""
    if nonzero is None:
        rise = _log_gamma_rise(counts, theta, torch.lgamma(theta))
        return (rise - torch.lgamma(counts + 1)).sum(-1)
    cell = torch.div(nonzero, counts.shape[1], rounding_mode="floor")
    gene = nonzero - cell * counts.shape[1]
    some, log_gamma = counts.flatten().index_select(0, nonzero), torch.lgamma(theta)
    index = nonzero if theta.dim() > 1 else gene
    theta, log_gamma = (field.flatten().index_select(0, index) for field in (theta, log_gamma))
    rise = _log_gamma_rise(some, theta, log_gamma) - torch.lgamma(some + 1)
    return rise.new_zeros(len(counts)).index_add_(0, cell, rise)


def _log_gamma_rise(counts: Tensor, theta: Tensor, log_gamma: Tensor) -> Tensor:
    """``log Gamma(x + theta) - log Gamma(theta) - x log(theta)``, which nears 0 as theta grows."""
    exact = torch.lgamma(counts + theta) - log_gamma - counts * theta.log()
    total = counts + theta
    series = (total - 0.5) * (counts / theta).log1p() - counts + (1 / total - 1 / theta) / 12
    return torch.where(theta > _LEAST_SERIES_THETA, series, exact)


def _digamma_rise(counts: Tensor, theta: Tensor) -> Tensor:
    """``digamma(counts + theta) - digamma(theta)``, zero where counts are."""
    if counts.is_cuda:  # which would wait for the number of counts that are not zero
        return _digamma_difference(counts, theta.expand_as(counts))
    rise = torch.zeros_like(counts)
    cell, gene = counts.nonzero(as_tuple=True)
    rise[cell, gene] = _digamma_difference(counts[cell, gene], theta.expand_as(counts)[cell, gene])
    return rise


def _digamma_difference(counts: Tensor, theta: Tensor) -> Tensor:
    exact = torch.digamma(counts + theta) - torch.digamma(theta)
    total = counts + theta
    series = (counts / theta).log1p() + 0.5 * (1 / theta - 1 / total)
    series = series + (1 / theta.square() - 1 / total.square()) / 12
    return torch.where(theta > _LEAST_SERIES_THETA, series, exact)


_STEP = 1.0  # of the trapezoid rule; its error falls as exp(-pi**2 / step)
_UPPER = 2.5  # exp(-exp(2.5)) is 5e-6
_MAX_PLAIN_THETA = 100.0
_SERIES = 0.02  # of what is expanded in a series to its square; its cube is below 1e-5


def expected_log_normalized(
    mean: Tensor, inverse_dispersion: Tensor | None, library: Tensor, target: float = 1e4
) -> Tensor:
    r"""Expectation of ``log2(1 + target * x / library)`` of negative binomial counts.

    With :math:`s = \mathrm{target} / l`, the Laplace transform of the counts in

    .. math::
       \mathrm E \log(1 + s x) = \int_0^\infty \left(1 - \mathrm E e^{-s t x}\right)
       \frac{e^{-t}}{t} dt, \quad
       \mathrm E e^{-a x} = \left(1 + \tfrac{\mu}{\theta} (1 - e^{-a})\right)^{-\theta}

    leaves one smooth integral, which a trapezoid rule in :math:`\log t` solves to four digits
    with some twenty nodes. No counts are drawn, so a small effect of a lowly expressed gene does
    not drown in their noise.

    Parameters
    ----------
    mean
        Means of the counts, shape ``(..., n_cells, n_genes)``.
    inverse_dispersion
        Inverse dispersion, broadcasts to ``mean``; ``None`` for Poisson counts, its limit.
    library
        Library sizes, shape ``(n_cells, 1)``.
    target
        What counts are scaled to.

    Returns
    -------
    Shape of ``mean``.

    Examples
    --------
    >>> expectation = expected_log_normalized(
    ...     torch.tensor([[0.0]]), torch.tensor([1.0]), torch.tensor([[1e4]])
    ... )
    >>> expectation.item()
    0.0
    """
    rate = target / library
    # The mean, and the mean square, of counts in units of 1 / rate.
    first = mean * rate
    excess = 1.0 if inverse_dispersion is None else 1 + 1 / inverse_dispersion
    largest = (first * excess).max().item()
    lower = math.log(_SERIES / (1 + largest + rate.max().item()))
    nodes = torch.arange(_UPPER, lower, -_STEP, dtype=torch.float64).exp().tolist()
    ratio = mean if inverse_dispersion is None else mean / inverse_dispersion
    # log1p is slow, and needed only where a rounding of its argument is raised to a high power.
    is_plain = (
        inverse_dispersion is not None and inverse_dispersion.max().item() < _MAX_PLAIN_THETA
    )
    weights = [_STEP * math.exp(-node) for node in nodes]
    total = torch.zeros_like(first)
    whole = first.new_zeros(())  # summed up as the rest is, so that no counts are exactly zero
    work = torch.empty_like(first)
    for node, weight in zip(nodes, weights, strict=True):
        torch.mul(ratio, -torch.expm1(-rate * node), out=work)
        if inverse_dispersion is None:
            work.neg_()
        else:
            work = work.add_(1).log_() if is_plain else work.log1p_()
            work.mul_(-inverse_dispersion)
        total.sub_(work.exp_(), alpha=weight)
        whole += -weight
    # Below the last node the integrand is a line and a parabola, so that the nodes left out are
    # two geometric series. Where they begin depends on what is computed together, and the result
    # must not.
    total = total.sub_(whole).clamp_(min=0)
    last = nodes[-1]
    square = (first * excess + rate).mul_(first)  # rate**2 times the mean square
    total.add_(first, alpha=_STEP * last / math.expm1(_STEP))
    total.sub_(square.mul_(0.5).add_(first), alpha=_STEP * last**2 / math.expm1(2 * _STEP))
    return total.div_(math.log(2))


GeneLikelihood: TypeAlias = Literal["nb", "zinb", "poisson", "normal"]
"""Distributions of what is measured: three of counts, one of any other features."""
Dispersion: TypeAlias = Literal["gene", "gene-batch"]
"""What shares a dispersion (of counts) or a standard deviation (of other features)."""

Observation: TypeAlias = NegativeBinomial | ZeroInflatedNegativeBinomial | Poisson | Normal


def observation_distribution(
    gene_likelihood: GeneLikelihood, decoded: Decoded, log_dispersion: Tensor, library: Tensor
) -> Observation:
    """Distribution of each gene of each cell, as scvi-tools' methods read it.

    Parameters
    ----------
    gene_likelihood
        The distribution. The mean of counts is the library size times
        :func:`~scvi_sams.module.likelihood.log_share`; of other features is the decoder's output
        itself.
    decoded
        Output of the decoder.
    log_dispersion
        Logarithm of the inverse dispersion of counts, or of the standard deviation of other
        features, shape ``(n_genes,)`` or ``(n_cells, n_genes)``.
    library
        Library size or size factor, shape ``(n_cells, 1)``.

    Returns
    -------
    With the share of the library (or the mean feature) where scvi-tools looks for it.
    """
    logits = decoded.logits.float() if decoded.logits.dtype.itemsize < 4 else decoded.logits
    if gene_likelihood == "normal":
        return Normal(logits, log_dispersion.exp(), validate_args=False, normal_mu=logits)
    scale = log_share(logits, decoded.ceiling).exp()
    mean = scale * library
    if gene_likelihood == "poisson":
        return Poisson(mean, validate_args=False, scale=scale)
    theta = log_dispersion.exp()
    if gene_likelihood == "nb":
        return NegativeBinomial(mu=mean, theta=theta, validate_args=False, scale=scale)
    return ZeroInflatedNegativeBinomial(
        mu=mean,
        theta=theta,
        zi_logits=decoded.zero_inflation_logits,
        validate_args=False,
        scale=scale,
    )


def observation_log_likelihood(
    gene_likelihood: GeneLikelihood,
    decoded: Decoded,
    log_dispersion: Tensor,
    x: Tensor,
    library: Tensor,
    n_dispersion_cells: int | None = None,
    nonzero: Tensor | None = None,
) -> Tensor:
    """Log-likelihood of each cell, summed over genes.

    Parameters
    ----------
    gene_likelihood, decoded, log_dispersion, library
        As in :func:`observation_distribution`.
    x
        Counts or features, shape ``(n_cells, n_genes)``.
    n_dispersion_cells, nonzero
        See :func:`~scvi_sams.module.likelihood.negative_binomial_log_likelihood`.

    Returns
    -------
    Shape ``(..., n_cells)``.
    """
    if gene_likelihood == "nb":
        return negative_binomial_log_likelihood(
            decoded.logits,
            log_dispersion,
            x,
            library,
            n_dispersion_cells,
            decoded.ceiling,
            nonzero,
        )
    distribution = observation_distribution(gene_likelihood, decoded, log_dispersion, library)
    return distribution.log_prob(x.to(library.dtype)).sum(-1)


def expected_expression(distribution: Observation) -> Tensor:
    """Expected share of the library of each gene, or expected value of a feature.

    Zero inflation is taken as a failure to detect, so that it does not lower the share.

    Returns
    -------
    Shape ``(..., n_cells, n_genes)``.
    """
    if isinstance(distribution, Normal):
        return distribution.loc
    return distribution.scale


def expected_log_normalized_expression(
    distribution: Observation, library: Tensor, target: float = 1e4, fold_change: float = 1.0
) -> Tensor:
    """Expectation of ``log2(1 + target * x / library)``, without sampling counts.

    Parameters
    ----------
    distribution
        Distribution of counts.
    library
        Library size or size factor, shape ``(n_cells, 1)``.
    target
        What counts are scaled to.
    fold_change
        Multiplies the means of the counts; the library stays.

    Returns
    -------
    Shape ``(..., n_cells, n_genes)``.
    """
    if isinstance(distribution, Poisson):
        return expected_log_normalized(distribution.rate * fold_change, None, library, target)
    mean = distribution.mu * fold_change
    expected = expected_log_normalized(mean, distribution.theta, library, target)
    if isinstance(distribution, ZeroInflatedNegativeBinomial):
        return expected * (1 - distribution.zi_probs)
    return expected
