"""Cells that annbatch streams from a collection, with what each received."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from pandas.api.types import union_categoricals
from scipy import sparse
from scvi import REGISTRY_KEYS

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.loader import PoolSampler
from scvi_sams.data.matrices import row_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scvi.data import AnnDataManager
    from torch import Tensor

PARTS = ("train", "validation", "test")
"""What a column of obs calls the cells to train on, to validate on and to leave alone."""
_N_CHECKED = 16  # minibatches of a pass; a GPU would wait at each


def screen_of(source: Any, keys: Iterable[str | None]) -> ad.AnnData:
    """An AnnData of the cells of a loader, with columns of obs, and one count each.

    It is registered in place of the cells, whose counts are not read for it. The source is an
    ``annbatch.Loader``, or scvi-tools' ``AnnbatchDataModule``, which has one.
    """
    loader = getattr(source, "dataset", source)
    tables, genes = getattr(loader, "_obs", None), getattr(loader, "var", None)
    if not tables or genes is None:
        raise ScreenError(
            f"A {type(source).__name__} without obs and var: give an annbatch.Loader that has "
            "them, as after use_collection(collection)."
        )
    obs = {}
    for key in dict.fromkeys(key for key in keys if key is not None):
        if lacking := [number for number, table in enumerate(tables) if key not in table]:
            raise ScreenError(
                f"obs of data set {lacking[0]} of the collection has no column {key!r}; it has "
                f"{', '.join(map(str, tables[lacking[0]].columns)) or 'none'}."
            )
        columns = [table[key] for table in tables]
        if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
            obs[key] = union_categoricals([c.array for c in columns], ignore_order=True)
        else:
            obs[key] = pd.concat(columns, ignore_index=True).array
    n_cells = loader.n_obs
    index = pd.RangeIndex(n_cells).astype(str)
    one_each = sparse.csr_matrix(
        (np.ones(n_cells, np.uint8), np.zeros(n_cells, np.int32), np.arange(n_cells + 1)),
        shape=(n_cells, loader.n_var),
    )
    var = pd.DataFrame(index=genes.index.astype(str))
    return ad.AnnData(one_each, obs=pd.DataFrame(obs, index=index), var=var)


class StreamedCells(LightningDataModule):
    """Minibatches of cells from an annbatch collection, of which few are in memory.

    Made by :meth:`scvi_sams.SAMSVAE.setup_annbatch`. annbatch reads the counts; doses, batches and
    covariates of all cells are kept, some tens of bytes each. Cells of the three parts may lie
    anywhere in the collection. Whole pieces of it are read in random order, and minibatches are
    formed from the training cells of several, as :class:`~scvi_sams.train.SAMSDataSplitter` does.

    Parameters
    ----------
    source
        An ``annbatch.Loader``, or scvi-tools' ``AnnbatchDataModule``, which has one.
    manager
        Manager of the AnnData of :func:`screen_of` these cells.
    parts
        Positions of the cells to train on, to validate on and to leave alone.
    batch_size
        Cells in a minibatch.
    chunk_size
        Neighbours that are read at once.
    preload_nchunks
        Chunks that minibatches are mixed from.

    Attributes
    ----------
    registry
        What a model is made from: ``SAMSVAE(registry=cells.registry)``.
    train_idx, val_idx, test_idx
        The three parts, positions in the collection.

    Examples
    --------
    >>> cells = SAMSVAE.setup_annbatch(
    ...     loader, perturbation_key="perturbation", control="control"
    ... )  # doctest: +SKIP
    >>> model = SAMSVAE(registry=cells.registry)  # doctest: +SKIP
    >>> model.train(max_epochs=2, datamodule=cells)  # doctest: +SKIP
    >>> model.get_elbo(dataloader=cells.inference_dataloader(cells.val_idx))  # doctest: +SKIP
    """

    def __init__(
        self,
        source: Any,
        manager: AnnDataManager,
        parts: Sequence[np.ndarray],
        *,
        batch_size: int = 128,
        chunk_size: int = 256,
        preload_nchunks: int = 64,
    ) -> None:
        super().__init__()
        self._loader = getattr(source, "dataset", source)
        self.registry: dict[str, Any] = manager.registry
        self.train_idx, self.val_idx, self.test_idx = (np.asarray(p, np.int64) for p in parts)
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)
        if not self.n_train:
            raise ScreenError("No cell is to be trained on.")
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.preload_nchunks = preload_nchunks
        self.data_loader_kwargs: dict[str, Any] = {}  # scvi-tools' runner looks for it
        dataset = manager.create_torch_dataset()
        self._is_count_data = manager.registry["setup_args"].get("is_count_data", True)
        self._columns: dict[str, Tensor] = {}
        for key, dtype in dataset.keys_and_dtypes.items():
            if key != REGISTRY_KEYS.X_KEY:
                values = np.asarray(manager.get_from_registry(key))
                values = values.reshape(len(values), -1)
                self._columns[key] = torch.from_numpy(values.astype(dtype, copy=False))

    def set_batch_size(self, batch_size: int | None = None) -> None:
        """Take the size that ``train`` was given, as scvi-tools 1.5 asks for."""
        self.batch_size = batch_size or self.batch_size

    def train_dataloader(self) -> _Stream:
        """Minibatches of training cells, in random order."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise NotImplementedError(
                "Streamed cells are read by one process; use devices=1, or an AnnData that is "
                "backed by a file, of which each process reads its part."
            )
        return self._stream(self.train_idx, shuffle=True)

    def val_dataloader(self) -> _Stream | list[Any]:
        """Minibatches of validation cells, if there are any."""
        return self._stream(self.val_idx) if self.n_val else []

    def inference_dataloader(self, indices: Any = None) -> _Stream:
        """Minibatches for the methods of a model, of all cells or in the order of positions."""
        n_cells = self._loader.n_obs
        cells = np.arange(n_cells) if indices is None else np.asarray(indices, np.int64)
        if len(cells) == 0 or cells.min() < 0 or cells.max() >= n_cells:
            raise ScreenError(f"indices must name some of the {n_cells} cells by their positions.")
        return self._stream(cells)

    def _stream(self, cells: np.ndarray, shuffle: bool = False) -> _Stream:
        pool = {"chunk_size": self.chunk_size, "preload_nchunks": self.preload_nchunks}
        sampler = _Requests(cells, self.batch_size, shuffle, **pool)
        return _Stream(self._loader, sampler, self._columns, self._is_count_data, shuffle)


