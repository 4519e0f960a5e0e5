from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl


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


def test_unknown_values_are_refused(known_readouts):
    with pytest.raises(ValueError, match="'mask' or 'effect', not 'sign'"):
        pl.mask_heatmap(known_readouts([[1]]), values="sign")


def test_a_trained_model_is_drawn_into_given_axes(trained_model):
    ax = Figure().subplots()
    assert pl.mask_heatmap(trained_model, ax=ax) is ax
