"""Reading out cells and perturbations in latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from scvi_sams.model._base import SAMSModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData


__all__ = ["LatentMixin"]


class LatentMixin(SAMSModel):
    """Latent states of cells."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        representation: Literal["full", "basal", "perturbation"] = "full",
        give_mean: bool = True,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Any = None,
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent state of cells.

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        representation
            ``"full"``: the state, basal plus shift. ``"basal"``: what the cell would be without
            its perturbations. ``"perturbation"``: the shift alone, which depends on the cell's
            perturbations only, not on its counts. A model without shifts has only one state.
        give_mean
            Posterior means; otherwise one draw (of the full state only).
        batch_size
            Cells in a minibatch.
        return_dist
            Return means and variances (of the full state only).
        dataloader
            Minibatches to use in place of ``adata``.
        **data_loader_kwargs
            Further arguments of the data loader.

        Returns
        -------
        Array of shape ``(n_cells, n_latent)`` in the order of ``indices``, or a pair of them with
        ``return_dist``.

        Raises
        ------
        ValueError
            For an unknown ``representation``, or one other than ``"full"`` with ``return_dist`` or
            without ``give_mean``.

        Examples
        --------
        >>> adata.obsm["X_sams"] = model.get_latent_representation()  # doctest: +SKIP
        """
        if representation not in {"full", "basal", "perturbation"}:
            raise ValueError(
                f"representation={representation!r} is unknown; use 'full', 'basal' or "
                "'perturbation'."
            )
        if representation != "full" and (return_dist or not give_mean):
            raise ValueError(
                "return_dist=True and give_mean=False are for representation='full' only."
            )
        self._check_if_trained(warn=False)
        if dataloader is None:
            adata = self._validate_anndata(adata)
            dataloader = self._make_data_loader(
                adata, indices=indices, batch_size=batch_size, **data_loader_kwargs
            )
        if representation == "perturbation":
            self._require_effects("get_latent_representation(representation='perturbation')")
        effects = self.module.effects
        values, variances = [], []
        for tensors in dataloader:
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            if representation != "full" and effects is not None:
                shift = outputs["shift_mean"]
                is_basal = representation == "basal"
                state = outputs["qz"].loc - shift if is_basal else shift
            else:
                state = outputs["qz"].loc if give_mean or return_dist else outputs["z"]
            mean, variance = self.module.to_latents(state, outputs["qz"].variance)
            values.append(mean)
            variances.append(variance)
        latent = torch.cat(values).cpu().numpy()
        return (latent, torch.cat(variances).cpu().numpy()) if return_dist else latent

    def get_latent_library_size(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Not offered: library sizes are observed, not latent."""
        raise NotImplementedError(
            f"{type(self).__name__} has no latent library size: it takes the sum of the counts, "
            "or the column given as size_factor_key in setup_anndata."
        )
