"""Basal states of cells with their covariates."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CellPopulation"]


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
