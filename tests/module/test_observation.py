"""The four likelihoods, against scipy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from scvi_sams.module import Decoded
from scvi_sams.module.likelihood import (
    expected_expression,
    expected_log_normalized_expression,
    observation_distribution,
    observation_log_likelihood,
)

N_CELLS, N_GENES = 12, 6
COUNTS = ("nb", "zinb", "poisson")


@pytest.fixture
def decoded() -> Decoded:
    return Decoded(*torch.randn(2, N_CELLS, N_GENES, dtype=torch.float64))


@pytest.fixture
def library() -> torch.Tensor:
    return 20 + 50 * torch.rand(N_CELLS, 1, dtype=torch.float64)


@pytest.fixture
def counts() -> torch.Tensor:
    return torch.poisson(3 * torch.rand(N_CELLS, N_GENES, dtype=torch.float64))


def scipy_log_pmf(gene_likelihood, decoded, log_dispersion, x, library) -> np.ndarray:
    mean = (library * torch.softmax(decoded.logits, -1)).numpy()
    theta = log_dispersion.exp().numpy()
    x = x.numpy()
    if gene_likelihood == "normal":
        return scipy.stats.norm.logpdf(x, decoded.logits.numpy(), theta)
    if gene_likelihood == "poisson":
        return scipy.stats.poisson.logpmf(x, mean)
    log_pmf = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    if gene_likelihood == "nb":
        return log_pmf
    zero = torch.sigmoid(decoded.zero_inflation_logits).numpy()
    return np.where(x == 0, np.log(zero + (1 - zero) * np.exp(log_pmf)), np.log1p(-zero) + log_pmf)


@pytest.mark.parametrize("per_cell", [False, True], ids=["gene", "gene-batch"])
@pytest.mark.parametrize("gene_likelihood", [*COUNTS, "normal"])
def test_log_likelihood(gene_likelihood, per_cell, decoded, counts, library):
    shape = (N_CELLS, N_GENES) if per_cell else (N_GENES,)
    log_dispersion = torch.randn(shape, dtype=torch.float64)
    x = counts if gene_likelihood != "normal" else counts - 1.5
    expected = scipy_log_pmf(gene_likelihood, decoded, log_dispersion, x, library).sum(-1)
    found = observation_log_likelihood(gene_likelihood, decoded, log_dispersion, x, library)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("gene_likelihood", COUNTS)
def test_counts_are_the_library_times_the_share(gene_likelihood, decoded, library):
    distribution = observation_distribution(
        gene_likelihood, decoded, torch.zeros(N_GENES), library
    )
    share = expected_expression(distribution)
    torch.testing.assert_close(share.sum(-1), torch.ones(N_CELLS, dtype=torch.float64))
    mean = library * share
    if gene_likelihood == "zinb":
        mean = mean * (1 - torch.sigmoid(decoded.zero_inflation_logits))
    torch.testing.assert_close(distribution.mean, mean)


def test_features_are_the_output_of_the_decoder(decoded, library):
    distribution = observation_distribution("normal", decoded, torch.zeros(N_GENES), library)
    assert torch.equal(expected_expression(distribution), decoded.logits)
    assert torch.equal(distribution.get_normalized("scale"), decoded.logits)


@pytest.mark.parametrize("gene_likelihood", COUNTS)
def test_expected_log_expression(gene_likelihood, decoded, library):
    """Against the sum over all counts that have any probability."""
    log_dispersion = torch.randn(N_GENES, dtype=torch.float64) + 1
    distribution = observation_distribution(gene_likelihood, decoded, log_dispersion, library)
    values = torch.arange(2_000, dtype=torch.float64)[:, None, None]
    log_pmf = scipy_log_pmf(
        gene_likelihood, decoded, log_dispersion, values.expand(-1, N_CELLS, N_GENES), library
    )
    log_expression = np.log2(1 + 1e4 * values.numpy() / library.numpy())
    expected = (np.exp(log_pmf) * log_expression).sum(0)
    found = expected_log_normalized_expression(distribution, library)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
