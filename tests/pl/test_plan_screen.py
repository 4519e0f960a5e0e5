from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl


def _table(cells, **columns):
    cells = np.asarray(cells, float)
    found = 10 * cells / (cells + 20)
    table = pd.DataFrame(
        {"cells": cells, "controls": 5 * cells, "depth": 1.0, "guides": 1, "replicates": 1}
        | {"perturbations": found, "perturbations_lower": found - 1}
        | {"perturbations_upper": found + 1}
        | columns
    )
    return table


def test_a_line_and_its_band():
    table = _table([40, 10, 20])
    ax = pl.plan_screen(table)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), [10, 20, 40])
    np.testing.assert_allclose(line.get_ydata(), sorted(table["perturbations"]))
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(table["perturbations_lower"].min())
    assert heights.max() == pytest.approx(table["perturbations_upper"].max())
    assert ax.get_legend() is None


def test_lines_are_the_other_designs_and_the_pilot_is_marked():
    table = _table([10, 20, 10, 20], depth=[0.5, 0.5, 1, 1])
    table.attrs = {"cells": 20.0, "perturbations_called": 4}
    ax = pl.plan_screen(table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["depth 0.5", "depth 1"]
    marks = [line for line in ax.lines if line.get_marker() == "D"]
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(20.0, 4)]


def test_controls_are_a_design_of_their_own_where_they_were_given():
    table = _table([10, 10, 20, 20], controls=[50, 100, 50, 100])
    assert len(pl.plan_screen(table).get_legend().get_texts()) == 2
    labels = [t.get_text() for t in pl.plan_screen(table, x="controls").get_legend().get_texts()]
    assert labels == ["cells 10", "cells 20"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="what='pairs'"):
        pl.plan_screen(_table([1, 2]), "pairs")
    with pytest.raises(ValueError, match="x='guides'"):
        pl.plan_screen(_table([1, 2]), x="guides")
    with pytest.raises(ValueError, match="no column 'mechanisms'"):
        pl.plan_screen(_table([1, 2]), "mechanisms")
    with pytest.raises(ValueError, match="9 lines"):
        pl.plan_screen(_table([1] * 9, depth=range(1, 10)))
