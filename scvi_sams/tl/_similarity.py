"""Which perturbations do the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams.model.read_outs import provenance, require_effects
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl._mechanisms import mechanisms
from scvi_sams.tl.distances import effect_distance, latent_gene_norm, mask_distance, neighbor_graph

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual


def perturbation_distance(
    model: SAMSVAE,
    by: Literal["effect", "mask"] = "effect",
    *,
    metric: Literal["euclidean", "cosine"] = "cosine",
    fdr: float = 0.05,
    counterfactual: Counterfactual | None = None,
) -> pd.DataFrame:
    r"""How far perturbations are apart in what they do.

    Parameters
    ----------
    model
        A trained model whose perturbations act by a shift.
    by
        ``"effect"``: by the expected effects on the latents, each scaled by the norm over genes
        of what one standard deviation of it does to log expression; effects whose mask is likelier
        off than on count as zero. ``"mask"``: by the latents that they are called on
        (:func:`mechanisms`), the Jaccard distance :math:`1 - |M_s \cap M_t| / |M_s \cup M_t|`.
    metric
        Of effects: ``"cosine"`` compares directions, ``"euclidean"`` sizes too. A perturbation
        without any effect is at cosine distance 1 of those with one.
    fdr
        False discovery rate of the calls, for ``by="mask"``.
    counterfactual
        The cells over which the scale of a latent is averaged, from
        :meth:`SAMSVAE.counterfactual`; 200 basal states from the prior by default.

    Returns
    -------
    pandas.DataFrame
        Perturbations x perturbations, symmetric with a zero diagonal, without null perturbations.

    Raises
    ------
    NotImplementedError
        If perturbations do not act by a shift, or have no masks (``by="mask"``).
    ValueError
        If ``by`` or ``metric`` is unknown, or ``fdr`` is not between 0 and 1.

    Examples
    --------
    >>> distance = scvi_sams.tl.perturbation_distance(model)  # doctest: +SKIP
    >>> distance["STAT1"].nsmallest(5)  # doctest: +SKIP
    """
    checked("by", by)
    checked("metric", metric)
    checked("fdr", fdr)
    if by == "mask":
        table = mechanisms(model, fdr)
        called = table.pivot(index="perturbation", columns="latent", values="called")
        return mask_distance(called.loc[pd.unique(table["perturbation"])])
    sparse_effects = require_effects(model, "perturbation_distance").sparse
    effect = model.get_perturbation_effect()
    if sparse_effects:
        # The expected effect of a mask that is off is tiny, yet has a direction.
        effect = effect.where(model.get_perturbation_mask() > 0.5, 0.0)
    effect = effect.drop(index=null_perturbations(effect.index))
    cells = model.counterfactual() if counterfactual is None else counterfactual
    norm = pd.Series(latent_gene_norm(cells), index=effect.columns)
    return effect_distance(effect, norm, metric)


def perturbation_graph(
    model: SAMSVAE,
    by: Literal["effect", "mask"] = "effect",
    *,
    n_neighbors: int = 5,
    metric: Literal["euclidean", "cosine"] = "cosine",
    fdr: float = 0.05,
    counterfactual: Counterfactual | None = None,
) -> AnnData:
    """Perturbations as an AnnData with a neighbour graph, for scanpy to lay out and to cluster.

    Parameters
    ----------
    model, by, metric, fdr, counterfactual
        As for :func:`perturbation_distance`.
    n_neighbors
        Neighbours of each perturbation; at most one less than there are.

    Returns
    -------
    anndata.AnnData
        Perturbations x latents: effects in ``X`` and ``obsm["X_effect"]``, the length of each in
        ``obs["strength"]`` (standard deviations of the basal state), all distances in
        ``obsp["perturbation_distances"]``, and scanpy's graph in ``obsp["distances"]``,
        ``obsp["connectivities"]`` and ``uns["neighbors"]``, so that ``sc.tl.umap``,
        ``sc.tl.leiden`` and ``sc.pl.umap`` work. Connectivities are those of UMAP.

    Raises
    ------
    NotImplementedError
        If perturbations do not act by a shift, or have no masks (``by="mask"``).
    ScreenError
        If there are fewer than three perturbations.
    ValueError
        If an argument is unknown or out of its range.

    Examples
    --------
    >>> graph = scvi_sams.tl.perturbation_graph(model)  # doctest: +SKIP
    >>> sc.tl.umap(graph)  # doctest: +SKIP
    >>> sc.pl.umap(graph, color="strength")  # doctest: +SKIP
    """
    distance = perturbation_distance(
        model, by, metric=metric, fdr=fdr, counterfactual=counterfactual
    )
    effect = model.get_perturbation_effect().loc[distance.index]
    graph = neighbor_graph(effect, distance, n_neighbors)
    graph.obs["strength"] = np.linalg.norm(effect.to_numpy(np.float64), axis=1)
    graph.uns["scvi_sams"] = provenance(model) | {"by": by, "metric": metric}
    return graph
