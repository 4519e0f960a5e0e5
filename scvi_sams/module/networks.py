"""The encoder and the decoder, and the covariates that they see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def covariates_of(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Covariates of a minibatch, under the names of the modules' arguments."""
    return {
        "batch_index": tensors.get(REGISTRY_KEYS.BATCH_KEY),
        "cat_covs": tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
        "cont_covs": tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
    }


def network_covariates(
    batch_index: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Split covariates into the columns that scvi-tools' layers take."""
    columns = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    return (batch_index, *columns), cont_covs


class SideInputLayers(FCLayers):
    """:class:`scvi.nn.FCLayers` on counts beside a side input, such as draws of the shift.

    The first layer is linear in both, so the product with the counts, by far the largest of the
    encoder, is worked out once a cell and not once a draw; and no gradient is formed for the
    counts. Parameters are those of :class:`scvi.nn.FCLayers` on both inputs joined.

    Examples
    --------
    >>> layers = SideInputLayers(5, 4, use_batch_norm=False)
    >>> layers(torch.ones(2, 3), side_input=torch.ones(7, 2, 2)).shape
    torch.Size([7, 2, 4])
    """

    def forward(
        self,
        x: Tensor,
        *categories: Tensor | None,
        cont: Tensor | None = None,
        side_input: Tensor | None = None,
    ) -> Tensor:
        """Values of the last layer.

        Parameters
        ----------
        x
            First input, shape ``(n_cells, n_input)``.
        *categories
            Category of each cell in each categorical covariate, shape ``(n_cells, 1)``.
        cont
            Continuous covariates, shape ``(n_cells, n_continuous)``.
        side_input
            Second input, shape ``(..., n_cells, n_side_input)``.

        Returns
        -------
        Shape ``(..., n_cells, n_out)``.

        Raises
        ------
        ValueError
            If a covariate that the layers were made for is missing.
        """
        if side_input is None:
            return super().forward(x, *categories, cont=cont)
        covariates = [
            covariate.expand(*side_input.shape[:-1], -1)
            for covariate in self._covariates(categories, cont)
        ]
        for number, layer in enumerate(self.fc_layers):
            linear, *others = layer
            if number == 0:
                further = torch.cat([side_input, *covariates], -1)
                of_x, of_further = linear.weight.split([x.shape[-1], further.shape[-1]], 1)
                x = F.linear(x, of_x, linear.bias) + F.linear(further, of_further)
            elif self.inject_into_layer(number):
                x = linear(torch.cat([x, *covariates], -1))
            else:
                x = linear(x)
            for other in others:
                x = x if other is None else other(x)
        return x

    def _covariates(
        self, categories: tuple[Tensor | None, ...], cont: Tensor | None
    ) -> list[Tensor]:
        """Continuous covariates, then a column for each category, in the order of the weights."""
        columns = [] if cont is None else [cont]
        for number, n_categories in enumerate(self.n_cat_list):
            if not n_categories:  # a covariate of one category has no columns
                continue
            category = categories[number] if number < len(categories) else None
            if category is None:
                raise ValueError(
                    f"The categories of covariate {number} are missing; the layers were made for "
                    f"{n_categories}."
                )
            columns.append(F.one_hot(category.squeeze(-1).long(), n_categories))
        return columns


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
