"""The SAMS-VAE model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import ArchesMixin, BaseModelClass, RNASeqMixin, VAEMixin

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data import (
    PerturbationField,
    check_confounding,
    check_counts,
    check_size_factor,
)
from scvi_sams.model._latent_mixin import LatentMixin
from scvi_sams.model._likelihood_mixin import LikelihoodMixin
from scvi_sams.model._loading import OrderedAnnDataLoader
from scvi_sams.model._prediction_mixin import PredictionMixin
from scvi_sams.model._query import (
    align_categories,
    categories_per_covariate,
    start_new_batches,
)
from scvi_sams.model._training_mixin import SAMSTrainingMixin
from scvi_sams.module import SAMSVAEModule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["SAMSVAE"]


class SAMSVAE(
    LatentMixin,
    PredictionMixin,
    LikelihoodMixin,
    RNASeqMixin,
    VAEMixin,
    ArchesMixin,
    SAMSTrainingMixin,
    BaseModelClass,
):
    """Sparse additive mechanism shift VAE (Bereket and Karaletsos, NeurIPS 2023).

    The state of a cell is a basal state plus the sum, weighted by dose, of the effects of its
    perturbations; each perturbation moves few of the latent dimensions.

    Parameters
    ----------
    adata
        AnnData set up by :meth:`setup_anndata`.
    registry
        Registry of a data module, in place of ``adata``.
    n_latent
        Number of latent dimensions; about twice as many as mechanisms are expected. Those that no
        perturbation uses cost little.
    n_hidden, n_layers, dropout_rate
        Size of the networks; dropout is in the encoder only.
    encode_covariates
        Whether the encoder sees batch and covariates, as the decoder does.
    global_inference
        ``"closed_form"``: masks and effects by coordinate ascent from running statistics of the
        cells, in a frame that is rotated for sparsity. ``"gradient"``: by stochastic gradient with
        relaxed masks, as in the paper.
    basal_gain
        ``"learned"``: the guide of the basal state is the product of the prior and what the
        counts say. ``"residual"``: what the counts say less the shift; the robust fallback.
    mask_prior
        Prior probability that a perturbation moves a latent.
    embedding_scale
        Prior standard deviation of an effect where the mask is on.
    spike_scale
        Standard deviation of a dense background of effects outside the masks; ``"learned"`` from
        the data, or ``0`` for the paper's exact zero. Closed-form inference only.
    mask_evidence_cells
        Evidence for a mask saturates at this many cells, so that masks call effects that are
        large, not merely detectable. ``None`` for the exact posterior. Fewer give cleaner masks.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen()
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, layer="counts", perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.SAMSVAE(adata)
    >>> model.train()  # doctest: +SKIP
    >>> adata.obsm["X_sams"] = model.get_latent_representation()  # doctest: +SKIP
    """

    _module_cls = SAMSVAEModule
    _data_loader_cls = OrderedAnnDataLoader

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        n_latent: int = 40,
        n_hidden: int = 400,
        n_layers: int = 1,
        dropout_rate: float = 0.05,
        encode_covariates: bool = False,
        global_inference: Literal["closed_form", "gradient"] = "closed_form",
        basal_gain: Literal["learned", "residual"] = "learned",
        mask_prior: float = 0.02,
        embedding_scale: float = 1.0,
        spike_scale: float | Literal["learned"] = "learned",
        mask_evidence_cells: float | None = 30.0,
    ) -> None:
        super().__init__(adata, registry)
        self._module_kwargs: dict[str, Any] = {
            "n_latent": n_latent,
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "dropout_rate": dropout_rate,
            "encode_covariates": encode_covariates,
            "global_inference": global_inference,
            "basal_gain": basal_gain,
            "mask_prior": mask_prior,
            "embedding_scale": embedding_scale,
            "spike_scale": spike_scale,
            "mask_evidence_cells": mask_evidence_cells,
        }
        stats = self.summary_stats
        n_cats_per_cov = None
        if stats.get("n_extra_categorical_covs", 0) > 0:
            n_cats_per_cov = list(self._field_state(REGISTRY_KEYS.CAT_COVS_KEY)["n_cats_per_key"])
        self.module = self._module_cls(
            n_input=stats.n_vars,
            n_perturbations=stats.n_perturbation,
            n_batch=stats.n_batch,
            n_cats_per_cov=n_cats_per_cov,
            n_continuous_cov=stats.get("n_extra_continuous_covs", 0),
            **self._module_kwargs,
        )
        self._model_summary_string = (
            f"{type(self).__name__} with {stats.n_perturbation} perturbations, "
            + ", ".join(f"{name}={value!r}" for name, value in self._module_kwargs.items())
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        perturbation_key: str | None = None,
        dosage_key: str | None = None,
        perturbation_names_uns_key: str | None = None,
        control: str | Sequence[str] | None = None,
        combination_delimiter: str | None = "+",
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say where an AnnData keeps counts, perturbations and covariates.

        Parameters
        ----------
        adata
            The screen, cells x genes. It is annotated, never changed otherwise.
        layer
            Layer with the counts; ``adata.X`` by default.
        perturbation_key
            Column of ``adata.obs`` with labels: ``"control"``, ``"KLF1"``, ``"KLF1+CEBPA"``.
        dosage_key
            With ``perturbation_key``, a column of doses (a number, or ``"1.0+0.5"`` in the order
            of the parts). Alone, a key of ``adata.obsm`` with the dosage matrix (cells x
            perturbations; array, sparse matrix or DataFrame).
        perturbation_names_uns_key
            Key of ``adata.uns`` with the names of the columns of a dosage matrix that has none.
        control
            Label or labels of unperturbed cells.
        combination_delimiter
            What joins the parts of a label.
        batch_key, labels_key
            Columns of ``adata.obs``. Labels are kept for plots and other tools, not modelled.
        size_factor_key
            Column of ``adata.obs`` to use as library size; the sum of the counts by default. Give
            it where the genes are a subset, so that their sum is not the library size.
        categorical_covariate_keys, continuous_covariate_keys
            Further covariates of the decoder.

        Raises
        ------
        ScreenError
            If something cannot be used; the message names it and the mend.

        Examples
        --------
        >>> import scvi_sams
        >>> adata = scvi_sams.datasets.simulated_screen()
        >>> scvi_sams.SAMSVAE.setup_anndata(
        ...     adata, layer="counts", perturbation_key="perturbation", control="control"
        ... )
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_counts(adata, layer)
        if size_factor_key is not None:
            check_size_factor(adata, size_factor_key)
        perturbations = PerturbationField(
            perturbation_key,
            dosage_key,
            perturbation_names_uns_key,
            control,
            combination_delimiter,
        )
        fields = [
            # Checked above, entry by entry; scvi-tools draws some from numpy's global stream.
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
            perturbations,
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        if kwargs.get("source_registry") is None:  # a screen of its own, not a query
            key = SAMS_REGISTRY_KEYS.PERTURBATION_KEY
            names = manager.get_state_registry(key).column_names
            check_confounding(adata, manager.get_from_registry(key), names, batch_key)
        cls.register_manager(manager)

    @classmethod
    def setup_annbatch(cls, *args: Any, **kwargs: Any) -> None:
        """Not offered: scvi-tools' out-of-memory loader does not carry dosages."""
        raise NotImplementedError(
            "scvi-tools' annbatch loader does not carry the dosage matrix; use setup_anndata, "
            "with a backed AnnData if the screen does not fit in memory."
        )

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: str | SAMSVAE,
        *,
        unfrozen: bool = False,
        **kwargs: Any,
    ) -> SAMSVAE:
        """Take a fitted model to cells of new batches (scArches).

        Masks and effects stay as they are, and so do the networks but for their weights of new
        batches, which training adapts.

        Parameters
        ----------
        adata
            Cells of new batches, laid out as those the model was set up with. Perturbations that
            they lack are fine.
        reference_model
            The fitted model, or the folder it was saved in.
        unfrozen
            Train everything on, masks and effects included.
        **kwargs
            Further arguments of :meth:`scvi.model.base.ArchesMixin.load_query_data`.

        Returns
        -------
        The model, to be trained on the query.

        Raises
        ------
        UnknownPerturbationError
            If a cell has a perturbation that the model has not seen.

        Examples
        --------
        >>> query = SAMSVAE.load_query_data(new_adata, model)  # doctest: +SKIP
        >>> query.train(max_epochs=20)  # doctest: +SKIP
        """
        query = super().load_query_data(adata, reference_model, unfrozen=unfrozen, **kwargs)
        query.module.globals_frozen.fill_(not unfrozen)
        reference = (
            cls.load_registry(reference_model)
            if isinstance(reference_model, str)
            else reference_model.registry
        )
        align_categories(query.module, categories_per_covariate(reference))
        start_new_batches(query.module)
        return query
