from __future__ import annotations

import numpy as np
import pytest

from scvi_sams.tl.effect_mixture import learn_effects


def _estimates(seed, excess=1.0, share=0.2, size=(80, 8)):
    rng = np.random.default_rng(seed)
    effect = np.where(rng.random(size) < share, rng.normal(0, 1.5, size), 0.0)
    error = rng.uniform(0.2, 0.4, size)
    return effect, effect + np.sqrt(excess) * error * rng.standard_normal(size), error


@pytest.mark.parametrize("excess", [1.0, 1.5, 2.2])
def test_the_excess_of_the_noise_is_found(excess):
    found = [learn_effects(*_estimates(seed, excess)[1:], 0.05).excess for seed in range(5)]
    assert np.mean(found) == pytest.approx(excess, abs=0.15)


def test_noise_alone_leaves_no_effects():
    _, estimate, error = _estimates(0, share=0.0)
    drawn = learn_effects(estimate, error, 0.05).sample(np.random.default_rng(0))
    assert np.square(drawn).mean() < 0.05 * np.square(estimate).mean()


def test_draws_are_spread_as_the_truth_is():
    """The rank of the truth among draws is uniform where it is not zero, sizes are those drawn."""
    ranks, sizes, drawn_sizes = [], [], []
    for seed in range(10):
        effect, estimate, error = _estimates(seed)
        mixture = learn_effects(estimate, error, 0.05)
        rng = np.random.default_rng(seed)
        draws = np.stack([mixture.sample(rng) for _ in range(100)])
        ranks.append((draws < effect).mean(0)[np.abs(estimate) > 4 * error])
        sizes.append(np.abs(effect) > 1)
        drawn_sizes.append((np.abs(draws) > 1).mean(0))
    below = np.concatenate(ranks)
    assert np.mean((below > 0.05) & (below < 0.95)) == pytest.approx(0.9, abs=0.03)
    assert np.mean(drawn_sizes) == pytest.approx(np.mean(sizes), rel=0.05)
