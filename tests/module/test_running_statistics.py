"""Running statistics of the cells, against sums over all cells and automatic differentiation."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module import Potential
from scvi_sams.module.doses import additive_shift, dosage_entries
from scvi_sams.module.statistics import RunningStatistics

N_CELLS, N_PERTURBATIONS, N_LATENT = 60, 5, 3


class Cells(NamedTuple):
    """Cells with doses, potentials of a fixed encoder, and the effects believed in."""

    dosage: torch.Tensor
    potential: Potential
    effects: torch.Tensor

    def shift(self) -> torch.Tensor:
        return self.dosage @ self.effects

    def take(self, rows: torch.Tensor) -> Cells:
        potential = Potential(*(field[rows] for field in self.potential))
        return Cells(self.dosage[rows], potential, self.effects)


@pytest.fixture
def cells() -> Cells:
    """Controls, singles, pairs and triples in random order, doses of all sizes; float64."""
    dosage = torch.rand(N_CELLS, N_PERTURBATIONS, dtype=torch.float64) + 0.5
    dosage *= torch.rand(N_CELLS, N_PERTURBATIONS) < 0.3
    dosage[0], dosage[1, :3] = 0, 1
    gain = 0.2 + 0.7 * torch.rand(N_CELLS, N_LATENT, dtype=torch.float64)
    location = torch.randn(N_CELLS, N_LATENT, dtype=torch.float64)
    effects = torch.randn(N_PERTURBATIONS, N_LATENT, dtype=torch.float64)
    return Cells(dosage, Potential(location, gain, 1 - gain), effects)


def make_statistics(n_batch: int = 1) -> RunningStatistics:
    return RunningStatistics(N_PERTURBATIONS, N_LATENT, n_batch).double()


def observe(statistics: RunningStatistics, cells: Cells, n_training_cells: int = N_CELLS) -> None:
    entries = dosage_entries(cells.dosage)
    of_entries = cells.effects[entries.perturbation]
    shift = additive_shift(entries, of_entries)
    statistics.observe(entries, cells.potential, shift, of_entries, n_training_cells)


def brute_force(cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and curvature as sums over all cells, one perturbation at a time."""
    dosage, (location, gain, _), effects = cells
    score, curvature = torch.zeros_like(effects), torch.zeros_like(effects)
    for t in range(len(effects)):
        for i in range(len(dosage)):
            dose = dosage[i, t]
            others = sum(dosage[i, u] * effects[u] for u in range(len(effects)) if u != t)
            score[t] += dose * gain[i] * (location[i] - others - dose * effects[t])
            curvature[t] += dose**2 * gain[i]
    return score, curvature


class TestScoreAndCurvature:
    def test_one_batch_is_the_sum_over_cells(self, cells):
        statistics = make_statistics()
        observe(statistics, cells)
        actual = statistics.score_and_curvature(cells.effects, N_CELLS)
        for found, expected in zip(actual, brute_force(cells), strict=True):
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("residual", [False, True], ids=["learned gain", "residual"])
    def test_are_derivatives_of_the_bound(self, cells, residual):
        """The bound by torch.distributions, differentiated with respect to the effects.

        With ``variance = 1 - gain`` the counts stand in as a normal likelihood of the full state
        of precision ``gain / (1 - gain)``. In the residual guide the full state does not depend
        on the shift at all, and the whole bound is the divergence of the basal state.
        """
        potential = cells.potential
        if residual:
            potential = potential._replace(gain=torch.ones_like(potential.gain))
            cells = cells._replace(potential=potential)
        location, gain, variance = potential

        def bound(effects: torch.Tensor) -> torch.Tensor:
            shift = cells.dosage @ effects
            guide = Normal(gain * (location - shift), variance.sqrt())
            value = -kl_divergence(guide, Normal(torch.zeros_like(shift), 1.0)).sum()
            if not residual:
                precision = gain / (1 - gain)
                error = (location - guide.mean - shift).square() + variance
                value = value - 0.5 * (precision * error).sum()
            return value

        score = torch.autograd.functional.jacobian(bound, cells.effects)
        hessian = torch.autograd.functional.hessian(bound, cells.effects)
        curvature = -torch.einsum("tltl->tl", hessian)
        statistics = make_statistics()
        observe(statistics, cells)
        actual = statistics.score_and_curvature(cells.effects, N_CELLS)
        torch.testing.assert_close(actual, (score, curvature))

    def test_follow_other_effects_of_the_same_perturbation(self, cells):
        """What is stored is linear in a perturbation's own effect, so that it may move."""
        statistics = make_statistics()
        observe(statistics, cells)
        score, curvature = statistics.score_and_curvature(cells.effects, N_CELLS)
        step = torch.randn_like(cells.effects)
        moved, _ = statistics.score_and_curvature(cells.effects + step, N_CELLS)
        torch.testing.assert_close(moved, score - curvature * step)


