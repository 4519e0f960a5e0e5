from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl


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
    assert ax.get_title() == "Pearson 1.000: 1 conditions x 3 genes"


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
