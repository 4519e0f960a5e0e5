from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from scvi_sams import pl
from scvi_sams.pl._figure import OTHER_COLOR


def _labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_only_what_moves_is_drawn(known_readouts):
    mask = np.zeros((4, 5))
    mask[1, 3] = 0.9
    mask[2, [3, 4]] = 0.8
    ax = pl.mask_heatmap(known_readouts(mask))
    assert ax.get_title() == "2 of 4 perturbations move 2 of 5 latents"
    assert sorted(_labels(ax.yaxis)) == ["GENE1", "GENE2"]
    assert _labels(ax.xaxis) == ["3", "4"]  # the one that more perturbations move comes first


def test_perturbations_with_one_mechanism_stand_together(known_readouts):
    kinds = np.tile([0, 1, 2], 8)
    order = [
        int(name.removeprefix("GENE"))
        for name in _labels(pl.mask_heatmap(known_readouts(np.eye(3)[kinds])).yaxis)
    ]
    changes = np.count_nonzero(np.diff(kinds[order]))
    assert changes == 2


def test_effects_are_drawn_about_zero(known_readouts):
    ax = pl.mask_heatmap(known_readouts([[1, 0], [0, 1]], size=-3.0), values="effect")
    image = ax.images[0]
    assert image.get_clim() == (-3, 3)
    assert image.get_array().min() == -3


def test_500_perturbations_keep_legible_labels(known_readouts):
    mask = np.random.default_rng(0).random((500, 30)) < 0.1
    ax = pl.mask_heatmap(known_readouts(mask))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert "labelled" in ax.get_ylabel()
    assert ax.figure.get_size_inches()[1] < 15


def test_25_perturbations_are_all_labelled(known_readouts):
    ax = pl.mask_heatmap(known_readouts(np.ones((25, 4))))
    assert len(_labels(ax.yaxis)) == 25
    assert ax.get_ylabel() == ""


@pytest.mark.parametrize("mask", [np.zeros((3, 4)), np.eye(4)[:1], np.eye(4)[:2]])
def test_few_or_no_masks_are_drawn(known_readouts, mask):
    pl.mask_heatmap(known_readouts(mask)).figure.canvas.draw()


def _strip(ax):
    return ax.images[1].get_array()[:, 0]


def test_rows_have_the_colour_of_their_pathway(known_readouts):
    kinds = {"GENE0": "MAPK", "GENE1": "WNT", "GENE2": "MAPK", "absent": "TGF"}
    ax = pl.mask_heatmap(known_readouts(np.eye(4)), pathways=kinds)
    color_of = dict(zip(_labels(ax.yaxis), map(tuple, _strip(ax)), strict=True))
    assert color_of["GENE0"] == color_of["GENE2"] != color_of["GENE1"]
    assert color_of["GENE3"] == (1, 1, 1)
    legend = ax.images[0].colorbar.ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["MAPK", "WNT"]
    shown = {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert shown == {"MAPK": color_of["GENE0"], "WNT": color_of["GENE1"]}


def test_rare_pathways_beyond_the_colours_are_grey(known_readouts):
    kinds = pd.Series({f"GENE{row}": f"kind {max(row, 1)}" for row in range(12)})
    ax = pl.mask_heatmap(known_readouts(np.eye(12)), pathways=kinds)
    grey = to_rgb(OTHER_COLOR)
    assert sum(tuple(color) == grey for color in _strip(ax)) == 3
    texts = ax.images[0].colorbar.ax.get_legend().get_texts()
    assert texts[0].get_text() == "kind 1"
    assert texts[-1].get_text() == "3 others"


def test_the_legend_of_pathways_covers_nothing(known_readouts):
    kinds = {f"GENE{row}": f"a pathway with a long name {row}" for row in range(6)}
    ax = pl.mask_heatmap(known_readouts(-3 * np.eye(6) + 4), "effect", pathways=kinds)
    figure = ax.figure
    figure.canvas.draw()
    bar = ax.images[0].colorbar.ax
    legend = bar.get_legend().get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    assert legend.x0 >= bar.yaxis.get_tightbbox().x1
    assert not legend.overlaps(ax.get_tightbbox())


def test_two_figures_give_a_pathway_one_colour(known_readouts):
    kinds = {"GENE0": "A", "GENE1": "B", "GENE2": "C"}
    colors = []
    for mask in (np.eye(3), np.eye(3)[:, [2, 0, 1]]):
        ax = pl.mask_heatmap(known_readouts(mask), pathways=kinds)
        colors.append(dict(zip(_labels(ax.yaxis), map(tuple, _strip(ax)), strict=True)))
    assert colors[0] == colors[1]


def test_unknown_values_are_refused(known_readouts):
    with pytest.raises(ValueError, match="'mask' or 'effect', not 'sign'"):
        pl.mask_heatmap(known_readouts([[1]]), values="sign")


def test_a_trained_model_is_drawn_into_given_axes(trained_model):
    ax = Figure().subplots()
    assert pl.mask_heatmap(trained_model, ax=ax) is ax
