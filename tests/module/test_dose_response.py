"""Hill curves: the formula, draws, gradients and divergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module import HillDoseResponse, HillDraws
from scvi_sams.module.doses import dosage_entries


@pytest.fixture
def curves() -> HillDoseResponse:
    curves = HillDoseResponse(3).double()
    with torch.no_grad():
        curves.log_reference_dose.copy_(torch.tensor([0.0, 2.0, -1.0]))
        for parameter in curves.parameters():
            parameter.add_(torch.randn(3) * 0.3)
    return curves


def test_formula(curves):
    dosage = torch.tensor([[0.5, 0.0, 0.0], [0.0, 20.0, 0.3]], dtype=torch.float64)
    entries = curves.respond(dosage_entries(dosage), curves.mean())
    ec50, slope = (field.exp() for field in curves.mean())
    for row, dose, response in zip(
        entries.perturbation, dosage[dosage > 0], entries.dose, strict=True
    ):
        h = slope[row]
        assert response.item() == pytest.approx((dose**h / (dose**h + ec50[row] ** h)).item())


def test_half_at_the_ec50_and_monotone(curves):
    ec50 = curves.mean().log_ec50.exp().detach()
    half = curves.respond(dosage_entries(torch.diag(ec50)), curves.mean())
    torch.testing.assert_close(half.dose, torch.full((3,), 0.5, dtype=torch.float64))
    doses = torch.logspace(-3, 3, 50, dtype=torch.float64)
    responses = torch.stack(
        [curves.respond(dosage_entries(dose * torch.eye(3)), curves.mean()).dose for dose in doses]
    )
    assert (responses.diff(dim=0) >= 0).all()
    assert (responses > 0).all()
    assert (responses <= 1).all()


def test_draws_follow_the_posterior(curves):
    draws = curves.rsample(100_000)
    for values, mean, std in zip(draws, curves.mean(), curves.std(), strict=True):
        assert values.shape == (100_000, 3)
        torch.testing.assert_close(values.mean(0), mean, atol=0.01, rtol=0)
        torch.testing.assert_close(values.std(0), std, atol=0.01, rtol=0)
    assert curves.rsample().log_ec50.shape == (3,)


def test_responses_of_draws(curves):
    draws = curves.rsample(7)
    entries = curves.respond(dosage_entries(2 * torch.eye(3)), draws)
    assert entries.dose.shape == (7, 3)
    fourth = HillDraws(*(field[4] for field in draws))
    single = curves.respond(dosage_entries(2 * torch.eye(3)), fourth)
    torch.testing.assert_close(entries.dose[4], single.dose)


def test_divergence_matches_torch(curves):
    ec50 = Normal(curves.log_ec50_offset, curves.std().log_ec50)
    slope = Normal(curves.log_slope_mean, curves.std().log_slope)
    expected = kl_divergence(ec50, Normal(0.0, 1.5)) + kl_divergence(slope, Normal(0.0, 0.5))
    torch.testing.assert_close(curves.kl_divergence(), expected.sum())


def test_gradients_reach_the_curve(curves):
    entries = curves.respond(dosage_entries(3 * torch.eye(3)), curves.rsample())
    entries.dose.sum().backward()
    for parameter in curves.parameters():
        assert (parameter.grad != 0).all()


def test_starts_at_the_reference_dose():
    curves = HillDoseResponse(2)
    curves.log_reference_dose.copy_(torch.tensor([math.log(10.0), 0.0]))
    torch.testing.assert_close(curves.mean().log_ec50.exp(), torch.tensor([10.0, 1.0]))
