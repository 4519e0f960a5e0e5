"""The rotation of the latents in which effects are sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


_N_ANGLES, _N_FINE = 18, 4  # five degrees apart, then 1.25 between the neighbours of the best
# Of the root mean square effect: at first only effects that stand out pull the axes towards them,
# at last those of half the typical size too, below which there is mostly noise.
_THRESHOLDS = (1.5, 1.05, 0.75, 0.5)
_N_STARTS, _N_ITERATIONS = 16, 100
_MOST_LATENTS_AT_FULL_EFFORT = 64  # a second of one core, and no more beyond
_MAX_START_ROWS = 2_000  # enough to find the basin of a rotation
_MAX_SWEEPS = 10
_MAX_ROWS = 1_000  # perturbations, the strongest, that a search looks at
_ANNEALING = (0.3, 0.1)  # background variances under which only what is strong counts
_TURN_GAIN, _SWEEP_GAIN = 0.1, 1.0  # nats that a turn, and a sweep, must be worth
_QUIET = -3.0  # log-odds of a mask at most, below which a perturbation has no say in a plane


def log_bayes_factor(score: Tensor, curvature: Tensor, variance: float) -> Tensor:
    """Evidence in nats for an effect of a normal prior against none, elementwise.

    Parameters
    ----------
    score, curvature
        First and negated second derivative of the log-likelihood of the effect at zero.
    variance
        Prior variance of the effect.

    Examples
    --------
    >>> log_bayes_factor(torch.tensor(0.0), torch.tensor(0.0), 1.0)
    tensor(0.)
    """
    precision = 1 + variance * curvature
    return 0.5 * (variance * score.square() / precision - precision.log())


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


@dataclass(frozen=True)
class SparseEvidence:
    r"""Evidence of spike-and-slab effects, as a function of the axes in which they are sparse.

    The log-likelihood of the effects of a perturbation is quadratic, with a score :math:`P` at
    zero and a diagonal curvature :math:`H` in the coordinates of the networks. In the plane of two
    axes, all else at its posterior mean, the evidence is a sum over four masks of normal
    integrals: exact, and cheap for a whole grid of angles. The best of a sweep's turns are taken
    plane by plane (the rotation of a factor analysis by planes, with evidence as its criterion),
    which also merges a mechanism that lies across two axes onto one.

    Parameters
    ----------
    score, curvature
        Shape ``(n_perturbations, n_latent)``.
    mask_prior_logit
        Prior log-odds of a mask.
    embedding_variance
        Prior variance of an effect whose mask is on.
    background_variance
        Effects of this variance count as noise.

    Examples
    --------
    >>> effects = torch.tensor([[3.0, 3.0], [-2.0, -2.0], [1.0, -1.0]])
    >>> evidence = SparseEvidence(100 * effects, torch.full((3, 2), 100.0), -3.0, 1.0, 0.01)
    >>> rotation = evidence.search([torch.eye(2)])
    >>> (effects @ rotation.T).abs().round(decimals=1).sum(1)  # one axis each
    tensor([4.2000, 2.8000, 1.4000])
    """

    score: Tensor
    curvature: Tensor
    mask_prior_logit: float
    embedding_variance: float
    background_variance: float

    @property
    def effects(self) -> Tensor:
        """Posterior means of dense effects."""
        return self.score / (self.curvature + 1 / self.embedding_variance)

    def of_axes(self, rotation: Tensor) -> Tensor:
        """Log-odds of each mask, the other axes at dense effects, ``(n_perturbations, n_latent)``.

        Parameters
        ----------
        rotation
            Axes in rows, orthogonal, shape ``(n_latent, n_latent)``.
        """
        effects = self.effects
        h = self.curvature @ rotation.T.square()
        s = (self.score - self.curvature * effects) @ rotation.T + h * (effects @ rotation.T)
        noise = 1 + self.background_variance * h
        bayes = log_bayes_factor(s / noise, h / noise, self.embedding_variance)
        return self.mask_prior_logit + bayes

    def total(self, rotation: Tensor) -> float:
        """Evidence of all masks in nats, which ranks rotations."""
        return F.softplus(self.of_axes(rotation)).sum().item()

    def principal_axes(self) -> Tensor:
        """Axes of greatest variance of the effects, a start that forgets what was believed."""
        weighted = self.effects * self.curvature.mean(1, keepdim=True).sqrt()
        # Axes beyond the rows of few perturbations need the full form, which is square in the
        # perturbations where these are many.
        is_wide = weighted.shape[0] < weighted.shape[1]
        return torch.linalg.svd(weighted, full_matrices=is_wide)[2]

    def search(
        self,
        starts: list[Tensor],
        n_random: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The best of the rotations that searches from several starts end in.

        The first start is improved as it is; the others, and random ones, under a background that
        falls to its own, so that what is strong settles first. Beyond 64 latents the cost of a
        search, which grows with the square of their number, leaves the first start alone.

        Parameters
        ----------
        starts
            Orthogonal matrices.
        n_random
            Random starts beside them.
        generator
            Source of these.

        Returns
        -------
        Orthogonal matrix, axes in rows, shape ``(n_latent, n_latent)``. Axes that no perturbation
        uses are turned so that the mean curvature is diagonal among them: nothing else tells them
        apart, and updates of all effects at once converge faster.
        """
        # A search decides number by number, which a device would have to be waited for.
        here = replace(
            self, score=self.score.float().cpu(), curvature=self.curvature.float().cpu()
        )
        here = here._strongest()
        n_latent = self.score.shape[1]
        if n_latent > _MOST_LATENTS_AT_FULL_EFFORT:
            starts, n_random = starts[:1], 0
        noise = [torch.randn(n_latent, n_latent, generator=generator) for _ in range(n_random)]
        starts = [*starts, *(torch.linalg.qr(matrix)[0] for matrix in noise)]
        found = []
        for number, start in enumerate(starts):
            rotation = start.float().cpu()
            for variance in (*(_ANNEALING if number > 0 else ()), self.background_variance):
                rotation = replace(here, background_variance=variance)._improve(rotation)
            found.append(rotation)
        best = max(found, key=here.total)
        return procrustes(here._settle_quiet(best).to(self.score))  # orthogonal in its precision

    def _strongest(self) -> SparseEvidence:
        """Without perturbations that have no evidence in any direction, and at most so many."""
        noise = 1 + self.background_variance * self.curvature
        precision = self.curvature + 1 / self.embedding_variance
        nats = 0.5 * (self.effects.square() * precision / noise).sum(1)
        rows = nats.topk(min(_MAX_ROWS, len(nats))).indices.sort().values
        rows = rows[nats[rows] > 0.5] if (nats > 0.5).any() else rows
        return replace(self, score=self.score[rows], curvature=self.curvature[rows])

    def _improve(self, rotation: Tensor) -> Tensor:
        """Turn planes until a sweep over all of them gains no more."""
        rotation = rotation.clone()
        rounds = _rounds(len(rotation))
        step = math.pi / 2 / _N_ANGLES
        coarse = (torch.arange(_N_ANGLES) * step).unsqueeze(1)
        fine = (torch.arange(1 - _N_FINE, _N_FINE) * step / _N_FINE).unsqueeze(1)
        effects = self.effects
        residual = self.score - self.curvature * effects
        # When an axis last turned, and when a plane was last looked at.
        turned = torch.zeros(len(rotation), dtype=torch.long)
        looked = torch.full((len(rotation), len(rotation)), -1)
        clock = 0
        for _ in range(_MAX_SWEEPS):
            gained = 0.0
            for first, second in rounds:
                clock += 1
                stale = torch.maximum(turned[first], turned[second]) > looked[first, second]
                a, b = first[stale], second[stale]
                looked[a, b] = clock
                planes = self._planes(residual, effects, rotation[a], rotation[b])
                start = planes.evidence(coarse.expand(-1, len(a)), self.mask_prior_logit)
                angle = coarse[start.argmax(0)].T + fine
                refined = planes.evidence(angle, self.mask_prior_logit)
                most, best = refined.max(0)
                gain = most - start[0]
                turns = gain > _TURN_GAIN
                gained += gain[turns].sum().item()
                angle = angle.gather(0, best.unsqueeze(0))[0, turns].unsqueeze(1)
                a, b = a[turns], b[turns]
                turned[a] = turned[b] = clock
                along, across = rotation[a], rotation[b]
                rotation[a] = angle.cos() * along + angle.sin() * across
                rotation[b] = angle.cos() * across - angle.sin() * along
            if gained < _SWEEP_GAIN:
                break
        return procrustes(rotation)  # rounding adds up over thousands of turns

    def _planes(self, residual: Tensor, effects: Tensor, a: Tensor, b: Tensor) -> _Planes:
        """Likelihoods in planes, the background taken for noise; of those with a say in them."""
        h_a, h_b = self.curvature @ a.T.square(), self.curvature @ b.T.square()
        h_ab = self.curvature @ (a * b).T
        d_a, d_b = effects @ a.T, effects @ b.T
        s_a = residual @ a.T + h_a * d_a + h_ab * d_b
        s_b = residual @ b.T + h_b * d_b + h_ab * d_a
        noise = self.background_variance
        n_a, n_b, n_ab = 1 + noise * h_a, 1 + noise * h_b, noise * h_ab
        determinant = n_a * n_b - n_ab.square()
        planes = _Planes(
            torch.arange(len(a)).expand_as(s_a),
            len(a),
            (n_b * s_a - n_ab * s_b) / determinant,
            (n_a * s_b - n_ab * s_a) / determinant,
            (n_b * h_a - n_ab * h_ab) / determinant,
            (n_a * h_b - n_ab * h_ab) / determinant,
            h_ab / determinant,
            self.embedding_variance,
        )
        return planes.where(planes.quadratic() + self.mask_prior_logit > _QUIET)

    def _settle_quiet(self, rotation: Tensor) -> Tensor:
        quiet = self.of_axes(rotation).amax(0) < _QUIET
        axes = rotation[quiet]
        turn = torch.linalg.eigh((axes * self.curvature.mean(0)) @ axes.T)[1]
        rotation = rotation.clone()
        rotation[quiet] = turn.T @ axes
        return rotation


