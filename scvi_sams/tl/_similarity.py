"""Which perturbations do the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from pandas.api.types import is_bool_dtype
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from sklearn.base import BaseEstimator, TransformerMixin

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["effect_distance", "hierarchical_clusters", "mask_distance", "perturbation_graph"]


def effect_distance(
    effect: pd.DataFrame,
    latent_scale: pd.Series | None = None,
    metric: Literal["euclidean", "cosine"] = "euclidean",
) -> pd.DataFrame:
    r"""Distances of perturbations by their effects on the latents.

    A latent counts by what it does to genes: with :math:`w_l` the norm over genes of the effect of
    a unit of it,

    .. math:: d_{st}^2 = \sum_l w_l^2 (e_{sl} - e_{tl})^2,

    or one minus the cosine of :math:`w \odot e_s` and :math:`w \odot e_t`, which ignores how
    strong the perturbations are.

    Parameters
    ----------
    effect
        Perturbations x latents, in standard deviations of the basal state.
    latent_scale
        Norm of the effect of a unit of each latent over genes, labelled as the columns; all 1 by
        default.
    metric
        ``"euclidean"`` or ``"cosine"``. A perturbation without any effect is at cosine distance 1
        of those with one, and at 0 of others without.

    Returns
    -------
    Perturbations x perturbations, symmetric with a zero diagonal.

    Raises
    ------
    ScreenError
        If an effect is not finite, or ``latent_scale`` lacks a latent.
    ValueError
        If ``metric`` is unknown.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import effect_distance
    >>> effect = pd.DataFrame([[3.0, 0.0], [0.0, 4.0]], index=["A", "B"], columns=["l0", "l1"])
    >>> effect_distance(effect).loc["A", "B"]
    np.float64(5.0)
    """
    if metric not in {"euclidean", "cosine"}:
        raise ValueError(f"metric={metric!r} is unknown; use 'euclidean' or 'cosine'.")
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


def mask_distance(called: pd.DataFrame) -> pd.DataFrame:
    r"""Jaccard distances of perturbations by the latents that they are called on.

    .. math:: d_{st} = 1 - |M_s \cap M_t| / |M_s \cup M_t|

    Parameters
    ----------
    called
        Whether each perturbation moves each latent, boolean, perturbations x latents.

    Returns
    -------
    Perturbations x perturbations, between 0 and 1. Two perturbations without any call are at 0 of
    each other.

    Raises
    ------
    ScreenError
        If the table is not boolean.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import mask_distance
    >>> called = pd.DataFrame([[True, True], [True, False]], index=["A", "B"])
    >>> mask_distance(called).loc["A", "B"]
    np.float64(0.5)
    """
    if not all(is_bool_dtype(dtype) for dtype in called.dtypes):
        raise ScreenError("Jaccard distances are of calls: give booleans, such as mask > 0.5.")
    return _square(pdist(called.to_numpy(bool), "jaccard"), called)


def hierarchical_clusters(
    distance: pd.DataFrame,
    *,
    n_clusters: int | None = None,
    max_distance: float | None = None,
    method: Literal["average", "complete", "single"] = "average",
) -> pd.Series:
    """Group perturbations by hierarchical clustering of their distances.

    Parameters
    ----------
    distance
        Perturbations x perturbations, as from :func:`effect_distance`.
    n_clusters, max_distance
        Where to cut the tree: into this number of groups, or where groups are further apart than
        this. Give one of them.
    method
        How far two groups are apart.

    Returns
    -------
    Group of each perturbation, a categorical ``"1"``, ``"2"`` and so on, by falling size. The
    linkage is in ``attrs["linkage"]``, for :func:`scipy.cluster.hierarchy.dendrogram`.

    Raises
    ------
    ValueError
        If not exactly one of ``n_clusters`` and ``max_distance`` is given, or ``method`` is
        unknown.
    ScreenError
        If there are fewer than two perturbations.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import effect_distance, hierarchical_clusters
    >>> effect = pd.DataFrame({"latent_0": [0.0, 5.0, 5.1]}, index=["A", "B", "C"])
    >>> hierarchical_clusters(effect_distance(effect), n_clusters=2).to_dict()
    {'A': '2', 'B': '1', 'C': '1'}
    """
    if (n_clusters is None) == (max_distance is None):
        raise ValueError("Give one of n_clusters and max_distance.")
    if method not in {"average", "complete", "single"}:
        raise ValueError(f"method={method!r} is unknown; use 'average', 'complete' or 'single'.")
    if len(distance) < 2:
        raise ScreenError("Clusters need at least two perturbations.")
    tree = linkage(squareform(distance.to_numpy(np.float64), checks=False), method=method)
    if n_clusters is not None:
        label = fcluster(tree, n_clusters, criterion="maxclust")
    else:
        label = fcluster(tree, max_distance, criterion="distance")
    by_size = pd.Series(label).value_counts(sort=False).sort_index()
    by_size = by_size.sort_values(ascending=False, kind="stable")
    rank = {old: str(new) for new, old in enumerate(by_size.index, start=1)}
    groups = pd.Categorical([rank[old] for old in label], categories=list(rank.values()))
    result = pd.Series(groups, index=distance.index, name="cluster")
    result.attrs["linkage"] = tree
    return result


def perturbation_graph(
    effect: pd.DataFrame, distance: pd.DataFrame, n_neighbors: int = 5
) -> ad.AnnData:
    """Neighbour graph of perturbations, for scanpy to lay out and to cluster.

    Parameters
    ----------
    effect
        Perturbations x latents.
    distance
        Perturbations x perturbations, as from :func:`effect_distance` or :func:`mask_distance`.
    n_neighbors
        Number of neighbours of each perturbation; at most one less than there are.

    Returns
    -------
    AnnData, perturbations x latents: effects in ``X`` and ``obsm["X_effect"]``, all distances in
    ``obsp["perturbation_distances"]``, and scanpy's graph in ``obsp["distances"]``,
    ``obsp["connectivities"]`` and ``uns["neighbors"]``, so that ``sc.tl.umap``, ``sc.tl.leiden``
    and ``sc.pl.umap`` work.

    Raises
    ------
    ScreenError
        If the tables name other perturbations, or there are fewer than three.
    ValueError
        If ``n_neighbors`` is below 1.

    Notes
    -----
    Connectivities are those of UMAP (McInnes, Healy and Melville 2018), by scanpy.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from scvi_sams.tl import effect_distance, perturbation_graph
    >>> values = np.random.default_rng(0).normal(size=(8, 3))
    >>> effect = pd.DataFrame(values, index=list("ABCDEFGH"), columns=["l0", "l1", "l2"])
    >>> graph = perturbation_graph(effect, effect_distance(effect), n_neighbors=3)
    >>> sorted(graph.obsp)
    ['connectivities', 'distances', 'perturbation_distances']
    """
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
