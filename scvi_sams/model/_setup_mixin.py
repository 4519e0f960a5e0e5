"""Registration of a screen, the same for every member of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data import (
    PerturbationField,
    check_confounding,
    check_counts,
    check_features,
    check_size_factor,
)
from scvi_sams.data.field import DoseField, add_dose_registry, registered_dosage
from scvi_sams.model._base import SAMSModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData

__all__ = ["SetupMixin"]


class SetupMixin(SAMSModel):
    """``setup_anndata`` of the family."""

    _get_setup_method_args: Callable[..., dict[str, Any]]
    register_manager: Callable[..., None]

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
        is_count_data: bool = True,
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
            Further covariates of the decoder.
        is_count_data
            Whether the matrix holds counts, which is then checked. ``False`` for normalised or
            imaging features, with ``gene_likelihood="normal"``.

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
        if is_count_data:
            check_counts(adata, layer)
        else:
            check_features(adata, layer)
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
            DoseField(),
        ]
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        if (source := kwargs.get("source_registry")) is not None:
            add_dose_registry(source)
        manager.register_fields(adata, **kwargs)
        if source is None:  # a screen of its own, not a query
            key = SAMS_REGISTRY_KEYS.PERTURBATION_KEY
            names = manager.get_state_registry(key).column_names
            check_confounding(adata, registered_dosage(manager), names, batch_key)
        cls.register_manager(manager)

    @classmethod
    def setup_annbatch(cls, *args: Any, **kwargs: Any) -> None:
        """Not offered: scvi-tools' out-of-memory loader does not carry dosages."""
        raise NotImplementedError(
            "scvi-tools' annbatch loader does not carry the dosage matrix; use setup_anndata with "
            "a backed AnnData, which train(data_placement='disk') reads in shuffled chunks."
        )
