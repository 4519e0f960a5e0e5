"""The encoder and the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from scvi.nn import FCLayers
from torch import nn

from scvi_sams.module._side_input_layers import SideInputLayers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["BasalPosterior", "Decoded", "ExpressionDecoder", "Potential", "PotentialEncoder"]

BasalPosterior: TypeAlias = Literal["mean_field", "correlated", "residual", "amortized"]
"""The guides of the basal state, see :class:`PotentialEncoder`."""

_MAX_STANDARDISED = 10.0  # a gene seen once must not drive the first layer
_MAX_LOCATION = 10.0  # z is of order one; an unbounded location runs away where the gain is zero
_MIN_VARIANCE = 1e-5


class Potential(NamedTuple):
    """What the counts of a cell say about its latent state, in the frame of the networks.

    The guide of the basal state is ``Normal(gain * (location - shift), variance)``. With
    ``variance = 1 - gain`` it is the product of the standard normal prior and a normal likelihood
    of the full state centred at ``location``: the Kalman gain. A guide that does not depend on the
    shift is ``Normal(location, variance)`` and has no gain.

    Attributes
    ----------
    location, gain, variance
        Shape ``(..., n_cells, n_latent)``; the gain is ``None`` where the shift does not matter.
    """

    location: Tensor
    gain: Tensor | None
    variance: Tensor

    def basal_mean(self, shift: Tensor) -> Tensor:
        """Mean of the basal state given the shift, shape ``(..., n_cells, n_latent)``."""
        return self.location if self.gain is None else self.gain * (self.location - shift)

    def basal_variance(self, shift_variance: Tensor) -> Tensor:
        """Variance of that mean over a shift that is uncertain, like the shift in shape."""
        if self.gain is None:
            return torch.zeros_like(shift_variance)
        return self.gain.square() * shift_variance

    def state_variance(self, shift_variance: Tensor) -> Tensor:
        """Variance of the full state, basal plus shift."""
        remainder = 1.0 if self.gain is None else (1 - self.gain).square()
        return self.variance + remainder * shift_variance


class PotentialEncoder(nn.Module):
    """Recognition network: counts to a :class:`Potential`.

    Parameters
    ----------
    n_input
        Number of genes.
    n_latent
        Number of latent dimensions.
    basal_posterior
        The guide of the basal state zb given counts x and shift zp. ``"correlated"``: the product
        of the prior and what the counts say of the full state. ``"residual"``: the same with the
        gain fixed to one, what the counts say less the shift, with a free variance; robust where
        the gain collapses. ``"mean_field"``: zb does not depend on zp. ``"amortized"``: the
        network sees the shift beside the counts (Bereket and Karaletsos 2023).
    n_layers, n_hidden, dropout_rate
        Hidden layers.
    n_cat_list, n_cont
        Categories of each categorical covariate, number of continuous covariates; empty and zero
        where the encoder does not see them.
    n_side_input
        Number of further inputs, such as doses, that are neither counts nor standardised.
    log_transform
        Whether the input is counts, to be encoded as ``log1p``.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        n_input: int,
        n_latent: int,
        *,
        basal_posterior: BasalPosterior = "correlated",
        n_layers: int = 1,
        n_hidden: int = 400,
        dropout_rate: float = 0.0,
        n_cat_list: Sequence[int] = (),
        n_cont: int = 0,
        n_side_input: int = 0,
        log_transform: bool = True,
    ) -> None:
        super().__init__()
        self.basal_posterior = basal_posterior
        self.log_transform = log_transform
        self.register_buffer("input_mean", torch.zeros(n_input))
        self.register_buffer("input_std", torch.ones(n_input))
        if self.sees_shift:
            n_side_input += n_latent
        self.hidden = SideInputLayers(
            n_input + n_side_input,
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

    @property
    def sees_shift(self) -> bool:
        """Whether the network takes the shift of each cell as an input."""
        return self.basal_posterior == "amortized"

    def forward(
        self,
        x: Tensor,
        *categories: Tensor,
        cont: Tensor | None = None,
        side_input: Tensor | None = None,
    ) -> Potential:
        """Encode counts, shape ``(n_cells, n_genes)``, and side input, ``(..., n_cells, n)``."""
        values = torch.log1p(x) if self.log_transform else x
        standardised = (values - self.input_mean) / self.input_std
        standardised = standardised.clamp(-_MAX_STANDARDISED, _MAX_STANDARDISED)
        hidden = self.hidden(standardised, *categories, cont=cont, side_input=side_input)
        location = _MAX_LOCATION * torch.tanh(self.location(hidden) / _MAX_LOCATION)
        # The offset starts the gain at 0.73, where both the prior and the counts are heard.
        variance = torch.sigmoid(self.variance_logit(hidden) - 1)
        variance = variance * (1 - 1e-4) + _MIN_VARIANCE
        if self.basal_posterior == "correlated":
            return Potential(location, 1 - variance, variance)
        is_residual = self.basal_posterior == "residual"
        return Potential(location, torch.ones_like(variance) if is_residual else None, variance)


class Decoded(NamedTuple):
    """Output of the decoder, of shape ``(..., n_cells, n_genes)`` unless said otherwise.

    Attributes
    ----------
    logits
        Unnormalised log expression, or the mean of features that are no counts.
    zero_inflation_logits
        Log-odds of a zero beyond those of the counts, or ``None``.
    ceiling
        What all genes together can reach per unit of library, a scalar; ``None`` where the
        library is the sum of their counts.
    """

    logits: Tensor
    zero_inflation_logits: Tensor | None = None
    ceiling: Tensor | None = None


class ExpressionDecoder(nn.Module):
    """Generative network: latent state and covariates to unnormalised log expression.

    Parameters
    ----------
    n_latent
        Number of inputs: latent dimensions, and doses where the decoder sees them.
    n_output
        Number of genes.
    n_layers, n_hidden
        Hidden layers.
    n_cat_list, n_cont
        Categories of each categorical covariate, number of continuous covariates.
    zero_inflated
        Whether to give log-odds of zero inflation too.
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
        zero_inflated: bool = False,
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
        self.zero_inflation_logits = nn.Linear(n_hidden, n_output) if zero_inflated else None
        if self.zero_inflation_logits is not None:  # start close to no inflation
            nn.init.constant_(self.zero_inflation_logits.bias, -3.0)

    def forward(self, u: Tensor, *categories: Tensor, cont: Tensor | None = None) -> Decoded:
        """Decode latent states, shape ``(..., n_cells, n_latent)``."""
        hidden = self.hidden(u, *categories, cont=cont)
        if self.zero_inflation_logits is None:
            return Decoded(self.logits(hidden))
        return Decoded(self.logits(hidden), self.zero_inflation_logits(hidden))