class _Planes(NamedTuple):
    """Scores and curvatures of perturbations in planes, an entry each, and which plane that is."""

    plane: Tensor
    n_planes: int
    s_a: Tensor
    s_b: Tensor
    h_a: Tensor
    h_b: Tensor
    h_ab: Tensor
    variance: float

    def where(self, kept: Tensor) -> _Planes:
        """Some of the entries."""
        fields = (self.plane, self.s_a, self.s_b, self.h_a, self.h_b, self.h_ab)
        plane, s_a, s_b, h_a, h_b, h_ab = (field[kept] for field in fields)
        return _Planes(plane, self.n_planes, s_a, s_b, h_a, h_b, h_ab, self.variance)

    def quadratic(self) -> Tensor:
        """An upper bound of the evidence for one mask at any angle, but for its constant."""
        p_a, p_b = 1 / self.variance + self.h_a, 1 / self.variance + self.h_b
        square = p_b * self.s_a.square() + p_a * self.s_b.square()
        determinant = p_a * p_b - self.h_ab.square()
        return 0.5 * (square - 2 * self.h_ab * self.s_a * self.s_b) / determinant

    def evidence(self, angle: Tensor, prior_logit: float) -> Tensor:
        """Evidence of the masks of all entries on axes turned by angles.

        Parameters
        ----------
        angle
            Shape ``(n_angles, n_planes)``, as is what comes back.
        prior_logit
            Prior log-odds of a mask.
        """
        cos, sin = angle.cos()[:, self.plane], angle.sin()[:, self.plane]
        cos2, cross = cos.square(), 2 * cos * sin * self.h_ab
        along = log_bayes_factor(
            cos * self.s_a + sin * self.s_b,
            cos2 * self.h_a + cross + (1 - cos2) * self.h_b,
            self.variance,
        )
        across = log_bayes_factor(
            cos * self.s_b - sin * self.s_a,
            (1 - cos2) * self.h_a - cross + cos2 * self.h_b,
            self.variance,
        )
        p_a, p_b = 1 + self.variance * self.h_a, 1 + self.variance * self.h_b
        log_determinant = (p_a * p_b - (self.variance * self.h_ab).square()).log()
        both = self.quadratic() - 0.5 * log_determinant  # whatever the angle
        one = torch.logaddexp(along, across) + prior_logit
        none_or_both = F.softplus(both + 2 * prior_logit)
        of_entries = torch.logaddexp(one, none_or_both)
        return of_entries.new_zeros(len(angle), self.n_planes).index_add_(
            1, self.plane, of_entries
        )


def _rounds(n: int) -> list[tuple[Tensor, Tensor]]:
    """All pairs of n, in rounds of disjoint ones: a tournament."""
    members = list(range(n + n % 2))  # one sits out where n is odd
    rounds = []
    for _ in range(len(members) - 1):
        half = len(members) // 2
        pairs = list(zip(members[:half], reversed(members[half:]), strict=True))
        pairs = [pair for pair in pairs if max(pair) < n]
        first, second = zip(*pairs, strict=True) if pairs else ((), ())
        rounds.append(
            (torch.tensor(first, dtype=torch.long), torch.tensor(second, dtype=torch.long))
        )
        members = [members[0], members[-1], *members[1:-1]]
    return rounds
