"""The SVAE+ model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_dosage
from scvi_sams.model._perturbation_vae import PerturbationVAE
from scvi_sams.module import SAMSVAEModule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["SVAEPlus"]


class SVAEPlus(PerturbationVAE):
    r"""SVAE+: sparse shifts of the prior (Lopez, Tagasovska et al., CLeaR 2023).

    The state of a cell under perturbation t has the prior
    :math:`z \sim \mathrm{Normal}(m_t \odot \mu_t, I)` with
    :math:`m_{tl} \sim \mathrm{Bernoulli}(p_t)` and :math:`p_t \sim \mathrm{Beta}(1, K)`, K the
    number of latents by default; the means :math:`\mu_t` are parameters. The guide of the state
    sees the counts alone. The generative model is that of :class:`SAMSVAE`, another posterior and
    another prior set it apart.

    The divergence of the state from its prior is quadratic in the masks and so taken over them in
    closed form; the probabilities :math:`p_t` have a conjugate posterior. Neither needs samples.

    Parameters
    ----------
    adata
        AnnData set up by :meth:`setup_anndata`.
    registry
        Registry of a data module, in place of ``adata``.
    n_latent, n_hidden, n_layers, dropout_rate, encode_covariates
        As for :class:`SAMSVAE`.
    gene_likelihood, dispersion
        As for :class:`SAMSVAE`.
    mask_prior
        ``(a, b)`` of the Beta prior of each perturbation's probability; ``(1, n_latent)`` by
        default. A number fixes the probability.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen()
    >>> scvi_sams.SVAEPlus.setup_anndata(
    ...     adata, layer="counts", perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.SVAEPlus(adata)
    >>> model.train()  # doctest: +SKIP
    """

    _module_cls = SAMSVAEModule

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
        mask_prior: float | tuple[float, float] | None = None,
    ) -> None:
        super().__init__(adata, registry)
        self._create_module(
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            encode_covariates=encode_covariates,
            gene_likelihood=gene_likelihood,
            dispersion=dispersion,
            global_inference="gradient",
            basal_posterior="residual",
            embedding_posterior="point",
            mask_prior=(1.0, float(n_latent)) if mask_prior is None else mask_prior,
            mask_prior_shared_by="perturbation",
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
        is_count_data: bool = True,
        combinations: Literal["own", "additive"] = "own",
        **kwargs: Any,
    ) -> None:
        """Say where an AnnData keeps counts, perturbations and covariates.

        Parameters
        ----------
        adata, layer, perturbation_key, dosage_key, perturbation_names_uns_key, control
            As in :meth:`SAMSVAE.setup_anndata`.
        combination_delimiter, batch_key, labels_key, size_factor_key
            As in :meth:`SAMSVAE.setup_anndata`.
        categorical_covariate_keys, continuous_covariate_keys, is_count_data
            As in :meth:`SAMSVAE.setup_anndata`.
        combinations
            ``"own"``: every label is a perturbation of its own, as in the paper, which has one
            perturbation a cell; pairs that were never measured cannot be predicted then.
            ``"additive"``: the prior mean of a cell is the sum over its perturbations, weighted
            by dose; an extension of the paper.

        Raises
        ------
        ScreenError
            If something cannot be used; the message names it and the mend.
        ValueError
            If ``combinations`` is neither of the two.

        Examples
        --------
        >>> import scvi_sams
        >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
        >>> scvi_sams.SVAEPlus.setup_anndata(
        ...     adata,
        ...     layer="counts",
        ...     perturbation_key="perturbation",
        ...     control="control",
        ...     combinations="additive",
        ... )
        """
        if combinations not in {"own", "additive"}:
            raise ValueError(f"combinations={combinations!r} is unknown; use 'own' or 'additive'.")
        if combinations == "own":
            combination_delimiter = None
        super().setup_anndata(
            adata,
            layer=layer,
            perturbation_key=perturbation_key,
            dosage_key=dosage_key,
            perturbation_names_uns_key=perturbation_names_uns_key,
            control=control,
            combination_delimiter=combination_delimiter,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            is_count_data=is_count_data,
            **kwargs,
        )
        manager = cls._get_most_recent_anndata_manager(adata)
        # The base does not know this argument, and a model is loaded with what is recorded here.
        manager.registry["setup_args"]["combinations"] = combinations
        dosage = registered_dosage(manager)
        several = np.flatnonzero(dosage.getnnz(axis=1) > 1)
        if combinations == "own" and len(several):
            raise ScreenError(
                f"{len(several)} cells have several perturbations in the dosage matrix, such as "
                f"{adata.obs_names[several[0]]!r}, and SVAE+ takes one a cell: give labels as "
                "perturbation_key, or combinations='additive'."
            )
