"""Deviations by context, and what contexts share, against every set of deviations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from scvi_sams.module.closed_form import ClosedForm
from scvi_sams.module.contexts import ContextDeviations, shared_part
from scvi_sams.module.doses import Doses
from scvi_sams.module.networks import Potential
from scvi_sams.module.posteriors import MaskPrior, SpikeAndSlab

ON, DEVIATES, BACKGROUND = 0.02, 0.002, 0.01


def likeliest(estimate: list[float], variance: float) -> tuple[bool, ...]:
    """Which contexts deviate in the set with the most evidence, shared part integrated out."""
    n = len(estimate)
    evidence = {}
    for shared, *deviates in itertools.product([False, True], repeat=1 + n):
        # The shared part is one number that all have, deviations are of their own.
        covariance = torch.full((n, n), 1.0 if shared else BACKGROUND, dtype=torch.float64)
        covariance += torch.diag(variance + torch.tensor(deviates, dtype=torch.float64))
        normal = MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance)
        prior = math.log(ON if shared else 1 - ON)
        prior += sum(math.log(DEVIATES if d else 1 - DEVIATES) for d in deviates)
        value = normal.log_prob(torch.tensor(estimate, dtype=torch.float64)).item() + prior
        evidence.setdefault(tuple(deviates), []).append(value)
    total = {key: torch.tensor(v).logsumexp(0).item() for key, v in evidence.items()}
    return max(total, key=total.get)


def shared_of(estimate: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return shared_part(
        estimate,
        variance,
        log_prior=(torch.tensor([[ON]]).log(), torch.tensor([[1 - ON]]).log()),
        log_deviation_prior=(math.log(DEVIATES), math.log(1 - DEVIATES)),
        embedding_variance=1.0,
        background_variance=torch.tensor(BACKGROUND),
    )


class TestSharedPart:
    @pytest.mark.parametrize(
        "effects",
        [
            (0.0, 0.0, 0.0),
            (2.0, 2.0, 2.0),
            (4.0, 0.0, 0.0),
            (2.5, 2.5, 0.0),
            (-2.0, 2.0, 2.0),
            (3.0, 0.0),
            (2.0, 2.0),
            (2.0, 2.0, 2.0, 2.0, -1.0),
            (0.0, 0.0, 3.0, 0.0, 0.0),
        ],
    )
    def test_deviations_are_those_with_the_most_evidence(self, effects):
        generator = torch.Generator().manual_seed(0)
        variance = 0.02
        noise = math.sqrt(variance) * torch.randn(20, len(effects), generator=generator)
        estimate = (torch.tensor(effects) + noise).unsqueeze(-1)
        _, log_odds = shared_of(estimate, torch.full_like(estimate, variance))
        agree = [
            tuple((odds > 0).tolist()) == likeliest(x.tolist(), variance)
            for odds, x in zip(log_odds.squeeze(-1), estimate.squeeze(-1), strict=True)
        ]
        assert sum(agree) >= 19

    def test_two_contexts_share_the_smaller_effect(self):
        shared, log_odds = shared_of(torch.tensor([[[3.0], [0.1]]]), torch.full((1, 2, 1), 0.02))
        assert abs(shared.item()) < 0.2
        assert (log_odds > 0).flatten().tolist() == [True, False]

    def test_what_is_not_measured_says_nothing(self):
        estimate, variance = torch.randn(4, 3, 5), torch.full((4, 3, 5), 0.05)
        shared, log_odds = shared_of(estimate, variance)
        further = torch.cat([estimate, torch.full((4, 1, 5), 9.0)], 1)
        unknown = torch.cat([variance, torch.full((4, 1, 5), torch.inf)], 1)
        found, found_odds = shared_of(further, unknown)
        assert torch.equal(found, shared)
        assert torch.equal(found_odds[:, :3], log_odds)
        assert (found_odds[:, 3] == -torch.inf).all()

    def test_parts_are_as_the_whole(self, monkeypatch):
        estimate, variance = torch.randn(7, 3, 5), torch.full((7, 3, 5), 0.05)
        whole = shared_of(estimate, variance)
        monkeypatch.setattr("scvi_sams.module.contexts._MAX_ELEMENTS", 1)
        for part, of_whole in zip(shared_of(estimate, variance), whole, strict=True):
            assert torch.equal(part, of_whole)


class TestColumns:
    def test_cells_have_a_row_for_each_perturbation_in_their_context(self):
        deviations = ContextDeviations(first_row=5, n_contexts=2)
        given = Doses(
            torch.tensor([[0, 2], [1, 0]]),
            torch.tensor([[1.0, 0.5], [2.0, 0.0]]),
            torch.tensor([[1], [0]]),
        )
        acting = deviations.append(given, given)
        assert acting.perturbation.tolist() == [[0, 2, 6, 10], [1, 0, 7, 5]]
        assert acting.dose.tolist() == [[1.0, 0.5, 1.0, 0.5], [2.0, 0.0, 2.0, 0.0]]
        assert deviations.rows(torch.tensor([0, 2])).tolist() == [5, 6, 9, 10]

    def test_without_a_context_there_is_the_shared_part(self):
        given = Doses(torch.tensor([[0]]), torch.ones(1, 1))
        assert ContextDeviations(5, 2).append(given, given) is given


class TestSolver:
    """Cells of known effects and exact potentials: what is found is their posterior."""

    N_CELLS = 60  # of each perturbation in each context
    # Perturbations x contexts: shared by all, lost in one, in one alone, other sign, none.
    EFFECTS = torch.tensor(
        [[2.0, 2.0, 2.0], [2.5, 2.5, 0.0], [0.0, 4.0, 0.0], [-2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    )

    @pytest.fixture
    def solved(self):
        torch.manual_seed(0)
        n, c = self.EFFECTS.shape
        effects = SpikeAndSlab(MaskPrior(n, 1, ON, n_deviations=n * c), 1.0, False, 0.0)
        solver = ClosedForm(effects.n_rows, 1, n_contexts=c, mask_evidence_cells=None)
        perturbation = torch.arange(n).repeat_interleave(c * self.N_CELLS).unsqueeze(1)
        context = torch.arange(c).repeat_interleave(self.N_CELLS).repeat(n).unsqueeze(1)
        given = Doses(perturbation, torch.ones_like(perturbation, dtype=torch.float32), context)
        deviations = ContextDeviations(n, c)
        doses = deviations.append(given, given)
        location = self.EFFECTS[perturbation.squeeze(1), context.squeeze(1)].unsqueeze(1)
        location = location + torch.randn_like(location)
        potential = Potential(location, torch.full_like(location, 0.5), torch.ones_like(location))
        shift, _, effect = effects.shift_moments(doses)
        effect = deviations.together(effect, 1)
        n_cells = len(location)
        solver.observe(effects, doses, potential, shift, effect, context.squeeze(1), n_cells)
        effects.masks_on = True
        solver.share(effects, n_cells)
        solver.update(effects, n_cells, n_sweeps=60, align=False)
        return effects, location.view(n, c, -1).mean(2)

    def test_masks(self, solved):
        effects, _ = solved
        on = (effects.mask_logits > 0).squeeze(1)
        assert on[:5].tolist() == [True, True, False, True, False]
        expected = torch.zeros(5, 3, dtype=torch.bool)
        expected[1, 2] = expected[2, 1] = expected[3, 0] = True
        assert torch.equal(on[5:].view(5, 3), expected)

    def test_effects_are_those_of_the_joint_posterior(self, solved):
        """Given the masks, shared part and deviations are a ridge regression."""
        effects, observed = solved
        on = (effects.mask_logits > 0).squeeze(1).float()
        precision = 0.5 * self.N_CELLS  # gain times cells
        for row in range(5):
            active = torch.cat([on[row : row + 1], on[5:].view(5, 3)[row]])
            design = torch.cat([torch.ones(3, 1), torch.eye(3)], 1) * active
            exact = torch.linalg.solve(
                precision * design.T @ design + torch.eye(4), precision * design.T @ observed[row]
            )
            found = torch.cat([effects.slab_mean[row], effects.slab_mean[5:].view(5, 3)[row]])
            # The solver weighs by probability, which is next to one or to zero.
            torch.testing.assert_close(found * active, exact * active, atol=0.02, rtol=0.02)


def test_means_of_batches_never_seen_are_those_of_their_context():
    solver = ClosedForm(2, 1, n_batch=3, n_contexts=2)
    solver.statistics.basal_weight[:4] = 1.0
    solver.basal_mean[:4, 0] = torch.tensor([1.0, 10.0, 3.0, 30.0])
    solver.fill_unseen()
    assert solver.basal_mean[:, 0].tolist() == [1.0, 10.0, 3.0, 30.0, 2.0, 20.0]
