"""Doses and what they do: shifts, pairs, responses, single genes; against dense matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module.doses import (
    DirectEffects,
    Doses,
    GeneEffects,
    HillDoseResponse,
    HillDraws,
    PairInteractions,
    add_gene_effects,
    additive_shift,
)

from .minibatches import dense, padded

N_PERTURBATIONS = 7


@pytest.fixture
def dosage() -> torch.Tensor:
    """Doses of 40 cells: controls, singles, pairs and triples, none of them one."""
    dosage = torch.rand(40, N_PERTURBATIONS, dtype=torch.float64) * 2
    dosage *= torch.rand(40, N_PERTURBATIONS) < 0.25
    dosage[0] = 0
    dosage[1, :3] = torch.tensor([0.5, 1.0, 2.0])
    return dosage


def filled_up(doses: Doses, n_further: int) -> Doses:
    """More columns, in another order in every cell, filled up with any perturbation."""
    n_cells = len(doses.dose)
    some = torch.randint(0, N_PERTURBATIONS, doses.perturbation.shape)
    perturbation = torch.where(doses.dose != 0, doses.perturbation, some)
    further = torch.randint(0, N_PERTURBATIONS, (n_cells, n_further))
    perturbation = torch.cat([perturbation, further], 1)
    dose = torch.cat([doses.dose, doses.dose.new_zeros(n_cells, n_further)], 1)
    order = torch.rand(perturbation.shape).argsort(1)
    return Doses(perturbation.gather(1, order), dose.gather(1, order))


class TestDoses:
    def test_columns_rebuild_the_matrix(self, dosage):
        assert torch.equal(dense(padded(dosage), N_PERTURBATIONS), dosage)
        assert torch.equal(dense(filled_up(padded(dosage), 3), N_PERTURBATIONS), dosage)

    def test_gather_gives_each_dose_its_effect(self, dosage):
        doses = padded(dosage)
        effects = torch.randn(3, N_PERTURBATIONS, 5)
        gathered = doses.gather(effects)
        assert gathered.shape == (3, *doses.perturbation.shape, 5)
        for cell, column in itertools.product(range(40), range(doses.dose.shape[1])):
            expected = effects[:, doses.perturbation[cell, column]]
            assert torch.equal(gathered[:, cell, column], expected)

    def test_cells_without_a_dose_do_not_move(self):
        doses = padded(torch.zeros(3, 2))
        assert torch.equal(
            additive_shift(doses, doses.gather(torch.ones(2, 4))), torch.zeros(3, 4)
        )


class TestAdditiveShift:
    @pytest.mark.parametrize("power", [1, 2])
    @pytest.mark.parametrize("n_further", [0, 4])
    def test_is_the_matrix_product(self, dosage, power, n_further):
        effects = torch.randn(N_PERTURBATIONS, 5, dtype=torch.float64)
        doses = filled_up(padded(dosage), n_further)
        shift = additive_shift(doses, doses.gather(effects), power)
        torch.testing.assert_close(shift, dosage**power @ effects)

    def test_leading_dimensions(self, dosage):
        effects = torch.randn(3, N_PERTURBATIONS, 5, dtype=torch.float64)
        doses = padded(dosage)
        torch.testing.assert_close(additive_shift(doses, doses.gather(effects)), dosage @ effects)

    def test_gradient_is_the_transposed_product(self, dosage):
        effects = torch.randn(N_PERTURBATIONS, 5, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(40, 5, dtype=torch.float64)
        doses = padded(dosage)
        (additive_shift(doses, doses.gather(effects)) * direction).sum().backward()
        torch.testing.assert_close(effects.grad, dosage.T @ direction)


class TestPairInteractions:
    N_PERTURBATIONS = 6
    PAIRS = ((0, 3), (4, 1), (2, 5), (3, 4))

    @pytest.fixture
    def dosage(self) -> torch.Tensor:
        """Cells with none to all of the perturbations, at doses that are not one."""
        dosage = torch.rand(200, self.N_PERTURBATIONS) + 0.5
        dosage *= torch.rand(200, self.N_PERTURBATIONS) < torch.linspace(0, 1, 200).unsqueeze(1)
        dosage[0], dosage[-1] = 0, 1
        return dosage

    @pytest.fixture
    def interactions(self) -> PairInteractions:
        return PairInteractions(self.N_PERTURBATIONS, self.PAIRS)

    @pytest.mark.parametrize("n_further", [0, 3])
    def test_every_pair_that_a_cell_has(self, interactions, dosage, n_further):
        doses = filled_up(padded(dosage), n_further)
        doses = doses._replace(perturbation=doses.perturbation.clamp(max=5))
        rebuilt = dense(interactions(doses), self.N_PERTURBATIONS + len(self.PAIRS))
        expected = [dosage[:, a] * dosage[:, b] for a, b in interactions.pairs]
        torch.testing.assert_close(rebuilt, torch.column_stack([dosage, *expected]))

    def test_shift_is_the_sum_of_parts_and_pairs(self, interactions, dosage):
        effects = torch.randn(self.N_PERTURBATIONS + len(self.PAIRS), 3)
        doses = interactions(padded(dosage))
        shift = additive_shift(doses, doses.gather(effects))
        expected = dosage @ effects[: self.N_PERTURBATIONS]
        for row, (a, b) in enumerate(interactions.pairs, self.N_PERTURBATIONS):
            expected += (dosage[:, a] * dosage[:, b]).unsqueeze(1) * effects[row]
        torch.testing.assert_close(shift, expected)

    def test_doses_may_be_draws(self, interactions, dosage):
        doses = padded(dosage)
        factors = torch.rand(5, 1, 1)
        drawn = interactions(doses._replace(dose=factors * doses.dose))
        single = interactions(doses)
        n_singles = doses.dose.shape[1]
        torch.testing.assert_close(drawn.dose[..., :n_singles], factors * doses.dose)
        expected = factors.square() * single.dose[:, n_singles:]
        torch.testing.assert_close(drawn.dose[..., n_singles:], expected)

    def test_no_pairs(self, dosage):
        doses = padded(dosage)
        assert PairInteractions(self.N_PERTURBATIONS)(doses) is doses

    @pytest.mark.parametrize("pairs", [[(0, 0)], [(0, 1), (1, 0)]])
    def test_impossible_pairs(self, pairs):
        with pytest.raises(ValueError, match="distinct and of two different perturbations"):
            PairInteractions(self.N_PERTURBATIONS, pairs)

    def test_all_pairs_of_a_cell_with_everything(self):
        pairs = list(itertools.combinations(range(self.N_PERTURBATIONS), 2))
        interactions = PairInteractions(self.N_PERTURBATIONS, pairs)
        doses = interactions(padded(torch.ones(1, self.N_PERTURBATIONS)))
        given = doses.perturbation[doses.dose > 0]
        assert sorted(given.tolist()) == list(range(self.N_PERTURBATIONS + len(pairs)))


class TestHillDoseResponse:
    REFERENCE = (1.0, math.exp(2.0), math.exp(-1.0))

    @pytest.fixture
    def curves(self) -> HillDoseResponse:
        curves = HillDoseResponse(self.REFERENCE).double()
        with torch.no_grad():
            for parameter in curves.parameters():
                parameter.add_(torch.randn(3) * 0.3)
        return curves

    def test_formula(self, curves):
        dosage = torch.tensor([[0.5, 0.0, 0.0], [0.0, 20.0, 0.3]], dtype=torch.float64)
        responses = dense(curves.respond(padded(dosage), curves.mean()), 3)
        ec50, slope = (field.exp() for field in curves.mean())
        expected = dosage**slope / (dosage**slope + ec50**slope)
        torch.testing.assert_close(responses, torch.where(dosage > 0, expected, 0.0))

    def test_half_at_the_ec50_and_monotone(self, curves):
        ec50 = curves.mean().log_ec50.exp().detach()
        half = curves.respond(padded(torch.diag(ec50)), curves.mean())
        torch.testing.assert_close(half.dose, torch.full((3, 1), 0.5, dtype=torch.float64))
        doses = torch.logspace(-3, 3, 50, dtype=torch.float64)
        responses = torch.stack(
            [curves.respond(padded(dose * torch.eye(3)), curves.mean()).dose for dose in doses]
        )
        assert (responses.diff(dim=0) >= 0).all()
        assert (responses > 0).all()
        assert (responses <= 1).all()

    def test_draws_follow_the_posterior(self, curves):
        draws = curves.rsample(100_000)
        for values, mean, std in zip(draws, curves.mean(), curves.std(), strict=True):
            assert values.shape == (100_000, 3)
            torch.testing.assert_close(values.mean(0), mean, atol=0.01, rtol=0)
            torch.testing.assert_close(values.std(0), std, atol=0.01, rtol=0)
        assert curves.rsample().log_ec50.shape == (3,)

    def test_responses_of_draws(self, curves):
        draws = curves.rsample(7)
        doses = curves.respond(padded(2 * torch.eye(3)), draws)
        assert doses.dose.shape == (7, 3, 1)
        fourth = HillDraws(*(field[4] for field in draws))
        single = curves.respond(padded(2 * torch.eye(3)), fourth)
        torch.testing.assert_close(doses.dose[4], single.dose)

    def test_divergence_matches_torch(self, curves):
        ec50 = Normal(curves.log_ec50_offset, curves.std().log_ec50)
        slope = Normal(curves.log_slope_mean, curves.std().log_slope)
        expected = kl_divergence(ec50, Normal(0.0, 1.5)) + kl_divergence(slope, Normal(0.0, 0.5))
        torch.testing.assert_close(curves.kl_divergence(), expected.sum())

    def test_gradients_reach_the_curve(self, curves):
        doses = curves.respond(padded(3 * torch.eye(3)), curves.rsample())
        doses.dose.sum().backward()
        for parameter in curves.parameters():
            assert (parameter.grad != 0).all()

    def test_no_dose_has_no_response_and_no_gradient(self, curves):
        doses = curves.respond(padded(torch.zeros(4, 3), n_columns=2), curves.rsample())
        assert not doses.dose.any()
        doses.dose.sum().backward()
        assert not any(parameter.grad.any() for parameter in curves.parameters())

    def test_starts_at_the_reference_dose(self):
        curves = HillDoseResponse([10.0, 1.0])
        torch.testing.assert_close(curves.mean().log_ec50.exp(), torch.tensor([10.0, 1.0]))


class TestDirectEffects:
    N_CELLS, N_GENES = 30, 5
    TARGETS = (2, -1, 4, 2)  # two perturbations share a target, one has none

    @pytest.fixture
    def direct(self) -> DirectEffects:
        direct = DirectEffects(self.TARGETS, prior_scale=0.7)
        with torch.no_grad():
            direct.mean.normal_()
            direct.log_variance.normal_().sub_(2)
        return direct

    @pytest.fixture
    def dosage(self) -> torch.Tensor:
        shape = (self.N_CELLS, len(self.TARGETS))
        return torch.rand(shape) * (torch.rand(shape) < 0.5)

    def by_hand(self, dosage: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        expected = torch.zeros(len(dosage), self.N_GENES)
        for perturbation, gene in enumerate(self.TARGETS):
            if gene >= 0:
                expected[:, gene] += dosage[:, perturbation] * values[perturbation]
        return expected

    def test_cells(self, direct, dosage):
        effects = direct.of(padded(dosage), direct.mean)
        logits = torch.randn(self.N_CELLS, self.N_GENES)
        torch.testing.assert_close(
            add_gene_effects(logits, effects), logits + self.by_hand(dosage, direct.mean)
        )

    def test_draws(self, direct, dosage):
        draws = direct.rsample(3)
        effects = direct.of(padded(dosage), draws)
        logits = torch.randn(3, self.N_CELLS, self.N_GENES)
        expected = torch.stack([self.by_hand(dosage, values) for values in draws])
        torch.testing.assert_close(add_gene_effects(logits, effects), logits + expected)

    def test_one_condition_for_all_cells(self, direct):
        condition = torch.tensor([[1.0, 1.0, 0.0, 0.5]])
        draws = direct.rsample(3)
        effects = direct.of(padded(condition), draws)
        added = add_gene_effects(torch.zeros(3, self.N_CELLS, self.N_GENES), effects)
        expected = torch.stack([self.by_hand(condition, values) for values in draws])
        torch.testing.assert_close(added, expected.expand(3, self.N_CELLS, self.N_GENES))

    def test_nothing_to_add(self, direct):
        """Controls, and perturbations without a target."""
        logits = torch.randn(2, self.N_GENES)
        dosage = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        effects = direct.of(padded(dosage), direct.mean)
        assert torch.equal(add_gene_effects(logits, effects), logits)

    def test_a_gene_that_is_named_twice_has_both(self):
        effects = GeneEffects(torch.tensor([[1, 1]]), torch.tensor([[0.5, 0.25]]))
        assert add_gene_effects(torch.zeros(1, 2), effects).tolist() == [[0, 0.75]]

    def test_gradients(self, direct, dosage):
        logits = torch.randn(self.N_CELLS, self.N_GENES, requires_grad=True)
        added = add_gene_effects(logits + 0, direct.of(padded(dosage), direct.rsample()))
        weight = torch.randn(self.N_CELLS, self.N_GENES)
        (added * weight).sum().backward()
        torch.testing.assert_close(logits.grad, weight)
        for perturbation, gene in enumerate(self.TARGETS):
            expected = (dosage[:, perturbation] * weight[:, gene]).sum() if gene >= 0 else 0.0
            assert direct.mean.grad[perturbation].item() == pytest.approx(
                float(expected), abs=1e-4
            )

    def test_divergence_counts_those_with_a_target(self, direct):
        posterior = Normal(direct.mean, (0.5 * direct.log_variance).exp())
        divergence = kl_divergence(posterior, Normal(0.0, 0.7))
        expected = divergence[torch.tensor(self.TARGETS) >= 0].sum()
        torch.testing.assert_close(direct.kl_divergence(), expected)


class TestColumns:
    """Nothing that is made of doses depends on what fills up columns, their order or number."""

    TARGETS = (2, -1, 4, 2, 0, 1, -1)
    PAIRS = ((0, 1), (1, 2), (3, 6))

    @pytest.fixture
    def dosage(self, dosage) -> torch.Tensor:
        return dosage.float()

    @pytest.mark.parametrize("n_further", [0, 5])
    @pytest.mark.parametrize("hill", [False, True])
    def test_shift_and_fold_changes(self, dosage, hill, n_further):
        curves = HillDoseResponse(torch.rand(N_PERTURBATIONS).add(0.5).tolist())
        direct = DirectEffects(self.TARGETS)
        interactions = PairInteractions(N_PERTURBATIONS, self.PAIRS)
        with torch.no_grad():
            direct.mean.normal_()
        effects = torch.randn(N_PERTURBATIONS + len(self.PAIRS), 3)
        found = []
        for doses in (padded(dosage), filled_up(padded(dosage), n_further)):
            if hill:
                doses = curves.respond(doses, curves.mean())
            logits = add_gene_effects(torch.zeros(40, 5), direct.of(doses, direct.mean))
            doses = interactions(doses)
            found.append((additive_shift(doses, doses.gather(effects)), logits))
        torch.testing.assert_close(*found)
        assert found[0][0][dosage.any(1)].any(1).all()
