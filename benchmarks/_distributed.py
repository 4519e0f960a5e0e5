"""One fit by several processes: how they are started, what each does and ends with."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scvi

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

__all__ = ["fit", "process_rank", "read_found", "run_together", "torchrun", "write_found"]

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT = 1_200  # seconds; a process that waits for another never ends by itself


def torchrun(*arguments: str) -> list[str]:
    """Arguments of Python that start torchrun with these arguments of its own."""
    return ["-m", "torch.distributed.run", *arguments]


def run_together(*commands: Sequence[str], timeout: float = _TIMEOUT) -> None:
    """Run Python with each list of arguments, all at the same time.

    Raises
    ------
    RuntimeError
        If one fails, with what it said.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_", "MASTER_", "PL_"))}
    env |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command in commands
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=timeout)
            if process.returncode:
                raise RuntimeError(f"{' '.join(process.args)}\n{output}")
    finally:
        for process in running:
            process.kill()
            process.communicate()


def fit(
    model_class: type,
    adata: AnnData,
    *,
    model_kwargs: Mapping[str, Any],
    train_kwargs: Mapping[str, Any],
    n_processes: int,
    n_nodes: int = 1,
    seed: int | None = 0,
) -> tuple[Any, dict[str, Any]]:
    """Fit a simulated screen by ``n_processes``, of which this is one; the model, and its state.

    ``batch_size`` is that of all processes together.
    """
    model_class.setup_anndata(
        adata,
        layer="counts",
        perturbation_key="perturbation",
        control="control",
        batch_key="replicate",
    )
    scvi.settings.seed = 0
    model = model_class(adata, **model_kwargs)
    scvi.settings.seed = seed
    train_kwargs = {"strategy": "ddp", "check_val_every_n_epoch": 2} | dict(train_kwargs)
    train_kwargs["batch_size"] //= n_processes
    if n_processes == 1:
        train_kwargs.pop("strategy")
    start = time.perf_counter()
    model.train(
        accelerator="cpu",
        devices=n_processes // n_nodes,
        num_nodes=n_nodes,
        enable_progress_bar=False,
        **train_kwargs,
    )
    found = {
        "seconds": time.perf_counter() - start,
        "state": {key: value.numpy() for key, value in model.module.state_dict().items()},
        "n_steps": model.trainer.global_step,
        "n_restarts": model.trainer.lightning_module.n_restarts,
        "history": {key: table.to_numpy(float) for key, table in (model.history or {}).items()},
        "train_indices": np.asarray(model.train_indices),
    }
    return model, found


def process_rank() -> int:
    """Number of this process, as torchrun or Lightning tells it; 0 where there is one only."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def write_found(found: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write what this process ends with."""
    temporary = folder / f"{name}_{process_rank()}.tmp"
    temporary.write_bytes(pickle.dumps(dict(found)))
    temporary.rename(temporary.with_suffix(".pickle"))


def read_found(folder: Path, name: str, n_processes: int = 2) -> list[dict[str, Any]]:
    """What each process ended with."""
    return [
        pickle.loads((folder / f"{name}_{rank}.pickle").read_bytes())
        for rank in range(n_processes)
    ]
