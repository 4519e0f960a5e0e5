"""Distances of perturbations, and scanpy's graph of their neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from pandas.api.types import is_bool_dtype
from scipy import sparse
from scipy.spatial.distance import pdist, squareform
from sklearn.base import BaseEstimator, TransformerMixin

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scvi_sams.model.counterfactual import Counterfactual


def effect_distance(
    effect: pd.DataFrame, latent_scale: pd.Series | None = None, metric: str = "euclidean"
) -> pd.DataFrame:
    r"""Distances of perturbations by their effects (perturbations x latents).

    A latent counts by what it does to genes: with :math:`w_l` the norm over genes of the effect of
    a unit of it, :math:`d_{st}^2 = \sum_l w_l^2 (e_{sl} - e_{tl})^2`, or one minus the cosine of
    :math:`w \odot e_s` and :math:`w \odot e_t`, which ignores how strong the perturbations are. A
    perturbation without any effect is at cosine distance 1 of those with one, and at 0 of others
    without.
    """
    checked("metric", metric)
    values = effect.to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise ScreenError("The effects hold values that are not finite.")
    if latent_scale is not None:
        if missing := list(effect.columns.difference(latent_scale.index)):
            raise ScreenError(f"latent_scale lacks the latent {missing[0]!r} of the effects.")
        values = values * latent_scale.loc[effect.columns].to_numpy(np.float64)
    if metric == "euclidean":
        return _square(pdist(values), effect)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = squareform(np.clip(pdist(values, "cosine"), 0, 2))
    without_effect = ~values.any(axis=1)
    distance[without_effect] = distance[:, without_effect] = 1.0
    distance[np.ix_(without_effect, without_effect)] = 0.0
    np.fill_diagonal(distance, 0.0)
    return pd.DataFrame(distance, index=effect.index, columns=effect.index)


def latent_gene_norm(cells: Counterfactual) -> NDArray[np.float64]:
    """Norm over genes of what one standard deviation of each latent does to mean expression."""
    base = cells.unperturbed().mean(0)
    profiles = [cells.unperturbed(latent, 1.0).mean(0) for latent in range(cells.module.n_latent)]
    return np.linalg.norm(np.stack(profiles) - base, axis=1).astype(np.float64)


def mask_distance(called: pd.DataFrame) -> pd.DataFrame:
    """Jaccard distances of perturbations by their calls (booleans, perturbations x latents).

    Two perturbations without any call are at 0 of each other.
    """
    if not all(is_bool_dtype(dtype) for dtype in called.dtypes):
        raise ScreenError("Jaccard distances are of calls: give booleans, such as mask > 0.5.")
    return _square(pdist(called.to_numpy(bool), "jaccard"), called)


def neighbor_graph(
    effect: pd.DataFrame, distance: pd.DataFrame, n_neighbors: int = 5
) -> ad.AnnData:
    """Perturbations x latents with scanpy's graph of the neighbours by given distances."""
    if not (effect.index.equals(distance.index) and effect.index.equals(distance.columns)):
        raise ScreenError("Effects and distances must have the same perturbations in one order.")
    if len(effect) < 3:
        raise ScreenError("A neighbour graph needs at least three perturbations.")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors} must be 1 or more.")
    values = effect.to_numpy(np.float32)
    full = distance.to_numpy(np.float64)
    graph = ad.AnnData(
        values,
        obs=pd.DataFrame(index=effect.index.astype(str).rename(None)),
        var=pd.DataFrame(index=effect.columns.astype(str).rename(None)),
        obsm={"X_effect": values, "to_all": full},
        obsp={"perturbation_distances": full},
    )
    # scanpy counts each perturbation among its own neighbours.
    n_neighbors = min(n_neighbors, len(effect) - 1) + 1
    sc.pp.neighbors(graph, use_rep="to_all", transformer=_PrecomputedNeighbors(n_neighbors))
    # scanpy's layouts look for the representation that neighbours were found in.
    graph.uns["neighbors"]["params"]["use_rep"] = "X_effect"
    del graph.obsm["to_all"]
    return graph


def _square(condensed: NDArray[np.float64], table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(squareform(condensed), index=table.index, columns=table.index)


class _PrecomputedNeighbors(TransformerMixin, BaseEstimator):
    """Neighbours from a matrix of distances, each row's own entry first.

    That of scikit-learn does not put it first where others are at distance zero, as are
    perturbations with the same mask, and scanpy then loses a neighbour.
    """

    def __init__(self, n_neighbors: int) -> None:
        self.n_neighbors = n_neighbors

    def fit(self, distance: NDArray[np.float64], y: None = None) -> _PrecomputedNeighbors:
        """Learn nothing."""
        return self

    def transform(self, distance: NDArray[np.float64]) -> sparse.csr_matrix:
        """Keep the nearest of each row."""
        ranked = distance.copy()
        np.fill_diagonal(ranked, -1.0)
        nearest = np.argsort(ranked, axis=1, kind="stable")[:, : self.n_neighbors]
        n = len(distance)
        values = np.take_along_axis(distance, nearest, axis=1).ravel()
        ends = np.arange(n + 1) * self.n_neighbors
        return sparse.csr_matrix((values, nearest.ravel(), ends), shape=(n, n))
