"""Effects that differ between donors: masks and effects judged against the spread of donors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from scvi_sams.module.closed_form import mask_evidence

if TYPE_CHECKING:
    from torch import Tensor


SCALES = (0.0, *(0.05 * 2 ** (k / 2) for k in range(11)))
"""Standard deviations between donors, up to 1.6 of that of the basal state."""
_NULL_EFFECTS = 10.0  # without a spread, that the prior of the scales counts, as null effects do
_N_STEPS = 30  # of expectation maximisation for that prior


class AcrossDonors(NamedTuple):
    """Effects of an average donor, each of shape ``(n_rows, n_latent)``.

    Attributes
    ----------
    log_odds
        That the mask is one.
    slab_mean, slab_variance
        Of the effect where it is.
    spread
        Expected standard deviation of the effect between donors.
    """

    log_odds: Tensor
    slab_mean: Tensor
    slab_variance: Tensor
    spread: Tensor


def across_donors(
    score: Tensor,
    curvature: Tensor,
    *,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
    **prior: Any,
) -> AcrossDonors:
    r"""Posterior of effects whose size differs between donors.

    Donor k shows the effect :math:`s + b_k` with :math:`b_k \sim \mathrm{Normal}(0, \tau^2)`, of
    which its cells have the log-likelihood ``score * x - curvature * x**2 / 2``. Summing out
    :math:`b_k` leaves the same form in s, with score and curvature of each donor divided by
    :math:`1 + \tau^2 \mathrm{curvature}`: an infinity of cells of one donor tells no more than
    :math:`1 / \tau^2` does. Each effect has a :math:`\tau` of its own, on a grid, whose
    prior is learned over all effects by expectation maximisation; it is summed out, so that few
    donors give the wide tails that they should.

    Parameters
    ----------
    score, curvature
        Of each donor, shape ``(n_donors, n_rows, n_latent)``; zero where it has no such cells.
    reference
        For differences from a reference that has donors of its own: its curvature at each scale,
        shape ``(n_scales, n_rows, n_latent)``. The variance that donors add to it is that of the
        difference too.
    weights
        Prior of the scales; learned by default.
    **prior
        As for :func:`~scvi_sams.module.closed_form.mask_evidence`.

    Returns
    -------
    AcrossDonors

    Examples
    --------
    Three donors agree on the first effect, not on the second:

    >>> curvature = torch.full((3, 1, 2), 500.0)
    >>> score = curvature * torch.tensor([[0.6, 1.0], [0.62, -0.6], [0.58, 0.5]]).unsqueeze(1)
    >>> found = across_donors(
    ...     score,
    ...     curvature,
    ...     weights=torch.ones(len(SCALES)) / len(SCALES),
    ...     mask_prior_logit=-4.0,
    ...     embedding_variance=1.0,
    ... )
    >>> (found.log_odds > 0).tolist()
    [[True, False]]
    """
    score, curvature = score.double(), curvature.double()
    at_scale = [_at_scale(score, curvature, k, reference, prior) for k in range(len(SCALES))]
    off, log_odds, judged, mean, variance = (
        torch.stack(parts) for parts in zip(*at_scale, strict=True)
    )
    evidence = off + F.softplus(log_odds)  # of the scale, whatever the mask
    if weights is None:
        known = ((curvature > 0).sum(0) > 1).double()  # one donor says nothing of a spread
        weights = evidence.new_full((len(SCALES),), 1 / len(SCALES))
        for _ in range(_N_STEPS):
            posterior = torch.softmax(evidence + weights.log()[:, None, None], 0)
            count = (posterior * known).sum((1, 2))
            count[0] += _NULL_EFFECTS
            weights = count / count.sum()
    log_weight = weights.to(evidence).log()[:, None, None]
    log_posterior = torch.log_softmax(evidence + log_weight, 0)
    where_on = torch.softmax(off + log_odds + log_weight, 0)
    slab_mean = (where_on * mean).sum(0)
    second = (where_on * (variance + mean.square())).sum(0)
    scales = torch.tensor(SCALES, dtype=torch.float64, device=score.device)[:, None, None]
    return AcrossDonors(
        (log_posterior + F.logsigmoid(judged)).logsumexp(0)
        - (log_posterior + F.logsigmoid(-judged)).logsumexp(0),
        slab_mean,
        second - slab_mean.square(),
        (log_posterior.exp() * scales).sum(0),
    )


def of_average_donor(score: Tensor, curvature: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Score and curvature of the effect of an average donor, ``(n_rows, n_latent)``."""
    shrunk = 1 / (1 + scale**2 * curvature)
    return (shrunk * score).sum(0), (shrunk * curvature).sum(0)


def _at_scale(
    score: Tensor, curvature: Tensor, number: int, reference: Tensor | None, prior: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Log evidence without an effect, log-odds of one, as masks are judged too, and the effect."""
    scale = SCALES[number]
    off = _log_evidence(score, curvature, scale**2).sum(0)
    total, precision = of_average_donor(score, curvature, scale)
    if reference is not None:
        least = 1 / prior["embedding_variance"]
        added = 1 / (reference[number] + least) - 1 / (reference[0] + least)
        off = off + _log_evidence(total, precision, added)
        total, precision = total / (1 + added * precision), precision / (1 + added * precision)
    floor = prior.get("mask_floor_variance", 0.0)
    log_odds, judged = (
        found.at_zero + found.per_square * total.square()
        for found in (
            mask_evidence(precision, **prior | {"mask_floor_variance": variance})
            for variance in (0.0, floor)
        )
    )
    variance = prior["embedding_variance"] + torch.as_tensor(prior.get("background_variance", 0.0))
    slab_variance = 1 / (precision + 1 / variance)
    return off, log_odds, judged, slab_variance * total, slab_variance


def _log_evidence(score: Tensor, curvature: Tensor, variance: Tensor | float) -> Tensor:
    """Of an effect of this variance about zero, against none."""
    grown = 1 + variance * curvature
    return 0.5 * (variance * score.square() / grown - grown.log())
