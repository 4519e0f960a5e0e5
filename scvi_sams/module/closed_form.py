"""Closed-form inference of masks, effects and rotation: pure steps, and their solver."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_sams.module.posteriors import SpikeSlab
from scvi_sams.module.statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from scvi_sams.module.doses import Doses
    from scvi_sams.module.networks import Potential
    from scvi_sams.module.posteriors import SpikeAndSlab

__all__ = [
    "ClosedForm",
    "learned_background_variance",
    "one_thread",
    "procrustes",
    "selection_penalty",
    "sparse_rotation",
    "spike_slab",
]


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


# Of the root mean square effect: at first only effects that stand out pull the axes towards them,
# at last those of half the typical size too, below which there is mostly noise.
_THRESHOLDS = (1.5, 1.05, 0.75, 0.5)
_N_STARTS, _N_ITERATIONS = 16, 100
_MOST_LATENTS_AT_FULL_EFFORT = 64  # a second of one core, and no more beyond
_MAX_START_ROWS = 2_000  # enough to find the basin of a rotation
_MAX_LOGIT = 12.0  # inclusion probabilities stay off 0 and 1, so that a mask can change its mind


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
    background = variance.clamp(min=mask_floor_variance)
    # Shrinking score and curvature alike is what noise of the background's variance does.
    discount = 1 / (1 + background * curvature)
    evidence_variance = embedding_variance / (1 + embedding_variance * discount * curvature)
    mask_logits = (
        mask_prior_logit
        + 0.5 * torch.log(evidence_variance / embedding_variance)
        + 0.5 * evidence_variance * (discount * score).square()
    )
    return SpikeSlab(
        mask_logits.clamp(-_MAX_LOGIT, _MAX_LOGIT),
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


def procrustes(cross: Tensor) -> Tensor:
    """Orthogonal matrix closest to ``cross``: the maximiser of ``trace(A.T @ cross)``.

    Parameters
    ----------
    cross
        Shape ``(n_latent, n_latent)``.

    Returns
    -------
    Shape ``(n_latent, n_latent)``.
    """
    left, _, right = torch.linalg.svd(cross)
    return left @ right


def sparse_rotation(
    effects: Tensor,
    *,
    n_starts: int | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rotation that makes a matrix of effects sparse.

    From several starts: quartimax (the rotation of greatest sum of fourth powers, by fixed-point
    steps), whose smooth criterion finds the basin, then Procrustes rotation towards the rotated
    effects with the small ones set to zero, under a falling threshold. Quartimax alone is biased
    where the effects of several latents overlap. The start of least absolute sum is kept. Starts
    are compared on the strongest 2,000 perturbations; the best one is then refined on all.

    Parameters
    ----------
    effects
        Shape ``(n_perturbations, n_latent)``.
    n_starts
        Number of starts; the first is the identity, the others are random. By default 16, fewer
        beyond 64 latents: each step is a singular value decomposition, whose cost grows with the
        cube of their number.
    max_iterations
        Most steps of each stage of a start; by default 100, fewer where one start is left.
    generator
        Source of the random starts.

    Returns
    -------
    Orthogonal matrix, shape ``(n_latent, n_latent)``.

    Examples
    --------
    >>> rotation = sparse_rotation(torch.eye(3))
    >>> torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-5)
    True
    """
    n_latent = effects.shape[1]
    starts_worth = _N_STARTS * min(1.0, (_MOST_LATENTS_AT_FULL_EFFORT / n_latent) ** 3)
    n_starts = max(1, round(starts_worth)) if n_starts is None else n_starts
    if max_iterations is None:
        max_iterations = max(5, round(_N_ITERATIONS * min(1.0, starts_worth)))
    identity = torch.eye(n_latent, dtype=effects.dtype, device=effects.device)
    everything, n_kept = effects, min(_MAX_START_ROWS, len(effects))
    if n_kept < len(effects):
        effects = effects[effects.square().sum(1).topk(n_kept).indices.sort().values]
    scale = effects.square().mean().sqrt()
    best, least = identity, math.inf
    for start in range(n_starts):
        rotation = identity
        if start > 0:
            # Drawn where the generator lives, so that a seed means the same on every device.
            noise = torch.randn(n_latent, n_latent, generator=generator, dtype=effects.dtype)
            rotation = torch.linalg.qr(noise.to(effects.device))[0]
        rotation = _rotate_towards(effects, rotation, _cube, max_iterations)
        for factor in _THRESHOLDS:
            keep_large = partial(_keep_large, threshold=factor * scale)
            rotation = _rotate_towards(effects, rotation, keep_large, max_iterations)
        absolute = (effects @ rotation).abs().sum().item()
        if absolute < least:
            best, least = rotation, absolute
    if n_kept < len(everything):
        threshold = _THRESHOLDS[-1] * everything.square().mean().sqrt()
        keep_large = partial(_keep_large, threshold=threshold)
        best = _rotate_towards(everything, best, keep_large, max_iterations)
    return best


def _cube(rotated: Tensor) -> Tensor:
    return rotated**3


def _keep_large(rotated: Tensor, threshold: Tensor) -> Tensor:
    return rotated * (rotated.abs() > threshold)


def _rotate_towards(
    effects: Tensor,
    rotation: Tensor,
    target: Callable[[Tensor], Tensor],
    max_iterations: int,
    tolerance: float = 1e-4,
) -> Tensor:
    """Repeat the Procrustes rotation of effects towards a function of the rotated effects."""
    for _ in range(max_iterations):
        previous, rotation = rotation, procrustes(effects.T @ target(effects @ rotation))
        if (rotation - previous).abs().max() < tolerance:
            break
    return rotation


