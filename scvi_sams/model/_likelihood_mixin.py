"""Likelihood bounds of cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.utils import track

from scvi_sams.model._base import SAMSModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData

__all__ = ["LikelihoodMixin"]

_MAX_WEIGHT_ELEMENTS = 20_000_000  # of one decoded (particles, cells, genes) tensor
_MAX_EFFECT_ELEMENTS = 50_000_000  # of the draws of all effects held at once


class LikelihoodMixin(SAMSModel):
    """The bound of the paper's evaluation, with and without importance weights."""

    def get_iwelbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_particles: int = 100,
        batch_size: int | None = None,
        return_mean: bool = True,
    ) -> float | np.ndarray:
        r"""Importance-weighted bound on the log-likelihood of cells.

        .. math:: \log \frac1K \sum_k \frac{p(x_i \mid z^{(k)}_i) \, p(z^{b(k)}_i)}
           {q(z^{b(k)}_i \mid x_i, \cdot)}

        Masks and effects are drawn once a particle, shared by all cells, and not scored against
        their priors: the cells are held out, the global latents were learned before (Bereket and
        Karaletsos 2023). It rises with ``n_particles``; with one particle it is, on average, the
        local part of :meth:`get_elbo`.

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        n_particles
            Number K of importance samples.
        batch_size
            Cells in a minibatch.
        return_mean
            Return the mean over cells.

        Returns
        -------
        Nats a cell: the mean, or an array of shape ``(n_cells,)`` in the order of ``indices``.

        Raises
        ------
        ValueError
            If ``n_particles`` is below one.

        Examples
        --------
        >>> model.get_iwelbo(indices=model.validation_indices)  # doctest: +SKIP
        """
        if n_particles < 1:
            raise ValueError(f"n_particles={n_particles}: at least one is needed.")
        log_weights = self._log_importance_weights(adata, indices, n_particles, batch_size)
        bound = (torch.logsumexp(log_weights, 0) - math.log(len(log_weights))).numpy()
        return float(bound.mean()) if return_mean else bound

    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 10,
        batch_size: int | None = None,
        include_global: bool = True,
        return_mean: bool = True,
    ) -> float | np.ndarray:
        """Evidence lower bound of cells.

        Unlike scvi-tools' it includes the divergences of masks and embeddings, divided by the
        number of training cells; without them it would not be a bound.

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        n_samples
            Draws of all latents that the expectation is estimated from.
        batch_size
            Cells in a minibatch.
        include_global
            Whether to subtract the global divergences.
        return_mean
            Return the mean over cells.

        Returns
        -------
        Nats a cell, higher is better: the mean, or an array of shape ``(n_cells,)`` in the order
        of ``indices``.

        Raises
        ------
        ValueError
            If ``n_samples`` is below one.

        Examples
        --------
        >>> model.get_elbo()  # doctest: +SKIP
        """
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples}: at least one is needed.")
        bound = self._log_importance_weights(adata, indices, n_samples, batch_size).mean(0).numpy()
        if include_global:
            with torch.no_grad():
                divergences = self.module.global_divergences().values()
            n_cells = max(1, int(self.module.n_training_cells))
            bound = bound - float(sum(divergences)) / n_cells
        return float(bound.mean()) if return_mean else bound

    def get_marginal_ll(self, *args: Any, **kwargs: Any) -> float | np.ndarray:
        """Not offered under this name: see :meth:`get_iwelbo`."""
        raise NotImplementedError(
            f"{type(self).__name__} estimates the marginal log-likelihood of cells by "
            "get_iwelbo(n_particles=...), whose draws of masks and effects all cells share."
        )

    @torch.inference_mode()
    def _log_importance_weights(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        n_particles: int,
        batch_size: int | None,
    ) -> torch.Tensor:
        """Weights of all cells under draws of the global latents they share, on the CPU."""
        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        loader = self._make_data_loader(adata, indices=indices, batch_size=batch_size)
        module = self.module
        n_held = max(1, _MAX_EFFECT_ELEMENTS // module.n_global_elements)
        chunks = []
        for start in range(0, n_particles, n_held):
            draws = module.sample_globals(min(n_held, n_particles - start))
            cells = []
            for tensors in track(
                loader, description="Importance weights", disable=len(loader) < 50
            ):
                n_cells, n_genes = tensors[REGISTRY_KEYS.X_KEY].shape
                n_at_once = max(1, _MAX_WEIGHT_ELEMENTS // (n_cells * n_genes))
                parts = [
                    module.log_importance_weights(tensors, draws.subset(k, k + n_at_once)).cpu()
                    for k in range(0, draws.n_samples, n_at_once)
                ]
                cells.append(torch.cat(parts))
            chunks.append(torch.cat(cells, dim=1))
        return torch.cat(chunks)
