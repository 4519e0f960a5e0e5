"""Running statistics of the cells, against sums over all cells and automatic differentiation."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module.doses import Doses, additive_shift
from scvi_sams.module.networks import Potential
from scvi_sams.module.statistics import RunningStatistics

from .minibatches import padded

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


def observe(
    statistics: RunningStatistics,
    cells: Cells,
    n_training_cells: int = N_CELLS,
    doses: Doses | None = None,
) -> None:
    doses = padded(cells.dosage) if doses is None else doses
    of_doses = doses.gather(cells.effects)
    shift = additive_shift(doses, of_doses)
    statistics.observe(doses, cells.potential, shift, of_doses, n_training_cells)


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


class TestTogether:
    """How many perturbations the cells of a perturbation have, on average."""

    def test_is_a_mean_over_the_cells_of_a_perturbation(self, cells):
        statistics = make_statistics()
        observe(statistics, cells)
        present = (cells.dosage != 0).double()
        expected = present.T @ present.sum(1, keepdim=True) / present.sum(0)[:, None]
        torch.testing.assert_close(statistics.n_together, expected)
        assert expected.std() > 0

    def test_perturbations_that_are_alone_say_one(self):
        """However many guides another cell has."""
        dosage = torch.zeros(30, 22, dtype=torch.float64)
        dosage[:10, 0] = dosage[10:20, 1] = 1
        dosage[20:, 2:] = 1
        gain = torch.ones(30, N_LATENT, dtype=torch.float64)
        cells = Cells(dosage, Potential(gain, gain, gain), torch.zeros(22, N_LATENT).double())
        statistics = RunningStatistics(22, N_LATENT).double()
        for piece in torch.randperm(30).split(5):
            observe(statistics, cells.take(piece), 30)
        expected = [1.0, 1.0, *[20.0] * 20]
        torch.testing.assert_close(
            statistics.n_together, torch.tensor(expected, dtype=torch.float64)[:, None]
        )


class TestColumns:
    """What is observed does not depend on how columns are filled up, nor on their order."""

    def test_order_number_and_filling(self, cells):
        statistics, other = make_statistics(), make_statistics()
        for piece in torch.arange(N_CELLS).split(11):
            some = cells.take(piece)
            observe(statistics, some)
            doses = padded(some.dosage, n_columns=9)
            filling = torch.randint(0, N_PERTURBATIONS, doses.perturbation.shape)
            perturbation = torch.where(doses.dose > 0, doses.perturbation, filling)
            order = torch.rand(len(piece), 9).argsort(1)
            doses = Doses(perturbation.gather(1, order), doses.dose.gather(1, order))
            observe(other, some, doses=doses)
        for (name, ours), theirs in zip(
            statistics.state_dict().items(), other.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(theirs, ours, msg=name)


class TestSums:
    """What waits for others enters the averages as if one process had seen all of it."""

    def basal(self, statistics, some):
        batch = torch.arange(len(some.dosage)) % 2
        information = torch.ones(len(batch), 1, dtype=torch.float64)
        statistics.observe_basal(batch, some.potential, some.shift(), information, N_CELLS)

    @pytest.mark.parametrize("n_processes", [1, 3])
    def test_sums_of_processes_are_those_of_one_minibatch(self, cells, n_processes):
        alone = make_statistics(n_batch=3)
        several = [make_statistics(n_batch=3) for _ in range(n_processes)]
        for statistics in several:
            statistics.waits = True
        for piece in torch.arange(N_CELLS).split(30):
            observe(alone, cells.take(piece))
            self.basal(alone, cells.take(piece))
            for statistics, part in zip(several, piece.chunk(n_processes), strict=True):
                observe(statistics, cells.take(part))
                self.basal(statistics, cells.take(part))
            pooled = [
                torch.stack(sums).sum(0) for sums in zip(*(s.sums for s in several), strict=True)
            ]
            for statistics in several:
                for sums, total in zip(statistics.sums, pooled, strict=True):
                    sums.copy_(total)
                statistics.absorb(N_CELLS)
        for statistics in several:
            assert not any(sums.any() for sums in statistics.sums)
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(statistics.state_dict()[name], value, msg=name)

    def test_nothing_that_waits_moves_the_averages(self, cells):
        statistics = make_statistics(n_batch=3)
        observe(statistics, cells)
        before = {name: value.clone() for name, value in statistics.state_dict().items()}
        statistics.waits = True
        observe(statistics, cells)
        self.basal(statistics, cells)
        for name, value in statistics.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert any(sums.any() for sums in statistics.sums)
        statistics.drop_sums()
        assert not any(sums.any() for sums in statistics.sums)
        statistics.absorb(N_CELLS)
        for name, value in statistics.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_cells_that_wait_are_counted(self, cells):
        statistics = make_statistics()
        statistics.waits = True
        observe(statistics, cells)
        expected = (cells.dosage != 0).sum(0, keepdim=True).T.double()
        torch.testing.assert_close(statistics.n_cells(N_CELLS), expected)


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
