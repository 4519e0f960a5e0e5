from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl


def _legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.fixture
def latent():
    """Twelve groups of twenty cells, of which the last eight stand far out."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(12), 20)
    state = rng.normal(size=(240, 8))
    state[group >= 4, group[group >= 4] - 4] += 20
    obs = pd.DataFrame(
        {"group": [f"g{number:02d}" for number in group], "depth": rng.random(240)},
        index=[f"cell{number}" for number in range(240)],
    )
    return ad.AnnData(obs=obs, obsm={"X_sams": state})


def test_the_groups_that_stand_out_are_coloured(latent):
    ax = pl.latent_umap(latent, color="group")
    assert _legend(ax) == ["4 others", *(f"g{number:02d}" for number in range(4, 12))]
    assert sum(len(points.get_offsets()) for points in ax.collections) == 240


def test_one_other_is_one(latent):
    nine = latent[latent.obs["group"] >= "g03"].copy()
    assert _legend(pl.latent_umap(nine, color="group"))[:2] == ["1 other", "g04"]


def test_few_cells_are_drawn_over_many(latent):
    latent.obs["kind"] = np.where(np.arange(240) % 24 == 0, "a few", "many")
    ax = pl.latent_umap(latent, color="kind")
    few, many = ax.collections
    assert len(few.get_offsets()) == 10
    assert few.get_zorder() > many.get_zorder()
    assert _legend(ax) == ["a few", "many"]


def test_a_numeric_column_has_a_colour_bar(latent):
    ax = pl.latent_umap(latent, color="depth")
    assert ax.get_legend() is None
    assert len(ax.figure.axes) == 2


def test_cells_are_drawn_at_random_and_alike_with_one_seed(latent):
    first, second = (pl.latent_umap(latent, n_cells=50, seed=3) for _ in range(2))
    offsets = first.collections[0].get_offsets()
    assert offsets.shape == (50, 2)
    np.testing.assert_array_equal(offsets, second.collections[0].get_offsets())


def test_the_given_anndata_is_left_as_it_was(latent):
    before = set(latent.obsm), set(latent.uns), set(latent.obsp), list(latent.obs)
    pl.latent_umap(latent, color="group", n_cells=50)
    assert before == (set(latent.obsm), set(latent.uns), set(latent.obsp), list(latent.obs))


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [({"representation": "X_pca"}, "X_pca"), ({"color": "grp"}, "'grp'.*'group'")],
)
def test_what_is_not_there_is_named(latent, arguments, culprit):
    with pytest.raises(KeyError, match=culprit):
        pl.latent_umap(latent, **arguments)


@pytest.mark.parametrize("representation", ["basal", "perturbation"])
def test_a_model_is_coloured_by_perturbation(trained_model, representation):
    ax = Figure().subplots()
    assert pl.latent_umap(trained_model, representation, n_cells=100, ax=ax) is ax
    assert ax.get_legend().get_title().get_text() == "perturbation"
