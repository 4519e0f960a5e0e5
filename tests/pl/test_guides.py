"""Plots of guides: each number is where it should be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError, pl


def _table():
    return pd.DataFrame(
        {
            "target": ["A", "A", "B"],
            "efficacy": [0.9, 0.4, 0.7],
            "efficacy_lower": [0.8, 0.3, 0.2],
            "efficacy_upper": [0.95, 0.5, 1.0],
            "can_be_told": [True, True, False],
            "off_target": [False, True, False],
        },
        index=["A$1$", "A2", "_B"],
    )


def test_guides_are_drawn_in_order_with_their_intervals():
    ax = pl.guide_efficacy(_table())
    told, untold, ring = ax.lines
    assert told.get_xdata().tolist() == [0.9, 0.4]
    assert untold.get_xdata().tolist() == [0.7]
    assert ring.get_xdata().tolist() == [0.4]
    ends = ax.collections[0].get_segments()
    np.testing.assert_allclose([segment[:, 0] for segment in ends], [[0.8, 0.95], [0.3, 0.5]])
    rows = ax.get_yticks()
    assert (np.diff(rows) > 0).all()
    assert rows[2] - rows[1] > rows[1] - rows[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [r"A\$1\$", "A2", " _B"]


def test_a_table_of_something_else_is_refused():
    with pytest.raises(ScreenError, match="efficacy_lower"):
        pl.guide_efficacy(_table().drop(columns="efficacy_lower"))
    with pytest.raises(ScreenError, match="0 guides"):
        pl.guide_efficacy(_table().iloc[:0])


def test_means_are_those_of_groups_of_probability():
    rng = np.random.default_rng(0)
    probability = rng.random(500)
    expression = 2 - probability + 0.1 * rng.standard_normal(500)
    ax = pl.perturbed_probability(probability, expression, [2.0, 2.2])
    means = [c for c in ax.containers if len(c.lines[0].get_xdata()) == 1]
    assert len(means) == 10
    here = (probability >= 0.3) & (probability < 0.4)
    x, y = means[3].lines[0].get_data()
    np.testing.assert_allclose([x[0], y[0]], [probability[here].mean(), expression[here].mean()])
    assert ax.lines[-1].get_label() == "mean of controls" or any(
        line.get_label() == "mean of controls" for line in ax.lines
    )
    with pytest.raises(ScreenError, match="shape"):
        pl.perturbed_probability([0.1], [1.0, 2.0])
