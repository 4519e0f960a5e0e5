"""SAMS-VAE, and the members of its family that differ by a posterior or a prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi.module.base import auto_move_data
from torch.distributions import Normal

from scvi_sams.module.base import GlobalDraws, PerturbationVAEModule
from scvi_sams.module.closed_form import ClosedForm
from scvi_sams.module.contexts import ContextDeviations
from scvi_sams.module.doses import (
    DirectEffects,
    Doses,
    HillDoseResponse,
    PairInteractions,
    additive_shift,
)
from scvi_sams.module.gene_effects import ResidualEffects
from scvi_sams.module.networks import Potential
from scvi_sams.module.posteriors import GIVEN_LOGIT, POSTERIORS, MaskPrior, SpikeAndSlab

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from scvi_sams.module.base import CellPopulation
    from scvi_sams.module.doses import GeneEffects, HillDraws
    from scvi_sams.module.likelihood import Observation
    from scvi_sams.module.networks import BasalPosterior
    from scvi_sams.module.posteriors import EffectsPosterior, EmbeddingPosterior, MaskPriorSharing


class SAMSVAEModule(PerturbationVAEModule):
    r"""Sparse additive mechanism shift VAE (Bereket and Karaletsos, NeurIPS 2023).

    The counts of cell i with doses :math:`d_i` and covariates :math:`s_i` come from

    .. math::
       z_i &= z^b_i + \sum_t d_{it} (m_t \odot e_t), \quad z^b_i \sim \mathrm{Normal}(0, I) \\
       x_{ig} &\sim \mathrm{NegativeBinomial}(l_i \, \mathrm{softmax}_g f(z_i, s_i), \theta_g)

    with masks and embeddings as in :class:`~scvi_sams.module.posteriors.EffectsPosterior` and
    guides of the basal state as in :class:`~scvi_sams.module.networks.PotentialEncoder`. With
    ``mask_prior=1`` it is CPA-VAE. With ``basal_posterior="residual"`` and
    ``embedding_posterior="point"`` it is SVAE+ (Lopez et al., CLeaR 2023): the guide of the full
    state sees the counts alone, and the shift enters as the mean of its prior.

    Parameters
    ----------
    n_input, n_perturbations
        Number of genes and of perturbations.
    global_inference
        ``"closed_form"`` or ``"gradient"``.
    basal_posterior
        See :class:`~scvi_sams.module.networks.PotentialEncoder`.
    embedding_posterior
        A key of :data:`~scvi_sams.module.posteriors.POSTERIORS`.
    mask_prior, mask_prior_shared_by
        See :class:`~scvi_sams.module.posteriors.MaskPrior`.
    embedding_scale
        Prior standard deviation of an embedding.
    background_scale
        See :class:`~scvi_sams.module.posteriors.SpikeAndSlab`; none with gradients.
    mask_evidence_cells
        See :class:`~scvi_sams.module.closed_form.ClosedForm`.
    reference_doses
        Median dose of each perturbation, for a Hill response; ``None`` for doses as they are.
    interactions, interaction_prior
        Pairs with an effect of their own (:class:`~scvi_sams.module.doses.PairInteractions`), and
        the prior probability of their masks.
    n_contexts, context_prior
        Contexts of cells, in which effects may deviate
        (:class:`~scvi_sams.module.contexts.ContextDeviations`), and the prior probability of the
        masks of deviations. Closed-form inference only.
    targets
        Gene that each perturbation targets, ``-1`` for none; ``None`` if none does.
    direct_effects
        Whether targets have an effect of their own
        (:class:`~scvi_sams.module.doses.DirectEffects`).
    gene_effects
        Whether predictions have effects on single genes that latents leave over
        (:class:`~scvi_sams.module.gene_effects.ResidualEffects`).
    **kwargs
        Arguments of :class:`~scvi_sams.module.base.PerturbationVAEModule`.
    """

    effects: EffectsPosterior

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
        background_scale: float | Literal["learned"] = "learned",
        mask_evidence_cells: float | None = 100.0,
        reference_doses: Sequence[float] | None = None,
        interactions: Sequence[tuple[int, int]] = (),
        interaction_prior: float = 0.002,
        n_contexts: int = 1,
        context_prior: float = 0.002,
        targets: Sequence[int] | None = None,
        direct_effects: bool = True,
        gene_effects: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_input, n_perturbations, basal_posterior=basal_posterior, **kwargs)
        self.interactions = PairInteractions(n_perturbations, interactions)
        self.n_contexts = n_contexts
        self.contexts = ContextDeviations(n_perturbations + len(self.interactions), n_contexts)
        if n_contexts > 1 and global_inference != "closed_form":
            raise ValueError(
                "Effects by context (context_key) take closed-form inference, which knows where "
                "the cells of each context lie: use SAMSVAE or CPAVAE with "
                "global_inference='closed_form', or leave context_key out."
            )
        prior = MaskPrior(
            n_perturbations,
            self.n_latent,
            mask_prior,
            mask_prior_shared_by,
            len(self.interactions),
            interaction_prior,
            n_perturbations * n_contexts if n_contexts > 1 else 0,
            context_prior,
        )
        if global_inference == "closed_form":
            self.effects = SpikeAndSlab(prior, embedding_scale, False, background_scale)
            self.closed_form = ClosedForm(
                self.effects.n_rows,
                self.n_latent,
                n_batch=self.n_batch,
                n_contexts=n_contexts,
                mask_evidence_cells=mask_evidence_cells if prior.sparse else None,
            )
        else:
            self.effects = POSTERIORS[embedding_posterior](prior, embedding_scale)
        self.dose_response = None if reference_doses is None else HillDoseResponse(reference_doses)
        self.direct_effects = None
        if targets is not None and direct_effects:
            self.direct_effects = DirectEffects(targets)
        if gene_effects:
            self.gene_effects = ResidualEffects(n_perturbations, n_input, targets)
        # Whether training must draw shifts. The divergence of the basal state is quadratic in the
        # shift: where the state that is decoded does not depend on it (residual guide), or its two
        # moments stand in for it (closed form), no draw is needed.
        self._samples_shift = self.closed_form is None and (
            basal_posterior != "residual" or embedding_posterior == "correlated"
        )
        self.register_load_state_dict_pre_hook(_upgrade_state)

    # -- cells ---------------------------------------------------------------------------------

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        perturbation: Tensor,
        dose: Tensor,
        library: Tensor | None = None,
        batch_index: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        context: Tensor | None = None,
        n_samples: int = 1,
    ) -> dict[str, Any]:
        """Infer the latent state of cells.

        Parameters
        ----------
        x
            Counts, shape ``(n_cells, n_genes)``.
        perturbation, dose
            What cells received, each of shape ``(n_cells, n_columns)``, see
            :class:`~scvi_sams.module.doses.Doses`.
        library
            Size factors, shape ``(n_cells, 1)``; the total count by default.
        batch_index, cat_covs, cont_covs
            Covariates, shapes ``(n_cells, 1)``, ``(n_cells, n_categorical)`` and
            ``(n_cells, n_continuous)``.
        context
            Contexts of cells, shape ``(n_cells, 1)``.
        n_samples
            Number of draws of ``z``; with one, there is no axis for them.

        Returns
        -------
        dict
            ``z`` (full state, shape ``([n_samples,] n_cells, n_latent)``), ``qz`` (its posterior),
            ``library``, ``gene_effects``, and for loss and statistics ``potential``, ``doses``,
            ``shift_mean`` and ``shift_variance`` (moments of the shift) and ``effect_of_dose``.
        """
        hill, direct = None, None
        if self.dose_response is not None:
            curves = self.dose_response
            hill = curves.rsample() if self.training else curves.mean()
        if self.direct_effects is not None:
            effects = self.direct_effects
            direct = effects.rsample() if self.training else effects.mean
        given = Doses(perturbation.long(), dose, context)
        doses, gene_effects = self._acting(given, hill, direct)
        effect_of_dose = None
        if self.training and self._samples_shift:
            shift_mean = self.effects.sampled_shift(doses, n_samples)
            shift_variance = torch.zeros_like(shift_mean)
        else:
            shift_mean, shift_variance, effect_of_dose = self.effects.shift_moments(doses)
            effect_of_dose = self.contexts.together(effect_of_dose, perturbation.shape[1])
        potential = self._potential(x, shift_mean, batch_index, cat_covs, cont_covs, context)

        # Given the shift, z is normal; the shift itself stands in by its two moments.
        state_mean = potential.basal_mean(shift_mean) + shift_mean
        state_std = potential.state_variance(shift_variance).sqrt()
        has_draws = state_mean.dim() > 2 or n_samples == 1
        shape = state_mean.shape if has_draws else (n_samples, *state_mean.shape)
        noise = torch.randn(shape, dtype=state_mean.dtype, device=state_mean.device)
        return {
            "z": state_mean + state_std * noise,
            "qz": Normal(state_mean, state_std, validate_args=False),
            "library": self._library(x, library),
            "gene_effects": gene_effects,
            "potential": potential,
            "doses": doses,
            "basal_group": self._basal_group(batch_index, len(x), context),
            "shift_mean": shift_mean,
            "shift_variance": shift_variance,
            "effect_of_dose": effect_of_dose,
        }

    def _acting(
        self, doses: Doses, hill: HillDraws | None, direct: Tensor | None
    ) -> tuple[Doses, GeneEffects | None]:
        """Doses as they act, pairs and deviations with them, and effects on single genes."""
        if hill is not None:
            doses = HillDoseResponse.respond(doses, hill)
        gene_effects = None
        if self.direct_effects is not None and direct is not None:
            gene_effects = self.direct_effects.of(doses, direct)
        return self.contexts.append(self.interactions(doses), doses), gene_effects

    def _potential(
        self,
        x: Tensor,
        shift: Tensor,
        batch_index: Tensor | None,
        cat_covs: Tensor | None,
        cont_covs: Tensor | None,
        context: Tensor | None = None,
    ) -> Potential:
        categories, cont = self._encoder_covariates(batch_index, cat_covs, cont_covs)
        side_input = shift if self.encoder.sees_shift else None
        potential = self.encoder(x, *categories, cont=cont, side_input=side_input)
        basal_mean = self._basal_mean(batch_index, len(x), context)
        return potential._replace(location=potential.location - basal_mean)

    def _basal_mean(
        self, batch_index: Tensor | None, n_cells: int, context: Tensor | None = None
    ) -> Tensor | float:
        """Mean basal state of the batches and contexts of cells; zero without closed form."""
        if self.closed_form is None:
            return 0.0
        means = self.closed_form.basal_mean
        if batch_index is None and context is None:
            return means[:1].expand(n_cells, -1)
        return means[self._basal_group(batch_index, n_cells, context)]

    def _basal_group(
        self, batch_index: Tensor | None, n_cells: int, context: Tensor | None
    ) -> Tensor:
        """Which basal mean cells have, ``(n_cells,)``: those of a new batch come last."""
        group = torch.zeros(n_cells, dtype=torch.long, device=self.effects.rotation.device)
        if batch_index is not None:
            group = batch_index.squeeze(-1).long()
        if context is not None:
            group = group * self.n_contexts + context.squeeze(-1).long()
        return group

    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the basal guide from its prior, expected over the shift.

        Quadratic in the shift, hence exact from its two moments. Nats, shape
        ``([n_particles,] n_cells)``.
        """
        potential = inference_outputs["potential"]
        squared = potential.basal_mean(inference_outputs["shift_mean"]).square()
        squared = squared + potential.basal_variance(inference_outputs["shift_variance"])
        variance = potential.variance
        return 0.5 * (squared + variance - 1 - variance.log()).sum(-1)

    def sample_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Draw the basal states of cells at their expected shift, ``(n_cells, n_latent)``."""
        potential = inference_outputs["potential"]
        mean = potential.basal_mean(inference_outputs["shift_mean"])
        return mean + potential.variance.sqrt() * torch.randn_like(mean)

    @torch.no_grad()
    def observe(self, inference_outputs: dict[str, Any]) -> None:
        """Add a minibatch to the statistics of the closed-form inference, if that is used."""
        if self.closed_form is None or self.effects.is_frozen:
            return
        location, gain, variance = inference_outputs["potential"]
        doses = inference_outputs["doses"]
        self.closed_form.observe(
            self.effects,  # type: ignore[arg-type]
            doses._replace(dose=doses.dose.detach()),
            Potential(*(field.detach().float() for field in (location, gain, variance))),
            inference_outputs["shift_mean"].detach(),
            inference_outputs["effect_of_dose"].detach(),
            inference_outputs["basal_group"],
            self.n_training_cells,
        )

    # -- perturbations -------------------------------------------------------------------------

    def global_divergences(self, of_effects: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Divergences of masks, embeddings, dose responses and direct effects, in nats."""
        terms = dict(self.effects.kl() if of_effects is None else of_effects)
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

    def drop_frozen_gradients(self) -> None:
        """Keep a step from moving perturbations that are frozen."""
        for parameter in self.global_parameters():
            if parameter.grad is not None:
                free = ~self.effects.frozen[: len(parameter)]
                parameter.grad.mul_(free if parameter.dim() > 1 else free.squeeze(1))

    @property
    def n_global_elements(self) -> int:  # type: ignore[override]
        """Numbers in one draw of what all cells share."""
        return self.effects.slab_mean.numel()

    def expected_shift(self, doses: Doses) -> Tensor:
        """Expected shifts under doses, in latents, shape ``(n_cells, n_latent)``."""
        hill = None if self.dose_response is None else self.dose_response.mean()
        doses, _ = self._acting(doses, hill, None)
        return additive_shift(doses, self.effects.moments(doses.perturbation)[0])

    def sample_globals(self, n_samples: int, perturbations: Tensor | None = None) -> GlobalDraws:
        """Draw effects, dose responses and direct effects from their posterior."""
        rows = torch.arange(self.effects.n_rows, device=self.effects.rotation.device)
        if perturbations is not None:
            named = perturbations.to(rows)
            pairs = rows[self.n_perturbations : self.contexts.first_row]
            rows = torch.cat([named, pairs, self.contexts.rows(named)])
        curves, direct = self.dose_response, self.direct_effects
        return GlobalDraws(
            n_samples,
            self.effects.to_network(self.effects.sample(n_samples, rows)),
            rows,
            None if direct is None else direct.rsample(n_samples),
            None if curves is None else curves.rsample(n_samples),
            None if self.gene_effects is None else self.gene_effects.sample(n_samples),
        )

    def decode_condition(
        self,
        population: CellPopulation,
        doses: Doses,
        draws: GlobalDraws,
        one_draw_a_cell: bool = False,
    ) -> Observation:
        """Distribution of the genes of a population of cells under a condition."""
        responses = doses if draws.hill is None else HillDoseResponse.respond(doses, draws.hill)
        if draws.multiple is not None:
            multiplied = responses.dose * draws.multiple[responses.perturbation]
            responses = responses._replace(dose=multiplied)
        doses, gene_effects = self._acting(responses, None, draws.direct)
        shift = draws.shift(doses)  # n_samples x 1 x n_latent
        if one_draw_a_cell:
            shift = shift.squeeze(1)
        log_fold_change = None
        if self.gene_effects is not None and draws.residual is not None:
            log_fold_change = self.gene_effects.of(responses, draws.residual)
            if not one_draw_a_cell:
                log_fold_change = log_fold_change.unsqueeze(1)
        if gene_effects is not None:
            value = gene_effects.value
            value = value.reshape(draws.n_samples, -1)
            if not one_draw_a_cell:
                value = value.unsqueeze(1)
            gene_effects = gene_effects._replace(value=value)
        return self.generative(
            population.basal + shift,
            gene_effects=gene_effects,
            log_fold_change=log_fold_change,
            **population.covariates(),
        )["px"]

    def expected_responses(self, doses: Doses) -> Doses:
        """Doses as they act, by the means of the curves."""
        curves = self.dose_response
        return doses if curves is None else curves.respond(doses, curves.mean())

    @torch.inference_mode()
    def decode_cells(self, population: CellPopulation, doses: Doses, noise: Tensor) -> Observation:
        """Distribution of the genes of cells that each received something of their own.

        Shifts are normal with the two moments of their posterior, as in training; what else is
        uncertain is at its mean.

        Parameters
        ----------
        population
            Basal states and covariates of cells.
        doses
            Doses of each of them.
        noise
            Standard normal, of which the shifts are drawn, shape ``(n_cells, n_latent)``.

        Returns
        -------
        scvi.distributions.NegativeBinomial or another observation
            Of shape ``(n_cells, n_genes)``.
        """
        hill = None if self.dose_response is None else self.dose_response.mean()
        direct = None if self.direct_effects is None else self.direct_effects.mean
        acting, gene_effects = self._acting(doses, hill, direct)
        mean, variance, _ = self.effects.shift_moments(acting)
        log_fold_change = None
        if self.gene_effects is not None and self.gene_effects.is_fitted:
            log_fold_change = self.gene_effects.expected(self.expected_responses(doses))
        return self.generative(
            population.basal + mean + variance.sqrt() * noise,
            gene_effects=gene_effects,
            log_fold_change=log_fold_change,
            **population.covariates(),
        )["px"]

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
        Tensor
            Shape ``(n_particles, n_cells)``.
        """
        inputs = self._get_inference_input(tensors)
        device = self.effects.rotation.device
        inputs = {key: None if v is None else v.to(device) for key, v in inputs.items()}
        x, library = inputs.pop("x"), inputs.pop("library")
        given = Doses(inputs.pop("perturbation").long(), inputs.pop("dose"), inputs.get("context"))
        doses, gene_effects = self._acting(given, draws.hill, draws.direct)
        shift = draws.shift(doses)
        potential = self._potential(x, shift, **inputs)
        noise = torch.randn_like(shift)
        basal = potential.basal_mean(shift) + potential.variance.sqrt() * noise
        library = self._library(x, library)
        decoded = self.generative(basal + shift, library, gene_effects=gene_effects, **inputs)
        # The normalising constants of prior and guide cancel but for the guide's variance.
        log_ratio = 0.5 * (noise.square() - basal.square() + potential.variance.log()).sum(-1)
        return self._log_likelihood(decoded, x, library) + log_ratio


_RENAMED = {
    "effects.frame": "effects.rotation",
    "effects.spike_variance": "effects.background_variance",
    "effects.spike_posterior_variance": "effects.spike_variance",
    "effects.correlated.code": "effects.code",
    "effects.correlated.from_mask.weight": "effects.from_mask.weight",
    "effects.correlated.from_mask.bias": "effects.from_mask.bias",
    "effects.correlated.moments.weight": "effects.to_moments.weight",
    "effects.correlated.moments.bias": "effects.to_moments.bias",
    "closed_form.statistics.pull": "closed_form.statistics.linear",
    "closed_form.statistics.basal_pull": "closed_form.statistics.basal_linear",
}


def _upgrade_state(
    module: SAMSVAEModule, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Bring the state of a model of version 0.1.0 into the present form."""
    if prefix + "effects.frame" not in state:
        return
    old = {name: state.pop(prefix + name) for name in _RENAMED if prefix + name in state}
    state |= {prefix + _RENAMED[name]: value for name, value in old.items()}
    state[prefix + "effects.n_frozen"] = state[prefix + "effects.frozen"].sum()
    logits = state[prefix + "effects.mask_logits"]
    given = module.effects.mask_prior.given.to(logits.device)
    state[prefix + "effects.mask_logits"] = torch.where(given, GIVEN_LOGIT, logits)
    largest = state.pop(prefix + "closed_form.statistics.max_per_cell", None)
    if largest is not None:
        weight = state[prefix + "closed_form.statistics.weight"]
        together = torch.full_like(weight, largest.item())
        state[prefix + "closed_form.statistics.n_together"] = together
    if module.closed_form is not None:
        state[prefix + "closed_form.settled"] = state[prefix + "effects.masks_on"].bool()
    if isinstance(module.effects, SpikeAndSlab):
        for name in ("spike_divergence", "background_scales", "background_weights"):
            state[prefix + f"effects.{name}"] = getattr(module.effects, name)
        state[prefix + "effects.has_mixture"] = torch.tensor(False)
    known = module.state_dict().keys()
    for key in [k for k in state if k.startswith(prefix + "effects.")]:
        if key[len(prefix) :] not in known:  # families used to keep the fields of all
            del state[key]
