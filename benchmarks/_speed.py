"""What the benchmarks of speed share: screens of any size, timers, memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks._common import parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = [
    "StepTimer",
    "clock",
    "in_own_process",
    "peak_memory",
    "random_screen",
    "run_one",
    "speed_parser",
    "steady",
    "training_arguments",
]


def speed_parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark of speed takes."""
    arguments = parser(description)
    arguments.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    arguments.add_argument("--quick", action="store_true", help="small sizes, a minute or so")
    arguments.add_argument("--one", help="internal: one run, reported as JSON")
    return arguments


def training_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``train`` that every benchmark of speed passes."""
    return {
        "accelerator": arguments.accelerator,
        "train_size": 1.0,
        "enable_progress_bar": False,
        "logger": None,
    }


def random_screen(
    n_cells: int, n_genes: int, n_perturbations: int, density: float = 0.2, seed: int = 0
) -> ad.AnnData:
    """Sparse counts without structure, one perturbation a cell: for speed, not for quality."""
    rng = np.random.default_rng(seed)
    n_entries = round(density * n_genes)
    genes = rng.integers(0, n_genes, n_cells * n_entries, dtype=np.int32)
    counts = 1 + rng.poisson(1.0, n_cells * n_entries).astype(np.float32)
    starts = np.arange(0, n_cells * n_entries + 1, n_entries)
    matrix = sp.csr_matrix((counts, genes, starts), shape=(n_cells, n_genes))
    matrix.sum_duplicates()
    labels = rng.permutation(np.arange(n_cells) % (n_perturbations + 1))
    names = np.array(["control", *(f"P{k}" for k in range(n_perturbations))])
    obs = pd.DataFrame({"perturbation": pd.Categorical(names[labels])})
    obs.index = obs.index.astype(str)
    return ad.AnnData(matrix, obs=obs)


def clock(accelerator: str) -> float:
    """Seconds: of the processor on a CPU, whose cores others use too; of the wall on a GPU."""
    if accelerator == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class StepTimer(Callback):
    """Seconds of each training step, data and bookkeeping included."""

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the time."""
        now = clock(self.accelerator)
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        """Leave out what happens between epochs."""
        self._last = None


def steady(seconds: list[float]) -> float:
    """Mean seconds of a step, of all but the first tenth, in which caches fill."""
    return float(np.mean(seconds[len(seconds) // 10 :]))


def peak_memory(accelerator: str) -> float:
    """Largest memory so far in MiB, of the process or of what it holds on the GPU."""
    if accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(
    name: str, one: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, float]:
    """Run one setting of a benchmark in a process whose peak of memory is its own."""
    command = [sys.executable, "-m", "benchmarks", name, "--one", json.dumps(one)]
    command += ["--threads", str(arguments.threads), "--accelerator", arguments.accelerator]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_one(
    run: Callable[[dict[str, Any], argparse.Namespace], dict[str, float]],
    arguments: argparse.Namespace,
) -> None:
    """Answer :func:`in_own_process`."""
    print(json.dumps(run(json.loads(arguments.one), arguments)))
