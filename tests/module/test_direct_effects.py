"""Effects on single genes, against dense loops and torch."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module import DirectEffects, GeneEffects
from scvi_sams.module.doses import add_gene_effects, dosage_entries

N_CELLS, N_GENES = 30, 5
TARGETS = [2, -1, 4, 2]  # two perturbations share a target, one has none


@pytest.fixture
def direct() -> DirectEffects:
    direct = DirectEffects(TARGETS, prior_scale=0.7)
    with torch.no_grad():
        direct.mean.normal_()
        direct.log_variance.normal_().sub_(2)
    return direct


@pytest.fixture
def dosage() -> torch.Tensor:
    return torch.rand(N_CELLS, len(TARGETS)) * (torch.rand(N_CELLS, len(TARGETS)) < 0.5)


def dense(dosage: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    expected = torch.zeros(len(dosage), N_GENES)
    for perturbation, gene in enumerate(TARGETS):
        if gene >= 0:
            expected[:, gene] += dosage[:, perturbation] * values[perturbation]
    return expected


def test_cells(direct, dosage):
    effects = direct.of(dosage_entries(dosage), direct.mean)
    logits = torch.randn(N_CELLS, N_GENES)
    torch.testing.assert_close(
        add_gene_effects(logits, effects), logits + dense(dosage, direct.mean)
    )


def test_draws(direct, dosage):
    draws = direct.rsample(3)
    effects = direct.of(dosage_entries(dosage), draws)
    logits = torch.randn(3, N_CELLS, N_GENES)
    expected = torch.stack([dense(dosage, values) for values in draws])
    torch.testing.assert_close(add_gene_effects(logits, effects), logits + expected)


def test_one_condition_for_all_cells(direct):
    condition = torch.tensor([[1.0, 1.0, 0.0, 0.5]])
    draws = direct.rsample(3)
    effects = direct.of(dosage_entries(condition), draws)
    effects = effects._replace(cell=None, value=effects.value.unsqueeze(1))
    added = add_gene_effects(torch.zeros(3, N_CELLS, N_GENES), effects)
    expected = torch.stack([dense(condition, values) for values in draws])
    torch.testing.assert_close(added, expected.expand(3, N_CELLS, N_GENES))


def test_rows_of_pairs_have_none(direct):
    entries = dosage_entries(torch.ones(1, len(TARGETS)))
    entries = entries._replace(perturbation=entries.perturbation + 2)  # two of them pairs now
    effects = direct.of(entries, direct.mean)
    assert effects.gene.tolist() == [4, 2]


def test_nothing_to_add():
    logits = torch.randn(2, 3)
    none = GeneEffects(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0))
    assert add_gene_effects(logits, none) is logits


def test_gradients(direct, dosage):
    logits = torch.randn(N_CELLS, N_GENES, requires_grad=True)
    added = add_gene_effects(logits + 0, direct.of(dosage_entries(dosage), direct.rsample()))
    weight = torch.randn(N_CELLS, N_GENES)
    (added * weight).sum().backward()
    torch.testing.assert_close(logits.grad, weight)
    for perturbation, gene in enumerate(TARGETS):
        expected = (dosage[:, perturbation] * weight[:, gene]).sum() if gene >= 0 else 0.0
        assert direct.mean.grad[perturbation].item() == pytest.approx(float(expected), abs=1e-4)


def test_divergence_counts_those_with_a_target(direct):
    posterior = Normal(direct.mean, (0.5 * direct.log_variance).exp())
    expected = kl_divergence(posterior, Normal(0.0, 0.7))[torch.tensor(TARGETS) >= 0].sum()
    torch.testing.assert_close(direct.kl_divergence(), expected)
