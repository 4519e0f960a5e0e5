"""Effects of perturbations on the gene they target, beside the latent shift."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from scvi_sams.module._functional import kl_centred_normal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_sams.module._functional import DosageEntries

__all__ = ["DirectEffects", "GeneEffects", "add_gene_effects"]


class GeneEffects(NamedTuple):
    """Log fold changes of single genes.

    Attributes
    ----------
    cell
        Cell of each, shape ``(n_effects,)``; ``None`` where all cells have them.
    gene
        Gene of each, shape ``(n_effects,)``.
    value
        Natural logarithm of the fold change, shape ``(..., n_effects)``; for all cells
        ``([n_samples, 1,] n_effects)`` or ``(n_cells, n_effects)``.
    """

    cell: Tensor | None
    gene: Tensor
    value: Tensor


class DirectEffects(nn.Module):
    r"""Log fold change of a perturbation on the one gene that it targets.

    :math:`\delta_t \sim \mathrm{Normal}(0, s^2)` is added, times the dose, to the unnormalised
    log expression of that gene, so that the knock-down of the target itself need not pass through
    latents that perturbations share. The posterior is normal, learned by gradient.

    Parameters
    ----------
    targets
        Index of the gene that each perturbation targets, ``-1`` for none.
    prior_scale
        Standard deviation s, in natural log fold change at dose one.
    """

    target: Tensor

    def __init__(self, targets: Sequence[int], prior_scale: float = 1.0) -> None:
        super().__init__()
        self.prior_variance = prior_scale**2
        self.register_buffer("target", torch.tensor(list(targets), dtype=torch.long))
        self.mean = nn.Parameter(torch.zeros(len(targets)))
        self.log_variance = nn.Parameter(torch.full((len(targets),), math.log(1e-2)))

    def rsample(self, n_samples: int | None = None) -> Tensor:
        """Draw effects, with gradients.

        Returns
        -------
        Shape ``([n_samples,] n_perturbations)``; without an axis of draws by default.
        """
        shape = self.mean.shape if n_samples is None else (n_samples, *self.mean.shape)
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def of(self, entries: DosageEntries, draws: Tensor) -> GeneEffects:
        """Effects of the doses of cells.

        Parameters
        ----------
        entries
            Doses (or responses) of cells, those of pairs ignored.
        draws
            Shape ``([n_samples,] n_perturbations)``.
        """
        is_single = entries.perturbation < len(self.target)
        gene = self.target[entries.perturbation.clamp(max=len(self.target) - 1)]
        kept = torch.where(is_single & (gene >= 0))[0]
        value = entries.dose[..., kept] * draws[..., entries.perturbation[kept]]
        return GeneEffects(entries.cell[kept], gene[kept], value)

    def kl_divergence(self) -> Tensor:
        """Divergence of the posterior of all effects from the prior, a scalar in nats."""
        kl = kl_centred_normal(self.mean, self.log_variance.exp(), self.prior_variance)
        return kl[self.target >= 0].sum()


@torch.compiler.disable  # the number of effects changes from step to step
def add_gene_effects(logits: Tensor, effects: GeneEffects) -> Tensor:
    """Add log fold changes of single genes to log expression.

    Parameters
    ----------
    logits
        Shape ``(..., n_cells, n_genes)``.
    effects
        What to add.

    Returns
    -------
    The sum, of the shape of ``logits``.

    Examples
    --------
    >>> effects = GeneEffects(torch.tensor([1]), torch.tensor([0]), torch.tensor([-2.0]))
    >>> add_gene_effects(torch.zeros(2, 2), effects)
    tensor([[ 0.,  0.],
            [-2.,  0.]])
    """
    if len(effects.gene) == 0:
        return logits
    value = effects.value.to(logits.dtype)
    if effects.cell is None:
        value = value.expand(*logits.shape[:-1], value.shape[-1])
        return logits.index_add(-1, effects.gene, value)
    index = effects.cell * logits.shape[-1] + effects.gene
    flat = logits.flatten(-2)
    value = value.expand(*flat.shape[:-1], value.shape[-1])
    return flat.index_add(-1, index, value).view(logits.shape)
