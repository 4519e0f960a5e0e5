"""An embedding posterior that depends on the masks, at a cost linear in the perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CorrelatedEmbedding"]


class CorrelatedEmbedding(nn.Module):
    r"""Moments of :math:`q(e_t \mid m_t)` from one network that all perturbations share.

    The network sees the mask of a perturbation and a code of it, and adds to free moments of the
    embedding what the mask changes. Bereket and Karaletsos (2023) let the network see a one-hot
    vector in place of the code, which costs time and memory that grow with the square of the
    number of perturbations; a code has the same part (a row of weights a perturbation) and costs
    a row. The last layer starts at zero: training begins at the mean-field posterior.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of masks and embeddings.
    n_hidden
        Width of the network.
    """

    def __init__(self, n_perturbations: int, n_latent: int, n_hidden: int = 100) -> None:
        super().__init__()
        self.code = nn.Parameter(0.1 * torch.randn(n_perturbations, n_hidden))
        self.from_mask = nn.Linear(n_latent, n_hidden)
        self.moments = nn.Linear(n_hidden, 2 * n_latent)
        nn.init.zeros_(self.moments.weight)
        nn.init.zeros_(self.moments.bias)

    def freeze_network(self) -> None:
        """Leave only the codes of perturbations to training."""
        self.from_mask.requires_grad_(False)
        self.moments.requires_grad_(False)

    def forward(self, rows: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks add to mean and log-variance of embeddings.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``.
        masks
            Zeros and ones, shape ``(..., n_rows, n_latent)``.

        Returns
        -------
        Each of shape ``(..., n_rows, n_latent)``.
        """
        hidden = torch.relu(self.from_mask(masks) + self.code[rows])
        mean, log_variance = self.moments(hidden).chunk(2, -1)
        return mean, log_variance