_MAX_STEP = 0.7  # of an update towards its optimum: the networks have not yet answered the last
_MAX_RELATIVE_WEIGHT = 2.0  # a perturbation with very many cells must not set the rotation alone
_SWITCH_ON_LOGIT = 8.0  # masks start on and are pruned
_SWITCH_ON_SWEEPS = 15


class ClosedForm(nn.Module):
    """Coordinate ascent over masks, effects and rotation, from sufficient statistics of the cells.

    The statistics are in the networks' coordinates; the effects are turned to them and back here
    and nowhere else.

    Parameters
    ----------
    n_rows, n_latent
        Shape of the effects.
    n_batch
        Number of batches.
    mask_evidence_cells
        Evidence for a mask saturates at this many cells; ``None`` for no limit. An effect must
        stand out from a background of standard deviation ``mask_evidence_cells ** -0.5`` (in
        units of the basal standard deviation) to be called a mechanism.
    """

    basal_mean: Tensor

    def __init__(
        self,
        n_rows: int,
        n_latent: int,
        *,
        n_batch: int = 1,
        mask_evidence_cells: float | None = 30.0,
    ) -> None:
        super().__init__()
        self.mask_floor_variance = 1 / mask_evidence_cells if mask_evidence_cells else 0.0
        self.statistics = RunningStatistics(n_rows, n_latent, n_batch)
        self.register_buffer("basal_mean", torch.zeros(n_batch, n_latent))

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
            Batch of each cell, shape ``(n_cells,)``.
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
    def centre(self) -> None:
        """Move the basal means to where the cells are.

        An exact reparametrisation of the decoder. Without it an offset of the encoder, which costs
        little, looks like a shift that all perturbations share.
        """
        self.basal_mean.copy_(self.statistics.basal_mean())

    @torch.no_grad()
    @one_thread()
    def switch_on(
        self,
        effects: SpikeAndSlab,
        n_training_cells: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start the masks after the warm-up: rotate dense shifts to sparse ones, then prune."""
        score, curvature, mean = self._problem(effects, n_training_cells)
        shifts = (score + curvature * effects.to_network(mean)) / (
            curvature + 1 / effects.embedding_variance
        )
        if effects.sparse:
            weight = curvature.mean(1, keepdim=True)
            weight = (weight / weight.mean()).sqrt().clamp(max=_MAX_RELATIVE_WEIGHT)
            rotation = sparse_rotation(shifts * weight, generator=generator)
            effects.rotation.copy_(rotation.T)
            shifts = shifts @ rotation
        effects.slab_mean.copy_(shifts)
        effects.set_mask_logits(_SWITCH_ON_LOGIT)
        effects.masks_on = True
        self.update(effects, n_training_cells, n_sweeps=_SWITCH_ON_SWEEPS)

    @torch.no_grad()
    @one_thread()
    def update(self, effects: SpikeAndSlab, n_training_cells: int, n_sweeps: int = 1) -> None:
        """Sweep over rotation, masks and effects, a step towards the optimum of each.

        All perturbations move at once, so those of cells with several take smaller steps. The
        rotation stays if the effects are dense, where it means nothing, or some are frozen.
        """
        is_free = effects.sparse and not effects.is_query
        n_together = self.statistics.n_together
        step = torch.where(n_together > 2, 1 / n_together, _MAX_STEP)
        for _ in range(n_sweeps):
            if is_free:
                _align_rotation(effects, *self._problem(effects, n_training_cells))
            score, curvature, mean = self._problem(effects, n_training_cells)
            curvature = curvature @ effects.rotation.T.square()
            log_on, log_off = effects.mask_prior.log_probabilities()
            posterior = spike_slab(
                score @ effects.rotation.T + curvature * mean,
                curvature,
                mask_prior_logit=log_on - log_off,
                embedding_variance=effects.embedding_variance,
                background_variance=effects.prior_background(),
                mask_floor_variance=self.mask_floor_variance,
            )
            effects.assign(posterior, step)
            if self.mask_floor_variance > 0:
                penalty = selection_penalty(
                    effects.mask_log_odds(),
                    curvature,
                    embedding_variance=effects.embedding_variance,
                    mask_floor_variance=self.mask_floor_variance,
                )
                effects.selection_penalty.copy_(
                    torch.where(effects.frozen, effects.selection_penalty, penalty)
                )
            effects.update_mask_prior()
            if effects.learns_background and is_free:
                of_perturbations = effects.parameters_of(slice(effects.n_perturbations))
                effects.background_variance.copy_(learned_background_variance(of_perturbations))

    def _problem(
        self, effects: SpikeAndSlab, n_training_cells: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score and curvature in the networks' coordinates, expected effects in latents."""
        mean, _ = effects.moments()
        score, curvature = self.statistics.score_and_curvature(
            effects.to_network(mean), n_training_cells
        )
        return score, curvature, mean


def _align_rotation(effects: SpikeAndSlab, score: Tensor, curvature: Tensor, mean: Tensor) -> None:
    """Turn the latents so that the sparse effects explain the shifts that the cells show."""
    q = effects.parameters_of()
    sparse = torch.sigmoid(q.mask_logits) * q.slab_mean
    weight = curvature.mean(1, keepdim=True)
    shown = score / curvature.clamp(min=1e-3) + effects.to_network(mean)
    # The small multiple of the old rotation decides for latents that no perturbation uses.
    effects.rotation.copy_(procrustes((sparse * weight).T @ shown + 1e-6 * effects.rotation))
