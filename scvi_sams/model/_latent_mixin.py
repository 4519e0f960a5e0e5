"""Reading out cells and perturbations in latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch

from scvi_sams.model._base import SAMSModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData

    from scvi_sams.data import Conditions

__all__ = ["LatentMixin"]


class LatentMixin(SAMSModel):
    """Latent states of cells; masks, effects and shifts of perturbations."""

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
            perturbations only, not on its counts.
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
        values, variances = [], []
        to_masks = self.module.effects.frame.T
        for tensors in dataloader:
            outputs = self.module.inference(**self.module._get_inference_input(tensors))
            shift = outputs["shift_mean"] @ to_masks
            if representation == "perturbation":
                values.append(shift)
            elif representation == "basal":
                values.append(outputs["qz"].loc - shift)
            else:
                values.append(outputs["qz"].loc if give_mean or return_dist else outputs["z"])
                variances.append(outputs["qz"].variance)
        latent = torch.cat(values).cpu().numpy()
        return (latent, torch.cat(variances).cpu().numpy()) if return_dist else latent

    def get_latent_library_size(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Not offered: library sizes are observed, not latent."""
        raise NotImplementedError(
            f"{type(self).__name__} has no latent library size: it takes the sum of the counts, "
            "or the column given as size_factor_key in setup_anndata."
        )

    def get_perturbation_mask(self) -> pd.DataFrame:
        """Probability that each perturbation moves each latent.

        Returns
        -------
        Posterior inclusion probabilities, perturbations x latents. With ``mask_evidence_cells``
        they are those of a coarsened posterior: an effect must exceed the background by a fixed
        size, not only be detectable, and is charged for having chosen the direction of a latent
        that no other perturbation uses. Predictions use the posterior without that charge.

        Examples
        --------
        >>> mask = model.get_perturbation_mask()  # doctest: +SKIP
        >>> mask.index[mask.gt(0.5).any(axis=1)]  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        effects = self.module.effects
        return self._perturbation_frame(effects.mask_probability())

    def get_perturbation_effect(self) -> pd.DataFrame:
        """Expected sparse effect of each perturbation: mask times embedding.

        Returns
        -------
        ``E[m * e]``, perturbations x latents, in standard deviations of the basal state. The
        learned background (``spike_scale``) is not in it; :meth:`get_perturbation_shift` has both.

        Examples
        --------
        >>> model.get_perturbation_effect().loc["STAT1"]  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        effects = self.module.effects
        probability = effects.mask_probability()
        return self._perturbation_frame(probability * effects.slab_mean)

    def get_perturbation_shift(self, conditions: Conditions) -> pd.DataFrame:
        """Expected shift of the latent state under conditions, measured or not.

        Parameters
        ----------
        conditions
            Labels (``"A"``, ``"A+B"``), dicts (``{"A": 1.0, "B": 0.5}``) or a dosage matrix.

        Returns
        -------
        Conditions x latents, in standard deviations of the basal state.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.

        Examples
        --------
        >>> model.get_perturbation_shift(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        dosage, labels = self._parse_conditions(conditions)
        mean, _ = self.module.effects.moments()
        values = dosage @ mean.detach().cpu().numpy()
        return pd.DataFrame(values, index=labels, columns=self._latent_names)

    @property
    def _latent_names(self) -> list[str]:
        return [f"latent_{latent}" for latent in range(self.module.n_latent)]

    def _perturbation_frame(self, values: torch.Tensor) -> pd.DataFrame:
        return pd.DataFrame(
            values.detach().cpu().numpy(),
            index=pd.Index(self.perturbation_names, name="perturbation"),
            columns=self._latent_names,
        )
