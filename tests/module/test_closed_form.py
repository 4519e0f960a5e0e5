"""The closed-form steps, against numerical integration, brute force and known solutions."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributions import Normal

from scvi_sams.module import closed_form
from scvi_sams.module.closed_form import (
    ClosedForm,
    learned_background_variance,
    one_thread,
    safe_step,
    scale_mixture,
    selection_penalty,
    spike_slab,
)
from scvi_sams.module.networks import Potential
from scvi_sams.module.posteriors import SpikeSlab
from scvi_sams.module.statistics import RunningStatistics

from ._effects import make_effects, match_columns, random_rotation, sparse_matrix
from .minibatches import padded

if TYPE_CHECKING:
    from scvi_sams.module.posteriors import SpikeAndSlab

PRIOR_LOGIT = -1.3
EMBEDDING_VARIANCE = 0.8


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def posterior_of(score: float, curvature: float, **kwargs) -> SpikeSlab:
    kwargs = {"mask_prior_logit": PRIOR_LOGIT, "embedding_variance": EMBEDDING_VARIANCE} | kwargs
    return spike_slab(tensor(score), tensor(curvature), **kwargs)


def integrate(score: float, curvature: float, prior_variance: float) -> tuple[float, float, float]:
    """Evidence, mean and variance under a normal prior and the quadratic likelihood, on a grid."""
    width = 12 * math.sqrt(prior_variance)
    grid = torch.linspace(-width, width, 400_001, dtype=torch.float64)
    prior = Normal(tensor(0.0), tensor(math.sqrt(prior_variance))).log_prob(grid)
    density = (prior + score * grid - 0.5 * curvature * grid.square()).exp()
    step = (grid[1] - grid[0]).item()
    evidence = density.sum().item() * step
    mean = (density @ grid).item() * step / evidence
    return evidence, mean, (density @ (grid - mean).square()).item() * step / evidence


LIKELIHOODS = [(0.0, 4.0), (1.5, 0.5), (-6.0, 9.0), (3.0, 20.0), (9.0, 12.0)]


class TestSpikeSlab:
    @pytest.mark.parametrize(("score", "curvature"), LIKELIHOODS)
    def test_point_spike_is_the_exact_posterior(self, score, curvature):
        posterior = posterior_of(score, curvature)
        evidence, mean, variance = integrate(score, curvature, EMBEDDING_VARIANCE)
        assert posterior.mask_logits.item() == pytest.approx(PRIOR_LOGIT + math.log(evidence))
        assert posterior.slab_mean.item() == pytest.approx(mean)
        assert posterior.slab_variance.item() == pytest.approx(variance)
        assert posterior.spike_mean.item() == posterior.spike_variance.item() == 0

    @pytest.mark.parametrize("background_variance", [1e-3, 0.05, 0.6])
    @pytest.mark.parametrize(("score", "curvature"), LIKELIHOODS)
    def test_continuous_spike_is_the_exact_posterior(self, score, curvature, background_variance):
        posterior = posterior_of(score, curvature, background_variance=background_variance)
        slab = integrate(score, curvature, EMBEDDING_VARIANCE + background_variance)
        spike = integrate(score, curvature, background_variance)
        log_odds = PRIOR_LOGIT + math.log(slab[0] / spike[0])
        assert posterior.mask_logits.item() == pytest.approx(log_odds)
        assert posterior.slab_mean.item() == pytest.approx(slab[1])
        assert posterior.slab_variance.item() == pytest.approx(slab[2])
        assert posterior.spike_mean.item() == pytest.approx(spike[1])
        assert posterior.spike_variance.item() == pytest.approx(spike[2])

    @pytest.mark.parametrize("variance", [0.0, 0.05])
    def test_no_data_is_the_prior(self, variance):
        posterior = posterior_of(0.0, 0.0, background_variance=variance)
        assert posterior.mask_logits.item() == pytest.approx(PRIOR_LOGIT)
        assert posterior.slab_mean.item() == 0
        assert posterior.slab_variance.item() == pytest.approx(EMBEDDING_VARIANCE + variance)
        assert posterior.spike_variance.item() == pytest.approx(variance)

    def test_floor_saturates_the_evidence(self):
        """However many cells show an effect of 0.6, they count for 25 that would."""
        effect, floor = 0.6, 1 / 25

        def logit(n_cells: float, **kwargs: float) -> float:
            return posterior_of(effect * n_cells, n_cells, **kwargs).mask_logits.item()

        limit = logit(25.0)
        with_floor = [logit(n, mask_floor_variance=floor) for n in (5, 25, 100, 1e4, 1e8)]
        assert with_floor == sorted(with_floor)
        assert with_floor[-1] == pytest.approx(limit, rel=1e-5)
        # n cells with the floor are 1 / (1 / n + floor) without it.
        assert with_floor[1] == pytest.approx(logit(12.5))
        assert logit(100.0) > limit

    def test_floor_leaves_the_effects_alone(self):
        without = posterior_of(60.0, 100.0, background_variance=0.01)
        floored = posterior_of(60.0, 100.0, background_variance=0.01, mask_floor_variance=0.04)
        for field in ("slab_mean", "slab_variance", "spike_mean", "spike_variance"):
            assert torch.equal(getattr(without, field), getattr(floored, field))
        assert floored.mask_logits < without.mask_logits

    def test_a_floor_below_the_background_does_nothing(self):
        without = posterior_of(6.0, 10.0, background_variance=0.05)
        floored = posterior_of(6.0, 10.0, background_variance=0.05, mask_floor_variance=0.04)
        assert torch.equal(without.mask_logits, floored.mask_logits)

    def test_masks_can_change_their_mind(self):
        sure = spike_slab(
            tensor(1e5, 0.0), tensor(1e4, 1e30), mask_prior_logit=0.0, embedding_variance=1.0
        )
        assert sure.mask_logits.tolist() == [12, -12]


class TestLearnedBackgroundVariance:
    @staticmethod
    def posterior(off_logit: float, mean: float, variance: float, n: int = 400) -> SpikeSlab:
        shape = (n, 1)
        return SpikeSlab(
            torch.full(shape, off_logit, dtype=torch.float64),
            torch.ones(shape, dtype=torch.float64),
            torch.ones(shape, dtype=torch.float64),
            torch.full(shape, mean, dtype=torch.float64),
            torch.full(shape, variance, dtype=torch.float64),
        )

    def test_is_the_mean_second_moment_of_what_is_off(self):
        learned = learned_background_variance(self.posterior(-60.0, 0.3, 0.07), prior_weight=0)
        assert learned.item() == pytest.approx(0.3**2 + 0.07)

    def test_all_on_is_the_prior(self):
        learned = learned_background_variance(self.posterior(60.0, 0.3, 0.07), prior_variance=2e-3)
        assert learned.item() == pytest.approx(2e-3)

    def test_no_effects_shrink_it_but_not_to_zero(self):
        learned = learned_background_variance(self.posterior(-60.0, 0.0, 0.0))
        assert learned.item() == pytest.approx(5 * 1e-4 / 405)

    def test_iterated_it_finds_the_variance_of_the_effects(self):
        """A fixed point of expectation-maximisation is the maximum of the marginal likelihood."""
        n_cells, truth = 50.0, 0.09
        effects = math.sqrt(truth) * torch.randn(4_000, 1, dtype=torch.float64)
        shown = effects + torch.randn_like(effects) / math.sqrt(n_cells)
        variance = torch.tensor(0.01, dtype=torch.float64)
        for _ in range(300):
            posterior = spike_slab(
                n_cells * shown,
                torch.full_like(shown, n_cells),
                mask_prior_logit=-50.0,
                embedding_variance=1.0,
                background_variance=variance,
            )
            off = posterior._replace(mask_logits=torch.full_like(shown, -50.0))
            variance = learned_background_variance(off, prior_weight=0)
        maximum = shown.square().mean() - 1 / n_cells
        assert variance.item() == pytest.approx(maximum.item(), rel=1e-3)
        assert variance.item() == pytest.approx(truth, rel=0.1)


class TestSelectionPenalty:
    def test_is_the_evidence_of_noise_turned_into_one_latent(self):
        """By simulation: a free rotation puts all noise of a perturbation on one latent."""
        n_latent, curvature, floor = 6, 40.0, 1 / 30
        noise = torch.randn(20_000, n_latent, dtype=torch.float64) / curvature**0.5

        def evidence(score: torch.Tensor) -> float:
            """Log-odds on average, less what they would be without data."""
            arguments = {"mask_prior_logit": 0.0, "embedding_variance": 1.0}
            posterior = spike_slab(
                score,
                torch.full_like(score, curvature),
                mask_floor_variance=floor,
                **arguments,
            )
            return posterior.mask_logits.mean().item()

        gained = evidence(curvature * noise.norm(dim=1)) - evidence(curvature * noise[:, 0])
        penalty = selection_penalty(
            torch.full((1, n_latent), -30.0, dtype=torch.float64),
            torch.full((1, n_latent), curvature, dtype=torch.float64),
            embedding_variance=1.0,
            mask_floor_variance=floor,
        )
        torch.testing.assert_close(penalty, torch.full_like(penalty, gained), rtol=0.03, atol=0)

    def test_spares_latents_that_others_use_and_perturbations_of_many_cells(self):
        logits = torch.full((3, 4), -12.0)
        logits[1, 0] = 12.0
        curvature = torch.tensor([[20.0], [20.0], [1e5]]).expand(3, 4)
        penalty = selection_penalty(
            logits, curvature, embedding_variance=1.0, mask_floor_variance=0.04
        )
        assert penalty[0, 0] < 1e-4
        assert penalty[1, 0] > 0.5
        assert penalty[0, 1] > 0.5
        assert penalty[2].max() < 0.01


class Screen:
    """Cells with fixed potentials, all of which are observed at once, in float64.

    ``isotropic`` cells tell as much of every latent, the case in which each step is an exact
    maximisation; ``pairs`` carry two perturbations.
    """

    def __init__(
        self,
        *,
        n_perturbations: int = 12,
        n_cells: int = 400,
        isotropic: bool = True,
        pairs: bool = False,
    ) -> None:
        n_latent = 4
        self.truth = sparse_matrix(n_perturbations, n_latent)
        label = torch.arange(n_cells) % (n_perturbations + 1)
        dosage = torch.eye(n_perturbations + 1, n_perturbations, dtype=torch.float64)[label]
        if pairs:
            dosage[::5] = (dosage[::5] + dosage.roll(3, 0)[::5]).clamp(max=1)
        self.dosage = dosage
        self.hidden_rotation = random_rotation(n_latent)
        shown = dosage @ self.truth @ self.hidden_rotation
        gain = 0.5 + 0.4 * torch.rand(n_cells, 1 if isotropic else n_latent, dtype=torch.float64)
        gain = gain.expand(n_cells, n_latent).contiguous()
        location = shown + torch.randn_like(shown) / gain.sqrt()
        self.potential = Potential(location, gain, 1 - gain)
        self.n_cells = n_cells
        self.effects = make_effects(n_perturbations, n_latent, 0.2, background_scale=0.0).double()
        self.closed_form = ClosedForm(n_perturbations, n_latent, mask_evidence_cells=None).double()

    def observe(self) -> None:
        doses = padded(self.dosage)
        shift, _, effect_of_dose = self.effects.shift_moments(doses)
        batch = torch.zeros(self.n_cells, dtype=torch.long)
        self.closed_form.observe(
            self.effects, doses, self.potential, shift, effect_of_dose, batch, self.n_cells
        )

    def bound(self) -> float:
        """Expected log-likelihood of the potentials, ``Normal(location; shift, 1 / gain)``, less
        divergences: a sum over cells, from nothing but the moments of the effects.
        """
        effects = self.effects
        mean, variance = effects.moments()
        shift = self.dosage @ mean @ effects.rotation
        shift_variance = self.dosage.square() @ variance @ effects.rotation.square()
        location, gain, _ = self.potential
        expected = -0.5 * (gain * ((location - shift).square() + shift_variance)).sum()
        return (expected - sum(effects.kl().values())).item()


class TestCoordinateAscent:
    @pytest.mark.parametrize(
        ("isotropic", "pairs"), list(itertools.product([True, False], repeat=2))
    )
    def test_every_update_raises_the_bound(self, isotropic, pairs):
        screen = Screen(isotropic=isotropic, pairs=pairs)
        screen.effects.masks_on = True
        screen.effects.slab_mean.copy_(0.3 * torch.randn_like(screen.effects.slab_mean))
        bounds = []
        for _ in range(25):
            screen.closed_form.statistics = RunningStatistics(12, 4).double()
            screen.observe()
            bounds.append(screen.bound())
            screen.closed_form.update(screen.effects, screen.n_cells)
        steps = torch.tensor(bounds).diff()
        assert steps[0] > 10
        assert steps.min() > -1e-6 * abs(bounds[-1])

    def test_rotation_turns_to_where_the_cells_are(self):
        """From the right effects in the wrong rotation."""
        screen = Screen(n_cells=4_000)
        effects = screen.effects
        effects.masks_on = True
        effects.slab_mean.copy_(screen.truth)
        effects.mask_logits.copy_(12 * (2.0 * (screen.truth != 0) - 1))
        assert (effects.rotation - screen.hidden_rotation).abs().max() > 0.5
        screen.observe()
        screen.closed_form.update(effects, screen.n_cells)
        torch.testing.assert_close(effects.rotation, screen.hidden_rotation, atol=0.1, rtol=0)

    def test_rotation_stays_orthogonal(self):
        screen = Screen(isotropic=False, pairs=True)
        screen.observe()
        screen.closed_form.switch_on(screen.effects, screen.n_cells)
        identity = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(screen.effects.rotation @ screen.effects.rotation.T, identity)

    def test_switching_on_recovers_masks_and_effects(self):
        screen = Screen(n_perturbations=80, n_cells=8_000, isotropic=False)
        screen.observe()
        screen.closed_form.switch_on(
            screen.effects, screen.n_cells, torch.Generator().manual_seed(0)
        )
        mean, _ = screen.effects.moments()
        shown = screen.truth @ screen.hidden_rotation
        assert (mean @ screen.effects.rotation - shown).square().mean() < 0.02
        assert match_columns(mean, screen.truth).min() > 0.97
        n_on = (screen.effects.mask_probability() > 0.5).sum().item()
        assert n_on == pytest.approx((screen.truth != 0).sum().item(), rel=0.1)

    @pytest.mark.parametrize(
        ("scale", "lowest", "highest"), [(0.08, 0.05, 0.1), (0.2, 0.12, 0.24)]
    )
    def test_background_takes_what_masks_leave(self, scale, lowest, highest):
        """Dense small effects: masks stay off, predictions keep the effects."""
        screen = Screen(n_perturbations=30, n_cells=30_000)
        screen.effects = make_effects(30, 4).double()
        screen.closed_form = ClosedForm(30, 4, mask_evidence_cells=10).double()
        dense = scale * torch.randn(30, 4, dtype=torch.float64)
        location = screen.dosage @ dense + 0.5 * torch.randn(30_000, 4, dtype=torch.float64)
        screen.potential = screen.potential._replace(location=location)
        screen.observe()
        screen.closed_form.switch_on(screen.effects, screen.n_cells)
        screen.closed_form.update(screen.effects, screen.n_cells, n_sweeps=50)
        assert (screen.effects.mask_probability() > 0.5).sum() == 0
        predicted = screen.effects.moments()[0] @ screen.effects.rotation
        assert (predicted - dense).square().mean() < 0.4 * dense.square().mean()
        assert lowest < screen.effects.background_variance.sqrt().item() < highest


class TestBasalMean:
    def test_information_of_controls_and_of_rare_perturbations(self):
        """A control tells all it can; the cells of a perturbation share one draw of its prior.

        A batch for the controls and for each perturbation: the mean information of its cells is
        the gain of its basal mean, as that of each cell is one.
        """
        effects = make_effects(3, 2, 0.2, background_scale=0.0)
        solver = ClosedForm(3, 2, n_batch=3)
        batch = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 2, 2])
        dosage = torch.eye(4, 3)[torch.tensor([3, 0, 1])[batch]]
        doses, zeros, ones = padded(dosage, n_columns=2), torch.zeros(10, 2), torch.ones(10, 2)
        solver.observe(
            effects,
            doses,
            Potential(zeros, ones, ones),
            zeros,
            doses.gather(torch.zeros(3, 2)),
            batch,
            10,
        )
        information = solver.statistics.basal_gain
        torch.testing.assert_close(information[0], torch.ones(2))
        torch.testing.assert_close(information[1], torch.full((2,), 1 / (1 + 2 * 0.2)))
        torch.testing.assert_close(information[2], torch.full((2,), 1 / (1 + 6 * 0.2)))

    def test_a_cell_tells_no_more_than_its_commonest_perturbation(self):
        effects = make_effects(2, 1, 0.2, background_scale=0.0)
        solver = ClosedForm(2, 1, n_batch=3)
        batch = torch.tensor([0] * 6 + [1] * 2 + [2] * 2)
        dosage = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[batch]
        doses, zeros, ones = padded(dosage), torch.zeros(10, 1), torch.ones(10, 1)
        solver.observe(
            effects,
            doses,
            Potential(zeros, ones, ones),
            zeros,
            doses.gather(torch.zeros(2, 1)),
            batch,
            10,
        )
        of_both = [1 / (1 + 8 * 0.2), 1 / (1 + 4 * 0.2)]
        expected = torch.tensor([of_both[0], of_both[0], of_both[1]])[:, None]
        torch.testing.assert_close(solver.statistics.basal_gain, expected)

    def test_centring_finds_the_offset_of_each_batch(self):
        effects = make_effects(2, 3, background_scale=0.0)
        solver = ClosedForm(2, 3, n_batch=2)
        offset = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.5, 3.0]])
        batch = torch.arange(2_000) % 2
        # What the module hands over is centred at the mean that is known so far.
        for _ in range(2):
            location = offset[batch] - solver.basal_mean[batch]
            potential = Potential(location, torch.full((2_000, 3), 0.6), torch.ones(2_000, 3))
            doses = padded(torch.zeros(2_000, 2))
            shift, _, effect_of_dose = effects.shift_moments(doses)
            solver.observe(effects, doses, potential, shift, effect_of_dose, batch, 2_000)
            solver.centre()
            torch.testing.assert_close(solver.basal_mean, offset, rtol=0.01, atol=1e-6)


class TestSteps:
    """Perturbations that share cells take smaller steps, those that do not are not slowed."""

    N_ALONE, N_GUIDES = 3, 20

    def screen(self, n_guides: int) -> tuple[SpikeAndSlab, ClosedForm]:
        """Perturbations with 100 cells each of their own, and cells with many more guides."""
        n_rows, n_alone = self.N_ALONE + self.N_GUIDES, 100 * self.N_ALONE
        dosage = torch.zeros(n_alone + 40, n_rows, dtype=torch.float64)
        dosage[torch.arange(n_alone), torch.arange(n_alone) % self.N_ALONE] = 1
        dosage[n_alone:, self.N_ALONE : self.N_ALONE + n_guides] = 1
        shape = (len(dosage), 2)
        gain = torch.full(shape, 0.6, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        location = torch.randn(shape, generator=generator, dtype=torch.float64)
        effects = make_effects(n_rows, 2, background_scale=0.0).double()
        solver = ClosedForm(n_rows, 2).double()
        effects.masks_on = True
        doses = padded(dosage, n_columns=self.N_GUIDES)
        shift, _, effect_of_dose = effects.shift_moments(doses)
        batch = torch.zeros(len(dosage), dtype=torch.long)
        solver.observe(
            effects,
            doses,
            Potential(location, gain, 1 - gain),
            shift,
            effect_of_dose,
            batch,
            len(dosage),
        )
        return effects, solver

    @pytest.mark.parametrize(("n_guides", "step"), [(1, 0.7), (2, 0.7), (4, 0.25), (20, 0.05)])
    def test_step_of_each_perturbation(self, n_guides, step):
        """From zero, the mean of a slab moves a share of the way to its optimum."""
        effects, solver = self.screen(n_guides)
        effects.freeze(slice(1))  # the rotation stays
        score, curvature = solver.statistics.score_and_curvature(effects.slab_mean, 340)
        optimum = score / (curvature + 1)
        solver.update(effects, 340)
        alone = slice(1, self.N_ALONE)
        together = slice(self.N_ALONE, self.N_ALONE + n_guides)
        torch.testing.assert_close(effects.slab_mean[alone], 0.7 * optimum[alone])
        torch.testing.assert_close(effects.slab_mean[together], step * optimum[together])

    def test_a_cell_with_twenty_guides_does_not_slow_those_that_are_alone(self):
        found = []
        for n_guides in (1, self.N_GUIDES):
            effects, solver = self.screen(n_guides)
            effects.freeze(slice(self.N_ALONE, None))
            solver.update(effects, 340)
            found.append(effects.slab_mean[: self.N_ALONE].clone())
        assert found[0].abs().min() > 0
        torch.testing.assert_close(*found)


class TestSafeStep:
    def test_is_the_inverse_of_the_largest_eigenvalue(self):
        curvature = torch.rand(6, 5, dtype=torch.float64) ** 4
        rotation = random_rotation(5)
        step = safe_step(curvature, rotation, n_iterations=300)
        for row in range(6):
            full = (rotation * curvature[row]) @ rotation.T
            scale = full.diagonal().rsqrt()
            largest = torch.linalg.eigvalsh(scale[:, None] * full * scale).max()
            assert step[row].item() == pytest.approx(1 / largest.item(), rel=1e-6)

    def test_a_diagonal_curvature_goes_all_the_way(self):
        step = safe_step(torch.rand(3, 4) + 0.1, torch.eye(4))
        torch.testing.assert_close(step, torch.ones(3, 1), rtol=1e-5, atol=0)

    def test_updates_converge_where_fixed_steps_explode(self):
        """One coordinate of the networks carries everything, seen from forty latents."""
        torch.manual_seed(3)
        rotation = random_rotation(40)
        curvature = torch.full((1, 40), 1e-3, dtype=torch.float64)
        curvature[0, 0] = 100.0
        full = (rotation * curvature[0]) @ rotation.T + torch.eye(40, dtype=torch.float64)
        score = full @ torch.ones(40, dtype=torch.float64)

        def solve(step: float, n_steps: int) -> torch.Tensor:
            x = torch.zeros(40, dtype=torch.float64)
            for _ in range(n_steps):
                x = x + step * (score - full @ x) / full.diagonal()
            return x

        step = safe_step(curvature, rotation).item()
        assert (solve(step, 5_000) - 1).abs().max() < 1e-2
        assert (solve(0.7, 20) - 1).abs().max() > 1e3


class TestScaleMixture:
    @pytest.mark.parametrize(("score", "curvature"), LIKELIHOODS)
    def test_is_the_exact_posterior(self, score, curvature):
        variances, weights = tensor(0.01, 0.3, 2.0), tensor(0.5, 0.3, 0.2)
        found = scale_mixture(tensor([score]), tensor([curvature]), variances, weights)
        parts = [integrate(score, curvature, v) for v in variances.tolist()]
        joint = [w * part[0] for w, part in zip(weights.tolist(), parts, strict=True)]
        evidence = sum(joint)
        mean = sum(j * part[1] for j, part in zip(joint, parts, strict=True)) / evidence
        second = (
            sum(j * (part[2] + part[1] ** 2) for j, part in zip(joint, parts, strict=True))
            / evidence
        )
        assert found.mean.item() == pytest.approx(mean)
        assert found.variance.item() == pytest.approx(second - mean**2)
        expected = score * mean - 0.5 * curvature * second - math.log(evidence)
        assert found.divergence.item() == pytest.approx(expected, abs=1e-9)

    def test_of_one_scale_is_the_normal_background(self):
        score, curvature = tensor([3.0, -1.0]), tensor([5.0, 2.0])
        found = scale_mixture(score, curvature, tensor(0.2), tensor(1.0))
        normal = spike_slab(
            score,
            curvature,
            mask_prior_logit=0.0,
            embedding_variance=1.0,
            background_variance=0.2,
        )
        torch.testing.assert_close(found.mean, normal.spike_mean)
        torch.testing.assert_close(found.variance, normal.spike_variance)


class TestSettle:
    @pytest.fixture
    def settled(self):
        torch.manual_seed(0)
        screen = Screen(n_perturbations=30, n_cells=6_000)
        screen.effects = make_effects(30, 4, background_scale="learned").double()
        screen.closed_form = ClosedForm(30, 4, mask_evidence_cells=30).double()
        weak = 0.3 * torch.randn(30, 4, dtype=torch.float64)
        weak *= torch.rand_like(weak) < 0.15  # what one normal would shrink with the rest
        screen.weak = weak @ screen.hidden_rotation
        location = screen.potential.location + screen.dosage @ screen.weak
        screen.potential = screen.potential._replace(location=location)
        screen.observe()
        screen.closed_form.switch_on(screen.effects, screen.n_cells)
        screen.closed_form.update(screen.effects, screen.n_cells, n_sweeps=30)
        screen.before = screen.effects.moments()[0] @ screen.effects.rotation
        screen.closed_form.settle(screen.effects, screen.n_cells, torch.Generator())
        return screen

    def test_latents_are_in_order_and_upright(self, settled):
        effects = settled.effects
        reported = effects.mask_probability() * effects.slab_mean
        share = reported.square().sum(0)
        assert (share[:-1] >= share[1:]).all()
        assert (reported.max(0).values >= -reported.min(0).values).all()

    def test_the_order_leaves_all_else_as_it_is(self, settled):
        effects = settled.effects
        before = effects.to_network(effects.moments()[0]), effects.kl()
        effects.slab_mean[:, 0] *= 0.1  # another order than before
        shown = effects.to_network(effects.moments()[0])
        divergence = sum(effects.kl().values())
        effects.order_latents()
        assert not torch.allclose(before[0], shown)
        torch.testing.assert_close(effects.to_network(effects.moments()[0]), shown)
        torch.testing.assert_close(sum(effects.kl().values()), divergence)

    def test_the_mixture_keeps_what_is_weak(self, settled):
        truth = settled.truth @ settled.hidden_rotation + settled.weak
        after = settled.effects.moments()[0] @ settled.effects.rotation
        errors = [(effects - truth).square().mean().item() for effects in (settled.before, after)]
        assert errors[1] < 0.9 * errors[0]

    def test_networks_that_move_again_take_it_back(self, settled):
        settled.closed_form.resume(settled.effects)
        assert not settled.closed_form.settled
        assert not settled.effects.has_mixture


class TestThreads:
    @pytest.fixture(autouse=True)
    def _two_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def test_are_back_after_the_block(self):
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2

    def test_are_back_after_an_error(self):
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / 0
        assert torch.get_num_threads() == 2

    def test_the_search_for_a_rotation_takes_one(self, monkeypatch):
        seen = []

        def record(shifts, generator):
            seen.append(torch.get_num_threads())
            return torch.eye(shifts.shape[1], dtype=shifts.dtype)

        monkeypatch.setattr(closed_form, "sparse_rotation", record)
        screen = Screen()
        screen.observe()
        screen.closed_form.switch_on(screen.effects, screen.n_cells)
        assert seen == [1]
        assert torch.get_num_threads() == 2
