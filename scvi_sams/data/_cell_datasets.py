"""Training cells, a minibatch at a time: from the AnnData, or from tensors on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from torch.utils.data import Dataset

from scvi_sams._constants import SAMS_REGISTRY_KEYS

from ._compact_matrix import CompactMatrix, compact_size, compact_table, to_dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi.data import AnnDataManager
    from torch import Tensor

__all__ = ["DeviceCells", "HostCells"]

_DOSAGE = SAMS_REGISTRY_KEYS.PERTURBATION_KEY


class HostCells(Dataset):
    """Cells read from the AnnData, as scvi-tools does, but for doses that stay sparse.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    indices
        Cells of the data set, shape ``(n_cells,)``.
    data_and_attributes
        Registered data to read, with their types if a dict; all by default.
    load_sparse_tensor
        Whether to give sparse counts as sparse tensors.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray,
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        load_sparse_tensor: bool = False,
    ) -> None:
        types = _types(adata_manager, data_and_attributes)
        self.indices = np.asarray(indices)
        self._reads_in_order = adata_manager.adata.isbacked  # HDF5 does, and scvi-tools sorts
        self._dosage: sparse.csr_matrix | None = None
        if types.pop(_DOSAGE, None) is not None:
            self._dosage = adata_manager.get_from_registry(_DOSAGE)
        self._others = adata_manager.create_torch_dataset(
            data_and_attributes=types, load_sparse_tensor=load_sparse_tensor
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Read a minibatch: the cells at some positions of ``indices``."""
        index = self.indices[np.asarray(batch)]
        if self._reads_in_order:
            index = np.sort(index)
        tensors = {key: torch.as_tensor(value) for key, value in self._others[index].items()}
        if self._dosage is not None:
            rows = self._dosage[index].tocoo()
            tensors[_DOSAGE] = _sparse_tensor(
                torch.from_numpy(np.stack([rows.row, rows.col]).astype(np.int64)),
                torch.from_numpy(rows.data.astype(np.float32)),
                rows.shape,
            )
        return tensors


class DeviceCells(Dataset):
    """Cells kept as compact tensors on a device, where minibatches are formed.

    A minibatch is that of :class:`HostCells`.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData, in memory.
    indices
        Cells of the data set, shape ``(n_cells,)``.
    device
        Where to keep them.
    data_and_attributes
        Registered data to keep, with their types if a dict; all by default.
    nonzero_counts
        Whether to add the positions of the counts that are not zero, where they are sparse: the
        likelihood needs the gamma function at those alone.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray,
        device: torch.device | str = "cpu",
        data_and_attributes: list[str] | dict[str, Any] | None = None,
        nonzero_counts: bool = False,
    ) -> None:
        self.indices = np.asarray(indices)
        self.nonzero_counts = nonzero_counts
        self.sparse: dict[str, CompactMatrix] = {}
        self.tables: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}
        for key, (values, dtype) in _registered(adata_manager, data_and_attributes).items():
            if key == _DOSAGE or _is_smaller_sparse(values, self.indices):
                self.sparse[key] = CompactMatrix(values, self.indices, device)
            else:
                self.tables[key] = compact_table(values, self.indices, device)
                self._types[key] = dtype

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Memory that the cells take on their device."""
        of_tables = sum(table.nbytes for table in self.tables.values())
        return of_tables + sum(matrix.nbytes for matrix in self.sparse.values())

    @staticmethod
    def required_bytes(adata_manager: AnnDataManager, indices: np.ndarray) -> int | None:
        """Memory that cells would take at most; ``None`` if they cannot be kept on a device."""
        if adata_manager.adata.isbacked:
            return None
        total = 0
        for key, (values, _) in _registered(adata_manager, None).items():
            as_sparse, as_table = compact_size(values, indices)
            if as_sparse is not None and (key == _DOSAGE or as_sparse < as_table):
                total += as_sparse
            else:
                total += as_table
        return total

    def __getitem__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Form a minibatch: the cells at some positions of ``indices``."""
        index = torch.as_tensor(batch)
        tensors = {}
        if self.tables:
            on_device = index.to(next(iter(self.tables.values())).device)
            for key, table in self.tables.items():
                tensors[key] = table.index_select(0, on_device).to(self._types[key])
        for key, matrix in self.sparse.items():
            rows = matrix.rows(index)
            if key == _DOSAGE:
                tensors[key] = _sparse_tensor(
                    torch.stack([rows.row, rows.column]),
                    rows.value,
                    (len(index), matrix.n_columns),
                )
                continue
            tensors[key], position = to_dense(rows, len(index), matrix.n_columns)
            if key == REGISTRY_KEYS.X_KEY and self.nonzero_counts:
                tensors[SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY] = position
        return tensors


def _types(
    adata_manager: AnnDataManager, data_and_attributes: list[str] | dict[str, Any] | None
) -> dict[str, Any]:
    """Type of each registered datum in a minibatch, as scvi-tools gives it."""
    dataset = adata_manager.create_torch_dataset(data_and_attributes=data_and_attributes)
    return dict(dataset.keys_and_dtypes)


def _registered(
    adata_manager: AnnDataManager, data_and_attributes: list[str] | dict[str, Any] | None
) -> dict[str, tuple[sparse.csr_matrix | np.ndarray, torch.dtype]]:
    """Each registered datum, and its type in a minibatch."""
    registered = {}
    for key, dtype in _types(adata_manager, data_and_attributes).items():
        values = adata_manager.get_from_registry(key)
        if sparse.issparse(values):
            values = values.tocsr()
        else:
            values = np.asarray(values)
            values = values.reshape(len(values), -1)
        registered[key] = values, torch.from_numpy(np.zeros(0, dtype)).dtype
    return registered


def _is_smaller_sparse(values: sparse.csr_matrix | np.ndarray, indices: np.ndarray) -> bool:
    as_sparse, as_table = compact_size(values, indices)
    return as_sparse is not None and as_sparse < as_table


def _sparse_tensor(position: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(
        position, values, shape, check_invariants=False, is_coalesced=True
    )
