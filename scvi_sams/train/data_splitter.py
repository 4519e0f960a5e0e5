"""Which cells are trained on, and where their minibatches are formed."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from scvi import settings
from scvi.dataloaders import BatchDistributedSampler, DataSplitter
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from scvi_sams.data.loader import DeviceCells, DiskCells, PoolSampler, reads_from_disk

if TYPE_CHECKING:
    from scvi.data import AnnDataManager
    from torch.utils.data import Dataset, Sampler

DataPlacement: TypeAlias = Literal["auto", "device", "host", "disk"]
"""Where training cells are kept, see :class:`SAMSDataSplitter`."""

_MAX_SHARE_OF_HOST = 0.25  # the AnnData, and other programs, need memory too
_MAX_SHARE_OF_FREE_DEVICE = 0.5  # parameters and activations are still to come

logger = logging.getLogger(__name__)


class SAMSDataSplitter(DataSplitter):
    """Splits cells as scvi-tools does, and may keep them on the device or read them from disk.

    The same seed gives the same minibatches on the device and on the host, and the same as
    scvi-tools' own loader. From disk they are others, as cells are read there in long pieces
    (:class:`~scvi_sams.data.loader.PoolSampler`); the same seed gives the same again.

    Where several processes train together, all split the cells alike, and each keeps to its own
    part of them, in minibatches of ``batch_size`` cells. Parts are equally large: up to one cell
    a process is in two of them, or in none with ``drop_dataset_tail=True``.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    data_placement
        ``"device"``: keep training and validation cells as compact tensors on the device that
        trains (in main memory for a CPU) and form minibatches there. If they do not fit, say so
        and fall back.
        ``"disk"``: for an AnnData whose counts stay on disk, read a pool of chunks in random
        order, and form minibatches of its cells, shuffled, on the device.
        ``"host"``: read each minibatch from the AnnData.
        ``"auto"``: on the device if they fit, otherwise from where they are, disk or host.
    chunk_size
        Cells of a chunk: neighbours on disk, which are read at once.
    preload_nchunks
        Chunks of a pool: more of them shuffle better, and take more memory.
    **kwargs
        Arguments of :class:`scvi.dataloaders.DataSplitter`.

    Raises
    ------
    ValueError
        If the placement is unknown, or ``"disk"`` for cells that are in memory; if training is to
        stop early and there are no validation cells to tell when.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *args: Any,
        data_placement: DataPlacement = "auto",
        chunk_size: int = 256,
        preload_nchunks: int = 64,
        **kwargs: Any,
    ) -> None:
        if data_placement not in get_args(DataPlacement):
            known = ", ".join(map(repr, get_args(DataPlacement)))
            raise ValueError(f"data_placement={data_placement!r} is unknown; use one of {known}.")
        self._is_on_disk = reads_from_disk(adata_manager)
        if data_placement == "disk" and not self._is_on_disk:
            raise ValueError(
                "data_placement='disk', but the AnnData is in memory. Open it with "
                "anndata.read_h5ad(path, backed='r'), or leave data_placement at 'auto'."
            )
        super().__init__(adata_manager, *args, **kwargs)
        self.data_placement: DataPlacement = data_placement
        self.chunk_size, self.preload_nchunks = chunk_size, preload_nchunks
        self._placement: DataPlacement | None = None

    def setup(self, stage: str | None = None) -> None:
        """Split the cells, in all processes alike."""
        super().setup(stage)
        if self._n_processes > 1:  # without a seed each would split them differently
            of_first = self.trainer.strategy.broadcast(
                {name: getattr(self, name) for name in ("train_idx", "val_idx", "test_idx")}
            )
            for name, indices in of_first.items():
                setattr(self, name, indices)
        # scvi-tools checks the same for its own splitter only.
        stopping = getattr(self.trainer, "early_stopping_callback", None)
        if stopping is not None and "validation" in stopping.monitor and len(self.val_idx) == 0:
            raise ValueError(
                f"Early stopping watches {stopping.monitor!r}, and there are no validation cells. "
                "Leave some out of training (train_size=0.9, or external_indexing with a second "
                "set), or train with early_stopping=False."
            )

    @property
    def placement(self) -> DataPlacement:
        """Where the cells are read from, never ``"auto"``; decided when training starts."""
        if self._placement is None:
            self._placement = self._decide()
        return self._placement

    def _decide(self) -> DataPlacement:
        if self.data_placement == "host":
            return "host"
        obstacle = ""
        if self.data_loader_kwargs.get("num_workers", settings.dl_num_workers) > 0:
            obstacle = "num_workers > 0 asks for other processes to form the minibatches"
        otherwise: DataPlacement = "disk" if self._is_on_disk and not obstacle else "host"
        if self.data_placement != "disk":
            obstacle = obstacle or self._too_large()
            if not obstacle:
                return "device"
        if obstacle and self.data_placement == "auto":
            logger.info("data_placement=%r: %s.", otherwise, obstacle)
        elif obstacle:
            source = "disk, in pools" if otherwise == "disk" else "the AnnData"
            warnings.warn(
                f"data_placement={self.data_placement!r}: {obstacle}. Minibatches are read from "
                f"{source} instead, as with data_placement={otherwise!r}.",
                UserWarning,
                stacklevel=settings.warnings_stacklevel,
            )
        return otherwise

    def train_dataloader(self) -> DataLoader:
        """Minibatches of training cells, in random order."""
        return self._loader(self.train_idx, shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader | None:
        """Minibatches of validation cells, if there are any."""
        return self._loader(self.val_idx) if len(self.val_idx) > 0 else None

    def test_dataloader(self) -> DataLoader | None:
        """Minibatches of test cells, if there are any."""
        return self._loader(self.test_idx) if len(self.test_idx) > 0 else None

    @property
    def _n_processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _own_part(self, indices: np.ndarray) -> np.ndarray:
        """The cells of this process: equal shares of a random order, of chunks on disk."""
        n_processes, indices = self._n_processes, np.asarray(indices)
        if n_processes == 1 or len(indices) == 0:
            return indices
        n_cells = len(indices) // n_processes
        if not self.data_loader_kwargs.get("drop_dataset_tail", False):
            n_cells = -(-len(indices) // n_processes)
        generator, rank = np.random.default_rng(settings.seed or 0), self.trainer.global_rank
        if self._is_on_disk:  # whole chunks, so that no two processes read the same piece
            chunks = np.array_split(np.sort(indices), -(-len(indices) // self.chunk_size))
            order = np.concatenate([chunks[k] for k in generator.permutation(len(chunks))])
            return np.resize(order, n_cells * n_processes)[rank * n_cells : (rank + 1) * n_cells]
        order = generator.permutation(indices)
        return np.resize(order, n_cells * n_processes)[rank::n_processes]

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _too_large(self) -> str:
        """Why the cells cannot be kept on the device; empty if they can."""
        needed = sum(
            DeviceCells.required_bytes(self.adata_manager, self._own_part(indices))
            for indices in (self.train_idx, self.val_idx)
        )
        available = _available_bytes(self._device)
        if self._device.type == "cpu" and self.trainer is not None:
            available /= self.trainer.num_devices  # processes that share the memory
        if needed <= available:
            return ""
        return (
            f"the cells take up to {needed / 2**30:.1f} GiB, and no more than "
            f"{available / 2**30:.1f} GiB of {self._device} are used for them"
        )

    def _loader(
        self, indices: np.ndarray, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader:
        kwargs = dict(self.data_loader_kwargs)
        batch_size = kwargs.pop("batch_size", None) or settings.batch_size
        for handled_here in ("distributed_sampler", "drop_dataset_tail"):
            kwargs.pop(handled_here, None)
        indices = self._own_part(indices)
        fields = kwargs.pop("data_and_attributes", None)
        dataset: Dataset
        if self.placement == "host":
            dataset = self.adata_manager.create_torch_dataset(
                indices, fields, load_sparse_tensor=self.load_sparse_tensor
            )
            kwargs.setdefault("num_workers", settings.dl_num_workers)
            kwargs.setdefault("persistent_workers", settings.dl_persistent_workers)
            kwargs["pin_memory"] = self.pin_memory
        else:
            # Not for validation: Lightning would ask which tensor has the size of the minibatch.
            dataset = (DeviceCells if self.placement == "device" else DiskCells)(
                self.adata_manager, indices, self._device, fields, nonzero_counts=shuffle
            )
            kwargs = {}
        sampler: Sampler
        if isinstance(dataset, DiskCells):
            sampler = PoolSampler(
                dataset, batch_size, shuffle, drop_last, self.chunk_size, self.preload_nchunks
            )
        elif self._n_processes > 1:
            # One replica, as the cells are divided already; of a class that Lightning leaves be.
            sampler = BatchDistributedSampler(
                dataset,
                batch_size=batch_size,
                drop_last=drop_last,
                shuffle=shuffle,
                num_replicas=1,
                rank=0,
                seed=settings.seed or 0,
            )
        else:
            order = (RandomSampler if shuffle else SequentialSampler)(dataset)  # type: ignore[arg-type]
            sampler = BatchSampler(order, batch_size=batch_size, drop_last=drop_last)
        if not shuffle:  # a loader draws a seed for workers, which must not move the fit's stream
            kwargs["generator"] = torch.Generator()
        return DataLoader(dataset, sampler=sampler, batch_size=None, **kwargs)


def _available_bytes(device: torch.device) -> float:
    """Memory that may be filled with cells."""
    if device.type == "cuda":
        return _MAX_SHARE_OF_FREE_DEVICE * torch.cuda.mem_get_info(device)[0]
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system says
        return float("inf")
    return _MAX_SHARE_OF_HOST * memory
