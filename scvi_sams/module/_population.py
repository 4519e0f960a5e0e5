"""Simulated cells: basal states with covariates, and counts of two conditions drawn together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CellPopulation", "coupled_poisson"]


class CellPopulation(NamedTuple):
    """Basal states of cells and what else the decoder asks for.

    Attributes
    ----------
    basal
        Basal states in the frame of the masks, shape ``(n_cells, n_latent)``.
    library
        Library sizes or size factors, shape ``(n_cells, 1)``.
    batch_index, cat_covs, cont_covs
        Covariates, shapes ``(n_cells, 1)``, ``(n_cells, n_categorical)`` and
        ``(n_cells, n_continuous)``, or ``None`` where there are none.
    """

    basal: Tensor
    library: Tensor
    batch_index: Tensor | None = None
    cat_covs: Tensor | None = None
    cont_covs: Tensor | None = None

    def covariates(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the generative model besides the latent state."""
        fields = self._asdict()
        del fields["basal"]
        return fields


def coupled_poisson(counts: Tensor, rate: Tensor, new_rate: Tensor) -> Tensor:
    """Turn Poisson draws into draws at another rate, changing as few counts as possible.

    Counts are thinned where the rate falls and topped up where it rises; the result is an exact
    draw at the new rate. Differences between two conditions then carry no noise where the
    conditions agree, which is what makes an average effect from few cells accurate.

    Parameters
    ----------
    counts
        Poisson draws with mean ``rate``, shape ``(n_cells, n_genes)``.
    rate
        Shape of ``counts``.
    new_rate
        Rates of the result, shape ``(..., n_cells, n_genes)``.

    Returns
    -------
    Draws with mean ``new_rate``, its shape.

    Examples
    --------
    >>> counts = torch.tensor([3.0])
    >>> coupled_poisson(counts, torch.tensor([2.0]), torch.tensor([2.0]))
    tensor([3.])
    """
    rate, counts = rate.expand_as(new_rate), counts.expand_as(new_rate)
    drawn = counts.clone()
    falls = (new_rate < rate) & (counts > 0)
    drawn[falls] = torch.binomial(counts[falls], new_rate[falls] / rate[falls])
    rises = new_rate > rate
    drawn[rises] += torch.poisson(new_rate[rises] - rate[rises])
    return drawn
