"""From the doses of cells to the shifts of their latent states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi.module.base import auto_move_data
from torch import nn
from torch.distributions import Normal

from scvi_sams.module.base import GlobalDraws, PerturbationVAEModule
from scvi_sams.module.closed_form import ClosedFormInference
from scvi_sams.module.doses import (
    DirectEffects,
    HillDoseResponse,
    PairInteractions,
    additive_shift,
    dosage_entries,
)
from scvi_sams.module.networks import Potential
from scvi_sams.module.posteriors import PerturbationEffects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_sams.module.base import CellPopulation
    from scvi_sams.module.doses import DosageEntries, GeneEffects
    from scvi_sams.module.likelihood import Observation
    from scvi_sams.module.networks import BasalPosterior, PotentialEncoder
    from scvi_sams.module.posteriors import (
        EmbeddingPosterior,
        MaskPriorSharing,
    )

__all__ = ["PerturbationShift", "SAMSVAEModule"]


_RELAXATION_TEMPERATURE = 0.5


class PerturbationShift(nn.Module):
    """Part of a module whose perturbations add up to shifts of the latent state.

    Doses act as they are or through a dose response, pairs may have an effect of their own, and
    single genes direct effects.
    """

    closed_form: ClosedFormInference | None
    effects: PerturbationEffects
    encoder: PotentialEncoder
    interactions: PairInteractions
    dose_response: HillDoseResponse | None
    direct_effects: DirectEffects | None

    @property
    def _samples_shift(self) -> bool:
        """Whether training must draw shifts.

        The divergence of the basal state is quadratic in the shift. Where the state that is
        decoded does not depend on it (residual guide), or its two moments stand in for it (closed
        form), no draw is needed.
        """
        if self.closed_form is not None:
            return False
        return (
            self.encoder.basal_posterior != "residual"
            or self.effects.posterior_family == "correlated"
        )

    # What follows up to the sums over doses has shapes that change from step to step, which
    # torch.compile would compile anew each time.

    @torch.compiler.disable
    def _cell_entries(self, dosage: Tensor) -> tuple[DosageEntries, GeneEffects | None]:
        """Doses of cells as they act, and the direct effects; drawn once in training."""
        entries = dosage_entries(dosage)
        if self.dose_response is not None:
            curves = self.dose_response
            parameters = curves.rsample() if self.training else curves.mean()
            entries = curves.respond(entries, parameters)
        gene_effects = None
        if self.direct_effects is not None:
            direct = self.direct_effects
            gene_effects = direct.of(entries, direct.rsample() if self.training else direct.mean)
        return self.interactions(entries), gene_effects

    @torch.compiler.disable
    def shift_moments(self, entries: DosageEntries) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the shifts of cells, in the frame of the networks.

        Returns
        -------
        Mean and variance of each coordinate, each of shape ``(n_cells, n_latent)``.
        """
        rows, index = entries.perturbation.unique(return_inverse=True)
        mean, variance = self.effects.moments(rows)
        frame = self.effects.frame
        return (
            additive_shift(entries, mean[index]) @ frame,
            additive_shift(entries, variance[index], power=2) @ frame.square(),
        )

    def expected_shift(self, dosage: Tensor) -> Tensor:
        """Expected shifts under conditions, in the frame of the masks.

        Parameters
        ----------
        dosage
            Doses, shape ``(n_conditions, n_perturbations)``.

        Returns
        -------
        Shape ``(n_conditions, n_latent)``.
        """
        entries, _ = self._cell_entries(dosage)
        mean, _ = self.effects.moments(entries.perturbation)
        return additive_shift(entries, mean)

    @torch.compiler.disable
    def _sampled_shift(self, entries: DosageEntries, n_samples: int) -> Tensor:
        """Draws of the shifts, shared by the cells of a perturbation, with gradients."""
        rows, index = entries.perturbation.unique(return_inverse=True)
        effects = self.effects.rsample(rows, _RELAXATION_TEMPERATURE, n_samples)
        shift = additive_shift(entries, effects[:, index]) @ self.effects.frame
        return shift[0] if n_samples == 1 else shift

    def _drawn_entries(
        self, dosage: Tensor, draws: GlobalDraws
    ) -> tuple[DosageEntries, GeneEffects | None]:
        """Doses as they act, and direct effects, under draws of what all cells share."""
        entries = dosage_entries(dosage)
        if draws.hill is not None:
            entries = HillDoseResponse.respond(entries, draws.hill)
        gene_effects = None
        if self.direct_effects is not None and draws.direct is not None:
            gene_effects = self.direct_effects.of(entries, draws.direct)
        return self.interactions(entries), gene_effects


