from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import scvi_sams
from scvi_sams import pl


def _labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def _mask(values):
    values = np.asarray(values, dtype=float)
    return pd.DataFrame(
        values,
        index=[f"GENE{row}" for row in range(values.shape[0])],
        columns=[f"latent_{column}" for column in range(values.shape[1])],
    )


def test_what_moves_comes_first():
    mask = np.zeros((4, 5))
    mask[1, 3] = 0.9
    mask[2, [3, 4]] = 0.8
    mask[3, 0] = 0.4
    ax = pl.mask_heatmap(_mask(mask))
    assert ax.get_title() == "2 of 4 perturbations move 2 of 5 latents"
    assert _labels(ax.yaxis) == ["GENE2", "GENE1", "GENE3", "GENE0"]
    assert _labels(ax.xaxis)[:3] == ["3", "4", "0"]  # the one that most perturbations move first


def test_those_that_do_nothing_are_counted_but_one_active_is_no_lone_rectangle():
    mask = np.full((100, 40), 0.01)
    mask[17, 4] = 0.9
    mask[50, 5] = 0.2
    ax = pl.mask_heatmap(_mask(mask))
    assert ax.get_title() == (
        "1 of 100 perturbations moves 1 of 40 latents\n"
        "not shown: 88 perturbations and 28 latents without a mask"
    )
    assert ax.images[0].get_array().shape == (12, 12)
    assert _labels(ax.yaxis)[:2] == ["GENE17", "GENE50"]
    everyone = pl.mask_heatmap(_mask(np.vstack([np.ones((30, 4)), np.zeros((1, 4))])))
    assert everyone.get_title().endswith("\nnot shown: 1 perturbation without a mask")
    assert len(_labels(everyone.yaxis)) == 30


def test_perturbations_with_one_mechanism_stand_together():
    kinds = np.tile([0, 1, 2, 2], 6)
    ax = pl.mask_heatmap(_mask(np.eye(3)[kinds]))
    order = [int(name.removeprefix("GENE")) for name in _labels(ax.yaxis)]
    assert np.count_nonzero(np.diff(kinds[order])) == 2
    assert (kinds[order[:12]] == 2).all()  # the largest group at the top


@pytest.mark.parametrize("seed", range(3))
def test_the_lower_left_is_empty(seed):
    """Each row begins at the latent of the row above it or further right."""
    mask = np.random.default_rng(seed).random((40, 12)) < 0.15
    drawn = np.asarray(pl.mask_heatmap(_mask(mask)).images[0].get_array()) > 0.5
    drawn = drawn[drawn.any(axis=1)]
    assert (np.diff(drawn.argmax(axis=1)) >= 0).all()
    assert (np.diff(drawn.sum(axis=0)) <= 0).all()


def test_effects_are_drawn_about_zero_and_signs_stand_together():
    mask = _mask(np.vstack([np.tile([1, 0], (8, 1)), [[0, 1]]]))
    effect = mask * np.array([3, -3, 2, -2, 1, -1, 3, -1, 2.0])[:, None] + 1e-3
    ax = pl.mask_heatmap(mask, effect.iloc[::-1])
    image = ax.images[0]
    assert image.get_clim() == pytest.approx((-3.001, 3.001))
    assert np.count_nonzero(np.diff(np.sign(image.get_array()[:8, 0]))) == 1
    drawn = pd.Series(image.get_array()[:, 0], index=_labels(ax.yaxis))
    pd.testing.assert_series_equal(drawn, effect["latent_0"][drawn.index], check_names=False)
    with pytest.raises(ValueError, match="`effect` lacks"):
        pl.mask_heatmap(mask, effect.iloc[1:])


def test_500_perturbations_keep_legible_labels():
    mask = np.random.default_rng(0).random((500, 30)) < 0.1
    ax = pl.mask_heatmap(_mask(mask))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert "labelled" in ax.get_ylabel()
    assert ax.figure.get_size_inches()[1] < 15


def test_25_perturbations_are_all_labelled():
    ax = pl.mask_heatmap(_mask(np.ones((25, 4))))
    assert len(_labels(ax.yaxis)) == 25
    assert ax.get_ylabel() == ""


@pytest.mark.parametrize("mask", [np.zeros((3, 4)), np.eye(4)[:1], np.eye(4)[:2]])
def test_few_or_no_masks_are_drawn(mask):
    pl.mask_heatmap(_mask(mask)).figure.canvas.draw()


def _strip(ax):
    return ax.images[1].get_array()[:, 0]


def test_rows_have_the_colour_of_their_pathway():
    kinds = {"GENE0": "MAPK", "GENE1": "WNT", "GENE2": "MAPK", "absent": "TGF"}
    ax = pl.mask_heatmap(_mask(np.eye(4)), pathways=kinds)
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


def test_rare_pathways_beyond_the_colours_are_grey():
    kinds = pd.Series({f"GENE{row}": f"kind {max(row, 1)}" for row in range(12)})
    ax = pl.mask_heatmap(_mask(np.eye(12)), pathways=kinds)
    legend = ax.images[0].colorbar.ax.get_legend()
    grey = to_rgb(legend.get_patches()[-1].get_facecolor())
    assert sum(tuple(color) == grey for color in _strip(ax)) == 3
    texts = legend.get_texts()
    assert texts[0].get_text() == "kind 1"
    assert texts[-1].get_text() == "3 others"


def test_the_legend_of_pathways_covers_nothing():
    kinds = {f"GENE{row}": f"a pathway with a long name {row}" for row in range(6)}
    ax = pl.mask_heatmap(_mask(np.ones((6, 6))), _mask(4 - 3 * np.eye(6)), pathways=kinds)
    figure = ax.figure
    figure.canvas.draw()
    bar = ax.images[0].colorbar.ax
    legend = bar.get_legend().get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    assert legend.x0 >= bar.yaxis.get_tightbbox().x1
    assert not legend.overlaps(ax.get_tightbbox())


def test_two_figures_give_a_pathway_one_colour():
    kinds = {"GENE0": "A", "GENE1": "B", "GENE2": "C"}
    colors = []
    for mask in (np.eye(3), np.eye(3)[:, [2, 0, 1]]):
        ax = pl.mask_heatmap(_mask(mask), pathways=kinds)
        colors.append(dict(zip(_labels(ax.yaxis), map(tuple, _strip(ax)), strict=True)))
    assert colors[0] == colors[1]


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="no perturbation or no latent"):
        pl.mask_heatmap(_mask(np.zeros((0, 3))))


def test_masks_of_a_model_are_drawn_into_given_axes(trained_model):
    ax = Figure().subplots()
    assert pl.mask_heatmap(trained_model.get_perturbation_mask(), ax=ax) is ax


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
