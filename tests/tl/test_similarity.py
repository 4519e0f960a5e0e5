from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scvi_sams import ScreenError
from scvi_sams.tl.distances import effect_distance, mask_distance, neighbor_graph


@pytest.fixture
def effect():
    """Three groups of five, each on a latent of its own."""
    rng = np.random.default_rng(0)
    values = 0.1 * rng.normal(size=(15, 4))
    values[np.arange(15), np.arange(15) // 5] += 3
    return pd.DataFrame(
        values, index=[f"P{k:02d}" for k in range(15)], columns=[f"l{k}" for k in range(4)]
    )


GROUP = np.arange(15) // 5


class TestDistance:
    def test_of_effects_agrees_with_the_formula(self, effect):
        scale = pd.Series({"l3": 0.5, "l2": 1.0, "l1": 2.0, "l0": 3.0})
        distance = effect_distance(effect, scale)
        cosine = effect_distance(effect, scale, metric="cosine")
        for s in ("P00", "P07"):
            for t in ("P01", "P14"):
                a, b = effect.loc[s] * scale, effect.loc[t] * scale
                assert distance.loc[s, t] == pytest.approx(np.sqrt(((a - b) ** 2).sum()))
                expected = 1 - (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
                assert cosine.loc[s, t] == pytest.approx(expected)
        assert (np.diag(distance) == 0).all()
        assert distance.equals(distance.T)

    def test_of_perturbations_that_do_nothing(self, effect):
        effect.iloc[:2] = 0
        cosine = effect_distance(effect, metric="cosine")
        assert cosine.iloc[0, 1] == 0
        assert (cosine.iloc[0, 2:] == 1).all()

    def test_of_masks_is_jaccard(self):
        rng = np.random.default_rng(0)
        called = pd.DataFrame(rng.random((6, 5)) < 0.5, index=list("ABCDEF"))
        called.loc[["A", "B"]] = False
        distance = mask_distance(called)
        assert distance.loc["A", "B"] == 0
        for s in "ACD":
            for t in "EF":
                together = (called.loc[s] & called.loc[t]).sum()
                assert distance.loc[s, t] == pytest.approx(
                    1 - together / (called.loc[s] | called.loc[t]).sum()
                )

    def test_errors(self, effect):
        with pytest.raises(ValueError, match="metric='l1'"):
            effect_distance(effect, metric="l1")
        with pytest.raises(ScreenError, match="lacks the latent 'l1'"):
            effect_distance(effect, pd.Series({"l0": 1.0, "l2": 1.0, "l3": 1.0}))
        with pytest.raises(ScreenError, match="not finite"):
            effect_distance(effect / 0)
        with pytest.raises(ScreenError, match="booleans"):
            mask_distance(effect)


class TestGraph:
    def test_neighbours_are_the_nearest(self, effect):
        distance = effect_distance(effect)
        graph = neighbor_graph(effect, distance, n_neighbors=4)
        found = graph.obsp["distances"].toarray() > 0
        nearest = np.argsort(distance.to_numpy(), axis=1)[:, 1:5]
        connected = graph.obsp["connectivities"].toarray() > 0
        for row, links, expected in zip(found, connected, nearest, strict=True):
            assert set(np.flatnonzero(row)) == set(expected)
            assert links[expected].all()
        assert graph.obs_names.tolist() == effect.index.tolist()
        np.testing.assert_allclose(graph.obsp["perturbation_distances"], distance)

    def test_scanpy_lays_it_out_and_clusters_it(self, effect, tmp_path):
        graph = neighbor_graph(effect, effect_distance(effect), n_neighbors=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numba, and of scanpy's use of matplotlib
            sc.tl.umap(graph)
            sc.tl.leiden(graph, flavor="igraph", n_iterations=2, directed=False)
            sc.pl.umap(graph, color="leiden", show=False)
        assert graph.obs["leiden"].groupby(GROUP).nunique().eq(1).all()
        graph.write_h5ad(tmp_path / "graph.h5ad")

    def test_perturbations_with_the_same_mask_are_neighbours(self):
        """At distance zero of each other, as many as there are neighbours."""
        called = pd.DataFrame(np.eye(3, dtype=bool)[np.arange(12) % 3], index=list("ABCDEFGHIJKL"))
        graph = neighbor_graph(called.astype(float), mask_distance(called), n_neighbors=3)
        connected = graph.obsp["connectivities"].toarray() > 0
        group = np.arange(12) % 3
        same = (group[:, None] == group) & ~np.eye(12, dtype=bool)
        np.testing.assert_array_equal(connected, same)

    def test_errors(self, effect):
        distance = effect_distance(effect)
        with pytest.raises(ScreenError, match="same perturbations"):
            neighbor_graph(effect.iloc[1:], distance)
        with pytest.raises(ScreenError, match="at least three"):
            neighbor_graph(effect.iloc[:2], distance.iloc[:2, :2])
        with pytest.raises(ValueError, match="n_neighbors"):
            neighbor_graph(effect, distance, n_neighbors=0)
