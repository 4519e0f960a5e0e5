from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl
from scvi_sams.pl._point_labels import PointLabels


def _table(additive, deviation, pairs=("A+B",), **obs):
    additive, deviation = (np.atleast_2d(np.asarray(v, float)) for v in (additive, deviation))
    return ad.AnnData(
        deviation,
        obs=pd.DataFrame(obs, index=list(pairs)),
        var=pd.DataFrame(index=[f"g{number}" for number in range(additive.shape[1])]),
        layers={
            "additive": additive,
            "effect": additive + deviation,
            "lower": deviation - 0.25,
            "upper": deviation + 0.5,
        },
    )


def _names(ax):
    ax.figure.canvas.draw()
    (labels,) = (artist for artist in ax.artists if isinstance(artist, PointLabels))
    return labels.boxes


def test_the_genes_that_deviate_stand_out_with_their_interval():
    ax = pl.pair_vs_additive_effects(_table([1, 2, -4, 0.5], [0.01, -1.5, 1.0, 0.02]))
    rest, intervals, outstanding = ax.collections
    np.testing.assert_allclose(rest.get_offsets(), [[1, 1.01], [0.5, 0.52]])
    np.testing.assert_allclose(outstanding.get_offsets(), [[2, 0.5], [-4, -3]])
    np.testing.assert_allclose(
        intervals.get_segments(), [[[2, 0.25], [2, 1.0]], [[-4, -3.25], [-4, -2.5]]]
    )
    assert set(_names(ax)) == {"g1", "g2"}


def test_an_additive_pair_has_no_gene_that_stands_out():
    ax = pl.pair_vs_additive_effects(_table([1, 2, -4], [0.01, 0.1, -0.1]))
    assert _names(ax) == {}
    assert len(ax.collections[0].get_offsets()) == 3


def test_the_title_says_what_kind_of_pair_it_is():
    table = _table(
        [1, 2],
        [1, 1],
        **{
            "class": ["synergistic"],
            "class_probability": [0.9],
            "interaction_score": [0.5],
            "interaction_score_lower": [0.25],
            "interaction_score_upper": [0.75],
        },
    )
    title = pl.pair_vs_additive_effects(table).get_title()
    assert title == "A+B\nsynergistic (0.90), score 0.50 [0.25, 0.75]"
    assert pl.pair_vs_additive_effects(_table([1, 2], [1, 1])).get_title() == "A+B"


def test_a_pair_of_several_is_chosen():
    table = _table([[1, 2], [3, 4]], [[0, 0], [5, 5]], ["A+B", "A+C"])
    ax = Figure().subplots()
    assert pl.pair_vs_additive_effects(table, "A+C", ax=ax) is ax
    np.testing.assert_allclose(ax.collections[2].get_offsets(), [[3, 8], [4, 9]])
    for wrong in (None, "B+C"):
        with pytest.raises(ValueError, match=r"it has A\+B, A\+C"):
            pl.pair_vs_additive_effects(table, wrong)


def test_a_pair_that_does_nothing_is_drawn():
    pl.pair_vs_additive_effects(_table([0, 0], [0, 0])).figure.canvas.draw()


def test_another_table_is_refused():
    table = _table([1], [1])
    del table.layers["additive"]
    with pytest.raises(ValueError, match=r"layer additive: give what get_pair_interactions\(\)"):
        pl.pair_vs_additive_effects(table)


def test_a_trained_model_is_drawn(trained_model):
    found = trained_model.get_pair_interactions(["P001+P002"], n_samples=4, n_cells=10)
    ax = pl.pair_vs_additive_effects(found)
    assert ax.get_title().startswith("P001+P002\n")
    assert "log2 expression" in ax.get_xlabel()
