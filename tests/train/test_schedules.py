"""Schedules: their ends, and that they move one way."""

from __future__ import annotations

import pytest

from scvi_sams.train.schedules import (
    cosine_learning_rate,
    default_warmups,
    linear_warmup,
    share_done,
)


class TestLinearWarmup:
    def test_ends(self):
        assert linear_warmup(0.0, duration=0.4, start=0.1) == 0.1
        assert linear_warmup(0.2, duration=0.4, start=0.1) == pytest.approx(0.55)
        assert linear_warmup(0.4, duration=0.4, start=0.1) == 1
        assert linear_warmup(1.0, duration=0.4, start=0.1) == 1

    def test_rises_all_the_way(self):
        weights = [linear_warmup(step / 100, 0.7, 0.01) for step in range(101)]
        assert weights == sorted(weights)
        assert len(set(weights)) == 71

    def test_no_duration_is_no_warmup(self):
        assert linear_warmup(0.0, duration=0.0) == 1


class TestCosineLearningRate:
    def test_ends(self):
        rates = [cosine_learning_rate(step, 1_000, final_factor=0.02) for step in range(1_001)]
        assert rates[0] == pytest.approx(1 / 50)
        assert rates[-1] == pytest.approx(0.02)
        assert rates[500] == pytest.approx(0.51)
        peak = rates.index(max(rates))
        assert peak == 49
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)

    def test_no_rise(self):
        assert cosine_learning_rate(0, 100, n_warmup_steps=0) == 1

    def test_steps_beyond_the_end_stay_there(self):
        assert cosine_learning_rate(2_000, 1_000) == pytest.approx(0.02)

    def test_no_steps(self):
        assert 0 < cosine_learning_rate(0, 0) <= 1


@pytest.mark.parametrize(
    ("counts", "is_closed_form", "expected"),
    [
        (999.0, True, (0.8, 0.4)),
        (1_000.0, True, (0.4, 0.5)),
        (999.0, False, (0.8, 0.0)),
        (5e4, False, (0.4, 0.0)),
    ],
)
def test_default_warmups(counts, is_closed_form, expected):
    assert default_warmups(counts, is_closed_form) == expected


def test_share_done():
    assert [share_done(step, 8) for step in (0, 2, 8)] == [0, 0.25, 1]
    assert share_done(3, 0) == 0
