"""Effects that depend on the context: rows of deviations, and what contexts share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from scvi_sams.module.doses import Doses

if TYPE_CHECKING:
    from torch import Tensor


_MAX_ELEMENTS = 20_000_000  # of perturbations x candidates x contexts x latents, at once


class ContextDeviations(NamedTuple):
    r"""Lists what a context changes of a perturbation as one more perturbation of its cells.

    The shift of a cell in context c becomes
    :math:`\sum_t d_t (m_t e_t + m_{tc} \delta_{tc})`. As a measured pair
    (:class:`~scvi_sams.module.doses.PairInteractions`), a deviation has a row of effects, after
    those of perturbations and pairs; every perturbation has one for every context, measured there
    or not. A row without cells stays at its prior.

    Attributes
    ----------
    first_row
        Row of the first deviation.
    n_contexts
        Number of contexts; below two there are no deviations.

    Examples
    --------
    >>> given = Doses(torch.tensor([[0], [2]]), torch.ones(2, 1), torch.tensor([[1], [0]]))
    >>> acting = ContextDeviations(3, 2).append(given, given)
    >>> acting.perturbation
    tensor([[0, 4],
            [2, 7]])
    """

    first_row: int
    n_contexts: int

    def rows(self, perturbations: Tensor) -> Tensor:
        """Rows of the deviations of perturbations in all contexts, ``(n * n_contexts,)``."""
        if self.n_contexts < 2:
            return perturbations[:0]
        contexts = torch.arange(self.n_contexts, device=perturbations.device)
        rows = self.first_row + perturbations.unsqueeze(1) * self.n_contexts + contexts
        return rows.flatten()

    def append(self, acting: Doses, given: Doses) -> Doses:
        """Append a column for each perturbation that a cell was given, in the cell's context."""
        if self.n_contexts < 2 or given.context is None:
            return acting
        rows = self.first_row + given.perturbation * self.n_contexts + given.context
        return Doses(
            torch.cat([acting.perturbation, rows], -1), torch.cat([acting.dose, given.dose], -1)
        )

    def together(self, effect_of_dose: Tensor, n_given: int) -> Tensor:
        """Give shared part and deviation the effect of both, ``(n_cells, n_columns, n_latent)``.

        What statistics of either row count as the effect of *others* is then free of both: how
        they divide what the cells show is left to the solver.
        """
        if self.n_contexts < 2:
            return effect_of_dose
        shared, deviation = effect_of_dose[:, :n_given], effect_of_dose[:, -n_given:]
        both = shared + deviation
        return torch.cat([both, effect_of_dose[:, n_given:-n_given], both], 1)


def _log_normal(gap: Tensor, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=gap.dtype, device=gap.device)
    return -0.5 * (gap.square() / variance + (2 * math.pi * variance).log())


def shared_part(
    estimate: Tensor,
    variance: Tensor,
    *,
    log_prior: tuple[Tensor, Tensor],
    log_deviation_prior: tuple[float, float],
    embedding_variance: float,
    background_variance: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Most probable part of an effect that contexts share, and log-odds that each deviates.

    Given the shared part, contexts are independent: each follows it or departs from it by
    ``Normal(0, embedding_variance)``, so that the deviations are summed out and the shared part is
    searched for among nothing, what each context shows, and their mean. Coordinate steps alone
    stay where a mean and deviations of either sign from it explain one context that is unlike
    the others.

    Parameters
    ----------
    estimate, variance
        Effect that the cells of each context show, and its variance, infinite where there are
        none; shape ``(n_perturbations, n_contexts, n_latent)``.
    log_prior, log_deviation_prior
        Logarithms of the prior probabilities of one and of zero: of the masks of shared parts,
        which broadcast to ``(n_perturbations, n_latent)``, and of those of deviations.
    embedding_variance, background_variance
        Prior variances of an effect whose mask is one, and zero (above zero).

    Returns
    -------
    tuple of Tensor
        Shared part, shape ``(n_perturbations, n_latent)``, and log-odds of deviations, of the
        shape of `estimate`, minus infinity where nothing was measured.

    Examples
    --------
    >>> estimate = torch.tensor([3.0, 0.0, 0.1]).view(1, 3, 1)
    >>> prior = torch.tensor([[0.02]]).log(), torch.tensor([[0.98]]).log()
    >>> shared, log_odds = shared_part(
    ...     estimate,
    ...     torch.full((1, 3, 1), 0.05),
    ...     log_prior=prior,
    ...     log_deviation_prior=(math.log(0.002), math.log(0.998)),
    ...     embedding_variance=1.0,
    ...     background_variance=torch.tensor(0.01),
    ... )
    >>> shared.item(), (log_odds > 0).flatten().tolist()
    (0.0, [True, False, False])
    """
    n, n_contexts, n_latent = estimate.shape
    at_once = max(1, _MAX_ELEMENTS // ((n_contexts + 2) * n_contexts * n_latent))
    on, off = (part.expand(n, n_latent) for part in log_prior)
    parts = []
    for first in range(0, n, at_once):
        rows = slice(first, first + at_once)
        x, v = estimate[rows], variance[rows]
        measured = v.isfinite()
        weight = torch.where(measured, 1 / v, 0.0)
        mean = (weight * x).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-12)
        candidates = torch.cat([torch.zeros_like(mean), mean, torch.where(measured, x, mean)], 1)
        gap = x.unsqueeze(1) - candidates.unsqueeze(2)
        v = torch.where(measured, v, 1.0).unsqueeze(1)
        departs = log_deviation_prior[0] + _log_normal(gap, v + embedding_variance)
        follows = log_deviation_prior[1] + _log_normal(gap, v)
        evidence = torch.logaddexp(departs, follows)
        evidence = torch.where(measured.unsqueeze(1), evidence, 0.0).sum(2)
        leaves = torch.sigmoid(departs - follows)
        precision = (1 - leaves) / v + leaves / (v + embedding_variance)
        precision = torch.where(measured.unsqueeze(1), precision, 0.0).sum(2)
        masks = torch.logaddexp(
            *(
                log_prior_of[rows].unsqueeze(1)
                + _log_normal(candidates, prior_variance)
                # By Laplace: how wide the mode is, so that a narrow prior is not likelier for it.
                - 0.5 * ((precision + 1 / prior_variance) / (2 * math.pi)).log()
                for log_prior_of, prior_variance in (
                    (on, embedding_variance),
                    (off, background_variance),
                )
            )
        )
        best = (evidence + masks).argmax(1, keepdim=True)
        log_odds = (departs - follows).gather(1, best.unsqueeze(2).expand(-1, -1, n_contexts, -1))
        log_odds = torch.where(measured, log_odds.squeeze(1), -torch.inf)
        parts.append((candidates.gather(1, best).squeeze(1), log_odds))
    shared, log_odds = (torch.cat(part) for part in zip(*parts, strict=True))
    return shared, log_odds
