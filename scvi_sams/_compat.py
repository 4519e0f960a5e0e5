"""Private names of other libraries, all of them, and what they are needed for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import rich.pretty  # noqa: F401 - scvi-tools calls it without importing it
import torch
from scvi.data._download import _download
from scvi.model._utils import parse_device_args
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn


class HostState:
    """Part of a module with numbers of Python that its ``state_dict`` carries.

    What decides which way Python goes must not be a tensor: the host would wait for the device to
    ask for it at every step. The hooks overridden here are torch's own; ``get_extra_state`` will
    not do, as scvi-tools takes all that is in a state for tensors.
    """

    host_state: ClassVar[tuple[str, ...]] = ()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self.host_state:
            value = getattr(self, name)
            dtype = torch.float64 if isinstance(value, float) else None  # Python's own
            destination[prefix + name] = torch.tensor(value, dtype=dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        for name in self.host_state:
            if prefix + name in state_dict:
                setattr(self, name, state_dict.pop(prefix + name).item())
            elif strict:
                missing_keys.append(prefix + name)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )


def ignore_buffers(module: nn.Module, names: Iterable[str]) -> None:
    """Keep distributed training from sending buffers of a module to every process at each step."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def download(url: str | None, folder: str | os.PathLike[str], name: str) -> None:
    """Fetch a file as scvi-tools does, unless it is there."""
    if url is not None:
        _download(url, str(folder), name)


def torch_device(accelerator: str, device: int | str) -> torch.device:
    """The device that scvi-tools means by an accelerator and a number."""
    return parse_device_args(
        accelerator, device, return_device="torch", validate_single_device=True
    )[2]
