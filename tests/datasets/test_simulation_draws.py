"""What simulated screens are drawn from, against counts and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from scvi_sams.datasets._simulation_draws import (
    draw_conditions,
    draw_hill_curves,
    draw_interactions,
    draw_masks,
    draw_pairs,
    numbered_names,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class TestPairs:
    @pytest.mark.parametrize("n_perturbations", [2, 3, 7])
    def test_all_that_there_are(self, rng, n_perturbations):
        every_pair = list(itertools.combinations(range(n_perturbations), 2))
        first, second = draw_pairs(rng, n_perturbations, len(every_pair))
        assert list(zip(first, second, strict=True)) == every_pair

    def test_each_is_as_likely(self, rng):
        drawn = [tuple(zip(*draw_pairs(rng, 5, 3), strict=True)) for _ in range(5_000)]
        assert all(len(set(pairs)) == 3 for pairs in drawn)
        _, counts = np.unique(np.concatenate(drawn), axis=0, return_counts=True)
        assert len(counts) == 10
        assert scipy.stats.chisquare(counts).pvalue > 1e-4

    def test_none(self, rng):
        first, second = draw_pairs(rng, 4, 0)
        assert len(first) == len(second) == 0


class TestMasks:
    def test_density_and_no_empty_mask(self, rng):
        mask = draw_masks(rng, 20_000, 6, 0.4, 0.0)
        assert mask.any(axis=1).all()
        # An empty mask, of probability 0.6 ** 6, gets one latent.
        np.testing.assert_allclose(mask.mean(axis=0), 0.4 + 0.6**6 / 6, atol=0.015)

    def test_inactive_are_those_asked_for_and_the_others_are_as_before(self):
        active = draw_masks(np.random.default_rng(1), 40, 6, 0.3, 0.0)
        some = draw_masks(np.random.default_rng(1), 40, 6, 0.3, 0.25)
        empty = ~some.any(axis=1)
        assert empty.sum() == 10
        np.testing.assert_array_equal(some[~empty], active[~empty])


def test_interactions_move_one_latent_by_the_effect_size(rng):
    interaction = draw_interactions(rng, 400, 5, 0.5, 1.7)
    moved = interaction != 0
    assert moved.sum(axis=1).tolist().count(1) == moved.sum() == 200
    assert set(interaction[moved]) == {-1.7, 1.7}
    assert scipy.stats.chisquare(moved.sum(axis=0)).pvalue > 1e-4


def test_hill_curves_lie_within_the_doses(rng):
    ec50, slope = draw_hill_curves(rng, 20_000, [10.0, 0.1, 1.0])
    log_ec50 = scipy.stats.uniform(np.log(0.1), np.log(100.0))
    assert scipy.stats.kstest(np.log(ec50), log_ec50.cdf).pvalue > 1e-4
    assert scipy.stats.kstest(np.log(slope / 1.5) / 0.2, "norm").pvalue > 1e-4


def test_conditions_have_their_shares(rng):
    condition = draw_conditions(rng, 10_000, 3, 2, 0.1, 0.25)
    counts = np.bincount(condition, minlength=6)
    assert counts[0] == 1_000
    assert counts[1:4].sum() == 6_500
    assert counts[4:].sum() == 2_500
    assert scipy.stats.chisquare(counts[1:4]).pvalue > 1e-4
    assert (condition[:5_000] == 0).sum() == pytest.approx(500, abs=80)  # shuffled
    assert draw_conditions(rng, 100, 3, 0, 0.1, 0.25).max() == 3


@pytest.mark.parametrize("n", [1, 9, 10, 1_234])
def test_names_sort_as_numbers(n):
    names = numbered_names("P", n, min_width=2)
    assert names == sorted(names)
    assert [int(name[1:]) for name in names] == list(range(1, n + 1))
    assert len(set(map(len, names))) == 1
