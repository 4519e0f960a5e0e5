"""The SAMS-VAE model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.data.field import registered_dosage
from scvi_sams.model._measured_pairs import pairs_together
from scvi_sams.model._perturbation_vae import PerturbationVAE
from scvi_sams.module import SAMSVAEModule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

__all__ = ["SAMSVAE"]


class SAMSVAE(PerturbationVAE):
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
        Share of units dropped, in the encoder only.
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
        large, not merely detectable. ``None`` for the exact posterior. Fewer give cleaner masks.
        Closed-form inference only.
    dose_response
        ``"linear"``: the shift is proportional to the dose. ``"hill"``: it saturates, with EC50
        and slope learned for each perturbation.
    interactions
        Give measured pairs a sparse shift beyond the sum of their parts: ``True`` for all pairs
        that occur together in a cell, or the pairs.
    interaction_prior
        Prior probability that a pair moves a latent beyond the sum of its parts.
    direct_effects
        Give each perturbation a log fold change on its own gene beside the latent shift, so that
        the knock-down of the target need not pass through shared latents. By default where its
        name is a gene; ``True`` demands that one is, a dict says which gene each perturbation
        targets, ``False`` is the paper's model.

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
        mask_evidence_cells: float | None = 30.0,
        dose_response: Literal["linear", "hill"] = "linear",
        interactions: bool | Sequence[tuple[str, str]] = False,
        interaction_prior: float = 0.002,
        direct_effects: bool | Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(adata, registry)
        # What is saved is the pairs themselves: another AnnData may have others.
        interactions = self._interaction_names(interactions)
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
            mask_prior=mask_prior,
            mask_prior_shared_by=mask_prior_shared_by,
            embedding_scale=embedding_scale,
            background_scale=spike_scale,
            mask_evidence_cells=mask_evidence_cells,
            reference_doses=self._reference_doses(dose_response),
            interactions=[tuple(map(self.perturbation_names.index, p)) for p in interactions],
            interaction_prior=interaction_prior,
            targets=self._target_genes(direct_effects),
        )
        self.init_params_ = self._get_init_params(locals())

    def _interaction_names(
        self, interactions: bool | Sequence[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Names of the pairs that get an interaction."""
        names = self.perturbation_names
        if interactions is False or (interactions is not True and len(interactions) == 0):
            return []
        if interactions is True:
            if self.adata is None:
                raise ScreenError("interactions=True needs the AnnData; name the pairs instead.")
            dosage = registered_dosage(self.adata_manager)
            pairs = pairs_together(dosage)
            if not pairs:
                raise ScreenError(
                    "interactions=True, but no cell has two perturbations; leave it out."
                )
            return [(names[a], names[b]) for a, b in pairs]
        pairs_given = [(str(a), str(b)) for a, b in interactions]
        Conditions.from_request([{a: 1.0, b: 1.0} for a, b in pairs_given], names)
        return pairs_given


def choose_inference(
    global_inference: Literal["closed_form", "gradient"] | None,
    basal_posterior: str,
    embedding_posterior: str,
) -> Literal["closed_form", "gradient"]:
    """The engine of masks and effects, closed form where the posteriors have it.

    Raises
    ------
    ValueError
        If closed form is asked for where there is none.
    """
    has_closed_form = (
        basal_posterior in {"correlated", "residual"} and embedding_posterior == "spike_and_slab"
    )
    if global_inference == "closed_form" and not has_closed_form:
        raise ValueError(
            f"global_inference='closed_form' needs a bound that is quadratic in the shift and "
            f"effects given masks, not basal_posterior={basal_posterior!r} with "
            f"embedding_posterior={embedding_posterior!r}: use basal_posterior='correlated' or "
            "'residual' and embedding_posterior='spike_and_slab', or global_inference='gradient'."
        )
    return global_inference or ("closed_form" if has_closed_form else "gradient")
