"""The rotation of the latents, against brute force and known solutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.special import logsumexp

from scvi_sams.module.rotation import (
    SparseEvidence,
    log_bayes_factor,
    procrustes,
    sparse_rotation,
)

from ._effects import match_columns, random_rotation, sparse_matrix


class TestProcrustes:
    def test_is_orthogonal_and_maximises_the_trace(self):
        cross = torch.randn(5, 5, dtype=torch.float64)
        closest = procrustes(cross)
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(closest @ closest.T, identity)
        best = torch.trace(closest.T @ cross)
        torch.testing.assert_close(best, torch.linalg.svdvals(cross).sum())
        for size in (1e-3, 0.1, 1.0):
            skew = size * torch.randn(50, 5, 5, dtype=torch.float64)
            others = closest @ torch.matrix_exp(skew - skew.mT)
            assert ((others.mT @ cross).diagonal(dim1=1, dim2=2).sum(1) <= best).all()

    def test_recovers_a_rotation(self):
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
        points = torch.randn(40, 6, dtype=torch.float64)
        torch.testing.assert_close(procrustes(points.T @ (points @ rotation)), rotation)


class TestSparseRotation:
    def test_undoes_a_rotation_of_effects_on_one_latent_each(self):
        truth = torch.zeros(30, 6, dtype=torch.float64)
        truth[torch.arange(30), torch.arange(30) % 6] = torch.randn(30, dtype=torch.float64)
        hidden = truth @ random_rotation(6)
        rotation = sparse_rotation(hidden, generator=torch.Generator().manual_seed(0))
        assert match_columns(hidden @ rotation, truth).min() > 0.9999

    def test_undoes_a_rotation_of_overlapping_effects(self):
        """Not to the last digit: the sum of fourth powers likes large entries too much."""
        truth = sparse_matrix(500, 6)
        hidden = truth @ random_rotation(6)
        rotation = sparse_rotation(hidden, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64))
        assert (hidden @ rotation).pow(4).sum() > 1.5 * hidden.pow(4).sum()
        assert match_columns(hidden @ rotation, truth).min() > 0.96

    def test_is_reproducible_and_leaves_the_global_stream_alone(self):
        matrix = torch.randn(30, 5)
        state = torch.get_rng_state()
        first, second = (
            sparse_rotation(matrix, generator=torch.Generator().manual_seed(3)) for _ in range(2)
        )
        assert torch.equal(first, second)
        assert torch.equal(state, torch.get_rng_state())

    def test_matrix_of_zeros(self):
        rotation = sparse_rotation(torch.zeros(4, 3))
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))


class TestRotationOfManyPerturbations:
    def test_the_starts_see_the_strongest_and_the_end_sees_all(self):
        generator = torch.Generator().manual_seed(0)
        on = torch.rand(2_500, 8, generator=generator) < 0.2
        effects = on * torch.randn(2_500, 8, generator=generator)
        hidden = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        rotation = sparse_rotation(effects @ hidden, generator=generator)
        # The rotation is found, up to the order and sign of the latents.
        overlap = (hidden @ rotation).abs()
        torch.testing.assert_close(overlap.max(0).values, torch.ones(8), atol=2e-3, rtol=0)


@pytest.mark.parametrize("n_latent", [64, 200, 400])
def test_rotation_of_many_latents_is_orthogonal_and_takes_a_bounded_number_of_steps(
    n_latent, monkeypatch
):
    steps = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x: steps.append(len(x)) or svd(x))
    rotation = sparse_rotation(torch.randn(30, n_latent), generator=torch.Generator())
    identity = torch.eye(n_latent)
    torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-3, rtol=0)
    assert sum(step**3 for step in steps) <= 1.5 * 16 * 500 * 64**3


def screen_of(effects: torch.Tensor, n_cells: float = 200.0, noise: bool = True) -> SparseEvidence:
    """What cells of unit gain say of effects."""
    curvature = n_cells * (0.5 + torch.rand(1, effects.shape[1]))
    score = curvature * effects + noise * curvature.sqrt() * torch.randn(effects.shape)
    return SparseEvidence(score, curvature.expand_as(score).contiguous(), -3.0, 1.0, 1 / 30)


class TestSparseEvidence:
    def test_bayes_factor_is_a_ratio_of_evidences(self):
        score, curvature, variance = 4.0, 3.0, 0.7
        grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
        prior = torch.distributions.Normal(0.0, math.sqrt(variance)).log_prob(grid)
        evidence = (prior + score * grid - 0.5 * curvature * grid**2).exp().sum() * 24 / 200_000
        found = log_bayes_factor(torch.tensor(score), torch.tensor(curvature), variance)
        assert found.item() == pytest.approx(math.log(evidence), rel=1e-5)

    def test_evidence_of_a_plane_is_a_sum_over_masks(self):
        """Two latents are one plane: against normal integrals of all four masks."""
        torch.manual_seed(0)
        problem = screen_of(torch.tensor([[1.0, -0.4], [0.2, 0.1]]), n_cells=20.0)
        planes = problem._planes(
            problem.score - problem.curvature * problem.effects,
            problem.effects,
            torch.eye(2)[:1],
            torch.eye(2)[1:],
        )
        angle = torch.tensor([[0.3]])
        turn = torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]])
        expected = 0.0
        for score, curvature in zip(problem.score, problem.curvature, strict=True):
            noise = torch.linalg.inv(torch.eye(2) + curvature.diag() / 30)
            h, s = turn @ noise @ curvature.diag() @ turn.T, turn @ noise @ score
            terms = []
            for mask in itertools.product([0, 1], repeat=2):
                on = [k for k in range(2) if mask[k]]
                term = -3.0 * len(on)
                if on:
                    precision = torch.eye(len(on)) + h[on][:, on]
                    term += 0.5 * (s[on] @ torch.linalg.solve(precision, s[on])).item()
                    term -= 0.5 * torch.logdet(precision).item()
                terms.append(term)
            expected += logsumexp(terms)
        # Perturbations without a say in the plane are left out, whatever the angle.
        assert len(planes.plane) == 2
        assert planes.evidence(angle, -3.0).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("n_latent", [4, 7])
    def test_hidden_axes_are_found(self, n_latent):
        torch.manual_seed(1)
        truth = 2 * torch.randn(40, n_latent) * (torch.rand(40, n_latent) < 0.25)
        hidden = random_rotation(n_latent).float()
        problem = screen_of(truth @ hidden)
        found = problem.search([torch.eye(n_latent), problem.principal_axes()])
        torch.testing.assert_close(found @ found.T, torch.eye(n_latent), atol=1e-5, rtol=0)
        overlap = (hidden @ found.T).abs().max(0).values
        assert overlap.min() > 0.99
        assert problem.total(found) > problem.total(torch.eye(n_latent)) + 10

    def test_a_split_mechanism_is_merged(self):
        torch.manual_seed(2)
        strength = 2 * torch.randn(12, 1)
        problem = screen_of(strength * torch.tensor([[0.8, 0.6]]))
        found = problem.search([torch.eye(2)])
        on = problem.of_axes(found) > 0
        assert on.any(0).sum() == 1

    def test_a_seed_gives_the_same(self):
        problem = screen_of(torch.randn(20, 6))
        first, second = (
            problem.search([torch.eye(6)], 2, torch.Generator().manual_seed(4)) for _ in range(2)
        )
        assert torch.equal(first, second)

    def test_unused_axes_have_a_diagonal_curvature(self):
        torch.manual_seed(3)
        truth = torch.zeros(20, 6)
        truth[:, 0] = 2.0
        problem = screen_of(truth)
        found = problem.search([random_rotation(6).float()])
        unused = found[problem.of_axes(found).amax(0) < -2.0]
        among = (unused * problem.curvature.mean(0)) @ unused.T
        off = among - among.diagonal().diag()
        assert len(unused) >= 4
        assert off.abs().max() < 1e-3 * among.diagonal().max()

    def test_nothing_to_see(self):
        problem = SparseEvidence(torch.zeros(3, 4), torch.ones(3, 4), -3.0, 1.0, 1 / 30)
        found = problem.search([torch.eye(4)], 1, torch.Generator())
        torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-5, rtol=0)
