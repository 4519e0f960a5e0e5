"""Whatever the names of genes, perturbations and conditions hold, plots draw them as they are."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl
from scvi_sams.tl.summaries import differential_expression_table

# Mathematics that does not parse, a legend's sign for nothing, markup, an escape code.
NAMES = ["$a_{$", "$b$", "_hidden", "[red]c[/]", "d\x1b[31m"]
SHOWN = ["$a_{$", "$b$", "_hidden", "[red]c[/]", r"d\x1b[31m"]


def _texts(figure):
    """Every text of a figure as the canvas draws it."""
    figure.canvas.draw()
    texts = figure.findobj(match=plt.Text)
    drawn = (text._preprocess_math(text.get_text()) for text in texts)
    return [shown.strip() for text, is_math in drawn if not is_math for shown in text.split("\n")]


def _heatmap():
    mask = pd.DataFrame(np.eye(5), index=NAMES, columns=NAMES)
    return pl.mask_heatmap(mask, pathways=dict(zip(NAMES, NAMES, strict=True)))


def _curves():
    columns = {"ec50": 1.0, "ec50_lower": 0.5, "ec50_upper": 2.0}
    columns |= {"slope": 1.0, "slope_lower": 0.5, "slope_upper": 2.0}
    return pl.dose_response(pd.DataFrame(columns, index=NAMES))


def _volcano():
    draws = np.random.default_rng(0).normal([-4, -3, -2, 2, 3], 0.1, size=(50, 5))
    table = differential_expression_table(draws, NAMES)
    return pl.volcano(table.assign(group1=NAMES[0], group2=NAMES[1], delta=0.1))


def _effects():
    values = np.random.default_rng(0).normal(size=(5, 5))
    return ad.AnnData(values, obs=pd.DataFrame(index=NAMES), var=pd.DataFrame(index=NAMES))


def _program():
    programs = _effects()
    programs.layers.update(lower=programs.X - 1, upper=programs.X + 1)
    return pl.gene_program(programs, NAMES[0])


def _pair():
    pairs = _effects()
    pairs.layers.update(dict.fromkeys(("effect", "additive", "lower", "upper"), pairs.X))
    return pl.pair_vs_additive_effects(pairs, NAMES[0])


@pytest.mark.parametrize(
    ("plot", "times"),
    [
        (_heatmap, 3),  # rows, columns and pathways
        (lambda: pl.effect_heatmap(_effects()), 2),
        (_program, 1),
    ],
)
def test_every_name_is_drawn(plot, times):
    texts = _texts(plot().figure)
    assert all(texts.count(name) >= times for name in SHOWN)


def test_every_curve_is_in_the_legend():
    texts = _texts(_curves().figure)
    assert [text.split(": ")[0] for text in texts if "[0.5, 2]" in text] == SHOWN


@pytest.mark.parametrize(("plot", "title"), [(_volcano, "$a_{$ vs $b$"), (_pair, "$a_{$")])
def test_names_beside_points_and_in_titles_are_drawn(plot, title, name_boxes):
    ax = plot()
    assert set(name_boxes(ax)) <= set(NAMES)
    assert len(name_boxes(ax)) >= 3
    assert title in _texts(ax.figure)
