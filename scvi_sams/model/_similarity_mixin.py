"""Which perturbations do the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scvi_sams.model._counterfactual_mixin import CounterfactualMixin
from scvi_sams.model._mechanisms_mixin import MechanismsMixin
from scvi_sams.module.base import GlobalDraws
from scvi_sams.tl import (
    effect_distance,
    hierarchical_clusters,
    mask_distance,
    null_perturbations,
    perturbation_graph,
)

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SimilarityMixin"]


class SimilarityMixin(MechanismsMixin, CounterfactualMixin):
    """Distances of perturbations, and their neighbour graph."""

    def get_perturbation_distance(
        self,
        by: Literal["effect", "mask"] = "effect",
        *,
        metric: Literal["euclidean", "cosine"] = "cosine",
        fdr: float = 0.05,
        n_cells: int = 200,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How far perturbations are apart in what they do.

        Parameters
        ----------
        by
            ``"effect"``: by the expected effects on the latents, each scaled by the norm over
            genes of what one standard deviation of it does to log expression
            (:func:`~scvi_sams.tl.effect_distance`); effects whose mask is likelier off
            than on count as zero. ``"mask"``: by the latents that they
            are called on (:func:`~scvi_sams.tl.mask_distance`).
        metric
            Of effects: ``"cosine"`` compares directions, ``"euclidean"`` sizes too.
        fdr
            False discovery rate of the calls, for ``by="mask"``.
        n_cells, seed
            Basal states to average the scale of a latent over, and seed of their draw.

        Returns
        -------
        Perturbations x perturbations, without null perturbations.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, or have no masks (``by="mask"``).
        ValueError
            If ``by`` or ``metric`` is unknown, or ``fdr`` is not between 0 and 1.

        Examples
        --------
        >>> distance = model.get_perturbation_distance()  # doctest: +SKIP
        >>> hierarchical_clusters(distance, n_clusters=5)  # doctest: +SKIP
        """
        if by == "mask":
            table = self.get_mechanisms(fdr)
            called = table.pivot(index="perturbation", columns="latent", values="called")
            return mask_distance(called.loc[pd.unique(table["perturbation"])])
        if by != "effect":
            raise ValueError(f"by={by!r} is unknown; use 'effect' or 'mask'.")
        effect = self.get_perturbation_effect()
        if self._require_effects("get_perturbation_distance").sparse:
            # The expected effect of a mask that is off is tiny, yet has a direction.
            effect = effect.where(self.get_perturbation_mask() > 0.5, 0.0)
        effect = effect.drop(index=null_perturbations(effect.index))
        return effect_distance(effect, self._latent_gene_norm(n_cells, seed), metric)

    def get_perturbation_graph(
        self,
        by: Literal["effect", "mask"] = "effect",
        *,
        n_neighbors: int = 5,
        n_clusters: int | None = None,
        metric: Literal["euclidean", "cosine"] = "cosine",
        fdr: float = 0.05,
        n_cells: int = 200,
        seed: int = 0,
    ) -> AnnData:
        """Perturbations as an AnnData with a neighbour graph, for scanpy.

        Parameters
        ----------
        by, metric, fdr, n_cells, seed
            As for :meth:`get_perturbation_distance`.
        n_neighbors
            Neighbours of each perturbation.
        n_clusters
            Number of hierarchical clusters to add as ``obs["cluster"]``, with the linkage in
            ``uns["linkage"]``; none by default.

        Returns
        -------
        AnnData, perturbations x latents, as from
        :func:`~scvi_sams.tl.perturbation_graph`, with the length of each effect in
        ``obs["strength"]`` (standard deviations of the basal state).

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
        >>> graph = model.get_perturbation_graph(n_clusters=4)  # doctest: +SKIP
        >>> sc.tl.umap(graph)  # doctest: +SKIP
        >>> sc.pl.umap(graph, color=["cluster", "strength"])  # doctest: +SKIP
        """
        distance = self.get_perturbation_distance(
            by, metric=metric, fdr=fdr, n_cells=n_cells, seed=seed
        )
        effect = self.get_perturbation_effect().loc[distance.index]
        graph = perturbation_graph(effect, distance, n_neighbors)
        graph.obs["strength"] = np.linalg.norm(effect.to_numpy(np.float64), axis=1)
        if n_clusters is not None:
            clusters = hierarchical_clusters(distance, n_clusters=n_clusters)
            graph.obs["cluster"] = clusters.to_numpy()
            graph.uns["linkage"] = clusters.attrs["linkage"]
        graph.uns["scvi_sams"] = self._provenance() | {"by": by, "metric": metric}
        return graph

    # -- shared steps --------------------------------------------------------------------------

    @torch.inference_mode()
    def _latent_gene_norm(self, n_cells: int, seed: int) -> pd.Series:
        """Norm over genes of what one standard deviation of each latent does to expression.

        Log2 of normalised expression, averaged over basal states from the prior.
        """
        n_latent, n_names = self.module.n_latent, len(self.perturbation_names)
        with self._seeded(seed):
            population = self._prior_population(n_cells)
        # One perturbation, whose draws are the unit moves of the latents and none at all.
        moves = self.module.to_network(
            torch.cat([torch.zeros(1, n_latent), torch.eye(n_latent)])
        ).unsqueeze(1)
        draws = GlobalDraws(
            n_latent + 1, moves.to(self.device), torch.zeros(1, dtype=torch.long).to(self.device)
        )
        dose = sparse.csr_matrix(([1.0], ([0], [0])), shape=(1, n_names), dtype=np.float32)
        profiles = self._population_means(population, dose, 0, draws)
        norm = np.linalg.norm(profiles[1:] - profiles[0], axis=1)
        return pd.Series(norm.astype(np.float64), index=self._latent_names)
