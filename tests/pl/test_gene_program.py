from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl, tl


def _labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


@pytest.fixture
def programs():
    effect = np.array([[0.5, -2.0, 1.0, 0.0, -0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
    return ad.AnnData(
        effect,
        obs=pd.DataFrame(
            {"move": [2.0, 1.0], "variance_share": [0.25, 0.0], "n_perturbations": [3.0, 0.0]},
            index=["latent_0", "latent_1"],
        ),
        var=pd.DataFrame(index=list("abcde")),
        layers={"lower": effect - 0.25, "upper": effect + 0.5},
        uns={"scvi_sams": {"units": "log2(1 + 10000 x / library)"}},
    )


@pytest.mark.parametrize("latent", ["latent_0", 0])
def test_genes_are_in_order_with_their_intervals(programs, latent):
    ax = pl.gene_program(programs, latent, n_genes=2)
    assert _labels(ax) == ["c", "a", "e", "b"]
    intervals, dots = ax.collections
    np.testing.assert_allclose(dots.get_offsets()[:, 0], [1.0, 0.5, -0.1, -2.0])
    ends = np.array([segment[:, 0] for segment in intervals.get_segments()])
    np.testing.assert_allclose(ends, [[0.75, 1.5], [0.25, 1.0], [-0.35, 0.4], [-2.25, -1.5]])
    top, bottom = ax.transData.transform([[0, 0], [0, 3]])[:, 1]
    assert top > bottom


def test_the_title_says_what_the_latent_does(programs):
    ax = pl.gene_program(programs, 0)
    assert ax.get_title() == "latent_0\n25% of the variance, 3.0 perturbations"
    assert ax.get_xlabel() == "effect (log2 expression) of moving it by +2 s.d."


def test_a_latent_without_effects_is_drawn_into_given_axes(programs):
    ax = Figure().subplots()
    assert pl.gene_program(programs, "latent_1", ax=ax) is ax
    ax.figure.canvas.draw()
    assert _labels(ax) == []


def test_what_cannot_be_drawn_is_refused(programs):
    with pytest.raises(
        ValueError, match="latent=7 is not in the table; it has latent_0, latent_1"
    ):
        pl.gene_program(programs, 7)
    with pytest.raises(ValueError, match="n_genes=0"):
        pl.gene_program(programs, 0, n_genes=0)
    del programs.layers["lower"]
    with pytest.raises(ValueError, match=r"no layer lower: give what gene_programs\(\)"):
        pl.gene_program(programs, 0)


def test_a_trained_model_is_drawn(trained_model):
    ax = pl.gene_program(
        tl.gene_programs(trained_model, counterfactual=trained_model.counterfactual(n_cells=20)),
        0,
        n_genes=3,
    )
    assert len(_labels(ax)) == 6
