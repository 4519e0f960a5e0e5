"""The registry field of contexts: what perturbations may act differently in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi.data.fields import CategoricalObsField

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed, nearest

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ContextField"]


class ContextField(CategoricalObsField):
    """Registers the context of each cell, such as its type, by its position among the levels.

    The levels go into the registry and so into saved models. Unlike a batch, a level that the
    model has not seen is refused, in a query too: what perturbations do there is not known.

    Parameters
    ----------
    context_key
        Column of ``adata.obs``.

    Examples
    --------
    >>> import anndata, pandas as pd
    >>> from scvi.data import AnnDataManager
    >>> obs = pd.DataFrame({"cell_type": 3 * ["T", "B"]}, index=list("abcdef"))
    >>> manager = AnnDataManager([ContextField("cell_type")])
    >>> manager.register_fields(anndata.AnnData(obs=obs))
    >>> manager.get_state_registry("context").categorical_mapping.tolist()
    ['B', 'T']
    """

    def __init__(self, context_key: str) -> None:
        super().__init__(SAMS_REGISTRY_KEYS.CONTEXT_KEY, context_key)

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any
    ) -> dict[str, Any]:
        """Write the contexts of another AnnData, by the model's levels; it may lack some."""
        self.validate_field(adata_target)
        key = self._original_attr_key
        levels = list(map(str, state_registry[self.CATEGORICAL_MAPPING_KEY]))
        column = adata_target.obs[key].astype(str)
        if unknown := sorted(set(column.unique()).difference(levels)):
            close = nearest(unknown[0], levels)
            hint = f"did you mean {listed(close)}?" if close else f"it has {listed(levels)}."
            raise ScreenError(
                f"adata.obs[{key!r}] holds contexts that the model has not seen: "
                f"{listed(unknown)}; {hint} Correct them, drop the cells, or fit all together."
            )
        return super().transfer_field(
            state_registry, adata_target, **(kwargs | {"extend_categories": False})
        )
