"""The least that a model of counts must beat: one rate a gene and batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


_LOG_DISPERSIONS = (-4.0, 8.0)  # from a gene that bursts in one cell of many to a Poisson
_N_CUTS = 20  # of that range by the golden section, to a thousandth
_GOLDEN = 0.6180339887498949
_PRIOR_COUNT = 0.5  # of a gene that no training cell has, or one held-out count would be fatal


def trivial_log_likelihood(
    counts: Tensor,
    library: Tensor,
    batch: Tensor,
    held_out_counts: Tensor,
    held_out_library: Tensor,
    held_out_batch: Tensor,
) -> Tensor:
    """Log-likelihood of cells under a negative binomial that knows no state and no effect.

    Rates by gene and batch, relative to the given library sizes, and dispersions by gene are those
    of greatest likelihood in the training cells.

    Parameters
    ----------
    counts, library, batch
        Training cells: shapes ``(n_cells, n_genes)``, ``(n_cells,)`` and ``(n_cells,)``.
    held_out_counts, held_out_library, held_out_batch
        The cells to be described, in the same shapes. A batch without training cells gets the
        rates of all.

    Returns
    -------
    Nats, shape ``(n_held_out_cells,)``.

    Examples
    --------
    >>> library = torch.full((400,), 5.0)
    >>> batch = torch.zeros(400, dtype=torch.long)
    >>> counts = torch.poisson(torch.full((400, 1), 5.0), torch.Generator().manual_seed(0))
    >>> cells = counts, library, batch
    >>> trivial_log_likelihood(*cells, *cells).mean().round(decimals=1)
    tensor(-2.2000)
    """
    n_batches = int(torch.maximum(batch.max(), held_out_batch.max())) + 1
    rates = _rates(counts, library).repeat(n_batches, 1)
    for number in batch.unique():
        rates[number] = _rates(counts[batch == number], library[batch == number])

    def log_likelihood(x: Tensor, size: Tensor, of: Tensor, log_dispersion: Tensor) -> Tensor:
        mean = size[:, None] * rates[of]
        theta = log_dispersion.exp()
        gamma = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return gamma - theta * (mean / theta).log1p() + x * (mean / (mean + theta)).log()

    low, high = (counts.new_full((counts.shape[1],), end) for end in _LOG_DISPERSIONS)
    for _ in range(_N_CUTS):
        width = _GOLDEN * (high - low)
        left, right = high - width, low + width
        of_left, of_right = (
            log_likelihood(counts, library, batch, log_dispersion).sum(0)
            for log_dispersion in (left, right)
        )
        low, high = (
            torch.where(of_left > of_right, low, left),
            torch.where(of_left > of_right, right, high),
        )
    found = (low + high) / 2
    return log_likelihood(held_out_counts, held_out_library, held_out_batch, found).sum(1)


def _rates(counts: Tensor, library: Tensor) -> Tensor:
    return (counts.sum(0) + _PRIOR_COUNT) / library.sum()
