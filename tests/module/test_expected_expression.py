"""Expected log-normalised expression, against sums over all counts and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from scvi_sams.module import expected_log_normalized


def brute_force(mean: float, theta: float, library: float, target: float = 1e4) -> float:
    """Sum over all counts that have a probability."""
    p = theta / (theta + mean)
    largest = int(scipy.stats.nbinom.isf(1e-12, theta, p)) + 10
    counts = np.arange(largest + 1)
    probability = scipy.stats.nbinom.pmf(counts, theta, p)
    return float(probability @ np.log2(1 + target * counts / library))


@pytest.mark.parametrize("library", [300.0, 8_000.0, 80_000.0])
@pytest.mark.parametrize("theta", [0.05, 1.0, 50.0])
def test_matches_sum_over_counts(library, theta):
    means = [1e-3, 0.05, 0.7, 10.0, 400.0]
    actual = expected_log_normalized(
        torch.tensor([means], dtype=torch.float64),
        torch.full((5,), theta, dtype=torch.float64),
        torch.tensor([[library]], dtype=torch.float64),
    )
    expected = [brute_force(mean, theta, library) for mean in means]
    np.testing.assert_allclose(actual[0], expected, rtol=2e-3, atol=5e-4)


def test_each_cell_has_its_library_and_each_gene_its_dispersion():
    mean = torch.tensor([[0.5, 3.0, 40.0], [2.0, 0.1, 9.0]], dtype=torch.float64)
    theta = torch.tensor([0.3, 2.0, 20.0], dtype=torch.float64)
    library = torch.tensor([[900.0], [20_000.0]], dtype=torch.float64)
    actual = expected_log_normalized(mean, theta, library, target=1e5)
    for cell in range(2):
        for gene in range(3):
            expected = brute_force(
                mean[cell, gene].item(), theta[gene].item(), library[cell].item(), 1e5
            )
            assert actual[cell, gene].item() == pytest.approx(expected, rel=2e-3)


def test_matches_monte_carlo_with_draws_in_front():
    mean = torch.tensor([[[0.5, 3.0]], [[8.0, 60.0]]])
    theta, library = torch.tensor([0.8, 5.0]), torch.tensor([[5_000.0]])
    actual = expected_log_normalized(mean, theta, library)
    assert actual.shape == mean.shape
    counts = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).sample(
        (200_000,)
    )
    estimate = torch.log2(1 + 1e4 * counts / library).mean(0)
    torch.testing.assert_close(actual, estimate, atol=0.01, rtol=0)


def test_small_effects_keep_their_sign():
    """A gene seen in one cell of a thousand, up by a hundredth: lost in the noise of any draw."""
    theta, library = torch.ones(1), torch.tensor([[5_000.0]])
    before = expected_log_normalized(torch.tensor([[1e-3]]), theta, library)
    after = expected_log_normalized(torch.tensor([[1.01e-3]]), theta, library)
    assert (after - before).item() == pytest.approx(0.01 * before.item(), rel=0.02)


class TestPoisson:
    """Without an inverse dispersion: the limit where it is infinite."""

    @pytest.mark.parametrize("library", [300.0, 8_000.0, 80_000.0])
    def test_matches_sum_over_counts(self, library):
        means = np.array([1e-3, 0.05, 0.7, 10.0, 400.0])
        actual = expected_log_normalized(
            torch.from_numpy(means)[None], None, torch.tensor([[library]], dtype=torch.float64)
        )
        counts = np.arange(700)[:, None]
        expected = scipy.stats.poisson.pmf(counts, means) * np.log2(1 + 1e4 * counts / library)
        np.testing.assert_allclose(actual[0], expected.sum(0), rtol=2e-3, atol=5e-4)

    def test_is_the_limit_of_the_negative_binomial(self):
        mean = torch.tensor([[[0.01, 3.0], [40.0, 0.4]]], dtype=torch.float64)
        library = torch.tensor([[900.0], [20_000.0]], dtype=torch.float64)
        limit = expected_log_normalized(mean, None, library)
        distances = [
            (expected_log_normalized(mean, torch.tensor([theta]).double(), library) - limit).abs()
            for theta in (10.0, 1e3, 1e8)
        ]
        assert (distances[0] > distances[1]).all()
        assert (distances[1] > distances[2]).all()
        torch.testing.assert_close(distances[2], torch.zeros_like(limit), atol=1e-6, rtol=0)
        assert limit.shape == mean.shape
