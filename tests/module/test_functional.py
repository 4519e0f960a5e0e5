"""Doses, shifts, divergences and relaxed draws, against brute force and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from scvi_sams.module.doses import (
    additive_shift,
    dosage_entries,
    kl_bernoulli_log_prior,
    kl_centred_normal,
    log_mean_exp,
    relaxed_bernoulli,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture
def dosage() -> torch.Tensor:
    """Doses of 40 cells: controls, singles, pairs and triples, none of them one."""
    dosage = torch.rand(40, 7, dtype=torch.float64) * 2
    dosage *= torch.rand(40, 7) < 0.25
    dosage[0] = 0
    dosage[1, :3] = torch.tensor([0.5, 1.0, 2.0])
    return dosage


class TestDosageEntries:
    @pytest.mark.parametrize("sparse", [False, True])
    def test_entries_rebuild_the_matrix(self, dosage, sparse):
        entries = dosage_entries(dosage.to_sparse_csr() if sparse else dosage)
        rebuilt = torch.zeros_like(dosage)
        rebuilt[entries.cell, entries.perturbation] = entries.dose
        assert torch.equal(rebuilt, dosage)
        assert entries.n_cells == 40

    def test_layouts_agree(self, dosage):
        for dense, sparse in zip(
            dosage_entries(dosage), dosage_entries(dosage.to_sparse_csr()), strict=True
        ):
            assert torch.equal(torch.as_tensor(dense), torch.as_tensor(sparse))

    def test_cells_without_a_dose_still_count(self):
        entries = dosage_entries(torch.zeros(3, 2).to_sparse_csr())
        assert len(entries.cell) == 0
        assert additive_shift(entries, torch.zeros(0, 4)).shape == (3, 4)


class TestAdditiveShift:
    @pytest.mark.parametrize("power", [1, 2])
    @pytest.mark.parametrize("sparse", [False, True])
    def test_is_the_matrix_product(self, dosage, power, sparse):
        effects = torch.randn(7, 5, dtype=torch.float64)
        entries = dosage_entries(dosage.to_sparse_csr() if sparse else dosage)
        shift = additive_shift(entries, effects[entries.perturbation], power)
        torch.testing.assert_close(shift, dosage**power @ effects)

    def test_leading_dimensions(self, dosage):
        effects = torch.randn(3, 7, 5, dtype=torch.float64)
        entries = dosage_entries(dosage)
        shift = additive_shift(entries, effects[:, entries.perturbation])
        torch.testing.assert_close(shift, dosage @ effects)

    def test_gradient_is_the_transposed_product(self, dosage):
        effects = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(40, 5, dtype=torch.float64)
        entries = dosage_entries(dosage)
        (additive_shift(entries, effects[entries.perturbation]) * direction).sum().backward()
        torch.testing.assert_close(effects.grad, dosage.T @ direction)


def kl_bernoulli(logits: torch.Tensor, prior_logit: torch.Tensor) -> torch.Tensor:
    return kl_bernoulli_log_prior(logits, F.logsigmoid(prior_logit), F.logsigmoid(-prior_logit))


class TestBernoulliDivergence:
    def test_matches_torch(self):
        logits, prior = torch.meshgrid(
            torch.linspace(-8, 8, 33, dtype=torch.float64),
            torch.linspace(-4, 4, 9, dtype=torch.float64),
            indexing="ij",
        )
        expected = kl_divergence(Bernoulli(logits=logits), Bernoulli(logits=prior))
        torch.testing.assert_close(kl_bernoulli(logits, prior), expected)

    def test_matches_monte_carlo(self):
        q, p = Bernoulli(logits=torch.tensor(1.2)), Bernoulli(logits=torch.tensor(-2.0))
        draws = q.sample((200_000,))
        estimate = (q.log_prob(draws) - p.log_prob(draws)).mean()
        torch.testing.assert_close(kl_bernoulli(q.logits, p.logits), estimate, atol=0.02, rtol=0)

    @pytest.mark.parametrize("logit", [-200.0, 200.0])
    def test_is_finite_where_the_posterior_is_certain(self, logit):
        divergence = kl_bernoulli(torch.tensor(logit), torch.tensor(1.0))
        sure = math.log1p(math.exp(math.copysign(1.0, -logit)))
        assert divergence.item() == pytest.approx(sure, rel=1e-4)


class TestNormalDivergence:
    def test_matches_torch(self):
        mean = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
        variance = torch.logspace(-4, 1, 6, dtype=torch.float64)
        expected = kl_divergence(
            Normal(mean, variance.sqrt()), Normal(torch.zeros_like(mean), math.sqrt(0.7))
        )
        torch.testing.assert_close(kl_centred_normal(mean, variance, 0.7), expected)

    def test_matches_monte_carlo(self):
        q, p = Normal(0.8, 0.5), Normal(0.0, 1.5)
        draws = q.sample((200_000,))
        estimate = (q.log_prob(draws) - p.log_prob(draws)).mean()
        exact = kl_centred_normal(torch.tensor(0.8), torch.tensor(0.25), 2.25)
        torch.testing.assert_close(exact, estimate, atol=0.01, rtol=0)


class TestLogMeanExp:
    @pytest.mark.parametrize("dim", [0, 1])
    def test_is_the_logarithm_of_the_mean(self, dim):
        log_weights = torch.randn(6, 5, dtype=torch.float64)
        expected = log_weights.exp().mean(dim).log()
        torch.testing.assert_close(log_mean_exp(log_weights, dim), expected)

    def test_neither_over_nor_underflows(self):
        assert log_mean_exp(torch.tensor([-5e3, -5e3])).item() == -5e3
        assert log_mean_exp(torch.tensor([5e3, 5e3])).item() == 5e3


class TestRelaxedBernoulli:
    def test_draws_are_exact(self):
        logits = torch.tensor([-3.0, -0.5, 0.0, 2.0])
        draws = relaxed_bernoulli(logits.expand(100_000, 4), 0.5)
        assert set(draws.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(draws.mean(0), logits.sigmoid(), atol=0.01, rtol=0)

    def test_gradient_points_to_what_lowers_the_loss(self):
        logits = torch.zeros(20_000, requires_grad=True)
        relaxed_bernoulli(logits, 0.5).sum().backward()
        assert (logits.grad > 0).float().mean() > 0.99
        # Of the concrete relaxation at this temperature: the mean of soft (1 - soft) / 0.5.
        uniform = torch.linspace(0, 1, 100_002, dtype=torch.float64)[1:-1]
        soft = torch.sigmoid(torch.logit(uniform) / 0.5)
        expected = (soft * (1 - soft) / 0.5).mean().item()
        assert logits.grad.mean().item() == pytest.approx(expected, rel=0.02)
