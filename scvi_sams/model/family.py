"""Relatives of SAMS-VAE, to compare it with."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_dosage
from scvi_sams.model.samsvae import SAMSVAE
from scvi_sams.model.settings import make_module
from scvi_sams.module import ConditionalVAEModule

if TYPE_CHECKING:
    from anndata import AnnData


_DEFAULTS = {name: p.default for name, p in inspect.signature(SAMSVAE).parameters.items()}
_NETWORKS = (
    "n_latent",
    "n_hidden",
    "n_layers",
    "dropout_rate",
    "encode_covariates",
    "gene_likelihood",
    "dispersion",
)
_CPA_EFFECTS = (
    "global_inference",
    "basal_posterior",
    "embedding_posterior",
    "embedding_scale",
    "dose_response",
    "direct_effects",
    "gene_effects",
)


class CPAVAE(SAMSVAE):
    """SAMS-VAE without sparsity: every perturbation moves every latent dimension.

    The ablation of Bereket and Karaletsos (NeurIPS 2023, after the compositional perturbation
    autoencoder of Lotfollahi et al. 2023): masks are fixed to one, so that the state of a cell is
    its basal state plus the sum of the embeddings of its perturbations. It is the model to set
    beside :class:`SAMSVAE` to see what sparsity does.

    Parameters
    ----------
    adata, registry
        As for :class:`SAMSVAE`.
    **kwargs
        ``n_latent``, ``n_hidden``, ``n_layers``, ``dropout_rate``, ``encode_covariates``,
        ``gene_likelihood``, ``dispersion``, ``global_inference``, ``basal_posterior``,
        ``embedding_posterior``, ``embedding_scale``, ``dose_response``, ``direct_effects`` and
        ``gene_effects`` of :class:`SAMSVAE`. Without masks the embedding posteriors
        ``"mean_field"`` and ``"spike_and_slab"`` are the same; only the latter has closed-form
        inference.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen()
    >>> scvi_sams.CPAVAE.setup_anndata(
    ...     adata, layer="counts", perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.CPAVAE(adata)
    >>> model.train()  # doctest: +SKIP
    """

    def __init__(
        self, adata: AnnData | None = None, registry: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        _check_names(type(self), kwargs, (*_NETWORKS, *_CPA_EFFECTS))
        super().__init__(adata, registry, mask_prior=1.0, **kwargs)
        self.init_params_ = self._get_init_params(locals())


class SVAEPlus(SAMSVAE):
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
    adata, registry
        As for :class:`SAMSVAE`.
    mask_prior
        ``(a, b)`` of the Beta prior of each perturbation's probability; ``(1, n_latent)`` by
        default. A number fixes the probability.
    **kwargs
        ``n_latent``, ``n_hidden``, ``n_layers``, ``dropout_rate``, ``encode_covariates``,
        ``gene_likelihood`` and ``dispersion`` of :class:`SAMSVAE`.

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

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        mask_prior: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_names(type(self), kwargs, _NETWORKS)
        n_latent = kwargs.get("n_latent", _DEFAULTS["n_latent"])
        super().__init__(
            adata,
            registry,
            global_inference="gradient",
            basal_posterior="residual",
            embedding_posterior="point",  # type: ignore[arg-type]  # of this model alone
            mask_prior=(1.0, float(n_latent)) if mask_prior is None else mask_prior,
            mask_prior_shared_by="perturbation",
            direct_effects=False,
            gene_effects=False,
            **kwargs,
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *args: Any,
        combinations: Literal["own", "additive"] = "own",
        **kwargs: Any,
    ) -> None:
        """Say where an AnnData keeps counts, perturbations and covariates.

        Parameters
        ----------
        adata, *args, **kwargs
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
            kwargs["combination_delimiter"] = None
        super().setup_anndata(adata, *args, **kwargs)
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


class ConditionalVAE(SAMSVAE):
    """VAE whose encoder and decoder see the perturbations of a cell.

    The least that a model of a screen can be: perturbations act through the weights of the
    networks, with no structure of effects. It has no masks, embeddings or shifts, and nothing
    that says how sure it is of an effect; everything else works as for :class:`SAMSVAE`.

    Parameters
    ----------
    adata, registry
        As for :class:`SAMSVAE`.
    **kwargs
        ``n_latent``, ``n_hidden``, ``n_layers``, ``dropout_rate``, ``encode_covariates``,
        ``gene_likelihood`` and ``dispersion`` of :class:`SAMSVAE`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen()
    >>> scvi_sams.ConditionalVAE.setup_anndata(
    ...     adata, layer="counts", perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.ConditionalVAE(adata)
    >>> model.train()  # doctest: +SKIP
    """

    _module_cls = ConditionalVAEModule

    def __init__(
        self, adata: AnnData | None = None, registry: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        _check_names(type(self), kwargs, _NETWORKS)
        super(SAMSVAE, self).__init__(adata, registry)  # which has effects, and this has none
        make_module(self, **{name: _DEFAULTS[name] for name in _NETWORKS} | kwargs)
        self.init_params_ = self._get_init_params(locals())


def _check_names(model_class: type, kwargs: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise for arguments of SAMS-VAE that a relative has not."""
    if unknown := [name for name in kwargs if name not in known]:
        raise TypeError(
            f"{model_class.__name__} has no argument {unknown[0]!r}; it takes {', '.join(known)}."
        )
