"""Closed-form inference of masks, effects and rotation: pure steps, and their solver."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from scvi_sams._compat import HostState
from scvi_sams.module.contexts import shared_part
from scvi_sams.module.posteriors import SpikeSlab
from scvi_sams.module.rotation import SparseEvidence, procrustes, sparse_rotation
from scvi_sams.module.statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scvi_sams.module.doses import Doses
    from scvi_sams.module.networks import Potential
    from scvi_sams.module.posteriors import SpikeAndSlab


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread of the processor inside of a block.

    Thousands of singular value decompositions of a few dozen rows each take three times as long
    on two threads as on one, and forty times if other programs are busy on the same cores: the
    threads wait for each other. A decorator too.

    Examples
    --------
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


MAX_LOGIT = 12.0
"""Inclusion probabilities stay off 0 and 1, so that a mask can change its mind."""


class MaskEvidence(NamedTuple):
    """What the cells of a perturbation can say of its masks, each ``(n_rows, n_latent)``.

    A score has the variance ``curvature`` about ``curvature * effect``; the log-odds of a mask
    are ``at_zero + per_square * score**2``.
    """

    curvature: Tensor
    at_zero: Tensor
    per_square: Tensor


def mask_evidence(
    curvature: Tensor,
    *,
    mask_prior_logit: Tensor | float,
    embedding_variance: float,
    background_variance: Tensor | float = 0.0,
    mask_floor_variance: float = 0.0,
) -> MaskEvidence:
    """Log-odds of masks as a function of the score; arguments as of :func:`spike_slab`.

    Examples
    --------
    >>> evidence = mask_evidence(
    ...     torch.tensor([3.0]), mask_prior_logit=0.0, embedding_variance=1.0
    ... )
    >>> evidence.at_zero, evidence.per_square
    (tensor([-0.6931]), tensor([0.1250]))
    """
    variance = torch.as_tensor(background_variance, dtype=curvature.dtype, device=curvature.device)
    background = variance.clamp(min=mask_floor_variance)
    # Shrinking score and curvature alike is what noise of the background's variance does.
    discount = 1 / (1 + background * curvature)
    evidence_variance = embedding_variance / (1 + embedding_variance * discount * curvature)
    at_zero = mask_prior_logit + 0.5 * torch.log(evidence_variance / embedding_variance)
    return MaskEvidence(curvature, at_zero, 0.5 * evidence_variance * discount.square())


def spike_slab(
    score: Tensor,
    curvature: Tensor,
    *,
    mask_prior_logit: Tensor | float,
    embedding_variance: float,
    background_variance: Tensor | float = 0.0,
    mask_floor_variance: float = 0.0,
) -> SpikeSlab:
    r"""Posterior of masks and effects given a quadratic log-likelihood of each effect.

    The likelihood of one effect ``s`` is ``exp(score * s - curvature * s**2 / 2)``; its prior is
    ``Normal(0, embedding_variance + background_variance)`` where the mask is one and
    ``Normal(0, background_variance)`` where it is zero (a point at zero by default, the model of
    Bereket and Karaletsos 2023). Without a floor this is the exact coordinate update.

    Parameters
    ----------
    score, curvature
        First and negated second derivative of the log-likelihood at zero, broadcastable.
    mask_prior_logit
        Prior log-odds of the mask.
    embedding_variance
        Prior variance of an embedding.
    background_variance
        Prior variance of the effect where the mask is zero.
    mask_floor_variance
        Treat effects of this variance as background when the mask is judged, however sure the
        data are of them: evidence for a mask then saturates at ``1 / mask_floor_variance`` cells.
        A coarsened posterior (Miller and Dunson 2019), a modelling choice; it does not touch the
        effects.

    Returns
    -------
    The posterior.

    Examples
    --------
    >>> posterior = spike_slab(
    ...     torch.tensor([30.0]),
    ...     torch.tensor([10.0]),
    ...     mask_prior_logit=0.0,
    ...     embedding_variance=1.0,
    ... )
    >>> posterior.slab_mean
    tensor([2.7273])
    """
    variance = torch.as_tensor(background_variance, dtype=score.dtype, device=score.device)
    slab_posterior = 1 / (curvature + 1 / (embedding_variance + variance))
    # The form that stays finite for a point spike.
    spike_posterior = variance / (1 + variance * curvature)
    evidence = mask_evidence(
        curvature,
        mask_prior_logit=mask_prior_logit,
        embedding_variance=embedding_variance,
        background_variance=variance,
        mask_floor_variance=mask_floor_variance,
    )
    mask_logits = evidence.at_zero + evidence.per_square * score.square()
    return SpikeSlab(
        mask_logits.clamp(-MAX_LOGIT, MAX_LOGIT),
        slab_posterior * score,
        slab_posterior,
        spike_posterior * score,
        spike_posterior.expand_as(score),
    )


def selection_penalty(
    mask_logits: Tensor,
    curvature: Tensor,
    *,
    embedding_variance: float,
    mask_floor_variance: float,
) -> Tensor:
    r"""Evidence that a perturbation gains by having chosen the direction of a latent.

    The rotation turns a latent that nobody else uses towards the noise of the one perturbation
    that does: among k free latents its sampling noise then looks like one effect of k degrees of
    freedom, k/2 nats more than the mask of a given direction deserves. That is most of the
    evidence of perturbations with few cells, and next to none of those with many.

    Parameters
    ----------
    mask_logits
        Current log-odds of the masks, shape ``(n_perturbations, n_latent)``.
    curvature
        Curvature of the likelihood of each effect, shape ``(n_perturbations, n_latent)``.
    embedding_variance, mask_floor_variance
        As in :func:`spike_slab`.

    Returns
    -------
    Nats to take off the log-odds, shape ``(n_perturbations, n_latent)``; near zero where another
    perturbation uses the latent.

    Examples
    --------
    >>> off, curvature = torch.full((1, 3), -12.0), torch.full((1, 3), 1e6)
    >>> selection_penalty(
    ...     off, curvature, embedding_variance=1.0, mask_floor_variance=0.0
    ... ).round(decimals=2)
    tensor([[1., 1., 1.]])
    """
    log_off = -torch.nn.functional.softplus(mask_logits)
    nobody_else = torch.exp(log_off.sum(0) - log_off)
    # The background is not sampled anew with the cells, so its share of the noise is not chased.
    sampled = 1 / (1 + mask_floor_variance * curvature)
    precision = embedding_variance * curvature * sampled
    freedom = nobody_else * sampled * precision / (1 + precision)
    return 0.5 * nobody_else * (freedom.sum(1, keepdim=True) - freedom)


def learned_background_variance(
    posterior: SpikeSlab, prior_variance: float = 1e-4, prior_weight: float = 5.0
) -> Tensor:
    """Variance of the effects outside the masks that their posterior expects.

    The expectation-maximisation update under an inverse-gamma prior, so that a screen whose every
    other effect is zero ends at the prior and not at a singularity.

    Parameters
    ----------
    posterior
        Current posterior of masks and effects.
    prior_variance, prior_weight
        Prior guess, and the number of effects it counts for.

    Returns
    -------
    Scalar.
    """
    off = torch.sigmoid(-posterior.mask_logits)
    second_moment = posterior.spike_mean.square() + posterior.spike_variance
    return ((off * second_moment).sum() + prior_weight * prior_variance) / (
        off.sum() + prior_weight
    )


class MixturePosterior(NamedTuple):
    """Posterior of effects outside the masks, each of shape ``(n_rows, n_latent)``.

    The scales are the first axis of ``responsibility``; ``divergence`` is that of the posterior
    from the prior, in nats.
    """

    mean: Tensor
    variance: Tensor
    responsibility: Tensor
    divergence: Tensor


def scale_mixture(
    score: Tensor, curvature: Tensor, variances: Tensor, weights: Tensor
) -> MixturePosterior:
    r"""Posterior of effects whose prior is a mixture of centred normals.

    Every component is conjugate to the quadratic log-likelihood, so that the posterior is a
    mixture of normals: adaptive shrinkage (Stephens 2017).

    Parameters
    ----------
    score, curvature
        As in :func:`spike_slab`, shape ``(n_rows, n_latent)``.
    variances, weights
        Of the components, shape ``(n_scales,)``; a variance may be zero.

    Examples
    --------
    >>> posterior = scale_mixture(
    ...     torch.tensor([[10.0]]), torch.tensor([[4.0]]), torch.tensor([0.0, 1.0]), torch.ones(2)
    ... )
    >>> posterior.mean
    tensor([[1.9998]])
    """
    variances, weights = variances[:, None, None], weights[:, None, None]
    shrunk = variances / (1 + variances * curvature)  # posterior variance of each component
    evidence = 0.5 * (shrunk * score.square() - torch.log1p(variances * curvature))
    log_joint = weights.clamp(min=1e-30).log() + evidence
    log_evidence = log_joint.logsumexp(0)
    responsibility = (log_joint - log_evidence).exp()
    mean = (responsibility * shrunk).sum(0) * score
    second = (responsibility * (shrunk + (shrunk * score).square())).sum(0)
    expected_log_likelihood = score * mean - 0.5 * curvature * second
    return MixturePosterior(
        mean,
        (second - mean.square()).clamp(min=0),
        responsibility,
        (expected_log_likelihood - log_evidence).clamp(min=0),
    )


def safe_step(curvature: Tensor, rotation: Tensor, n_iterations: int = 8) -> Tensor:
    """Largest share of the way to their optima that all effects of a perturbation may go at once.

    Among the latents the curvature has entries off its diagonal where the networks use some
    coordinates and not others. Simultaneous steps converge below twice the inverse of the largest
    eigenvalue of the curvature scaled to a unit diagonal, which power iterations find.

    Parameters
    ----------
    curvature
        In the networks' coordinates, where it is diagonal, shape ``(n_rows, n_latent)``.
    rotation
        Axes of the latents in rows.
    n_iterations
        Power iterations.

    Returns
    -------
    Shape ``(n_rows, 1)``, at most one.

    Examples
    --------
    >>> safe_step(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.8, -0.6]]))
    tensor([[0.5000]])
    """
    scale = (curvature @ rotation.T.square()).clamp(min=1e-12).rsqrt()
    vector = torch.ones_like(curvature) + 1e-3 * torch.arange(curvature.shape[1]).to(curvature)
    for _ in range(n_iterations):
        vector = F.normalize(vector, dim=1)
        vector = scale * ((((scale * vector) @ rotation) * curvature) @ rotation.T)
    return 1 / vector.norm(dim=1, keepdim=True).clamp(min=1.0)


_MAX_STEP = 0.7  # of an update towards its optimum: the networks have not yet answered the last
_MAX_RELATIVE_WEIGHT = 2.0  # a perturbation with very many cells must not set the rotation alone
_SWITCH_ON_LOGIT = 8.0  # masks start on and are pruned
_SWITCH_ON_SWEEPS = 15
_RENEW_SWEEPS = 8  # from masks that are on, after the latents were turned
_FINAL_SWEEPS = 30
_SWEEPS_OF_STEP = 4  # in the last update, of steps of one over that many: 0.02 of the way is left
_LEAST_GAIN = 1.0  # nats that other axes must be worth
_N_RANDOM_STARTS = 2  # of the last search, when there is time
_NULL_EFFECTS = 10.0  # effects of exactly zero that the prior of the background's scales counts
# While the networks train. What is called later may be weaker: it cannot bend them any more.
_TRAINING_EVIDENCE_CELLS = 30.0


class ClosedForm(HostState, nn.Module):
    """Coordinate ascent over masks, effects and rotation, from sufficient statistics of the cells.

    The statistics are in the networks' coordinates; the effects are turned to them and back here
    and nowhere else.

    Parameters
    ----------
    n_rows, n_latent
        Shape of the effects.
    n_batch
        Number of batches.
    n_contexts
        Number of contexts. A basal mean is then one of a batch and a context, and the last rows
        of the effects are deviations by context.
    mask_evidence_cells
        Evidence for a mask saturates at this many cells; ``None`` for no limit. An effect must
        stand out from a background of standard deviation ``mask_evidence_cells ** -0.5`` (in
        units of the basal standard deviation) to be called a mechanism. While networks train, at
        30 if that is fewer, so that they straighten what is weak rather than to call it.

    Attributes
    ----------
    settled
        Whether the networks are trained, see :meth:`settle`.
    """

    host_state = ("settled",)
    basal_mean: Tensor
    seen_effects: Tensor
    seen_basal: Tensor
    seen_cells: Tensor

    def __init__(
        self,
        n_rows: int,
        n_latent: int,
        *,
        n_batch: int = 1,
        n_contexts: int = 1,
        mask_evidence_cells: float | None = 100.0,
    ) -> None:
        super().__init__()
        self.n_contexts = n_contexts
        self.mask_evidence_cells = mask_evidence_cells
        self.settled = False
        n_groups = n_batch * n_contexts
        self.statistics = RunningStatistics(n_rows, n_latent, n_groups)
        self.register_buffer("basal_mean", torch.zeros(n_groups, n_latent))
        # Effects that the running averages were made under, see `_drift`: they follow the fit.
        self.register_buffer("seen_effects", torch.zeros(n_rows, n_latent), persistent=False)
        self.register_buffer("seen_basal", torch.zeros(n_groups, n_latent), persistent=False)
        self.register_buffer("seen_cells", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def observe(
        self,
        effects: SpikeAndSlab,
        doses: Doses,
        potential: Potential,
        shift: Tensor,
        effect_of_dose: Tensor,
        batch_index: Tensor,
        n_training_cells: int,
    ) -> None:
        """Add the cells of a minibatch.

        Parameters
        ----------
        effects
            Posterior of the effects.
        doses
            Doses of the cells.
        potential
            Potentials of the cells, centred at the basal mean of their batch.
        shift, effect_of_dose
            Expected shifts of the cells, shape ``(n_cells, n_latent)``, and what they are the
            sums of, shape ``(n_cells, n_columns, n_latent)``.
        batch_index
            Batch of each cell, or batch and context, shape ``(n_cells,)``.
        n_training_cells
            Number of training cells.
        """
        statistics = self.statistics
        statistics.observe(doses, potential, shift, effect_of_dose, n_training_cells)
        location = potential.location + self.basal_mean[batch_index]
        statistics.observe_basal(
            batch_index,
            potential._replace(location=location),
            shift,
            self._basal_information(effects, doses, n_training_cells),
            n_training_cells,
        )

    def _basal_information(
        self, effects: SpikeAndSlab, doses: Doses, n_training_cells: int
    ) -> Tensor:
        """How much each cell tells of the basal mean, between zero and one, ``(n_cells, 1)``.

        All cells of a perturbation whose effect could be anything within its prior tell no more
        than one draw from that prior.
        """
        n_cells = self.statistics.n_cells(n_training_cells, doses.perturbation).squeeze(-1)
        prior_variance = effects.embedding_variance * effects.mask_prior.mean().mean()
        of_dose = torch.where(doses.dose > 0, 1 / (1 + n_cells * prior_variance), 1.0)
        return of_dose.amin(-1, keepdim=True)

    @torch.no_grad()
    @one_thread()
    def centre(self, effects: SpikeAndSlab | None = None, n_training_cells: int = 0) -> None:
        """Move the basal means to where the cells are.

        An exact reparametrisation of the decoder. Without it an offset of the encoder, which costs
        little, looks like a shift that all perturbations share. With `effects`, where cells have
        many, by what these have moved since they were averaged, too (see :meth:`_drift`).
        """
        basal_mean = self.statistics.basal_mean()
        if effects is not None:
            self._follow(effects, n_training_cells)
            change = self._change(effects.to_network(effects.moments()[0]))
            basal_mean = basal_mean - change.sum(0)
        self.basal_mean.copy_(basal_mean)
        if self.n_contexts > 1:
            self.fill_unseen()

    @torch.no_grad()
    def fill_unseen(self) -> None:
        """Start the basal means of batches that were never seen at those of the others.

        Of batches in a context, at those of the others in that context.
        """
        seen = self.statistics.basal_weight.squeeze(1) > 0
        for context in range(self.n_contexts):
            means = self.basal_mean[context :: self.n_contexts]
            known = seen[context :: self.n_contexts]
            means[~known] = means[known].mean(0) if known.any() else self.basal_mean[seen].mean(0)

    @torch.no_grad()
    @one_thread()
    def switch_on(
        self,
        effects: SpikeAndSlab,
        n_training_cells: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start the masks after the warm-up: rotate dense shifts to sparse ones, then prune."""
        score, curvature = self._at_zero(effects, n_training_cells)
        shifts = score / (curvature + 1 / effects.embedding_variance)
        if effects.sparse:
            weight = curvature.mean(1, keepdim=True)
            weight = (weight / weight.mean()).sqrt().clamp(max=_MAX_RELATIVE_WEIGHT)
            rotation = sparse_rotation(shifts * weight, generator=generator)
            evidence = self._evidence(effects, score, curvature)
            effects.rotation.copy_(evidence.search([rotation.T, evidence.principal_axes()]))
        self._renew_masks(effects, shifts, n_training_cells, _SWITCH_ON_SWEEPS)

    def resume(self, effects: SpikeAndSlab) -> None:
        """Take back what :meth:`settle` did, as networks will move again; not those of a query."""
        if not effects.is_query:
            self.settled = effects.has_mixture = False

    @torch.no_grad()
    @one_thread()
    def settle(
        self,
        effects: SpikeAndSlab,
        n_training_cells: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Once the networks are trained: the axes anew, what masks and background say, the order.

        Masks are read at all the evidence that they may have, and the background, a normal while
        the networks straighten what it would take up, becomes a mixture of scales.
        """
        if not effects.masks_on or effects.is_frozen:
            return
        if effects.sparse and not effects.is_query:
            score, curvature = self._at_zero(effects, n_training_cells)
            evidence = self._evidence(effects, score, curvature)
            starts = [effects.rotation, evidence.principal_axes()]
            rotation = evidence.search(starts, _N_RANDOM_STARTS, generator)
            if evidence.total(rotation) > evidence.total(effects.rotation) + _LEAST_GAIN:
                shifts = score / (curvature + 1 / effects.embedding_variance)
                effects.rotation.copy_(rotation)
                self._renew_masks(effects, shifts, n_training_cells, _RENEW_SWEEPS)
            effects.start_mixture()
        self.settled = True
        self.share(effects, n_training_cells)
        # Of perturbations that share cells steps are short: masks need as many more.
        n_together = self.statistics.n_together.max().item()
        n_sweeps = max(_FINAL_SWEEPS, math.ceil(_SWEEPS_OF_STEP * n_together))
        self.update(effects, n_training_cells, n_sweeps, align=False)
        effects.order_latents()

    def _renew_masks(
        self, effects: SpikeAndSlab, shifts: Tensor, n_training_cells: int, n_sweeps: int
    ) -> None:
        """Start from dense shifts with all masks on, and prune."""
        effects.slab_mean.copy_(shifts @ effects.rotation.T)
        effects.set_mask_logits(_SWITCH_ON_LOGIT)
        effects.masks_on = True
        self.share(effects, n_training_cells)
        self.update(effects, n_training_cells, n_sweeps, align=False)

    @torch.no_grad()
    def share(self, effects: SpikeAndSlab, n_training_cells: int) -> None:
        """Choose anew what contexts share of the effects that are free; nothing without contexts.

        See :func:`~scvi_sams.module.contexts.shared_part`.
        """
        if effects.n_deviations == 0:
            return
        n, first = effects.n_perturbations, effects.n_rows - effects.n_deviations
        score, curvature = (
            values[first:].view(n, self.n_contexts, -1)
            for values in self.statistics.score_and_curvature(
                torch.zeros_like(effects.slab_mean), n_training_cells
            )
        )
        known = 1 / (curvature + 1 / effects.embedding_variance)
        floor = self._floor(in_training=not self.settled)
        estimate = (known * score) @ effects.rotation.T
        variance = known @ effects.rotation.T.square() + floor
        n_cells = self.statistics.n_cells(n_training_cells, slice(first, None))
        variance = torch.where(n_cells.view(n, self.n_contexts, 1) > 0, variance, torch.inf)
        log_on, log_off = effects.mask_prior.log_probabilities()
        shared, log_odds = shared_part(
            estimate,
            variance,
            log_prior=(log_on[:n], log_off[:n].clamp(min=-1e6)),
            log_deviation_prior=(log_on[-1, 0].item(), log_off[-1, 0].item()),
            embedding_variance=effects.embedding_variance,
            background_variance=effects.background_variance.clamp(min=max(floor, 1e-4)),
        )
        on = torch.where(torch.cat([shared != 0, (log_odds > 0).flatten(0, 1)]), 1.0, -1.0)
        rows = torch.cat([torch.arange(n), torch.arange(first, effects.n_rows)]).to(shared.device)
        free = ~effects.frozen[rows]
        apart = (estimate - shared.unsqueeze(1)).flatten(0, 1)
        logits = effects.mask_logits.clone()
        logits[rows] = torch.where(free, _SWITCH_ON_LOGIT * on, logits[rows])
        effects.set_mask_logits(logits)
        means = torch.cat([shared, apart])
        effects.slab_mean[rows] = torch.where(free, means, effects.slab_mean[rows])

    def _evidence(self, effects: SpikeAndSlab, score: Tensor, curvature: Tensor) -> SparseEvidence:
        """Evidence of perturbations for axes, with masks as they are judged in training."""
        n = effects.n_perturbations
        log_on, log_off = effects.mask_prior.log_probabilities(slice(n))
        return SparseEvidence(
            score[:n],
            curvature[:n],
            (log_on - log_off).mean().item(),
            effects.embedding_variance,
            self._floor(in_training=True),
        )

    def _floor(self, in_training: bool) -> float:
        """Variance of the effects that count as background when masks are judged."""
        if self.mask_evidence_cells is None:
            return 0.0
        n_cells = self.mask_evidence_cells
        return 1 / (min(n_cells, _TRAINING_EVIDENCE_CELLS) if in_training else n_cells)

    @torch.no_grad()
    @one_thread()
    def update(
        self, effects: SpikeAndSlab, n_training_cells: int, n_sweeps: int = 1, align: bool = True
    ) -> None:
        """Sweep over rotation, masks and effects, a step towards the optimum of each.

        All latents of all perturbations move at once, which bounds the steps, and those of
        perturbations that share cells more. The rotation stays without `align`, if the effects are
        dense, where it means nothing, or some are frozen.
        """
        is_free = effects.sparse and not effects.is_query
        floor = self._floor(in_training=not self.settled)
        n_together = self.statistics.n_together
        most = torch.where(n_together > 2, 1 / n_together, _MAX_STEP)
        self._follow(effects, n_training_cells)
        most, blocks = self._blocks(effects, most)
        for block in blocks * n_sweeps:
            if is_free and align and block is blocks[0]:
                _align_rotation(effects, *self._problem(effects, n_training_cells))
            score, curvature, mean = self._problem(effects, n_training_cells)
            score = score - curvature * self._drift(effects.to_network(mean))
            safe = torch.cat([safe_step(r, effects.rotation) for (r,) in _row_blocks(curvature)])
            # Of a change that all effects share the two bounds multiply.
            step = torch.where(n_together > 2, most * safe, torch.minimum(most, safe))
            curvature = curvature @ effects.rotation.T.square()
            score = score @ effects.rotation.T + curvature * mean
            posterior = spike_slab(score, curvature, **self._prior(effects))
            if effects.has_mixture:
                posterior = _under_mixture(effects, posterior, score, curvature)
            effects.assign(posterior, step if block is None else step * block)
            if floor > 0:
                penalty = selection_penalty(
                    effects.mask_log_odds(),
                    curvature,
                    embedding_variance=effects.embedding_variance,
                    mask_floor_variance=floor,
                )
                effects.selection_penalty.copy_(
                    torch.where(effects.frozen, effects.selection_penalty, penalty)
                )
            effects.update_mask_prior()
            if effects.learns_background and is_free and not effects.has_mixture:
                of_perturbations = effects.parameters_of(slice(effects.n_perturbations))
                effects.background_variance.copy_(learned_background_variance(of_perturbations))

    def _prior(self, effects: SpikeAndSlab) -> dict[str, Any]:
        """Against what masks are judged."""
        log_on, log_off = effects.mask_prior.log_probabilities()
        return {
            "mask_prior_logit": log_on - log_off,
            "embedding_variance": effects.embedding_variance,
            # What masks mean does not depend on the scales that a mixture finds.
            "background_variance": 0.0 if effects.has_mixture else effects.prior_background(),
            "mask_floor_variance": self._floor(in_training=not self.settled),
        }

    @torch.no_grad()
    def evidence(
        self, effects: SpikeAndSlab, n_training_cells: int, factor: Tensor | float = 1.0
    ) -> MaskEvidence:
        """How masks are judged, in latents, as they are reported.

        Parameters
        ----------
        effects
            Posterior of the effects.
        n_training_cells
            Number of training cells.
        factor
            Of the curvature in the networks' coordinates, as if there were more cells or counts,
            broadcastable.
        """
        _, curvature = self.statistics.score_and_curvature(effects.slab_mean, n_training_cells)
        curvature = (factor * curvature) @ effects.rotation.T.square()
        prior = self._prior(effects)
        evidence = mask_evidence(curvature, **prior)
        if (floor := prior["mask_floor_variance"]) == 0:
            return evidence
        penalty = selection_penalty(
            effects.mask_log_odds(),
            curvature,
            embedding_variance=effects.embedding_variance,
            mask_floor_variance=floor,
        )
        return evidence._replace(at_zero=evidence.at_zero - penalty)

    @torch.no_grad()
    def scores(self, effects: SpikeAndSlab, n_training_cells: int) -> Tensor:
        """Score of each effect at zero, the others as they are expected, in latents."""
        score, curvature, mean = self._problem(effects, n_training_cells)
        return score @ effects.rotation.T + (curvature @ effects.rotation.T.square()) * mean

    @torch.no_grad()
    def basal_curvature(
        self, effects: SpikeAndSlab, n_cells: Tensor, factor: Tensor | float = 1.0
    ) -> Tensor:
        """Inverse variance of the basal mean, latents.

        Parameters
        ----------
        effects
            Posterior of the effects.
        n_cells
            Number of training cells of each batch, controls and others.
        factor
            Of the curvature in the networks' coordinates.
        """
        gain = (self.statistics.basal_gain * n_cells.unsqueeze(1)).sum(0)
        return (factor * gain) @ effects.rotation.T.square()

    def _follow(self, effects: SpikeAndSlab, n_training_cells: int) -> None:
        """Let the effects that are remembered forget as the running averages do."""
        n_seen = self.statistics.n_cells_seen.to(self.seen_cells.dtype)
        n_new = (n_seen - self.seen_cells).clamp(min=0)  # none after a restart
        forgotten = -torch.expm1(-n_new / max(1, n_training_cells))
        present = effects.to_network(effects.moments()[0])
        for seen, now in ((self.seen_effects, present), (self.seen_basal, self.basal_mean)):
            before = torch.where(seen.isfinite(), seen, now)
            seen.copy_(before + forgotten * (now - before))
        self.seen_cells.copy_(n_seen)

    def _change(self, present: Tensor) -> Tensor:
        """What each effect adds to the mean shift of cells, beyond what was averaged.

        Zero where cells have two perturbations or fewer.
        """
        statistics = self.statistics
        share = statistics.n_occurrences / statistics.n_cells_seen.clamp(min=1)
        change = share.to(present.dtype) * (present - self.seen_effects)
        return torch.where(statistics.n_together > 2, change, 0.0)

    def _drift(self, present: Tensor) -> Tensor:
        """How far basal means, and shifts by a cell's other perturbations, moved since averaged.

        Averages remember both as they were up to an epoch ago. Where cells have many
        perturbations, each effect would answer to a common change of all others that is over long
        since, all at once, and the answers would grow from update to update. The change is that
        of an average cell, and zero where cells have two perturbations or fewer.
        """
        change = self._change(present)
        weight = self.statistics.basal_weight / self.statistics.basal_weight.sum().clamp(min=1)
        of_basal = (weight * (self.basal_mean - self.seen_basal)).sum(0)
        return torch.where(self.statistics.n_together > 2, change.sum(0) - change + of_basal, 0.0)

    def _blocks(
        self, effects: SpikeAndSlab, most: Tensor
    ) -> tuple[Tensor, list[Tensor] | list[None]]:
        """Longest steps, and which rows move together: shared parts and deviations take turns.

        One at a time they need no shorter step for being in the same cells.
        """
        if effects.n_deviations == 0:
            return most, [None]
        index = torch.arange(effects.n_rows, device=effects.rotation.device).unsqueeze(1)
        deviates = (index >= effects.n_rows - effects.n_deviations).to(most.dtype)
        return (2 * most).clamp(max=_MAX_STEP), [1 - deviates, deviates]

    def _problem(
        self, effects: SpikeAndSlab, n_training_cells: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score and curvature in the networks' coordinates, expected effects in latents."""
        mean, _ = effects.moments()
        moved = effects.to_network(mean)
        score, curvature = self.statistics.score_and_curvature(moved, n_training_cells)
        if effects.n_deviations > 0:  # what cells say of either is of the sum of the two
            n, first = effects.n_perturbations, effects.n_rows - effects.n_deviations
            shape = (n, self.n_contexts, -1)
            score[:n] -= (curvature[first:] * moved[first:]).view(shape).sum(1)
            shared = moved[:n].unsqueeze(1).expand(-1, self.n_contexts, -1).flatten(0, 1)
            score[first:] -= curvature[first:] * shared
        return score, curvature, mean

    def _at_zero(self, effects: SpikeAndSlab, n_training_cells: int) -> tuple[Tensor, Tensor]:
        """Score, at no effect of the perturbation itself, and curvature, networks' coordinates."""
        score, curvature, mean = self._problem(effects, n_training_cells)
        return score + curvature * effects.to_network(mean), curvature


def _under_mixture(
    effects: SpikeAndSlab, posterior: SpikeSlab, score: Tensor, curvature: Tensor
) -> SpikeSlab:
    """Effects outside the masks under a mixture of scales; a step of EM for its weights."""
    n = effects.n_perturbations  # pairs and deviations have no background
    score, curvature = score[:n], curvature[:n]
    variances, weights = effects.background_scales.square(), effects.background_weights
    if not effects.is_query:
        off = torch.sigmoid(-posterior.mask_logits[:n])
        counts = [
            (scale_mixture(s, h, variances, weights).responsibility * share).sum((1, 2))
            for s, h, share in _row_blocks(score, curvature, off)
        ]
        count = torch.stack(counts).sum(0)
        count[0] += _NULL_EFFECTS
        weights.copy_(count / count.sum())
        effects.background_variance.copy_(weights @ variances)
    found = [scale_mixture(s, h, variances, weights) for s, h in _row_blocks(score, curvature)]
    kept = effects.frozen[:n]
    divergence = effects.spike_divergence
    of_perturbations = torch.cat([block.divergence for block in found])
    divergence[:n] = torch.where(kept, divergence[:n], of_perturbations)
    return posterior._replace(
        spike_mean=torch.cat([*(block.mean for block in found), posterior.spike_mean[n:]]),
        spike_variance=torch.cat(
            [*(block.variance for block in found), posterior.spike_variance[n:]]
        ),
    )


_BLOCK_ELEMENTS = 2**15  # of float32, times the scales of a mixture: they stay in a core's cache


def _row_blocks(*fields: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of matrices in blocks, for what treats rows one by one and takes many passes."""
    n_rows = len(fields[0])
    if fields[0].device.type == "cpu":  # a GPU is faster with all at once
        n_rows = max(1, _BLOCK_ELEMENTS // fields[0].shape[1])
    return zip(*(field.split(max(1, n_rows)) for field in fields), strict=True)


def _align_rotation(effects: SpikeAndSlab, score: Tensor, curvature: Tensor, mean: Tensor) -> None:
    """Turn the latents so that the sparse effects explain the shifts that the cells show."""
    q = effects.parameters_of()
    sparse = torch.sigmoid(q.mask_logits) * q.slab_mean
    weight = curvature.mean(1, keepdim=True)
    shown = score / curvature.clamp(min=1e-3) + effects.to_network(mean)
    # The small multiple of the old rotation decides for latents that no perturbation uses.
    effects.rotation.copy_(procrustes((sparse * weight).T @ shown + 1e-6 * effects.rotation))
