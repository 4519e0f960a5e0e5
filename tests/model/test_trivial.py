"""The model of one rate a gene and batch, against scipy and the truth that made the counts."""

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from scvi_sams.model.trivial import trivial_log_likelihood


def _cells(n_cells=3_000, seed=0):
    rng = np.random.default_rng(seed)
    library, batch = rng.uniform(50, 200, n_cells), rng.integers(2, size=n_cells)
    rates = np.array([[0.01, 0.1, 0.5], [0.03, 0.1, 0.2]])[batch]
    theta = np.array([0.5, 2.0, 20.0])
    mean = library[:, None] * rates
    counts = rng.poisson(rng.gamma(theta, mean / theta))
    return counts, library, batch, mean, theta


def _tensors(counts, library, batch):
    return torch.tensor(counts).float(), torch.tensor(library).float(), torch.tensor(batch)


def test_likelihood_is_greatest_in_the_training_cells():
    counts, library, batch, *_ = _cells(500)
    cells = _tensors(counts, library, batch)
    found = trivial_log_likelihood(*cells, *cells).sum().item()
    rates = np.stack(
        [(counts[batch == b].sum(0) + 0.5) / library[batch == b].sum() for b in range(2)]
    )
    mean = library[:, None] * rates[batch]

    def loss(log_theta, gene):
        theta, mu = np.exp(log_theta), mean[:, gene]
        return -nbinom.logpmf(counts[:, gene], theta, theta / (theta + mu)).sum()

    best = sum(
        -minimize_scalar(loss, bounds=(-4, 8), args=(g,), method="bounded").fun for g in range(3)
    )
    np.testing.assert_allclose(found, best, rtol=1e-5)


def test_held_out_cells_are_described_nearly_as_by_the_truth():
    counts, library, batch, mean, theta = _cells()
    truth = nbinom.logpmf(counts, theta, theta / (theta + mean)).sum(1)[2_000:].mean()
    cells = _tensors(counts, library, batch)
    found = trivial_log_likelihood(*(c[:2_000] for c in cells), *(c[2_000:] for c in cells)).mean()
    # Nine numbers were fitted to 2,000 cells: half a nat each over these cells is lost.
    assert truth - 0.02 < found.item() < truth + 0.005


def test_a_batch_that_was_not_trained_on_gets_the_rates_of_all():
    counts, library, batch, *_ = _cells(500)
    first = _tensors(counts, library, np.zeros_like(batch))
    other = _tensors(counts, library, np.full_like(batch, 3))
    same = trivial_log_likelihood(*first, *first)
    torch.testing.assert_close(trivial_log_likelihood(*first, *other), same)
