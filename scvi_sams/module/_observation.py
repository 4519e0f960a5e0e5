"""Distributions of what is measured in a cell, given the output of the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial

from scvi_sams.module._expected_expression import expected_log_normalized
from scvi_sams.module._likelihood import negative_binomial_log_likelihood
from scvi_sams.module._share import log_share

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._networks import Decoded

__all__ = [
    "Dispersion",
    "GeneLikelihood",
    "expected_expression",
    "expected_log_normalized_expression",
    "observation_distribution",
    "observation_log_likelihood",
]

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
        :func:`~scvi_sams.module._share.log_share`; that of other features is the decoder's output
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
        See :func:`~scvi_sams.module._likelihood.negative_binomial_log_likelihood`.

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
    distribution: Observation, library: Tensor, target: float = 1e4
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

    Returns
    -------
    Shape ``(..., n_cells, n_genes)``.
    """
    if isinstance(distribution, Poisson):
        return expected_log_normalized(distribution.rate, None, library, target)
    expected = expected_log_normalized(distribution.mu, distribution.theta, library, target)
    if isinstance(distribution, ZeroInflatedNegativeBinomial):
        return expected * (1 - distribution.zi_probs)
    return expected
