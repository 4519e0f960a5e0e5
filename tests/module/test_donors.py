"""Effects of an average donor, against integrals that nobody simplified."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.stats import multivariate_normal

from scvi_sams.module.closed_form import spike_slab
from scvi_sams.module.donors import SCALES, across_donors

PRIOR = {"mask_prior_logit": -3.0, "embedding_variance": 1.0}
EVEN = torch.ones(len(SCALES), dtype=torch.float64) / len(SCALES)


def _score_of(estimate, curvature):
    """Of one effect that donors estimate so, with these inverse variances."""
    estimate, curvature = (np.asarray(v, float)[:, None, None] for v in (estimate, curvature))
    return torch.from_numpy(curvature * estimate), torch.from_numpy(curvature)


@pytest.mark.parametrize("estimate", [[1.2, 0.1, 0.8], [0.5, 0.45, 0.6], [0.9, -1.0, 0.1]])
def test_probability_and_effect_are_those_of_the_hierarchy(estimate):
    """Estimates are normal about s, covariance from scale and cells, in the naive form."""
    curvature = np.array([30.0, 8.0, 60.0])
    found = across_donors(*_score_of(estimate, curvature), weights=EVEN, **PRIOR)

    def density(s, scale):
        covariance = np.diag(1 / curvature + scale**2)
        return multivariate_normal.pdf(estimate, np.full(3, s), covariance)

    def integral(power):
        def of_scale(scale):
            def slab(s):
                return s**power * density(s, scale) * math.exp(-(s**2) / 2)

            return integrate.quad(slab, -8, 8, points=[0.5])[0] / math.sqrt(2 * math.pi)

        return sum(map(of_scale, SCALES))

    off, on = sum(density(0.0, scale) for scale in SCALES), integral(0)
    assert found.log_odds.item() == pytest.approx(-3.0 + math.log(on / off), abs=1e-6)
    mean = integral(1) / on
    assert found.slab_mean.item() == pytest.approx(mean, abs=1e-6)
    assert found.slab_variance.item() == pytest.approx(integral(2) / on - mean**2, abs=1e-6)


def test_a_difference_has_what_donors_add_to_its_reference():
    """Two groups of donors, with the naive covariance of the difference of their means."""
    estimate, curvature, other = [1.0, 0.6], np.array([50.0, 50.0]), np.array([40.0, 20.0])
    at_scale = [sum(1 / (1 / other + scale**2)) for scale in SCALES]
    reference = torch.tensor(at_scale, dtype=torch.float64)[:, None, None]
    only = torch.zeros(len(SCALES), dtype=torch.float64)
    only[5] = 1.0
    found = across_donors(
        *_score_of(estimate, curvature), weights=only, reference=reference, **PRIOR
    )
    scale = SCALES[5]
    # The prior of effects is an observation of the reference.
    added = 1 / (1 + at_scale[5]) - 1 / (1 + at_scale[0])
    covariance = np.diag(1 / curvature + scale**2) + added
    precision = np.linalg.inv(covariance).sum()
    mean = np.linalg.inv(covariance).sum(0) @ estimate / (precision + 1)
    assert found.slab_mean.item() == pytest.approx(mean)
    assert found.slab_variance.item() == pytest.approx(1 / (precision + 1))


def test_without_a_spread_all_is_as_before():
    rng = torch.Generator().manual_seed(0)
    score, curvature = 20 * torch.randn(3, 4, 2, generator=rng), torch.full((3, 4, 2), 50.0)
    prior = PRIOR | {"mask_floor_variance": 0.01}
    none = torch.tensor([1.0] + [0.0] * (len(SCALES) - 1))
    found = across_donors(score, curvature, weights=none, **prior)
    expected = spike_slab(score.sum(0), curvature.sum(0), **prior)
    torch.testing.assert_close(found.log_odds.float().clamp(-12, 12), expected.mask_logits)
    torch.testing.assert_close(found.slab_mean.float(), expected.slab_mean)
    torch.testing.assert_close(found.slab_variance.float(), expected.slab_variance)
    assert (found.spread == 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_the_prior_of_the_spread_is_learned(scale):
    rng = np.random.default_rng(1)
    curvature = np.full((3, 200, 4), 100.0)
    effect = rng.normal(size=(200, 4)) * (rng.random((200, 4)) < 0.2)
    estimate = (
        effect + scale * rng.normal(size=curvature.shape) + 0.1 * rng.normal(size=curvature.shape)
    )
    score = torch.from_numpy(curvature * estimate)
    found = across_donors(score, torch.from_numpy(curvature), **PRIOR)
    assert found.spread.mean().item() == pytest.approx(scale, abs=0.06)
    # As sure as it is right: as many as are expected are on, and of what is on few are false.
    on = torch.sigmoid(found.log_odds).numpy()
    called = on > 0.9
    assert called.sum() > 20
    assert (effect[called] == 0).mean() < 0.1
