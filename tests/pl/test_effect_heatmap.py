from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import scvi_sams
from scvi_sams import pl


def _labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def _effects(values):
    values = np.asarray(values, dtype=float)
    return pd.DataFrame(
        values,
        index=[f"c{row}" for row in range(values.shape[0])],
        columns=[f"gene{column}" for column in range(values.shape[1])],
    )


def test_the_genes_changed_most_are_drawn_with_their_effects():
    table = _effects([[0.0, -3.0, 1.0, 0.1], [0.2, 0.0, 2.0, 0.1]])
    ax = pl.effect_heatmap(table, n_genes=2)
    drawn = pd.DataFrame(
        ax.images[0].get_array(), index=_labels(ax.yaxis), columns=_labels(ax.xaxis)
    )
    pd.testing.assert_frame_equal(drawn.sort_index().sort_index(axis=1), table[["gene1", "gene2"]])
    assert ax.get_title() == "2 conditions, the 2 of 4 genes changed most"


def test_conditions_and_genes_of_a_kind_stand_together():
    rng = np.random.default_rng(0)
    kinds, modules = np.arange(12) % 3, np.arange(20) % 2
    profile = rng.normal(size=(3, 2))
    strength = rng.uniform(0.2, 3, size=(12, 1))
    ax = pl.effect_heatmap(_effects(strength * profile[kinds][:, modules]))
    conditions = [int(name.removeprefix("c")) for name in _labels(ax.yaxis)]
    genes = [int(name.removeprefix("gene")) for name in _labels(ax.xaxis)]
    assert np.count_nonzero(np.diff(kinds[conditions])) == 2
    assert np.count_nonzero(np.diff(modules[genes])) == 1


def test_one_outlier_does_not_take_the_colours():
    values = np.random.default_rng(0).uniform(-4, 4, size=(30, 40)).round()
    values[0, 0] = 1e3
    ax = pl.effect_heatmap(_effects(values))
    low, high = ax.images[0].get_clim()
    assert low == -high
    assert high < 5
    assert ax.images[0].colorbar.extend == "max"


def test_programmes_are_called_what_they_are():
    table = _effects(np.eye(3)).rename_axis("latent")
    ax = pl.effect_heatmap(ad.AnnData(table))
    assert ax.get_title().startswith("3 latents")


def test_many_genes_are_labelled_in_part():
    ax = pl.effect_heatmap(_effects(np.random.default_rng(0).normal(size=(4, 400))), 400)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 <= right.x0 + 1 for left, right in zip(boxes, boxes[1:], strict=False))
    assert "labelled" in ax.get_xlabel()


def test_effects_that_are_all_zero_are_drawn_into_given_axes():
    ax = Figure().subplots()
    assert pl.effect_heatmap(_effects(np.zeros((3, 4))), ax=ax) is ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("table", "n_genes", "message"),
    [(_effects(np.eye(2)), 0, "n_genes=0"), (_effects(np.zeros((0, 2))), 5, "no condition")],
)
def test_nothing_to_draw_is_refused(table, n_genes, message):
    with pytest.raises(ValueError, match=message):
        pl.effect_heatmap(table, n_genes)


def test_a_gene_twice_is_refused():
    with pytest.raises(scvi_sams.ScreenError, match="gene0"):
        pl.effect_heatmap(_effects(np.eye(2))[["gene0", "gene0"]])
