from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl, tl


def _effects(values, conditions=None, genes=None):
    values = np.atleast_2d(np.asarray(values, dtype=float))
    conditions = conditions or [f"c{row}" for row in range(values.shape[0])]
    genes = genes or [f"g{column}" for column in range(values.shape[1])]
    return ad.AnnData(values, obs=pd.DataFrame(index=conditions), var=pd.DataFrame(index=genes))


def test_conditions_and_genes_are_matched_by_name():
    model = _effects([[1.0, 2.0, 4.0]], ["A"], ["x", "y", "z"])
    observed = _effects([[9, 9, 9, 9], [4, 2, 9, 1]], ["B", "A"], ["z", "y", "w", "x"])
    ax = pl.model_vs_observed_effects(model, observed)
    np.testing.assert_array_equal(
        ax.collections[0].get_offsets(), [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    )
    assert ax.get_title() == "Pearson 1.000: 1 condition x 3 genes"


def test_many_effects_are_counted_and_none_is_lost():
    values = np.random.default_rng(0).normal(size=(30, 200))
    ax = pl.model_vs_observed_effects(_effects(values), _effects(values + 1))
    assert ax.collections[0].get_array().sum() == values.size
    ax.figure.canvas.draw()


def test_effects_that_are_all_zero_are_drawn():
    ax = pl.model_vs_observed_effects(_effects(np.zeros((2, 3))), _effects(np.zeros((2, 3))))
    ax.figure.canvas.draw()
    assert "nan" in ax.get_title()


def test_no_room_is_left_for_effects_that_there_are_not():
    ax = pl.model_vs_observed_effects(_effects([[-2.0, 0.1]]), _effects([[-1.0, 0.2]]))
    assert ax.get_xlim() == ax.get_ylim() == pytest.approx((-2.11, 0.31))
    ax.figure.canvas.draw()
    assert list(ax.get_xticks()) == list(ax.get_yticks())


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="in common"):
        pl.model_vs_observed_effects(_effects([[1.0]], ["A"]), _effects([[1.0]], ["B"]))


def _pairs(additive, deviation, pairs=("A+B",), **obs):
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


def test_the_genes_that_deviate_stand_out_with_their_interval(name_boxes):
    ax = pl.pair_vs_additive_effects(_pairs([1, 2, -4, 0.5], [0.01, -1.5, 1.0, 0.02]))
    rest, intervals, outstanding = ax.collections
    np.testing.assert_allclose(rest.get_offsets(), [[1, 1.01], [0.5, 0.52]])
    np.testing.assert_allclose(outstanding.get_offsets(), [[2, 0.5], [-4, -3]])
    np.testing.assert_allclose(
        intervals.get_segments(), [[[2, 0.25], [2, 1.0]], [[-4, -3.25], [-4, -2.5]]]
    )
    assert set(name_boxes(ax)) == {"g1", "g2"}


def test_an_additive_pair_has_no_gene_that_stands_out(name_boxes):
    ax = pl.pair_vs_additive_effects(_pairs([1, 2, -4], [0.01, 0.1, -0.1]))
    assert name_boxes(ax) == {}
    assert len(ax.collections[0].get_offsets()) == 3


def test_the_title_says_what_kind_of_pair_it_is():
    table = _pairs(
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
    assert pl.pair_vs_additive_effects(_pairs([1, 2], [1, 1])).get_title() == "A+B"


def test_a_pair_of_several_is_chosen():
    table = _pairs([[1, 2], [3, 4]], [[0, 0], [5, 5]], ["A+B", "A+C"])
    ax = Figure().subplots()
    assert pl.pair_vs_additive_effects(table, "A+C", ax=ax) is ax
    np.testing.assert_allclose(ax.collections[2].get_offsets(), [[3, 8], [4, 9]])
    for wrong in (None, "B+C"):
        with pytest.raises(ValueError, match=r"it has A\+B, A\+C"):
            pl.pair_vs_additive_effects(table, wrong)


def test_a_pair_that_does_nothing_is_drawn():
    pl.pair_vs_additive_effects(_pairs([0, 0], [0, 0])).figure.canvas.draw()


def test_another_table_is_refused():
    table = _pairs([1], [1])
    del table.layers["additive"]
    with pytest.raises(ValueError, match=r"layer additive: give what pair_interactions\(\)"):
        pl.pair_vs_additive_effects(table)


def test_a_trained_model_is_drawn(trained_model):
    found = tl.pair_interactions(
        trained_model,
        ["P001+P002"],
        n_samples=4,
        counterfactual=trained_model.counterfactual(n_cells=10),
    )
    ax = pl.pair_vs_additive_effects(found)
    assert ax.get_title().startswith("P001+P002\n")
    assert "log2 expression" in ax.get_xlabel()
