"""Reading cells in the order that was asked for, with sparse doses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from scvi_sams.data import HostCells
from scvi_sams.data._cell_datasets import (
    DiskCells,
    minibatch_as_formed,
    minibatch_sampler,
    reads_from_disk,
)
from scvi_sams.data._pools import PoolSampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi.data import AnnDataManager
    from torch.utils.data import Sampler

__all__ = ["OrderedAnnDataLoader"]


class OrderedAnnDataLoader(DataLoader):
    """Minibatches of cells for the public methods, in the order of the indices.

    In place of scvi-tools' loader, which makes the doses dense, and gives the cells of a minibatch
    in the order of the file if they stay on disk. From disk they are read many minibatches at a
    time (:class:`~scvi_sams.data._cell_datasets.DiskCells`), by this process alone.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    shuffle
        Whether the order is random.
    indices
        Cells, as numbers or as a mask; all by default.
    batch_size
        Cells in a minibatch.
    drop_last
        Whether to leave out a last minibatch of fewer cells.
    data_and_attributes
        Registered data to read, with their types if a dict; all by default.
    load_sparse_tensor
        Whether to give sparse counts as sparse tensors, where they are in memory.
    **kwargs
        Further arguments of :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        shuffle: bool = False,
        indices: Sequence[int] | Sequence[bool] | None = None,
        batch_size: int = 128,
        drop_last: bool = False,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        cells = np.arange(adata_manager.adata.n_obs) if indices is None else np.asarray(indices)
        if cells.dtype == bool:
            cells = np.flatnonzero(cells)
        sampler: Sampler
        dataset: DiskCells | HostCells
        if reads_from_disk(adata_manager):
            dataset = DiskCells(adata_manager, cells, data_and_attributes=data_and_attributes)
            sampler = PoolSampler(dataset, batch_size, shuffle, drop_last)
            kwargs |= {"num_workers": 0, "persistent_workers": False}
        else:
            dataset = HostCells(adata_manager, cells, data_and_attributes, load_sparse_tensor)
            sampler = minibatch_sampler(dataset, batch_size, shuffle, drop_last)
        super().__init__(
            dataset, sampler=sampler, batch_size=None, collate_fn=minibatch_as_formed, **kwargs
        )
