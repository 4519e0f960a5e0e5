"""The encoder and the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from scvi.nn import FCLayers
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ExpressionDecoder", "Potential", "PotentialEncoder"]

_MAX_STANDARDISED = 10.0  # a gene seen once must not drive the first layer
_MAX_LOCATION = 10.0  # z is of order one; an unbounded location runs away where the gain is zero
_MIN_VARIANCE = 1e-5


class Potential(NamedTuple):
    """What the counts of a cell say about its latent state, in the frame of the networks.

    The guide of the basal state is ``Normal(gain * (location - shift), variance)``. With
    ``variance = 1 - gain`` it is the product of the standard normal prior and a normal likelihood
    of the full state centred at ``location``: the Kalman gain.

    Attributes
    ----------
    location, gain, variance
        Shape ``(n_cells, n_latent)``.
    """

    location: Tensor
    gain: Tensor
    variance: Tensor


class PotentialEncoder(nn.Module):
    """Recognition network: counts to a :class:`Potential`.

    Parameters
    ----------
    n_input
        Number of genes.
    n_latent
        Number of latent dimensions.
    n_layers, n_hidden, dropout_rate
        Hidden layers.
    n_cat_list, n_cont
        Categories of each categorical covariate, number of continuous covariates; empty and zero
        where the encoder does not see them.
    residual
        Fix the gain to one: the basal state is the residual ``location - shift``, with a free
        variance. Robust where the gain collapses, a little less accurate elsewhere.
    """

    log_count_mean: Tensor
    log_count_std: Tensor

    def __init__(
        self,
        n_input: int,
        n_latent: int,
        *,
        n_layers: int = 1,
        n_hidden: int = 400,
        dropout_rate: float = 0.0,
        n_cat_list: Sequence[int] = (),
        n_cont: int = 0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.register_buffer("log_count_mean", torch.zeros(n_input))
        self.register_buffer("log_count_std", torch.ones(n_input))
        self.hidden = FCLayers(
            n_input,
            n_hidden,
            n_cat_list=n_cat_list,
            n_cont=n_cont,
            n_layers=n_layers,
            n_hidden=n_hidden,
            dropout_rate=dropout_rate,
            use_batch_norm=False,
            use_layer_norm=True,
        )
        self.location = nn.Linear(n_hidden, n_latent)
        self.variance_logit = nn.Linear(n_hidden, n_latent)

    def forward(self, x: Tensor, *categories: Tensor, cont: Tensor | None = None) -> Potential:
        """Encode counts, shape ``(n_cells, n_genes)``."""
        standardised = (torch.log1p(x) - self.log_count_mean) / self.log_count_std
        standardised = standardised.clamp(-_MAX_STANDARDISED, _MAX_STANDARDISED)
        hidden = self.hidden(standardised, *categories, cont=cont)
        location = _MAX_LOCATION * torch.tanh(self.location(hidden) / _MAX_LOCATION)
        # The offset starts the gain at 0.73, where both the prior and the counts are heard.
        variance = torch.sigmoid(self.variance_logit(hidden) - 1)
        variance = variance * (1 - 1e-4) + _MIN_VARIANCE
        gain = torch.ones_like(variance) if self.residual else 1 - variance
        return Potential(location, gain, variance)


class ExpressionDecoder(nn.Module):
    """Generative network: latent state and covariates to unnormalised log expression.

    Parameters
    ----------
    n_latent
        Number of latent dimensions.
    n_output
        Number of genes.
    n_layers, n_hidden
        Hidden layers.
    n_cat_list, n_cont
        Categories of each categorical covariate, number of continuous covariates.
    """

    def __init__(
        self,
        n_latent: int,
        n_output: int,
        *,
        n_layers: int = 1,
        n_hidden: int = 400,
        n_cat_list: Sequence[int] = (),
        n_cont: int = 0,
    ) -> None:
        super().__init__()
        self.hidden = FCLayers(
            n_latent,
            n_hidden,
            n_cat_list=n_cat_list,
            n_cont=n_cont,
            n_layers=n_layers,
            n_hidden=n_hidden,
            dropout_rate=0,
            use_batch_norm=False,
        )
        self.logits = nn.Linear(n_hidden, n_output)

    def forward(self, u: Tensor, *categories: Tensor, cont: Tensor | None = None) -> Tensor:
        """Decode latent states, shape ``(..., n_cells, n_latent)``."""
        return self.logits(self.hidden(u, *categories, cont=cont))
