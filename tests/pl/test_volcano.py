from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl, tl
from scvi_sams.tl.summaries import differential_expression_table

_GENES = ["up", "down", "unsure", "none", "exact", "sure"]


def _table(condition="KLF1", seed=0):
    draws = np.random.default_rng(seed).normal(
        [2.0, -1.0, 0.3, 0.0, 0.0, 1e-3], [0.2, 0.1, 0.5, 0.1, 0.0, 1e-9], size=(200, 6)
    )
    table = differential_expression_table(draws, _GENES)
    return table.assign(group1=condition, group2="control", delta=0.25)


def _points(ax, group, marker=0):
    """Offsets of the dots (or triangles) of a group: 0 not called, 1 down, 2 up."""
    return np.asarray(ax.collections[2 * group + marker].get_offsets())


def test_genes_are_drawn_and_coloured_by_their_calls(name_boxes):
    table = _table()
    ax = pl.volcano(table)
    ratio = table["lfc_mean"].abs() / table["lfc_std"]
    np.testing.assert_allclose(_points(ax, 2), [[table.loc["up", "lfc_mean"], ratio["up"]]])
    np.testing.assert_allclose(_points(ax, 1), [[table.loc["down", "lfc_mean"], ratio["down"]]])
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["4 not called", "1 down", "1 up"]
    assert set(name_boxes(ax)) == {"up", "down"}
    assert ax.get_title() == "KLF1 vs control"


def test_what_is_surely_unchanged_does_not_squeeze_the_rest():
    ax = pl.volcano(_table())
    top = max(_points(ax, 1)[0, 1], _points(ax, 2)[0, 1])
    (triangle,) = _points(ax, 0, marker=1)
    np.testing.assert_allclose(triangle, [1e-3, top], rtol=1e-5)
    assert ax.get_ylim()[1] < 1.2 * top
    # No change at all is no evidence of one, however certain.
    assert [0.0, 0.0] in _points(ax, 0).tolist()


def test_a_condition_of_several_is_chosen(name_boxes):
    table = pd.concat([_table("A"), _table("B", seed=1)])
    ax = pl.volcano(table, "B", n_labels=1)
    assert _points(ax, 2)[0, 0] == table.loc[table["group1"] == "B", "lfc_mean"]["up"]
    assert set(name_boxes(ax)) == {"up"}
    for wrong in (None, "C"):
        with pytest.raises(ValueError, match="it has A, B"):
            pl.volcano(table, wrong)


def test_no_calls_are_drawn_into_given_axes(name_boxes):
    ax = Figure().subplots()
    assert pl.volcano(_table().loc[["unsure", "none", "exact"]], n_labels=0, ax=ax) is ax
    assert name_boxes(ax) == {}


@pytest.mark.parametrize("column", ["lfc_std", "is_de_fdr_0.05"])
def test_another_table_is_refused(column):
    with pytest.raises(ValueError, match=r"differential_expression\(\)"):
        pl.volcano(_table().drop(columns=column))


def test_a_trained_model_is_drawn(trained_model):
    table = tl.differential_expression(
        trained_model,
        ["P001", "P002"],
        n_samples=10,
        counterfactual=trained_model.counterfactual(n_cells=20),
    )
    ax = pl.volcano(table, "P001")
    drawn = sum(len(points.get_offsets()) for points in ax.collections)
    assert drawn == len(trained_model.get_var_names())
