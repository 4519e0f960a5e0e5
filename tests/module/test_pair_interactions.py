"""Pairs as further perturbations, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from scvi_sams.module import PairInteractions
from scvi_sams.module.doses import additive_shift, dosage_entries

N_PERTURBATIONS = 6
PAIRS = [(0, 3), (4, 1), (2, 5), (3, 4)]

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture
def dosage() -> torch.Tensor:
    """Cells with none to all of the perturbations, at doses that are not one."""
    dosage = torch.rand(200, N_PERTURBATIONS) + 0.5
    dosage *= torch.rand(200, N_PERTURBATIONS) < torch.linspace(0, 1, 200).unsqueeze(1)
    dosage[0], dosage[-1] = 0, 1
    return dosage


@pytest.mark.parametrize("sparse", [False, True])
def test_every_pair_that_a_cell_has(dosage, sparse):
    interactions = PairInteractions(N_PERTURBATIONS, PAIRS)
    entries = interactions(dosage_entries(dosage.to_sparse_csr() if sparse else dosage))
    rebuilt = torch.zeros(len(dosage), N_PERTURBATIONS + len(PAIRS))
    rebuilt[entries.cell, entries.perturbation] = entries.dose
    expected = [dosage[:, a] * dosage[:, b] for a, b in interactions.pairs]
    torch.testing.assert_close(rebuilt, torch.column_stack([dosage, *expected]))


def test_shift_is_the_sum_of_parts_and_pairs(dosage):
    interactions = PairInteractions(N_PERTURBATIONS, PAIRS)
    effects = torch.randn(N_PERTURBATIONS + len(PAIRS), 3)
    entries = interactions(dosage_entries(dosage))
    shift = additive_shift(entries, effects[entries.perturbation])
    expected = dosage @ effects[:N_PERTURBATIONS]
    for row, (a, b) in enumerate(interactions.pairs, N_PERTURBATIONS):
        expected += (dosage[:, a] * dosage[:, b]).unsqueeze(1) * effects[row]
    torch.testing.assert_close(shift, expected)


def test_doses_may_be_draws(dosage):
    interactions = PairInteractions(N_PERTURBATIONS, PAIRS)
    entries = dosage_entries(dosage)
    factors = torch.rand(5, 1)
    drawn = interactions(entries._replace(dose=factors * entries.dose))
    single = interactions(entries)
    n_singles = len(entries.dose)
    torch.testing.assert_close(drawn.dose[:, :n_singles], factors * entries.dose)
    expected = factors.square() * single.dose[n_singles:]
    torch.testing.assert_close(drawn.dose[:, n_singles:], expected)


def test_no_pairs(dosage):
    entries = dosage_entries(dosage)
    assert PairInteractions(N_PERTURBATIONS)(entries) is entries


@pytest.mark.parametrize("pairs", [[(0, 0)], [(0, 1), (1, 0)]])
def test_impossible_pairs(pairs):
    with pytest.raises(ValueError, match="distinct and of two different perturbations"):
        PairInteractions(N_PERTURBATIONS, pairs)


def test_all_pairs_of_a_cell_with_everything():
    pairs = list(itertools.combinations(range(N_PERTURBATIONS), 2))
    entries = PairInteractions(N_PERTURBATIONS, pairs)(
        dosage_entries(torch.ones(1, N_PERTURBATIONS))
    )
    assert sorted(entries.perturbation.tolist()) == list(range(N_PERTURBATIONS + len(pairs)))