class SAMSVAEModule(PerturbationShift, PerturbationVAEModule):
    r"""Sparse additive mechanism shift VAE (Bereket and Karaletsos, NeurIPS 2023).

    The counts of cell i with doses :math:`d_i` and covariates :math:`s_i` come from

    .. math::
       z_i &= z^b_i + \sum_t d_{it} (m_t \odot e_t), \quad z^b_i \sim \mathrm{Normal}(0, I) \\
       x_{ig} &\sim \mathrm{NegativeBinomial}(l_i \, \mathrm{softmax}_g f(z_i, s_i), \theta_g)

    with masks and embeddings as in :class:`~scvi_sams.module.PerturbationEffects` and guides of
    the basal state as in :class:`~scvi_sams.module.PotentialEncoder`. With ``mask_prior=1`` it is
    CPA-VAE. With ``basal_posterior="residual"`` and ``embedding_posterior="point"`` it is SVAE+
    (Lopez et al., CLeaR 2023): the guide of the full state sees the counts alone, and the shift
    enters as the mean of its prior.

    Parameters
    ----------
    n_input, n_perturbations
        Number of genes and of perturbations.
    global_inference
        ``"closed_form"`` or ``"gradient"``.
    basal_posterior
        See :class:`~scvi_sams.module.PotentialEncoder`.
    embedding_posterior, mask_prior, mask_prior_shared_by, embedding_scale, spike_scale
        Posterior and prior of the effects, see :class:`~scvi_sams.module.PerturbationEffects`.
    mask_evidence_cells
        See :class:`~scvi_sams.module.ClosedFormInference`.
    dose_response
        ``"linear"``, or ``"hill"`` for :class:`~scvi_sams.module.HillDoseResponse`.
    interactions, interaction_prior
        Pairs with an effect of their own (:class:`~scvi_sams.module.PairInteractions`), and the
        prior probability of their masks.
    targets
        Gene that each perturbation targets (:class:`~scvi_sams.module.DirectEffects`), ``-1`` for
        none; ``None`` for no direct effects.
    **kwargs
        Arguments of :class:`~scvi_sams.module.PerturbationVAEModule`.
    """

    effects: PerturbationEffects

    def __init__(
        self,
        n_input: int,
        n_perturbations: int,
        *,
        global_inference: Literal["closed_form", "gradient"] = "closed_form",
        basal_posterior: BasalPosterior = "correlated",
        embedding_posterior: EmbeddingPosterior = "spike_and_slab",
        mask_prior: float | tuple[float, float] = 0.02,
        mask_prior_shared_by: MaskPriorSharing = "all",
        embedding_scale: float = 1.0,
        spike_scale: float | Literal["learned"] = "learned",
        mask_evidence_cells: float | None = 30.0,
        dose_response: Literal["linear", "hill"] = "linear",
        interactions: Sequence[tuple[int, int]] = (),
        interaction_prior: float = 0.002,
        targets: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_input, n_perturbations, basal_posterior=basal_posterior, **kwargs)
        closed_form = global_inference == "closed_form"
        self.interactions = PairInteractions(n_perturbations, interactions)
        self.effects = PerturbationEffects(
            n_perturbations,
            self.n_latent,
            posterior=embedding_posterior,
            mask_prior=mask_prior,
            mask_prior_shared_by=mask_prior_shared_by,
            embedding_scale=embedding_scale,
            spike_scale=spike_scale if closed_form else 0.0,
            n_pairs=len(self.interactions),
            interaction_prior=interaction_prior,
            trainable=not closed_form,
        )
        self.closed_form = (
            ClosedFormInference(
                self.effects.n_rows,
                self.n_latent,
                n_batch=self.n_batch,
                mask_evidence_cells=mask_evidence_cells if self.effects.sparse else None,
            )
            if closed_form
            else None
        )
        self.dose_response = HillDoseResponse(n_perturbations) if dose_response == "hill" else None
        self.direct_effects = None if targets is None else DirectEffects(targets)

    # -- cells ---------------------------------------------------------------------------------

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
        (its posterior), ``library``, ``gene_effects``, and for the loss ``potential``,
        ``entries``, ``shift_mean`` and ``shift_variance`` (moments of the shift, network frame).
        """
        entries, gene_effects = self._cell_entries(dosage)
        if self.training and self._samples_shift:
            shift_mean = self._sampled_shift(entries, n_samples)
            shift_variance = torch.zeros_like(shift_mean)
        else:
            shift_mean, shift_variance = self.shift_moments(entries)
        potential = self._potential(x, shift_mean, batch_index, cat_covs, cont_covs)

        # Given the shift, z is normal; the shift itself stands in by its two moments.
        state_mean = potential.basal_mean(shift_mean) + shift_mean
        state_variance = potential.state_variance(shift_variance)
        has_draws = state_mean.dim() > 2 or n_samples == 1
        shape = state_mean.shape if has_draws else (n_samples, *state_mean.shape)
        noise = torch.randn(shape, dtype=state_mean.dtype, device=state_mean.device)
        to_masks = self.effects.frame.T
        return {
            "z": (state_mean + state_variance.sqrt() * noise) @ to_masks,
            "qz": Normal(
                state_mean @ to_masks,
                (state_variance @ to_masks.square()).sqrt(),
                validate_args=False,
            ),
            "library": self._library(x, library),
            "gene_effects": gene_effects,
            "potential": potential,
            "entries": entries,
            "batch_index": batch_index,
            "shift_mean": shift_mean,
            "shift_variance": shift_variance,
        }

    def _potential(
        self,
        x: Tensor,
        shift: Tensor,
        batch_index: Tensor | None,
        cat_covs: Tensor | None,
        cont_covs: Tensor | None,
    ) -> Potential:
        categories, cont = self._encoder_covariates(batch_index, cat_covs, cont_covs)
        side_input = shift if self.encoder.sees_shift else None
        potential = self.encoder(x, *categories, cont=cont, side_input=side_input)
        if self.closed_form is None:
            return potential
        basal_mean = self._basal_mean(batch_index, len(x))
        return potential._replace(location=potential.location - basal_mean)

    def _basal_mean(self, batch_index: Tensor | None, n_cells: int) -> Tensor | float:
        """Mean basal state of the batches of cells, network frame; zero without closed form."""
        if self.closed_form is None:
            return 0.0
        means = self.closed_form.basal_mean
        if batch_index is None:
            return means[:1].expand(n_cells, -1)
        return means[batch_index.squeeze(-1).long()]

    def _to_network(self, z: Tensor, batch_index: Tensor | None) -> Tensor:
        return z @ self.effects.frame + self._basal_mean(batch_index, z.shape[-2])

    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the basal guide from its prior, expected over the shift.

        Quadratic in the shift, hence exact from its two moments.

        Returns
        -------
        Nats, shape ``([n_particles,] n_cells)``.
        """
        potential = inference_outputs["potential"]
        squared = potential.basal_mean(inference_outputs["shift_mean"]).square()
        squared = squared + potential.basal_variance(inference_outputs["shift_variance"])
        variance = potential.variance
        return 0.5 * (squared + variance - 1 - variance.log()).sum(-1)

    def sample_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Draw the basal states of cells, at their expected shift.

        Returns
        -------
        Frame of the masks, shape ``(n_cells, n_latent)``.
        """
        potential = inference_outputs["potential"]
        mean = potential.basal_mean(inference_outputs["shift_mean"])
        basal = mean + potential.variance.sqrt() * torch.randn_like(mean)
        return basal @ self.effects.frame.T

    @torch.no_grad()
    def observe(self, inference_outputs: dict[str, Any]) -> None:
        """Add a minibatch to the statistics of the closed-form inference, if that is used."""
        if self.closed_form is None or self.effects.frozen.all():
            return
        location, gain, variance = inference_outputs["potential"]
        batch_index = inference_outputs["batch_index"]
        if batch_index is None:
            batch_index = torch.zeros_like(location[:, :1], dtype=torch.long)
        entries = inference_outputs["entries"]
        self.closed_form.observe(
            self.effects,
            entries._replace(dose=entries.dose.detach()),
            Potential(*(field.detach().float() for field in (location, gain, variance))),
            inference_outputs["shift_mean"].detach(),
            batch_index.squeeze(1),
            int(self.n_training_cells),
        )

    # -- perturbations -------------------------------------------------------------------------

    def global_divergences(self, of_effects: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Divergences of masks, embeddings, dose responses and direct effects, in nats."""
        terms = dict(self.effects.kl_divergence() if of_effects is None else of_effects)
        if self.dose_response is not None:
            terms["kl_dose_response"] = self.dose_response.kl_divergence()
        if self.direct_effects is not None:
            terms["kl_direct"] = self.direct_effects.kl_divergence()
        return terms

    def global_parameters(self) -> list[nn.Parameter]:
        """Parameters of the posterior of what all cells share that are learned by gradient."""
        parts = (self.dose_response, self.direct_effects)
        others = [p for part in parts if part is not None for p in part.parameters()]
        return self.effects.trainable_parameters() + others

    def zero_frozen_gradients(self) -> None:
        """Keep training from moving perturbations that are frozen."""
        frozen = self.effects.frozen.squeeze(1)
        for parameter in self.global_parameters():
            if parameter.grad is not None:
                parameter.grad[frozen[: len(parameter)]] = 0

    @property
    def n_global_elements(self) -> int:
        """Numbers in one draw of what all cells share."""
        return self.effects.slab_mean.numel()

    def sample_globals(self, n_samples: int, perturbations: Tensor | None = None) -> GlobalDraws:
        """Draw effects, dose responses and direct effects from their posterior."""
        if perturbations is None:
            rows = torch.arange(self.effects.n_rows, device=self.effects.frame.device)
        else:
            pairs = torch.arange(
                self.n_perturbations, self.effects.n_rows, device=perturbations.device
            )
            rows = torch.cat([perturbations, pairs])
        curves, direct = self.dose_response, self.direct_effects
        return GlobalDraws(
            n_samples,
            self.effects.sample(n_samples, rows),
            rows,
            None if direct is None else direct.rsample(n_samples),
            None if curves is None else curves.rsample(n_samples),
        )

    def decode_condition(
        self,
        population: CellPopulation,
        dosage: Tensor,
        draws: GlobalDraws,
        one_draw_a_cell: bool = False,
    ) -> Observation:
        """Distribution of the genes of a population of cells under a condition."""
        entries, gene_effects = self._drawn_entries(dosage, draws)
        shift = additive_shift(entries, draws.of_rows(entries.perturbation))
        if one_draw_a_cell:
            shift = shift.squeeze(1)
        if gene_effects is not None:
            value = gene_effects.value
            value = value if one_draw_a_cell else value.unsqueeze(1)
            gene_effects = gene_effects._replace(cell=None, value=value)
        state = population.basal + shift
        covariates = population.covariates()
        return self.generative(state, gene_effects=gene_effects, **covariates)["px"]

    @torch.inference_mode()
    def log_importance_weights(self, tensors: dict[str, Tensor], draws: GlobalDraws) -> Tensor:
        """Importance weights of cells under given draws of the global latents.

        ``log p(x | z) + log p(zb) - log q(zb | x, shift)`` with ``zb`` drawn from its guide. The
        draws are shared by all cells and not scored against their prior, as in Bereket and
        Karaletsos (2023).

        Parameters
        ----------
        tensors
            A minibatch.
        draws
            Draws of the global latents of all perturbations.

        Returns
        -------
        Shape ``(n_particles, n_cells)``.
        """
        inputs = self._get_inference_input(tensors)
        device = self.effects.frame.device
        inputs = {key: None if v is None else v.to(device) for key, v in inputs.items()}
        x, library = inputs.pop("x"), inputs.pop("library")
        entries, gene_effects = self._drawn_entries(inputs.pop("dosage"), draws)
        frame = self.effects.frame
        shift = additive_shift(entries, draws.of_rows(entries.perturbation)) @ frame
        potential = self._potential(x, shift, **inputs)
        noise = torch.randn_like(shift)
        basal = potential.basal_mean(shift) + potential.variance.sqrt() * noise
        library = self._library(x, library)
        decoded = self.generative(
            (basal + shift) @ frame.T, library, gene_effects=gene_effects, **inputs
        )
        # The normalising constants of prior and guide cancel but for the guide's variance.
        log_ratio = 0.5 * (noise.square() - basal.square() + potential.variance.log()).sum(-1)
        return self._log_likelihood(decoded, x, library) + log_ratio
