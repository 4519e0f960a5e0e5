"""The conditional VAE model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from scvi_sams.model._perturbation_vae import PerturbationVAE
from scvi_sams.module import ConditionalVAEModule

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ConditionalVAE"]


class ConditionalVAE(PerturbationVAE):
    """VAE whose encoder and decoder see the perturbations of a cell.

    The least that a model of a screen can be: perturbations act through the weights of the
    networks, with no structure of effects. It has no masks, embeddings or shifts, and nothing
    that says how sure it is of an effect; everything else works as for :class:`SAMSVAE`.

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
        )
        self.init_params_ = self._get_init_params(locals())
