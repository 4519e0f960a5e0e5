"""The CPA-VAE model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from scvi_sams.model._perturbation_vae import PerturbationVAE
from scvi_sams.model._samsvae import choose_inference
from scvi_sams.module import SAMSVAEModule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

__all__ = ["CPAVAE"]


class CPAVAE(PerturbationVAE):
    """SAMS-VAE without sparsity: every perturbation moves every latent dimension.

    The ablation of Bereket and Karaletsos (NeurIPS 2023, after the compositional perturbation
    autoencoder of Lotfollahi et al. 2023): masks are fixed to one, so that the state of a cell is
    its basal state plus the sum of the embeddings of its perturbations. It is the model to set
    beside :class:`SAMSVAE` to see what sparsity does.

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
    global_inference, basal_posterior
        As for :class:`SAMSVAE`.
    embedding_posterior
        As for :class:`SAMSVAE`. Without masks ``"mean_field"`` and ``"spike_and_slab"`` are the
        same posterior; only the latter has closed-form inference.
    embedding_scale
        Prior standard deviation of an effect.
    dose_response, direct_effects
        As for :class:`SAMSVAE`.

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
        global_inference: Literal["closed_form", "gradient"] | None = None,
        basal_posterior: Literal[
            "mean_field", "correlated", "residual", "amortized"
        ] = "correlated",
        embedding_posterior: Literal[
            "mean_field", "correlated", "spike_and_slab"
        ] = "spike_and_slab",
        embedding_scale: float = 1.0,
        dose_response: Literal["linear", "hill"] = "linear",
        direct_effects: bool | Mapping[str, str] | None = None,
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
            global_inference=choose_inference(
                global_inference, basal_posterior, embedding_posterior
            ),
            basal_posterior=basal_posterior,
            embedding_posterior=embedding_posterior,
            mask_prior=1.0,
            embedding_scale=embedding_scale,
            reference_doses=self._reference_doses(dose_response),
            targets=self._target_genes(direct_effects),
        )
        self.init_params_ = self._get_init_params(locals())
