"""The SAMS-VAE model class: AnnData in, labelled tables out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import scvi
import torch
from scvi import REGISTRY_KEYS
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import (
    ArchesMixin,
    BaseModelClass,
    RNASeqMixin,
    UnsupervisedTrainingMixin,
    VAEMixin,
)
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, StudentT

from scvi_sams._arguments import check_names, checked, settings_of
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.checks import (
    ScreenManager,
    check_adata,
    check_confounding,
    check_doses,
    check_unchanged,
    genes_of,
    in_order_of,
    registered_modality,
)
from scvi_sams.data.field import (
    ContextField,
    DoseField,
    PerturbationField,
    add_dose_registry,
    registered_conditions,
)
from scvi_sams.data.guide_inputs import KEY as GUIDES
from scvi_sams.data.guide_inputs import guides_from_mudata
from scvi_sams.data.guides import TARGET, GuideField, target_table
from scvi_sams.data.loader import OrderedAnnDataLoader
from scvi_sams.model.counterfactual import draw_cells
from scvi_sams.model.efficacy import multiples_of, perturbed_probability
from scvi_sams.model.fit_checks import warn_of_fit
from scvi_sams.model.gene_effects import fit_gene_effects, gene_effects_table
from scvi_sams.model.model_file import load_model, read_model_file, save_model
from scvi_sams.model.prediction import average_treatment_effect, effect_scale, predict
from scvi_sams.model.query import added_perturbations, start_query
from scvi_sams.model.read_outs import (
    check_level,
    context_code,
    context_names,
    deviation_table,
    field_state,
    latent_names,
    latent_representation,
    log_importance_weights,
    minibatches,
    of_cells,
    of_groups,
    of_samples,
    parse_conditions,
    perturbation_table,
    require_effects,
)
from scvi_sams.model.settings import (
    choose_inference,
    make_module,
    median_doses,
    named_interactions,
    named_targets,
    target_genes,
)
from scvi_sams.model.training import (
    changed_settings,
    check_training_names,
    default_epochs,
    infer_query,
    reference_cells,
    streamed_reference_cells,
    tell_of_interruption,
)
from scvi_sams.module import SAMSVAEModule
from scvi_sams.module.doses import Doses
from scvi_sams.module.posteriors import CorrelatedEmbeddings
from scvi_sams.train import SAMSDataSplitter, SAMSTrainingPlan, StreamedCells
from scvi_sams.train.interruption import Interruption
from scvi_sams.train.streamed import PARTS, screen_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

    from scvi_sams.data import ConditionsLike
    from scvi_sams.data.guides import GuideTargets
    from scvi_sams.model.counterfactual import Basal, Counterfactual
    from scvi_sams.model.efficacy import EffectOf
    from scvi_sams.module.base import PerturbationVAEModule
    from scvi_sams.train import DataPlacement


_WARMUP_SHARE = 0.8  # the longest warm-up of the plan: before its end the bound still rises
_MAX_PATIENCE, _MAX_LR_PATIENCE = 45, 30  # scvi-tools' own, meant for 400 epochs


class SAMSVAE(UnsupervisedTrainingMixin, RNASeqMixin, VAEMixin, ArchesMixin, BaseModelClass):
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
    n_hidden
        Units of a hidden layer.
    n_layers
        Hidden layers of encoder and decoder.
    dropout_rate
        Share of units dropped, in the encoder only. More, such as 0.3, where small screens are
        learned by heart; intervals of pairs and EC50 were worse for it.
    encode_covariates
        Whether the encoder sees batch and covariates, as the decoder does.
    gene_likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"`` for counts; ``"normal"`` for normalised or imaging
        features (``setup_anndata(..., is_count_data=False)``).
    dispersion
        ``"gene"`` or ``"gene-batch"``: what shares an inverse dispersion, or the standard
        deviation of features.
    global_inference
        ``"closed_form"``: masks and effects by coordinate ascent from running statistics of the
        cells, in a frame that is rotated for sparsity. ``"gradient"``: by stochastic gradient with
        relaxed masks, as in the paper. By default closed form for the posteriors that have it.
    basal_posterior
        Guide of the basal state zb given counts x and shift zp. ``"correlated"``: q(zb | x, zp) is
        the product of the prior and what the counts say of the state. ``"residual"``: what the
        counts say less the shift; the robust fallback. ``"mean_field"``: q(zb | x).
        ``"amortized"``: a network sees x and zp (the paper's correlated guide). The first two have
        closed-form inference.
    embedding_posterior
        ``"spike_and_slab"``: q(e | m) is normal where the mask is one, the prior where it is zero;
        it has closed-form inference. ``"mean_field"``: q(e) whatever the mask.
        ``"correlated"``: q(e | m) from a network that all perturbations share.
    mask_prior
        Prior probability that a perturbation moves a latent, or ``(a, b)`` of a Beta hyper-prior
        under which it is learned. ``1.0`` switches sparsity off.
    mask_prior_shared_by
        Masks that share a learned probability: ``"all"``, those of a ``"latent"`` or those of a
        ``"perturbation"``.
    embedding_scale
        Prior standard deviation of an effect where the mask is on.
    spike_scale
        Standard deviation of a dense background of effects outside the masks; ``"learned"`` from
        the data, or ``0`` for the paper's exact zero. Closed-form inference only.
    mask_evidence_cells
        Evidence for a mask saturates at this many cells, so that masks call effects that are
        large, not merely detectable; at 30, if that is fewer, while the networks train. ``None``
        for the exact posterior. Fewer give cleaner masks. Closed-form inference only.
    dose_response
        ``"linear"``: the shift is proportional to the dose. ``"hill"``: it saturates, with EC50
        and slope learned for each perturbation.
    interactions
        Give measured pairs a sparse shift beyond the sum of their parts: ``True`` for all pairs
        that occur together in a cell, or the pairs.
    interaction_prior
        Prior probability that a pair moves a latent beyond the sum of its parts.
    context_prior
        Prior probability that the effect of a perturbation on a latent is another in one context
        (``setup_anndata(context_key=...)``) than in the others.
    direct_effects
        Give each perturbation a log fold change on its own gene beside the latent shift, so that
        the knock-down of the target need not pass through shared latents. By default where its
        name is a gene; ``True`` demands that one is. Where names of perturbations are not those of
        genes, say which gene each targets: a dict, the obs column of cells that has it, or the key
        of a dict in ``adata.uns``. ``False`` is the paper's model.
    gene_effects
        After training, learn for each perturbation and gene what the latents leave over of its
        effect, and give it to every prediction (:meth:`get_gene_effects`). It takes counts and 50
        control cells; ``gene_effects_absent_`` says what else stood against it. ``False`` is the
        paper's model.

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

    _module_cls: type[PerturbationVAEModule] = SAMSVAEModule
    _data_loader_cls = OrderedAnnDataLoader
    _data_splitter_cls = SAMSDataSplitter
    _training_plan_cls = SAMSTrainingPlan
    _reordered: AnnData | None = None
    stopped_in: str | None = None  # where Ctrl-C ended the last training, in words
    gene_effects_absent_: str | None = None
    efficacy_: dict[str, Any] | None = None  # solved when it is first asked for

    # scvi-tools' methods of given cells, with arguments and cells checked as in our own.
    get_normalized_expression = of_cells(RNASeqMixin.get_normalized_expression)
    get_likelihood_parameters = of_cells(RNASeqMixin.get_likelihood_parameters)
    posterior_predictive_sample = of_cells(RNASeqMixin.posterior_predictive_sample)
    get_feature_correlation_matrix = of_cells(RNASeqMixin.get_feature_correlation_matrix)
    get_reconstruction_error = of_cells(VAEMixin.get_reconstruction_error)
    differential_expression = of_groups(RNASeqMixin.differential_expression)
    differential_abundance = of_samples(VAEMixin.differential_abundance)

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
        gene_likelihood: Literal["nb", "zinb", "poisson", "normal"] = "nb",
        dispersion: Literal["gene", "gene-batch"] = "gene",
        global_inference: Literal["closed_form", "gradient"] | None = None,
        basal_posterior: Literal[
            "mean_field", "correlated", "residual", "amortized"
        ] = "correlated",
        embedding_posterior: Literal[
            "mean_field", "correlated", "spike_and_slab"
        ] = "spike_and_slab",
        mask_prior: float | tuple[float, float] = 0.02,
        mask_prior_shared_by: Literal["all", "latent", "perturbation"] = "all",
        embedding_scale: float = 1.0,
        spike_scale: float | Literal["learned"] = "learned",
        mask_evidence_cells: float | None = 100.0,
        dose_response: Literal["linear", "hill"] = "linear",
        interactions: bool | Sequence[tuple[str, str]] = False,
        interaction_prior: float = 0.002,
        context_prior: float = 0.002,
        direct_effects: bool | str | Mapping[str, str] | None = None,
        gene_effects: bool = True,
    ) -> None:
        adata = registered_modality(adata)
        super().__init__(adata, registry)
        # What is saved is pairs and targets themselves: another AnnData may have others.
        interactions = named_interactions(self, interactions)
        direct_effects = named_targets(self, direct_effects)
        make_module(
            self,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            encode_covariates=encode_covariates,
            gene_likelihood=gene_likelihood,
            dispersion=dispersion,
            global_inference=choose_inference(
                global_inference, basal_posterior, embedding_posterior
            ),
            basal_posterior=basal_posterior,
            embedding_posterior=embedding_posterior,
            mask_prior=mask_prior,
            mask_prior_shared_by=mask_prior_shared_by,
            embedding_scale=embedding_scale,
            background_scale=spike_scale,
            mask_evidence_cells=mask_evidence_cells,
            reference_doses=median_doses(self, dose_response),
            interactions=[tuple(map(self.perturbation_names.index, p)) for p in interactions],
            interaction_prior=interaction_prior,
            n_contexts=max(1, len(context_names(self))),
            context_prior=context_prior,
            targets=target_genes(self, direct_effects),
            direct_effects=direct_effects is not False,
            gene_effects=gene_effects,
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
        categorical_covariate_keys: str | list[str] | None = None,
        continuous_covariate_keys: str | list[str] | None = None,
        is_count_data: bool = True,
        guide_key: str | None = None,
        guide_targets: GuideTargets | None = None,
        guide_threshold: float | None = None,
        context_key: str | None = None,
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
            What joins the parts of a label; ``None`` takes every label as one perturbation.
        batch_key, labels_key
            Columns of ``adata.obs``. Labels are kept for plots and other tools, not modelled.
        size_factor_key
            Column of ``adata.obs`` to use as library size; the sum of the counts by default. Give
            it where the genes are a subset, so that their sum is not the library size.
        categorical_covariate_keys, continuous_covariate_keys
            Further covariates of the decoder, columns of ``adata.obs``. Continuous ones may be in
            any units: the networks see them standardised by the training cells.
        is_count_data
            Whether the matrix holds counts, which is then checked. ``False`` for normalised or
            imaging features, with ``gene_likelihood="normal"``.
        guide_key
            Guides of the cells: a column of ``adata.obs`` with names, joined by
            ``combination_delimiter`` where a cell has several, or a key of ``adata.obsm`` with
            calls (cells x guides; 0 and 1 or boolean; DataFrame, array or sparse matrix, whose
            columns ``perturbation_names_uns_key`` names, or a DataFrame of guides under the same
            key of ``adata.uns``). Alone, they say what cells received: a dose of 1 of each
            target, of however many guides. Beside labels, they are known for each perturbation
            of a cell: in the order of the parts of its label, or by ``guide_targets``. How often
            each works is in :func:`scvi_sams.tl.guides`.
        guide_targets
            Perturbation that each guide targets, the control label for one that does not: a dict,
            a Series, a DataFrame with a column ``"target"``, or the key of ``adata.uns`` that has
            one. By default the DataFrame in ``adata.uns[guide_key]``.
        guide_threshold
            Counts of a guide from which a cell has it, for a matrix of counts. A plain threshold
            misses guides of shallow cells and takes ambient ones in deep cells: calls of a
            mixture model, as crispat makes, are better.
        context_key
            Column of ``adata.obs`` with what effects may depend on: cell type, stimulation, time
            point. The effect of a perturbation is a part that all levels share plus a sparse
            deviation in each. What cells of a level have in common without a perturbation is
            their mean basal state; each level needs control cells for it. Effects on single genes
            (``direct_effects``, ``gene_effects``) are shared by all levels.

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
        check_adata(adata)
        _check_setup(locals())
        categorical_covariate_keys = _as_list(categorical_covariate_keys)
        continuous_covariate_keys = _as_list(continuous_covariate_keys)
        if not (guide_targets is None or isinstance(guide_targets, str)):
            guide_targets = target_table(guide_targets)  # plain, as it is saved with the model
        setup_method_args = cls._get_setup_method_args(**locals())
        perturbations = PerturbationField(
            perturbation_key,
            dosage_key,
            perturbation_names_uns_key,
            control,
            combination_delimiter,
            guide_key,
            guide_targets,
            guide_threshold,
        )
        fields = [
            # The manager checks entry by entry; scvi-tools draws some from numpy's global stream.
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical_covariate_keys),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous_covariate_keys),
            perturbations,
            DoseField(),
            *([] if guide_key is None else [GuideField()]),
        ]
        if context_key is not None:
            fields.append(ContextField(context_key))
        manager = ScreenManager(fields=fields, setup_method_args=setup_method_args)
        if (source := kwargs.get("source_registry")) is not None:
            add_dose_registry(source)
        manager.register_fields(adata, **kwargs)
        if source is None:  # a screen of its own, not a query
            conditions = registered_conditions(manager)
            check_doses(conditions)
            check_confounding(adata, conditions, batch_key)
            check_confounding(adata, conditions, context_key, kind="context")
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        rna_layer: str | None = None,
        guide_layer: str | None = None,
        guide_targets: GuideTargets | None = None,
        guide_threshold: float | None = None,
        control: str = "non-targeting",
        modalities: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say where a MuData keeps counts, guides and covariates.

        Calls of guides are added to the modality of the counts, which is what the model reads:
        ``SAMSVAE(mdata)`` is ``SAMSVAE(mdata["rna"])``, and methods take that modality of another
        MuData once :func:`scvi_sams.data.guides_from_mudata` has added calls to it.

        Parameters
        ----------
        mdata
            Modalities of counts and of guides, of the same cells.
        rna_layer
            Layer of the counts; ``X`` by default.
        guide_layer, guide_targets, control, modalities
            As for :func:`~scvi_sams.data.guides_from_mudata`.
        guide_threshold
            As in :meth:`setup_anndata`, where the guides are counts.
        **kwargs
            Further arguments of :meth:`setup_anndata`. Columns may be those of the modality of
            the counts or of ``mdata.obs``.

        Raises
        ------
        ScreenError
            If something cannot be used; the message names it and the mend.

        Examples
        --------
        >>> mdata = mudata.read_h5mu("screen.h5mu")  # doctest: +SKIP
        >>> scvi_sams.SAMSVAE.setup_mudata(
        ...     mdata, modalities={"rna_layer": "gene", "guide_layer": "guide"}
        ... )  # doctest: +SKIP
        >>> model = scvi_sams.SAMSVAE(mdata)  # doctest: +SKIP
        """
        adata = guides_from_mudata(
            mdata,
            modalities=modalities,
            guide_layer=guide_layer,
            guide_targets=guide_targets,
            control=control,
        )
        for keys in kwargs.values():  # what all modalities have stands in the obs of all
            for key in [keys] if isinstance(keys, str) else keys if isinstance(keys, list) else ():
                if key in mdata.obs and key not in adata.obs:
                    adata.obs[key] = mdata.obs[key].reindex(adata.obs_names)
        has_control = control in set(adata.uns[GUIDES][TARGET])
        cls.setup_anndata(
            adata,
            layer=rna_layer,
            control=control if has_control else None,
            guide_key=GUIDES,
            guide_threshold=guide_threshold,
            **kwargs,
        )

    def _validate_anndata(
        self, adata: AnnData | None = None, copy_if_view: bool = True
    ) -> AnnData:
        """Check an AnnData that a method was given; genes in another order are reordered.

        What comes back is then a copy, and the one made before is let go.
        """
        given = self.adata if adata is None else adata
        if given is None:
            raise ScreenError("The model was loaded without its AnnData: give one, `adata=...`.")
        ordered = in_order_of(given, genes_of(self.registry))
        if ordered is not given:
            if self._reordered is not None and self._reordered is not self.adata:
                self.register_manager(self.get_anndata_manager(self._reordered, required=True))
                self.deregister_manager(self._reordered)
            self._reordered = ordered
        ordered = super()._validate_anndata(ordered, copy_if_view)
        check_unchanged(self.get_anndata_manager(ordered, required=True))
        return ordered

    @classmethod
    def setup_annbatch(
        cls,
        source: Any,
        *,
        perturbation_key: str,
        dosage_key: str | None = None,
        control: str | Sequence[str] | None = None,
        combination_delimiter: str | None = "+",
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: str | list[str] | None = None,
        continuous_covariate_keys: str | list[str] | None = None,
        is_count_data: bool = True,
        split_key: str | None = None,
        **kwargs: Any,
    ) -> StreamedCells:
        """Say what the cells of an annbatch collection received, to train on them as they stream.

        It takes Python 3.12 and annbatch 0.2 or 0.3, ``pip install "scvi-sams[annbatch]"``.

        Parameters
        ----------
        source
            An ``annbatch.Loader`` of the collection, or scvi-tools' ``AnnbatchDataModule``, whose
            loader is taken.
        perturbation_key, dosage_key, control, combination_delimiter, batch_key, labels_key, \
        size_factor_key, categorical_covariate_keys, continuous_covariate_keys, is_count_data
            As in :meth:`setup_anndata`; columns of obs.
        split_key
            Column of obs with ``"train"``, ``"validation"``, ``"test"`` and ``"unused"``, as the
            splits of ``scvi_sams.evaluation`` write it; these cells may lie anywhere in the
            collection. By default all cells are trained on.
        **kwargs
            ``batch_size``, ``chunk_size`` and ``preload_nchunks`` of
            :class:`~scvi_sams.train.StreamedCells`.

        Returns
        -------
        StreamedCells
            Its ``registry`` makes the model, and it is the ``datamodule`` of :meth:`train`.

        Raises
        ------
        ScreenError
            If a column is missing or cannot be used.

        Examples
        --------
        >>> import annbatch  # doctest: +SKIP
        >>> loader = annbatch.Loader().use_collection(
        ...     annbatch.DatasetCollection("screen.zarr")
        ... )  # doctest: +SKIP
        >>> cells = SAMSVAE.setup_annbatch(
        ...     loader, perturbation_key="perturbation", control="control", split_key="split"
        ... )  # doctest: +SKIP
        >>> model = SAMSVAE(registry=cells.registry)  # doctest: +SKIP
        >>> model.train(max_epochs=2, datamodule=cells)  # doctest: +SKIP
        """
        categorical = _as_list(categorical_covariate_keys) or []
        continuous = _as_list(continuous_covariate_keys) or []
        keys = [perturbation_key, dosage_key, batch_key, labels_key, size_factor_key, split_key]
        screen = screen_of(source, [*keys, *categorical, *continuous])
        parts = [np.arange(screen.n_obs), np.array([], int), np.array([], int)]
        if split_key is not None:
            part_of = screen.obs[split_key].astype(str).to_numpy()
            if others := set(part_of) - {*PARTS, "unused"}:
                raise ScreenError(
                    f"obs[{split_key!r}] holds {listed(sorted(others))}; a cell is "
                    f"{', '.join(map(repr, PARTS))} or 'unused'."
                )
            parts = [np.flatnonzero(part_of == part) for part in PARTS]
        cls.setup_anndata(
            screen,
            perturbation_key=perturbation_key,
            dosage_key=dosage_key,
            control=control,
            combination_delimiter=combination_delimiter,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical or None,
            continuous_covariate_keys=continuous or None,
            is_count_data=is_count_data,
        )
        manager = cls._get_most_recent_anndata_manager(screen, required=True)
        cells = StreamedCells(source, manager, parts, **kwargs)
        cls._setup_adata_manager_store.pop(manager.adata_uuid)  # nor keeps the stand-in
        return cells

    def train(
        self,
        max_epochs: int | None = None,
        *,
        train_size: float | None = None,
        batch_size: int = 128,
        early_stopping: bool = False,
        data_placement: DataPlacement = "auto",
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. By default as many as make about 3,000 steps, between
            2 and 80. Learning rate, warm-up and the switching on of the masks follow the share
            of them that is done. A query of new perturbations alone (``load_query_data``) takes
            600 steps, or 5 passes where it needs no gradients.
        train_size
            Share of the cells to train on, 0.9 by default; the rest is for validation.
        batch_size
            Cells in a minibatch. Small ones train faster here.
        early_stopping
            Stop when the validation bound no longer improves. Counting starts when masks and
            warm-up are done (``early_stopping_warmup_epochs``, 0.8 of ``max_epochs``), and a third
            of the epochs that are left must pass without gain (``early_stopping_patience``).
        data_placement
            ``"device"`` keeps the cells as compact tensors on the device that trains and forms
            minibatches there, ``"host"`` reads each from the AnnData: the fit is the same.
            ``"disk"``, for a backed AnnData, reads shuffled pools of cells, so that the screen may
            be larger than memory: other minibatches, as good a fit. ``"auto"`` is ``"device"``
            where the cells fit, else ``"disk"`` or ``"host"``, where they are. See
            :class:`~scvi_sams.train.SAMSDataSplitter`.
        plan_kwargs
            Arguments of :class:`~scvi_sams.train.SAMSTrainingPlan`.
        datasplitter_kwargs
            Arguments of :class:`~scvi.dataloaders.DataSplitter`, such as ``external_indexing``
            to choose the cells. Ignored, like ``data_placement``, with a ``datamodule``.
        **kwargs
            Further arguments of scvi-tools' ``train`` and :class:`~scvi.train.Trainer`, such as
            ``accelerator``, ``devices``, ``check_val_every_n_epoch``, ``enable_checkpointing``,
            ``gradient_clip_val``, ``precision``, ``ckpt_path`` or ``callbacks``.

        Raises
        ------
        ScreenError
            If an argument is of another kind, out of range or unknown, or the counts of the
            AnnData were changed since it was set up.
        TrainingDivergedError
            If training diverged and could not be mended by restarts.

        Warns
        -----
        UserWarning
            If Ctrl-C ended training early: what was learned is kept, and may be used.
        FitWarning
            If the bound still falls at the end, all perturbations share one latent, or validation
            cells are described worse than before or than by one rate a gene and batch.

        Examples
        --------
        >>> model.train(max_epochs=50, early_stopping=True)  # doctest: +SKIP
        """
        max_epochs, train_size = (
            checked("max_epochs", max_epochs),
            checked("train_size", train_size),
        )
        batch_size = checked("batch_size", batch_size) or scvi.settings.batch_size
        early_stopping = checked("early_stopping", early_stopping)
        kwargs = {name: checked(name, value) for name, value in kwargs.items()}
        config = changed_settings(kwargs.pop("plan_config", None))
        plan_kwargs = settings_of("plan_kwargs", config) | settings_of("plan_kwargs", plan_kwargs)
        datasplitter_kwargs = settings_of("datasplitter_kwargs", datasplitter_kwargs)
        check_training_names(type(self), kwargs, plan_kwargs, datasplitter_kwargs)
        if self.adata is not None:
            self._validate_anndata()
        learns_effects_only = getattr(self, "learns_effects_only_", False)
        needs_gradients = self.module.closed_form is None or self.module.global_parameters()
        if learns_effects_only and not needs_gradients:
            infer_query(self, max_epochs, batch_size)
            self.reference_cells_ = reference_cells(self)
            self.gene_effects_absent_ = fit_gene_effects(self)
            self.efficacy_ = None
            return
        if max_epochs is None:
            max_epochs = default_epochs(
                self, train_size, batch_size, datasplitter_kwargs, learns_effects_only
            )
        every = kwargs.get("check_val_every_n_epoch") or 1
        n_checks = max_epochs // every  # of the validation bound; scvi-tools counts these
        if early_stopping:
            warmup = math.ceil(_WARMUP_SHARE * n_checks)
            kwargs.setdefault("early_stopping_warmup_epochs", warmup)
            left = n_checks - kwargs["early_stopping_warmup_epochs"]
            kwargs.setdefault("early_stopping_patience", max(1, min(_MAX_PATIENCE, left // 3)))
        if plan_kwargs.get("reduce_lr_on_plateau"):
            plan_kwargs.setdefault("lr_patience", max(1, min(_MAX_LR_PATIENCE, n_checks // 10)))
        self.module.train()  # scvi-tools leaves a module that was trained before as for reading
        callbacks = kwargs.pop("callbacks", None) or []
        callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        with Interruption() as interruption:
            super().train(
                max_epochs=max_epochs,
                train_size=train_size,
                batch_size=batch_size,
                early_stopping=early_stopping,
                plan_kwargs=plan_kwargs,
                datasplitter_kwargs={"data_placement": data_placement, **datasplitter_kwargs},
                callbacks=[*callbacks, interruption],
                **kwargs,
            )
        self.stopped_in = interruption.stopped_in
        if self.stopped_in is not None:
            tell_of_interruption(self, self.stopped_in)
        if self.adata is not None:
            self.reference_cells_ = reference_cells(self)
        else:
            cells = kwargs["datamodule"].train_dataloader()
            is_counts = self.module.is_count_model
            self.reference_cells_ = streamed_reference_cells(cells, is_counts)
        self.gene_effects_absent_ = fit_gene_effects(self)
        self.efficacy_ = None
        if not learns_effects_only:
            warn_of_fit(self)

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: str | os.PathLike[str] | Self,
        *,
        new_perturbations: bool = False,
        unfrozen: bool = False,
        prefix: str | None = None,
        trusted: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Take a fitted model to cells of new batches or new perturbations (scArches).

        The effects of known perturbations stay as they are, and so do the networks but for their
        weights of new batches. What is new is learned by :meth:`train`: the weights of new
        batches by gradient, masks and embeddings of new perturbations as the model learned the
        others. The task is the transfer of Lopez et al. (CLeaR 2023). What no cell of the
        reference shows cannot be learned this way: the decoder does not know it, and the effect
        comes out too small. Fit all cells together then.

        Parameters
        ----------
        adata
            New cells, laid out as those the model was set up with. Perturbations that they lack
            are fine. Genes in another order are reordered, and the model then keeps a copy.
        reference_model
            The fitted model, or the folder it was saved in.
        new_perturbations
            Add the perturbations of ``adata`` that the model does not know. Otherwise they are an
            error, as a misspelt name would be.
        unfrozen
            Train everything on, known effects included.
        prefix, trusted
            As in :meth:`load`, where the model is read from a folder.
        **kwargs
            Further arguments of :meth:`scvi.model.base.ArchesMixin.load_query_data`.

        Returns
        -------
        SAMSVAE
            The model, to be trained on the query.

        Raises
        ------
        UnknownPerturbationError
            If a cell has a perturbation that the model has not seen, unless it is to be added.
        NotImplementedError
            If the model cannot take new perturbations without training its networks.

        Examples
        --------
        >>> query = SAMSVAE.load_query_data(new_adata, model)  # doctest: +SKIP
        >>> query.train(max_epochs=20)  # doctest: +SKIP
        """
        if isinstance(reference_model, (str, os.PathLike)):
            reference_model = cls.load(reference_model, False, prefix=prefix, trusted=trusted)
        registry = reference_model.registry
        if not kwargs.get("inplace_subset_query_vars"):
            adata = in_order_of(adata, genes_of(registry))
        added = added_perturbations(registry, adata, new_perturbations)
        query = super().load_query_data(adata, reference_model, unfrozen=unfrozen, **kwargs)
        start_query(query, registry, added, unfrozen)
        query.efficacy_ = None
        return query

    # -- files ------------------------------------------------------------------------------------

    def save(
        self,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_kwargs: dict[str, Any] | None = None,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Write the model to a folder, so that there is a whole one whatever happens meanwhile.

        The file is data alone, which ``torch.load(..., weights_only=True)`` reads, with a checksum
        of every part, the versions of the packages that wrote it and the seed then set.

        Parameters
        ----------
        dir_path
            The folder.
        prefix
            What the names of the files start with.
        overwrite
            Whether the folder may be there already.
        save_anndata
            Write the AnnData beside the model.
        save_kwargs
            Further arguments of :func:`torch.save`.
        **anndata_write_kwargs
            Arguments of :meth:`anndata.AnnData.write_h5ad`.

        Raises
        ------
        ScreenError
            If the folder is there and ``overwrite`` is not set, or the model cannot be loaded
            from what would be written.
        OSError
            If it cannot be written; what was there before is then as it was.

        Examples
        --------
        >>> model.save("my_model", overwrite=True)  # doctest: +SKIP
        """
        save_model(
            self, dir_path, prefix, overwrite, save_anndata, save_kwargs, anndata_write_kwargs
        )

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        adata: AnnData | Literal[False] | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        backup_url: str | None = None,
        *,
        allowed_classes_names_list: Sequence[str] = (),
        trusted: bool = False,
    ) -> Self:
        """Make a model from the folder that it was saved to.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Cells, laid out as those the model was set up with; genes in another order are
            reordered in a copy. By default those saved with it; ``False`` for none.
        accelerator, device
            Where the model goes, as in :meth:`train`.
        prefix
            What the names of the files start with.
        backup_url
            Where the file is fetched from if it is not in the folder.
        allowed_classes_names_list
            Names of other classes whose models may be loaded as this one.
        trusted
            Read files that hold more than data too, as those of version 0.1.0 do. That runs
            whatever code is in them: know who made the file.

        Returns
        -------
        The model.

        Raises
        ------
        ScreenError
            If there is no model, or its file is damaged, holds more than data, has values that
            are not finite, or is of a newer version or another class.

        Examples
        --------
        >>> model = SAMSVAE.load("my_model", adata)  # doctest: +SKIP
        """
        file = read_model_file(dir_path, prefix, trusted, backup_url)
        if adata is not None and adata is not False:
            adata = in_order_of(adata, genes_of(file.attributes["registry_"]))
        return load_model(cls, file, adata, accelerator, device, allowed_classes_names_list or ())

    @staticmethod
    def load_registry(
        dir_path: str | os.PathLike[str], prefix: str | None = None, *, trusted: bool = False
    ) -> dict[str, Any]:
        """Read how the data of a saved model were set up; arguments as in :meth:`load`."""
        return read_model_file(dir_path, prefix, trusted).attributes["registry_"]

    @staticmethod
    def view_setup_args(
        dir_path: str | os.PathLike[str], prefix: str | None = None, *, trusted: bool = False
    ) -> None:
        """Print the arguments a saved model was set up with; arguments as in :meth:`load`."""
        registry = SAMSVAE.load_registry(dir_path, prefix, trusted=trusted)
        ScreenManager.view_setup_method_args(registry)

    # -- what was learned of perturbations --------------------------------------------------------

    @property
    def perturbation_names(self) -> list[str]:
        """Names of the perturbations the model knows, in the order of every matrix."""
        state = field_state(self, SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
        return list(state[PerturbationField.COLUMN_NAMES_KEY])

    def get_perturbation_mask(self) -> pd.DataFrame:
        """Probability that each perturbation moves each latent.

        Returns
        -------
        pandas.DataFrame
            Posterior inclusion probabilities, perturbations x latents. With
            ``mask_evidence_cells`` they are those of a coarsened posterior: an effect must exceed
            the background by a fixed size, not only be detectable, and is charged for having
            chosen the direction of a latent that no other perturbation uses. Predictions use the
            posterior without that charge. ``attrs["mask_prior"]`` holds the prior probability, see
            :func:`~scvi_sams.tl.mask_prior`.

        Raises
        ------
        NotImplementedError
            If the model has no masks.

        Examples
        --------
        >>> mask = model.get_perturbation_mask()  # doctest: +SKIP
        >>> mask.index[mask.gt(0.5).any(axis=1)]  # doctest: +SKIP
        """
        effects = require_effects(self, "get_perturbation_mask", masks=True)
        table = perturbation_table(self, effects.mask_probability())
        table.attrs["mask_prior"] = effects.mask_prior.mean().squeeze().tolist()
        return table

    def get_perturbation_effect(self, context: str | None = None) -> pd.DataFrame:
        """Effect of each perturbation on each latent, as it is reported: mask times embedding.

        The inclusion probability of :meth:`get_perturbation_mask` times the posterior mean of the
        embedding given that the mask is one. That probability is charged for the choice of the
        latent, so this is not the posterior expectation of mask times embedding, which is larger
        where a mask is in doubt, unless there is no charge: ``mask_evidence_cells=None``, or
        inference by gradient. Predictions, and :meth:`get_perturbation_shift`, use the posterior
        without the charge, and the learned background (``spike_scale``), which is not in here.
        With ``embedding_posterior="correlated"``, whose embedding depends on all masks, it is the
        posterior expectation.

        Parameters
        ----------
        context
            Context (a level of ``context_key``) whose deviations are added, each again times its
            probability; by default the part that all contexts share.

        Returns
        -------
        pandas.DataFrame
            Perturbations x latents, in standard deviations of the basal state.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift.
        ScreenError
            If the model does not know the context.

        Examples
        --------
        >>> model.get_perturbation_effect().loc["STAT1"]  # doctest: +SKIP
        """
        effects, code = require_effects(self, "get_perturbation_effect"), None
        if context_code(self, context) is not None and effects.n_deviations > 0:
            code = str(context)
        if isinstance(effects, CorrelatedEmbeddings):
            with torch.no_grad():
                return perturbation_table(self, effects.moments()[0])
        values = effects.mask_probability() * effects.slab_mean
        table = perturbation_table(self, values)
        return table if code is None else table + deviation_table(self, values)[code]

    def get_perturbation_shift(
        self, conditions: ConditionsLike, context: str | None = None
    ) -> pd.DataFrame:
        """Expected shift of the latent state under conditions, measured or not.

        Parameters
        ----------
        conditions
            Labels (``"A"``, ``"A+B"``), dicts (``{"A": 1.0, "B": 0.5}``) or a dosage matrix.
        context
            Context that the cells are in, as in :meth:`predict`.

        Returns
        -------
        pandas.DataFrame
            Conditions x latents, in standard deviations of the basal state.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        NotImplementedError
            If perturbations do not act by a shift.

        Examples
        --------
        >>> model.get_perturbation_shift(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        """
        require_effects(self, "get_perturbation_shift")
        asked = parse_conditions(self, conditions)
        index, dose = (
            torch.as_tensor(c, device=self.device) for c in (asked.cell_index, asked.cell_dose)
        )
        code = context_code(self, context)
        codes = None if code is None else torch.full((1, 1), code, device=self.device)
        with torch.inference_mode():
            shift = self.module.expected_shift(Doses(index, dose, codes))
        return pd.DataFrame(
            shift.cpu().numpy(), index=asked.cell_labels, columns=latent_names(self)
        )

    def get_gene_effects(
        self,
        perturbations: Sequence[str] | None = None,
        n_samples: int = 25,
        *,
        seed: int | None = 0,
    ) -> pd.DataFrame:
        """Effects of perturbations on single genes: all of them, and what latents leave over.

        What the latents say of a perturbation is shrunk by the noise that they learned by heart,
        then compared with the mean of its training cells against controls, and the difference is
        shrunk too (Stephens 2017). All predictions contain both corrections, unless they are made
        from ``counterfactual(gene_effects=False)``.

        Parameters
        ----------
        perturbations
            Names of perturbations; all by default.
        n_samples
            Draws of masks and effects, for the whole effects.
        seed
            Seed of their draws.

        Returns
        -------
        pandas.DataFrame
            A row for each perturbation and gene, by rising ``lfsr``, at dose one:
            ``perturbation``, ``gene``, ``log2_fold_change`` and ``sd`` (mean and standard
            deviation of the whole effect), ``residual_log2_fold_change`` and ``residual_sd`` (of
            both corrections), ``lfsr`` (probability that what latents and direct effects leave
            over is zero or of the other sign, an error that takes no account of genes being
            correlated) and ``is_target`` (whether the gene is the perturbation's own target).

        Raises
        ------
        ScreenError
            If a name is not that of a perturbation.
        NotImplementedError
            If the model has no such effects; the message says why.

        Examples
        --------
        >>> table = model.get_gene_effects()  # doctest: +SKIP
        >>> table.query("lfsr < 0.05 and not is_target")  # doctest: +SKIP
        """
        return gene_effects_table(self, perturbations, n_samples, seed)

    # -- cells ------------------------------------------------------------------------------------

    @of_cells
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterable[dict[str, Any]] | None = None,
        *,
        representation: Literal["full", "basal", "perturbation"] = "full",
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent state of cells.

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        give_mean
            Posterior means; otherwise one draw (of the full state only).
        mc_samples
            Taken as scvi-tools' models take it, for those without a mean in closed form; this one
            has no need of it.
        batch_size
            Cells in a minibatch.
        return_dist
            Return means and variances (of the full state only).
        dataloader
            Minibatches to use in place of ``adata`` and ``indices``.
        representation
            ``"full"``: the state, basal plus shift. ``"basal"``: what the cell would be without
            its perturbations. ``"perturbation"``: the shift alone, which depends on the cell's
            perturbations only, not on its counts. A model without shifts has only one state.
        **data_loader_kwargs
            Further arguments of the data loader.

        Returns
        -------
        numpy.ndarray or tuple of numpy.ndarray
            Shape ``(n_cells, n_latent)`` in the order of ``indices``; means and variances with
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
        if representation != "full" and (return_dist or not give_mean):
            raise ValueError(
                "return_dist=True and give_mean=False are for representation='full' only."
            )
        loader = minibatches(self, adata, indices, batch_size, dataloader, data_loader_kwargs)
        if representation == "perturbation":
            require_effects(self, "get_latent_representation(representation='perturbation')")
        return latent_representation(self, loader, representation, give_mean, return_dist)

    @of_cells
    def get_perturbed_probability(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        own_gene: bool = True,
    ) -> pd.DataFrame:
        """Probability that each perturbation of each cell took, rather than that the cell escaped.

        A cell shows some multiple of the effect of its perturbation: that of an effect, or none.
        How often it is none is the efficacy of its guide. Efficacies, and effects where they took,
        are solved from the training cells when they are first asked for, with the networks as
        they are, and kept in the model. Where the cells cannot tell, probabilities stay near the
        efficacy that guides have in general (:func:`scvi_sams.tl.guides` says where).

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        own_gene
            Whether the count of the perturbation's own target is evidence, beside the latent
            state.

        Returns
        -------
        pandas.DataFrame
            A row for each cell and perturbation, named by the cell, with columns
            ``perturbation``, ``guide`` and ``probability``. Controls have none.

        Raises
        ------
        NotImplementedError
            If what counts say of a shift has no closed form in this model.
        ScreenError
            If efficacies are still to be solved and the model has no AnnData.

        Examples
        --------
        >>> table = model.get_perturbed_probability()  # doctest: +SKIP
        >>> adata.obs["perturbed"] = table["probability"]  # doctest: +SKIP
        """
        return perturbed_probability(self, adata, indices, checked("own_gene", own_gene))

    @of_cells
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> MixtureSameFamily:
        """Mixture of the posteriors of cells, as ``differential_abundance`` takes it for a sample.

        Parameters
        ----------
        adata
            Cells; those the model was set up with by default.
        indices
            Which of them; all by default.
        batch_size
            Cells in a minibatch.
        dof
            Degrees of freedom of Student's t in place of the normal; ``None`` for the normal.

        Returns
        -------
        torch.distributions.MixtureSameFamily
            Over latent states. Its scales are standard deviations (scvi-tools' are variances).

        Examples
        --------
        >>> model.get_aggregated_posterior(indices=controls).log_prob(states)  # doctest: +SKIP
        """
        moments = self.get_latent_representation(
            adata, indices, batch_size=batch_size, return_dist=True
        )
        mean, variance = (torch.as_tensor(moment, device=self.device) for moment in moments)
        scale = variance.sqrt()
        cells = Normal(mean, scale) if dof is None else StudentT(dof, mean, scale)
        return MixtureSameFamily(Categorical(torch.ones_like(mean[:, 0])), Independent(cells, 1))

    @of_cells
    def get_iwelbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_particles: int = 100,
        batch_size: int | None = None,
        return_mean: bool = True,
        dataloader: Iterable[dict[str, Any]] | None = None,
        data_loader_kwargs: dict[str, Any] | None = None,
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
        dataloader, data_loader_kwargs
            Minibatches to use in place of ``adata`` and ``indices``, or arguments of the loader
            that gives them.

        Returns
        -------
        float or numpy.ndarray
            Nats a cell: the mean, or of shape ``(n_cells,)`` in the order of ``indices``.

        Raises
        ------
        ValueError
            If ``n_particles`` is below one.

        Examples
        --------
        >>> model.get_iwelbo(indices=model.validation_indices)  # doctest: +SKIP
        """
        kwargs = data_loader_kwargs or {}
        loader = minibatches(self, adata, indices, batch_size, dataloader, kwargs)
        log_weights = log_importance_weights(self, loader, n_particles)
        bound = (torch.logsumexp(log_weights, 0) - math.log(n_particles)).numpy()
        return np.float64(bound.mean()) if return_mean else bound

    @of_cells
    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Any]] | None = None,
        return_mean: bool = True,
        data_loader_kwargs: dict[str, Any] | None = None,
        *,
        n_samples: int = 10,
        include_global: bool = True,
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
        batch_size
            Cells in a minibatch.
        dataloader
            Minibatches to use in place of ``adata`` and ``indices``.
        return_mean
            Return the mean over cells.
        data_loader_kwargs
            Further arguments of the data loader.
        n_samples
            Draws of all latents that the expectation is estimated from.
        include_global
            Whether to subtract the global divergences.

        Returns
        -------
        float or numpy.ndarray
            Nats a cell, higher is better: the mean, or of shape ``(n_cells,)`` in the order of
            ``indices``.

        Raises
        ------
        ValueError
            If ``n_samples`` is below one.

        Examples
        --------
        >>> model.get_elbo()  # doctest: +SKIP
        """
        kwargs = data_loader_kwargs or {}
        loader = minibatches(self, adata, indices, batch_size, dataloader, kwargs)
        bound = log_importance_weights(self, loader, n_samples).mean(0).numpy()
        if include_global:
            with torch.no_grad():
                divergences = self.module.global_divergences().values()
            n_cells = max(1, self.module.n_training_cells)
            bound = bound - float(sum(divergences)) / n_cells
        return np.float64(bound.mean()) if return_mean else bound

    # -- conditions, measured or not --------------------------------------------------------------

    def counterfactual(
        self,
        basal: Basal = "prior",
        n_cells: int = 200,
        batch: str | None = None,
        library_size: float | None = None,
        *,
        seed: int | None = 0,
        gene_effects: bool = True,
        effect: EffectOf = "as_labelled",
        context: str | None = None,
    ) -> Counterfactual:
        """Draw one population of cells, to be put under any condition.

        The functions of ``scvi_sams.tl`` that compare conditions make one by default, with the
        defaults below; give them this one for other cells, another batch or another seed.

        Parameters
        ----------
        basal, batch, library_size, context
            As in :meth:`predict`.
        n_cells
            Cells of the population. Ignored if ``basal`` is cells.
        seed
            Seed of the cells, and of what is drawn for them later; ``None`` for torch's own
            stream of random numbers.
        gene_effects
            Whether conditions have the effects on single genes of :meth:`get_gene_effects`;
            without them they are what latents alone say.
        effect
            ``"as_labelled"``: the effect on all cells with the label, as the model was fitted.
            ``"where_it_took"``: that on the cells in which the perturbation took; as labelled
            where no guide lets it be told (:func:`scvi_sams.tl.guides`).

        Returns
        -------
        Counterfactual
            The cells, with the means to decode them under conditions.

        Raises
        ------
        ScreenError
            If an argument cannot be used with this model.

        Examples
        --------
        >>> controls = model.counterfactual("control", n_cells=500)  # doctest: +SKIP
        >>> scvi_sams.tl.differential_expression(
        ...     model, ["KLF1"], counterfactual=controls
        ... )  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        multiple = multiples_of(self, effect)
        return draw_cells(
            self, basal, n_cells, batch, library_size, seed, gene_effects, multiple, context
        )

    def predict(
        self,
        conditions: ConditionsLike,
        n_samples: int = 200,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        library_size: float | None = None,
        batch: str | None = None,
        return_mean: bool = False,
        *,
        seed: int | None = None,
        effect: EffectOf = "as_labelled",
        context: str | None = None,
    ) -> AnnData:
        """Simulate cells under conditions, whether or not they were ever measured.

        Cell k of every condition has the same basal state, library size and covariates, so that
        conditions can be compared cell by cell.

        Parameters
        ----------
        conditions
            Labels (``"A"``, ``"A+B"``, a control label), dicts (``{"A": 1.0, "B": 0.5}``) or a
            dosage matrix (conditions x perturbations).
        n_samples
            Cells of each condition. Ignored if ``basal`` is cells.
        basal
            Where basal states come from: ``"prior"``, ``"control"`` (the posterior of control
            cells of the training data, drawn with replacement), or cells to ask "what if" about:
            an AnnData, or indices into the model's own. Such cells keep their basal state, library
            size and covariates.
        library_size
            Library size (or size factor) of every cell. By default those of control cells.
        batch
            Batch to predict for. By default batches as they occur among control cells.
        return_mean
            Return the mean normalised expression of each condition in place of its cells.
        seed
            Seed of all draws; by default they come from torch's stream, which
            ``scvi.settings.seed`` seeds.
        effect
            Of which cells with the label, as in :meth:`counterfactual`.
        context
            Context to predict for, a level of ``context_key``: the cells are of that level
            (unless ``basal`` is cells, which stay what they are), and so are the effects. One in
            which a perturbation was never measured has the shared part, and draws of the deviation
            from its prior. By default the cells are of all contexts, as controls are, and effects
            are the part that contexts share.

        Returns
        -------
        anndata.AnnData
            Cells x genes with counts in ``X`` and ``obs`` columns ``condition``, ``library_size``
            and ``basal_cell``, ``batch`` and ``context`` where there are such;
            ``layers["normalized_expression"]`` holds each cell's expected share of the library.
            With ``return_mean``, conditions x genes with the mean of that share in ``X`` and its
            standard deviation over cells in ``layers["std"]``.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        ScreenError
            If an argument cannot be used with this model.

        Examples
        --------
        >>> cells = model.predict(["KLF1+CEBPA"], n_samples=200)  # doctest: +SKIP
        """
        return predict(
            self,
            conditions,
            n_samples,
            basal,
            library_size,
            batch,
            return_mean,
            seed,
            effect,
            context,
        )

    def get_average_treatment_effect(
        self,
        conditions: ConditionsLike | None = None,
        reference: str | dict[str, float] | None = None,
        method: Literal["log_normalized", "mean"] | None = None,
        n_samples: int = 25,
        n_cells: int = 200,
        credible_level: float = 0.95,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int | None = None,
        effect: EffectOf = "as_labelled",
        context: str | None = None,
    ) -> AnnData:
        """Average effect of conditions on each gene, over a population of cells.

        Every draw of masks and effects is applied to the same basal states, and expectations over
        counts are computed by quadrature, not sampled, so that the draws differ by what is
        uncertain about the perturbations alone.

        Parameters
        ----------
        conditions
            As in :meth:`predict`; all single perturbations by default.
        reference
            The condition that effects are measured against; no perturbation by default.
        method
            ``"log_normalized"``: difference of the mean of ``log2(1 + 1e4 * x / library)``, as
            computed from observed counts (Bereket and Karaletsos 2023); the default for counts.
            ``"mean"``: difference of the expected counts per 10,000; for features that are no
            counts, of their expected values.
        n_samples
            Draws of masks and effects, which the intervals are made of.
        n_cells
            Cells of the population.
        credible_level
            Level of the intervals.
        basal
            Where basal states come from, as in :meth:`predict`.
        batch
            Batch to predict for, as in :meth:`predict`.
        seed
            Seed of all draws, as in :meth:`predict`.
        effect
            Of which cells with the label, as in :meth:`counterfactual`.
        context
            Context of cells and effects, as in :meth:`predict`.

        Returns
        -------
        anndata.AnnData
            Conditions x genes: posterior mean in ``X``, ends of the interval in
            ``layers["lower"]`` and ``layers["upper"]``, posterior standard deviation in
            ``layers["std"]``; NaN where perturbations act through networks (ConditionalVAE),
            which have no posterior.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        ScreenError
            If a condition is given twice, ``reference`` is more than one, or ``n_samples``,
            ``basal`` or ``batch`` cannot be used.
        ValueError
            If ``method`` is unknown or not for this likelihood, or ``credible_level`` is not
            between 0 and 1.

        Examples
        --------
        >>> effect = model.get_average_treatment_effect(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        >>> effect.to_df().loc["KLF1"].nlargest(10)  # doctest: +SKIP
        """
        scale = effect_scale(self, method)
        check_level(credible_level)
        cells = self.counterfactual(
            basal, n_cells, batch, seed=seed, effect=effect, context=context
        )
        return average_treatment_effect(
            self, conditions, reference, scale, n_samples, credible_level, cells
        )

    # -- what scvi-tools' mixins offer and this model has not -------------------------------------

    def get_latent_library_size(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Not offered: library sizes are observed, not latent."""
        raise NotImplementedError(
            f"{type(self).__name__} has no latent library size: it takes the sum of the counts, "
            "or the column given as size_factor_key in setup_anndata."
        )

    def get_marginal_ll(self, *args: Any, **kwargs: Any) -> float | np.ndarray:
        """Not offered under this name: see :meth:`get_iwelbo`."""
        raise NotImplementedError(
            f"{type(self).__name__} estimates the marginal log-likelihood of cells by "
            "get_iwelbo(n_particles=...), whose draws of masks and effects all cells share."
        )


def _check_setup(given: dict[str, Any]) -> None:
    """Check the kinds of arguments of ``setup_anndata``, and that there are no others."""
    for name, value in given.items():
        checked(name, value)
    if "source_registry" not in given["kwargs"]:  # else scvi-tools hands on arguments of its own
        check_names(given["kwargs"], given, "setup_anndata")
    if (key := given["context_key"]) is not None:
        if key in (given["perturbation_key"], given["guide_key"]):
            raise ScreenError(
                f"context_key={key!r} is the column of the perturbations: give the column of what "
                "their effects may depend on, such as cell type."
            )


def _as_list(keys: str | Sequence[str] | None) -> list[str] | None:
    """Keys as a list, of one if a single one was named."""
    return [keys] if isinstance(keys, str) else None if keys is None else list(keys)