class _Requests:
    """Which rows annbatch is to read, and which of these make a minibatch: a sampler for it."""

    def __init__(self, indices: np.ndarray, batch_size: int, shuffle: bool, **pool: Any) -> None:
        self.indices, self.batch_size, self.shuffle = indices, batch_size, shuffle
        self._order = PoolSampler(self, batch_size, shuffle, **pool)

    def __len__(self) -> int:
        return len(self.indices)

    def n_batches(self, n_obs: int) -> int:
        """Number of minibatches."""
        return len(self._order)

    def sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
        """Give slices to read at once, and the places in them of the cells of each minibatch."""
        for pool in self._order.pools():
            cells = self.indices[pool]
            pieces = row_pieces(np.unique(cells))
            starts = np.array([piece[0] for piece in pieces])
            stops = np.array([piece[-1] + 1 for piece in pieces])
            before = np.cumsum(stops - starts) - (stops - starts)
            piece = np.searchsorted(starts, cells, side="right") - 1
            place = before[piece] + cells - starts[piece]
            yield {
                "requests": [slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True)],
                "splits": np.split(place, range(self.batch_size, len(place), self.batch_size)),
            }


class _Stream:
    """Minibatches as scvi-tools' own loaders give them, each time anew."""

    def __init__(
        self,
        loader: Any,
        sampler: _Requests,
        columns: dict[str, Tensor],
        is_count_data: bool,
        nonzero_counts: bool,
    ) -> None:
        self._loader = copy.copy(loader)
        self._loader._batch_sampler = sampler
        self._loader._return_index = True
        self._sampler, self._columns = sampler, columns
        self._is_count_data, self._nonzero_counts = is_count_data, nonzero_counts

    def __len__(self) -> int:
        return self._sampler.n_batches(len(self._sampler))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Read minibatches, in an order of their own each time if they are shuffled."""
        for number, batch in enumerate(self._loader):
            index = torch.as_tensor(np.asarray(batch["index"], np.int64))
            tensors = {key: values[index] for key, values in self._columns.items()}
            x, position = _dense(batch["X"])
            if self._is_count_data and number < _N_CHECKED:
                _check_counts(x, index)
            tensors[REGISTRY_KEYS.X_KEY] = x
            if self._nonzero_counts and position is not None:
                tensors[SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY] = position
            yield tensors


def _dense(rows: Any) -> tuple[Tensor, Tensor | None]:
    """Rows as annbatch gives them, dense, and where their entries are if they were sparse."""
    if hasattr(rows, "get"):  # of cupy
        rows = rows.get()
    if isinstance(rows, torch.Tensor):
        return (rows if rows.layout == torch.strided else rows.to_dense()).float(), None
    if not sparse.issparse(rows):
        return torch.from_numpy(np.asarray(rows, np.float32)), None
    rows = rows.tocsr()
    x = torch.from_numpy(rows.toarray().astype(np.float32, copy=False))
    return x, x.flatten().nonzero()[:, 0]


def _check_counts(x: Tensor, index: Tensor) -> None:
    """Raise for what is no count: nobody has looked at the collection before."""
    is_faulty = ((x < 0) | (x != x.round())).any(1)
    if bool(is_faulty.any()):
        row = int(is_faulty.nonzero()[0])
        raise ScreenError(
            f"Cell {int(index[row])} of the collection has values that are no counts (whole "
            "numbers, 0 or more): make a collection of the raw counts, or say "
            "is_count_data=False."
        )
