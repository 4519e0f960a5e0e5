"""What a model found, written where others look for it: the user's AnnData, scvi-tools' hub."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.model._effects_mixin import EffectsMixin
from scvi_sams.model._gene_programs_mixin import GeneProgramsMixin
from scvi_sams.model._hub import hub_model_card
from scvi_sams.model._latent_mixin import LatentMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from anndata import AnnData
    from scvi.hub import HubModel

__all__ = ["ResultsMixin"]

_REFERENCES = (
    "Bereket and Karaletsos, Modelling Cellular Perturbations with the Sparse Additive Mechanism "
    "Shift Variational Autoencoder, NeurIPS 2023."
)


class ResultsMixin(LatentMixin, EffectsMixin, GeneProgramsMixin):
    """What the model found, where scanpy and scvi-tools' hub look for it."""

    # Declared, not defined: they are those of scvi-tools' model class.
    init_params_: dict[str, Any]
    save: Callable[..., None]

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

    def save_for_hub(
        self,
        folder: str | PathLike[str],
        license_info: str,
        *,
        description: str,
        references: str = _REFERENCES,
        tissues: Sequence[str] = (),
        training_data_url: str | None = None,
        save_anndata: bool = True,
        overwrite: bool = False,
    ) -> HubModel:
        """Save the model as scvi-tools' hub wants it: model, metadata and a card.

        Nothing is uploaded; the ``push_to_huggingface_hub`` of what is returned does that. Whoever
        loads the model needs this package, and trust in the file, which is a pickle.

        Parameters
        ----------
        folder
            Folder to write.
        license_info
            Licence of model and data, such as ``"cc-by-4.0"``.
        description
            What the screen is: cells, perturbations, where it was published.
        references
            What to cite, the paper of the model by default.
        tissues
            Tissues or cell lines.
        training_data_url
            Where the data are: a page of CELLxGENE, the only ones that the hub takes.
        save_anndata
            Whether the AnnData goes with the model. Without it, whoever loads it gives their own.
        overwrite
            Whether to write over what is in the folder.

        Returns
        -------
        scvi.hub.HubModel
            The model as the hub has it.

        Raises
        ------
        ImportError
            If huggingface_hub is not there: ``pip install "scvi-sams[hub]"``.
        ScreenError
            If the AnnData is to be saved and the model was loaded without it.

        Examples
        --------
        >>> hub_model = model.save_for_hub(  # doctest: +SKIP
        ...     "my_model", "cc-by-4.0", description="THP-1 cells, 25 knock-outs."
        ... )
        >>> hub_model.push_to_huggingface_hub("me/my_model", "my_token")  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        try:
            import huggingface_hub  # noqa: F401  scvi.hub itself says so late since 1.5
            from scvi.hub import HubMetadata, HubModel
        except ImportError as error:
            raise ImportError(
                'The hub needs huggingface_hub: pip install "scvi-sams[hub]".'
            ) from error
        if save_anndata and self.adata is None:
            raise ScreenError(
                "The model was loaded without its AnnData: load it with adata, or pass "
                "save_anndata=False."
            )
        metadata = HubMetadata(
            scvi_version=self.registry["scvi_version"],
            anndata_version=version("anndata"),
            model_cls_name=type(self).__name__,
            training_data_url=training_data_url,
            model_parent_module="scvi_sams",
        )
        card = hub_model_card(
            self,
            license_info,
            description=description,
            references=references,
            tissues=tissues,
            training_data_url=training_data_url,
        )
        self.save(str(folder), overwrite=overwrite, save_anndata=save_anndata)
        hub_model = HubModel(str(folder), metadata=metadata, model_card=card)
        hub_model.save(overwrite=overwrite)
        return hub_model
