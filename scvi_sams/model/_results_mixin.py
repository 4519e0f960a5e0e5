"""Results written into the user's AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.model._effects_mixin import EffectsMixin
from scvi_sams.model._gene_programs_mixin import GeneProgramsMixin
from scvi_sams.model._latent_mixin import LatentMixin

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ResultsMixin"]


class ResultsMixin(LatentMixin, EffectsMixin, GeneProgramsMixin):
    """What the model found, where scanpy looks for it."""

    def write_results(
        self,
        adata: AnnData | None = None,
        key: str = "sams",
        move: float | Literal["typical"] = 1.0,
        n_cells: int = 500,
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Write latent states, gene programmes, masks and effects into an AnnData.

        Everything survives ``adata.write_h5ad``. With ``key="sams"``:

        * ``obsm["X_sams"]``: latent states (``sc.pp.neighbors(adata, use_rep="X_sams")``),
          cells x latents
        * ``obsm["X_sams_basal"]``, ``obsm["X_sams_perturbation"]``: what the cell would be without
          its perturbations, and the shift; where perturbations act by a shift
        * ``varm["sams_programs"]``: mean effects of latents on genes, genes x latents
          (:meth:`get_gene_programs`)
        * ``uns["sams"]``: ``latents`` (DataFrame, the ``obs`` of :meth:`get_gene_programs`),
          ``perturbation_effect`` and ``perturbation_mask`` (DataFrames, perturbations x latents,
          where there are such), ``programs`` (how they were made) and ``provenance`` (model,
          versions)

        Parameters
        ----------
        adata
            AnnData to write to and whose cells to describe, the model's own by default.
        key
            Start of the names.
        move, n_cells, seed
            See :meth:`get_gene_programs`.
        batch_size
            Cells in a minibatch.

        Raises
        ------
        ScreenError
            If ``adata`` is a view, ``key`` cannot name anything, or there is no AnnData.
        NotImplementedError
            For ``move="typical"`` where perturbations do not act by a shift.

        Examples
        --------
        >>> model.write_results(adata)  # doctest: +SKIP
        >>> sc.pp.neighbors(adata, use_rep="X_sams")  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        adata = self.adata if adata is None else adata
        if adata is None:
            raise ScreenError("The model was loaded without its AnnData: give one as adata.")
        if adata.is_view:
            raise ScreenError("adata is a view, which cannot be written to: give adata.copy().")
        if not key or "/" in key:
            raise ScreenError(f"key={key!r} cannot start a name: give a word, such as 'sams'.")
        has_shifts = self.module.effects is not None
        # All that may fail first: an AnnData with half of the results would mislead.
        programs = self.get_gene_programs(move, n_cells, seed=seed)
        states = {"": "full"}
        if has_shifts:
            states |= {"_basal": "basal", "_perturbation": "perturbation"}
        latent = {
            suffix: self.get_latent_representation(
                adata,
                representation=representation,  # type: ignore[arg-type]
                batch_size=batch_size,
            )
            for suffix, representation in states.items()
        }
        made = programs.uns["scvi_sams"]
        parameters = {name: made.pop(name) for name in ("seed", "move", "credible_level", "units")}
        found: dict[str, Any] = {
            "latents": programs.obs.copy(),
            "programs": parameters,
            "provenance": self._provenance(),
        }
        if has_shifts:
            found["perturbation_effect"] = self.get_perturbation_effect()
            if self.module.effects is not None and self.module.effects.sparse:
                mask = self.get_perturbation_mask()
                found["perturbation_mask"] = mask
        table = programs.to_df().T
        table.index = adata.var_names
        table.columns.name = None  # which an h5ad does not keep
        for suffix, values in latent.items():
            adata.obsm[f"X_{key}{suffix}"] = np.asarray(values, dtype=np.float32)
        adata.varm[f"{key}_programs"] = table
        adata.uns[key] = found
