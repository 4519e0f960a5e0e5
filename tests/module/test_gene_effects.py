"""Effects on single genes: shrinkage against numerical integration, draws, and known effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.distributions import Normal

from scvi_sams.module.doses import Doses
from scvi_sams.module.gene_effects import (
    ResidualEffects,
    ScaleMixture,
    absorbed_by_residuals,
    absorbed_by_validation,
    shrunk,
    solve,
)


class TestScaleMixture:
    @pytest.mark.parametrize("z", [-4.0, -0.7, 0.0, 1.5, 8.0])
    def test_posterior_is_that_of_the_prior(self, z):
        """Against a grid, with a point at zero and normals at the scales."""
        torch.manual_seed(0)
        mixture = ScaleMixture(3 * torch.randn(20, 50), torch.zeros(20, 50, dtype=torch.bool))
        weights = torch.rand(len(mixture.scales), generator=torch.Generator().manual_seed(1))
        mixture.of_targets = weights / weights.sum()
        value, own = torch.tensor([[z]]), torch.ones(1, 1, dtype=torch.bool)
        mean, variance, lfsr = (found.item() for found in mixture.posterior(value, own))

        grid = torch.linspace(-60, 60, 1_200_001, dtype=torch.float64)
        step = (grid[1] - grid[0]).item()
        error = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
        likelihood = error.log_prob(z - grid).exp()
        density = torch.zeros_like(grid)
        for scale, weight in zip(mixture.scales[1:], mixture.of_targets[1:], strict=True):
            density += weight * Normal(0.0, scale.double()).log_prob(grid).exp()
        at_zero = mixture.of_targets[0].item() * error.log_prob(torch.tensor(z)).exp().item()
        joint = density * likelihood * step
        total = joint.sum().item() + at_zero
        expected = (joint @ grid).item() / total
        assert mean == pytest.approx(expected, rel=1e-3, abs=1e-4)
        second = (joint @ grid.square()).item() / total
        assert variance == pytest.approx(second - expected**2, rel=2e-3)
        negative = joint[grid < 0].sum().item() / total
        positive = joint[grid > 0].sum().item() / total
        assert lfsr == pytest.approx(1 - max(negative, positive), abs=1e-3)

    def test_noise_is_shrunk_to_nothing_and_signal_is_not(self):
        torch.manual_seed(2)
        z = torch.randn(40, 300)
        z[0, :5] = 12.0
        none = torch.zeros(40, 300, dtype=torch.bool)
        mean, _, lfsr = ScaleMixture(z, none).posterior(z, none)
        assert mean[1:].square().mean() < 0.02
        assert (mean[0, :5] > 10).all()
        assert (lfsr[0, :5] < 0.01).all()
        assert (lfsr[1:] < 0.05).float().mean() < 0.001


class TestAbsorbed:
    """A model that projects means of cells on some directions learns that share of their noise."""

    @pytest.fixture
    def fit(self):
        torch.manual_seed(4)
        n_perturbations, n_genes, rank = 60, 400, 60
        error = torch.rand(n_perturbations, 1) * torch.ones(n_genes) + 0.5
        basis = torch.linalg.qr(torch.randn(n_genes, rank))[0]
        truth = torch.randn(n_perturbations, rank) @ basis.T
        seen = truth + error * torch.randn_like(truth)
        other = truth + 3 * error * torch.randn_like(truth)
        return seen, other, error, seen @ basis @ basis.T, rank / n_genes

    def test_from_validation_cells(self, fit):
        seen, other, error, effect, share = fit
        found, spread = absorbed_by_validation(effect, seen - other, error.square(), error > 0)
        assert abs(found - share) < 3 * spread < 0.1

    @pytest.mark.parametrize("n_single", [0, 5])
    def test_from_residuals(self, fit, n_single):
        """Single genes that the model lacks do not count."""
        seen, _, error, effect, share = fit
        residual = seen - effect
        residual[:, :n_single] += 10.0
        found = absorbed_by_residuals(residual, error, error > 0)
        assert found == pytest.approx(share, abs=0.03)

    def test_bounds_say_nothing_of_noise(self, fit):
        """Errors that are far above the noise, as of a perturbation of one cell, do not count."""
        seen, other, error, effect, share = fit
        error[:20], error[20:, ::2] = 30.0, 30.0
        told = error < 30
        found = absorbed_by_residuals(seen - effect, error, told)
        assert found == pytest.approx(share, abs=0.05)
        found, spread = absorbed_by_validation(effect, seen - other, error.square(), told)
        assert abs(found - share) < 3 * spread < 0.2


def test_shrunk_takes_out_noise_and_leaves_effects():
    """Errors of a few large effects stay small; of a row of dense ones nothing is lost."""
    torch.manual_seed(6)
    truth, error = torch.zeros(20, 500), 0.1 * torch.ones(20, 500)
    truth[:19, :10] = 2 * torch.randn(19, 10)
    truth[19] = torch.randn(500)
    estimate = truth + error * torch.randn_like(error)
    found = shrunk(estimate, error, torch.full((20,), -1)).mean
    before, after = ((table - truth).square().mean(1) for table in (estimate, found))
    assert after[:19].mean() < 0.2 * before[:19].mean()
    assert after[19] < 1.05 * before[19]


class TestSolve:
    def problem(self, doses: np.ndarray, error: float = 0.1):
        torch.manual_seed(3)
        n_perturbations = doses.shape[1]
        truth = torch.zeros(n_perturbations, 100)
        truth[torch.arange(n_perturbations), torch.arange(n_perturbations)] = 1.0
        residual = torch.from_numpy(doses).float() @ truth
        residual += error * torch.randn_like(residual) * len(doses) ** 0.5 / 4
        coupling = sparse.csr_matrix(doses.T @ doses)
        score = torch.from_numpy(doses.T).float() @ residual
        return truth, score, coupling, torch.full_like(truth, error)

    @pytest.mark.parametrize("pairs", [False, True])
    def test_planted_effects(self, pairs):
        doses = np.eye(8)[np.arange(64) % 8]
        if pairs:
            doses[::3] = np.minimum(doses[::3] + np.roll(doses, 1, axis=0)[::3], 1)
        truth, score, coupling, error = self.problem(doses)
        target = torch.full((8,), -1)
        found = solve(score, coupling, error, target)
        planted = truth > 0
        assert (found.mean[planted] - 1).abs().max() < 0.5
        naive = score / torch.from_numpy(coupling.diagonal()).float().unsqueeze(1)
        rest = found.mean[~planted].square().mean()
        assert rest < 0.2 * naive[~planted].square().mean()

    def test_targets_have_their_own_prior(self):
        """What is rare among all genes is not so rare among targets."""
        truth, score, coupling, error = self.problem(np.eye(8)[np.arange(64) % 8], error=0.3)
        without = solve(score, coupling, error, torch.full((8,), -1))
        with_targets = solve(score, coupling, error, torch.arange(8))
        planted = truth > 0
        assert with_targets.mean[planted].mean() > without.mean[planted].mean()


class TestDraws:
    @pytest.fixture
    def effects(self):
        effects = ResidualEffects(3, 5)
        shape = (2, 5)
        effects.set_rows(
            np.array([0, 2]), torch.full(shape, 0.7), torch.full(shape, 0.3), torch.zeros(shape)
        )
        return effects

    def doses(self, *of: tuple[int, float]) -> Doses:
        return Doses(torch.tensor([[t for t, _ in of]]), torch.tensor([[d for _, d in of]]))

    def test_moments(self, effects):
        torch.manual_seed(0)
        drawn = effects.of(self.doses((0, 2.0)), effects.sample(20_000))
        # The logarithm of the mean fold change is what is kept.
        torch.testing.assert_close(
            drawn.exp().mean(0).log(), torch.full((5,), 1.4), atol=0.03, rtol=0
        )
        torch.testing.assert_close(drawn.std(0), torch.full((5,), 0.6), atol=0.01, rtol=0)

    def test_pairs_add_draw_by_draw(self, effects):
        draws = effects.sample(50)
        both = effects.of(self.doses((0, 1.0), (2, 1.0)), draws)
        parts = [effects.of(self.doses((t, 1.0)), draws) for t in (0, 2)]
        torch.testing.assert_close(both, parts[0] + parts[1])

    def test_some_of_the_draws(self, effects):
        draws = effects.sample(10)
        doses = self.doses((2, 1.0))
        torch.testing.assert_close(
            effects.of(doses, draws.subset(2, 9).subset(1, 3)), effects.of(doses, draws)[3:5]
        )

    def test_nothing_is_drawn_without_effects(self, effects):
        assert (effects.of(self.doses((1, 1.0)), effects.sample(4)) == 0).all()
        assert ResidualEffects(3, 5).sample(4) is None