class TestForgetting:
    def test_is_an_exponentially_weighted_mean(self, cells):
        """A perturbation forgets over as many cells as it has, and only when it is seen."""
        statistics = make_statistics()
        weight = torch.zeros(N_PERTURBATIONS, 1, dtype=torch.float64)
        total = torch.zeros(N_PERTURBATIONS, N_LATENT, dtype=torch.float64)
        for piece in torch.arange(N_CELLS).split(7):
            some = cells.take(piece)
            observe(statistics, some)
            count = (some.dosage != 0).sum(0).double()[:, None]
            decay = torch.exp(-count / statistics.n_cells(N_CELLS).clamp(min=1))
            total = decay * total + some.dosage.square().T @ some.potential.gain
            weight = decay * weight + count
        torch.testing.assert_close(statistics.curvature, total / weight)

    def test_many_epochs_of_a_fixed_encoder_end_near_the_mean(self, cells):
        statistics = make_statistics()
        for _ in range(30):
            for piece in torch.randperm(N_CELLS).split(15):
                observe(statistics, cells.take(piece))
        score, curvature = statistics.score_and_curvature(cells.effects, N_CELLS)
        expected_score, expected_curvature = brute_force(cells)
        torch.testing.assert_close(curvature, expected_curvature, rtol=0.1, atol=0)
        scale = (expected_score.square().mean()).sqrt()
        assert (score - expected_score).abs().max() < 0.35 * scale

    def test_old_potentials_are_forgotten(self, cells):
        statistics = make_statistics()
        observe(statistics, cells)
        moved = cells._replace(
            potential=cells.potential._replace(location=cells.potential.location + 5)
        )
        for _ in range(8):
            observe(statistics, moved)
        score, _ = statistics.score_and_curvature(cells.effects, N_CELLS)
        expected, curvature = brute_force(moved)
        assert ((score - expected).abs() < 0.01 * 5 * N_CELLS).all()
        assert curvature.min() > 0


class TestNumberOfCells:
    def test_is_exact_after_an_epoch(self, cells):
        statistics = make_statistics()
        expected = (cells.dosage != 0).sum(0, keepdim=True).T.double()
        for _ in range(2):
            for piece in torch.randperm(N_CELLS).split(16):
                observe(statistics, cells.take(piece))
            torch.testing.assert_close(statistics.n_cells(N_CELLS), expected)

    def test_is_extrapolated_before(self, cells):
        statistics = make_statistics()
        observe(statistics, cells.take(torch.arange(30)), N_CELLS)
        expected = 2 * (cells.dosage[:30] != 0).sum(0, keepdim=True).T.double()
        torch.testing.assert_close(statistics.n_cells(N_CELLS), expected)

    def test_unseen_perturbations_have_none(self, cells):
        statistics = make_statistics()
        dosage = cells.dosage.clone()
        dosage[:, 2] = 0
        observe(statistics, cells._replace(dosage=dosage))
        score, curvature = statistics.score_and_curvature(cells.effects, N_CELLS)
        assert not score[2].any()
        assert not curvature[2].any()
        assert curvature[[0, 1, 3, 4]].all()

    def test_only_controls(self, cells):
        statistics = make_statistics()
        observe(statistics, cells._replace(dosage=torch.zeros_like(cells.dosage)))
        assert int(statistics.n_cells_seen) == N_CELLS
        assert not any(part.any() for part in statistics.score_and_curvature(cells.effects, 60))

    def test_counts_the_most_that_are_together(self, cells):
        statistics = make_statistics()
        observe(statistics, cells)
        assert int(statistics.max_per_cell) == int((cells.dosage != 0).sum(1).max())


class TestBasalMean:
    def test_is_the_posterior_mean_given_all_cells(self, cells):
        """Of a standard normal prior and one observation of precision gain from each cell."""
        statistics = make_statistics(n_batch=3)
        batch = torch.arange(N_CELLS) % 2
        information = torch.rand(N_CELLS, 1, dtype=torch.float64)
        statistics.observe_basal(batch, cells.potential, cells.shift(), information, N_CELLS)
        location, gain, _ = cells.potential
        for b in range(2):
            some = batch == b
            precision = (information * gain)[some]
            expected = (precision * (location - cells.shift())[some]).sum(0) / (
                precision.sum(0) + 1
            )
            torch.testing.assert_close(statistics.basal_mean()[b], expected)
        assert not statistics.basal_mean()[2].any()

    def test_minibatches_of_a_fixed_encoder_end_near_it(self, cells):
        whole, parts = make_statistics(), make_statistics()
        batch = torch.zeros(N_CELLS, dtype=torch.long)
        information = torch.ones(N_CELLS, 1, dtype=torch.float64)
        whole.observe_basal(batch, cells.potential, cells.shift(), information, N_CELLS)
        for _ in range(20):
            for piece in torch.randperm(N_CELLS).split(10):
                some = cells.take(piece)
                parts.observe_basal(
                    batch[piece], some.potential, some.shift(), information[piece], N_CELLS
                )
        torch.testing.assert_close(parts.basal_mean(), whole.basal_mean(), atol=0.1, rtol=0)
