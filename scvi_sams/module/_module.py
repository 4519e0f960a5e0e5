"""SAMS-VAE: generative model, guide of the cells, and local loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import nn
from torch.distributions import Normal

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module._closed_form_inference import ClosedFormInference
from scvi_sams.module._functional import additive_shift, dosage_entries
from scvi_sams.module._likelihood import negative_binomial_log_likelihood
from scvi_sams.module._networks import ExpressionDecoder, Potential, PotentialEncoder
from scvi_sams.module._perturbation_effects import PerturbationEffects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_sams.module._functional import DosageEntries

__all__ = ["SAMSVAEModule"]

_N_DISPERSION_CELLS = 8  # the dispersion is shared by all cells; see the likelihood
_RELAXATION_TEMPERATURE = 0.5


class SAMSVAEModule(BaseModuleClass):
    r"""Sparse additive mechanism shift VAE (Bereket and Karaletsos, NeurIPS 2023).

    The counts of cell i with doses :math:`d_i` and covariates :math:`s_i` come from

    .. math::
       z_i &= z^b_i + \sum_t d_{it} (m_t \odot e_t), \quad z^b_i \sim \mathrm{Normal}(0, I) \\
       x_{ig} &\sim \mathrm{NegativeBinomial}(l_i \, \mathrm{softmax}_g f(z_i, s_i), \theta_g)

    with masks and embeddings as in :class:`~scvi_sams.module.PerturbationEffects`. The guide of
    the basal state given counts and shift is ``Normal(gain * (location - shift), variance)``
    (:class:`~scvi_sams.module.Potential`). The loss is the local part of the bound; the training
    plan adds the divergences of the global latents.

    Parameters
    ----------
    n_input
        Number of genes.
    n_perturbations
        Number of perturbations.
    n_batch, n_cats_per_cov, n_continuous_cov
        Batches, categories of each further categorical covariate, continuous covariates.
    n_hidden, n_latent, n_layers, dropout_rate
        Size of the networks; dropout is in the encoder only.
    encode_covariates
        Whether the encoder sees the covariates too.
    global_inference
        ``"closed_form"`` or ``"gradient"``.
    basal_gain
        ``"learned"`` or ``"residual"``, see :class:`~scvi_sams.module.PotentialEncoder`.
    mask_prior, embedding_scale, spike_scale
        Prior of the effects, see :class:`~scvi_sams.module.PerturbationEffects`.
    mask_evidence_cells
        See :class:`~scvi_sams.module.ClosedFormInference`.
    """

    gene_likelihood = "nb"
    dispersion = "gene"
    latent_distribution = "normal"

    n_training_cells: Tensor
    initialized: Tensor
    counts_per_cell: Tensor
    globals_frozen: Tensor

    def __init__(
        self,
        n_input: int,
        n_perturbations: int,
        *,
        n_batch: int = 1,
        n_cats_per_cov: Sequence[int] | None = None,
        n_continuous_cov: int = 0,
        n_hidden: int = 400,
        n_latent: int = 40,
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
        super().__init__()
        self.n_latent = n_latent
        self.n_batch = n_batch
        self.encode_covariates = encode_covariates
        covariates: dict[str, Any] = {
            "n_cat_list": [n_batch, *(n_cats_per_cov or ())],
            "n_cont": n_continuous_cov,
        }
        self.encoder = PotentialEncoder(
            n_input,
            n_latent,
            n_layers=n_layers,
            n_hidden=n_hidden,
            dropout_rate=dropout_rate,
            residual=basal_gain == "residual",
            **(covariates if encode_covariates else {}),
        )
        self.decoder = ExpressionDecoder(
            n_latent, n_input, n_layers=n_layers, n_hidden=n_hidden, **covariates
        )
        self.px_r = nn.Parameter(torch.zeros(n_input))
        closed_form = global_inference == "closed_form"
        self.effects = PerturbationEffects(
            n_perturbations,
            n_latent,
            mask_prior=mask_prior,
            embedding_scale=embedding_scale,
            spike_scale=spike_scale if closed_form else 0.0,
            trainable=not closed_form,
        )
        self.closed_form = (
            ClosedFormInference(
                n_perturbations,
                n_latent,
                n_batch=n_batch,
                mask_evidence_cells=mask_evidence_cells,
            )
            if closed_form
            else None
        )
        self.register_buffer("n_training_cells", torch.tensor(0))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("counts_per_cell", torch.tensor(0.0))
        self.register_buffer("globals_frozen", torch.tensor(False))

    @torch.no_grad()
    def initialize(
        self, counts_mean: Tensor, log_count_mean: Tensor, log_count_std: Tensor
    ) -> None:
        """Set the scale of the encoder's input and the decoder's bias from training data.

        Parameters
        ----------
        counts_mean
            Mean count of each gene, shape ``(n_genes,)``.
        log_count_mean, log_count_std
            Mean and standard deviation of ``log1p(counts)`` of each gene, shape ``(n_genes,)``.
        """
        self.encoder.log_count_mean.copy_(log_count_mean)
        self.encoder.log_count_std.copy_(log_count_std.clamp(min=1e-3))
        # Relative to the mean gene, a gene that was never seen starts at a ten-thousandth.
        share = counts_mean / counts_mean.mean() + 1e-4
        self.decoder.logits.bias.copy_((share / share.sum()).log())
        self.counts_per_cell.copy_(counts_mean.sum())
        self.initialized.fill_(True)

    # -- scvi-tools interface ------------------------------------------------------------------

    def _get_inference_input(
        self, tensors: dict[str, Tensor], full_forward_pass: bool = False
    ) -> dict[str, Tensor | None]:
        return {
            "x": tensors[REGISTRY_KEYS.X_KEY],
            "dosage": tensors[SAMS_REGISTRY_KEYS.PERTURBATION_KEY],
            "library": tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY),
            **_covariates(tensors),
        }

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        dosage: Tensor,
        library: Tensor | None = None,
        batch_index: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        n_samples: int = 1,
    ) -> dict[str, Any]:
        """Infer the latent state of cells.

        Parameters
        ----------
        x
            Counts, shape ``(n_cells, n_genes)``.
        dosage
            Doses, shape ``(n_cells, n_perturbations)``, strided or CSR.
        library
            Size factors, shape ``(n_cells, 1)``; the total count by default.
        batch_index, cat_covs, cont_covs
            Covariates, shapes ``(n_cells, 1)``, ``(n_cells, n_categorical)`` and
            ``(n_cells, n_continuous)``.
        n_samples
            Number of draws of ``z``; with one, there is no axis for them.

        Returns
        -------
        ``z`` (full state, shape ``([n_samples,] n_cells, n_latent)``, frame of the masks), ``qz``
        (its posterior), ``library``, and for the loss ``potential``, ``entries``,
        ``shift_mean`` and ``shift_variance`` (moments of the shift, network frame).
        """
        if library is None:
            library = x.sum(1, keepdim=True)
        categories, cont = _network_covariates(batch_index, cat_covs, cont_covs)
        if not self.encode_covariates:
            categories, cont = (), None
        potential = self.encoder(x, *categories, cont=cont)
        potential = potential._replace(
            location=potential.location - self.basal_mean(batch_index, len(x))
        )
        entries = dosage_entries(dosage)
        outputs = {
            "potential": potential,
            "entries": entries,
            "library": library,
            "batch_index": batch_index,
        }
        if self.training and self.closed_form is None:
            shift_mean = self._sampled_shift(entries)
            shift_variance = torch.zeros_like(shift_mean)
        else:
            shift_mean, shift_variance = self.shift_moments(entries)
        outputs |= {"shift_mean": shift_mean, "shift_variance": shift_variance}

        # Given the shift, z is normal; the shift itself stands in by its two moments.
        location, gain, variance = potential
        state_mean = gain * location + (1 - gain) * shift_mean
        state_variance = variance + (1 - gain).square() * shift_variance
        shape = (n_samples, *location.shape) if n_samples > 1 else location.shape
        noise = torch.randn(shape, dtype=location.dtype, device=location.device)
        to_masks = self.effects.frame.T
        outputs["z"] = (state_mean + state_variance.sqrt() * noise) @ to_masks
        outputs["qz"] = Normal(
            state_mean @ to_masks, (state_variance @ to_masks.square()).sqrt(), validate_args=False
        )
        return outputs

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]
    ) -> dict[str, Tensor | None]:
        return {
            "z": inference_outputs["z"],
            "library": inference_outputs["library"],
            **_covariates(tensors),
        }

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        transform_batch: int | Tensor | None = None,
    ) -> dict[str, Any]:
        """Decode latent states.

        Parameters
        ----------
        z
            Full states in the frame of the masks, shape ``(..., n_cells, n_latent)``.
        library
            Size factors, shape ``(n_cells, 1)``.
        batch_index, cat_covs, cont_covs
            Covariates, as in :meth:`inference`.
        transform_batch
            Decode all cells as if they came from this batch.

        Returns
        -------
        ``px`` (distribution of counts, ``px.scale`` is normalised expression) and ``px_logits``,
        each of shape ``(..., n_cells, n_genes)``.
        """
        if transform_batch is not None and batch_index is not None:
            batch_index = torch.ones_like(batch_index) * transform_batch
        categories, cont = _network_covariates(batch_index, cat_covs, cont_covs)
        u = z @ self.effects.frame + self.basal_mean(batch_index, z.shape[-2])
        logits = self.decoder(u, *categories, cont=cont)
        scale = torch.softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
        px = NegativeBinomial(mu=scale * library, theta=self.px_r.exp(), scale=scale)
        return {"px": px, "px_logits": logits}

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float | Tensor = 1.0,
    ) -> LossOutput:
        """Local part of the negative bound, a mean over the cells of a minibatch."""
        reconstruction = -negative_binomial_log_likelihood(
            generative_outputs["px_logits"],
            self.px_r,
            tensors[REGISTRY_KEYS.X_KEY],
            inference_outputs["library"],
            _N_DISPERSION_CELLS if self.training else None,
        )
        kl_basal = self.kl_basal(inference_outputs)
        return LossOutput(
            loss=(reconstruction + kl_weight * kl_basal).mean(),
            reconstruction_loss=reconstruction,
            kl_local={"kl_basal": kl_basal},
        )

    @torch.inference_mode()
    def sample(
        self,
        tensors: dict[str, Tensor],
        n_samples: int = 1,
        generative_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Draw counts from the posterior predictive distribution of given cells.

        Returns
        -------
        Shape ``(n_cells, n_genes)``, with a last axis of ``n_samples`` if there are several.
        """
        _, outputs = self.forward(
            tensors,
            inference_kwargs={"n_samples": n_samples},
            generative_kwargs=generative_kwargs,
            compute_loss=False,
        )
        counts = outputs["px"].sample()
        return counts.cpu() if n_samples == 1 else counts.permute(1, 2, 0).cpu()

    # -- global latents ------------------------------------------------------------------------

    def basal_mean(self, batch_index: Tensor | None, n_cells: int) -> Tensor | float:
        """Mean basal state of the batches of cells, in the frame of the networks.

        Returns
        -------
        Shape ``(n_cells, n_latent)``; zero if masks are inferred by gradient.
        """
        if self.closed_form is None:
            return 0.0
        means = self.closed_form.basal_mean
        if batch_index is None:
            return means[:1].expand(n_cells, -1)
        return means[batch_index.squeeze(-1).long()]

    def shift_moments(self, entries: DosageEntries) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the shifts of cells, in the frame of the networks.

        Returns
        -------
        Mean and variance of each coordinate, each of shape ``(n_cells, n_latent)``.
        """
        mean, variance = self.effects.moments(entries.perturbation)
        frame = self.effects.frame
        return (
            additive_shift(entries, mean) @ frame,
            additive_shift(entries, variance, power=2) @ frame.square(),
        )

    def _sampled_shift(self, entries: DosageEntries) -> Tensor:
        """One draw of the shifts, shared by the cells of a perturbation, with gradients."""
        rows, index = entries.perturbation.unique(return_inverse=True)
        effects = self.effects.rsample(rows, _RELAXATION_TEMPERATURE)
        return additive_shift(entries, effects[index]) @ self.effects.frame

    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the basal guide from its prior, expected over the shift.

        Quadratic in the shift, hence exact from its two moments.

        Returns
        -------
        Nats, shape ``(n_cells,)``.
        """
        location, gain, variance = inference_outputs["potential"]
        squared = (location - inference_outputs["shift_mean"]).square()
        squared = gain.square() * (squared + inference_outputs["shift_variance"])
        return 0.5 * (squared + variance - 1 - variance.log()).sum(-1)

    @torch.no_grad()
    def observe(self, inference_outputs: dict[str, Any]) -> None:
        """Add a minibatch to the statistics of the closed-form inference, if that is used."""
        if self.closed_form is None or self.globals_frozen:
            return
        potential = inference_outputs["potential"]
        batch_index = inference_outputs["batch_index"]
        if batch_index is None:
            batch_index = torch.zeros_like(potential.location[:, :1], dtype=torch.long)
        self.closed_form.observe(
            self.effects,
            inference_outputs["entries"],
            Potential(*(field.detach().float() for field in potential)),
            inference_outputs["shift_mean"],
            batch_index.squeeze(1),
            int(self.n_training_cells),
        )

    @torch.inference_mode()
    def log_importance_weights(self, tensors: dict[str, Tensor], effects: Tensor) -> Tensor:
        """Importance weights of cells under given draws of the global latents.

        ``log p(x | z) + log p(zb) - log q(zb | x, shift)`` with ``zb`` drawn from its guide. The
        draws of the effects are shared by all cells and not scored against their prior, as in
        Bereket and Karaletsos (2023).

        Parameters
        ----------
        tensors
            A minibatch.
        effects
            Draws of all effects, shape ``(n_particles, n_perturbations, n_latent)``.

        Returns
        -------
        Shape ``(n_particles, n_cells)``.
        """
        outputs = self.inference(**self._get_inference_input(tensors))
        entries, frame = outputs["entries"], self.effects.frame
        shift = additive_shift(entries, effects[:, entries.perturbation]) @ frame
        location, gain, variance = outputs["potential"]
        noise = torch.randn_like(shift)
        basal = gain * (location - shift) + variance.sqrt() * noise
        generative_input = self._get_generative_input(tensors, outputs)
        generative_input["z"] = (basal + shift) @ frame.T
        decoded = self.generative(**generative_input)
        counts = tensors[REGISTRY_KEYS.X_KEY].to(shift.device)
        log_likelihood = negative_binomial_log_likelihood(
            decoded["px_logits"], self.px_r, counts, outputs["library"]
        )
        # The normalising constants of prior and guide cancel but for the guide's variance.
        log_ratio = 0.5 * (noise.square() - basal.square() + variance.log()).sum(-1)
        return log_likelihood + log_ratio


def _covariates(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {
        "batch_index": tensors.get(REGISTRY_KEYS.BATCH_KEY),
        "cat_covs": tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
        "cont_covs": tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
    }


def _network_covariates(
    batch_index: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Split covariates into the columns that scvi-tools' layers take."""
    columns = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    return (batch_index, *columns), cont_covs
