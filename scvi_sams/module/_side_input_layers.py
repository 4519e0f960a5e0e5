"""Hidden layers whose second input has several draws where the first has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scvi.nn import FCLayers
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SideInputLayers"]


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
