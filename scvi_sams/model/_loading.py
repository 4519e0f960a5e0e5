"""Reading cells from disk in the order that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.dataloaders import AnnDataLoader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvi.data import AnnDataManager
    from torch import Tensor

__all__ = ["OrderedAnnDataLoader"]


class OrderedAnnDataLoader(AnnDataLoader):
    """Data loader that keeps the order of the indices for a backed AnnData too.

    HDF5 reads rows in increasing order, and scvi-tools leaves the cells of a minibatch in it.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        shuffle: bool = False,
        indices: Sequence[int] | Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(adata_manager, shuffle=shuffle, indices=indices, **kwargs)
        self._asked: np.ndarray | None = None
        if adata_manager.adata.isbacked and indices is not None and not shuffle:
            asked = np.asarray(indices)
            self._asked = np.flatnonzero(asked) if asked.dtype == bool else asked

    def __iter__(self) -> Iterator[dict[str, Tensor | None]]:
        if self._asked is None:
            yield from super().__iter__()
            return
        start = 0
        for tensors in super().__iter__():
            stop = start + len(tensors[REGISTRY_KEYS.X_KEY])
            rank = np.argsort(np.argsort(self._asked[start:stop], kind="stable"), kind="stable")
            yield {key: None if value is None else value[rank] for key, value in tensors.items()}
            start = stop
