"""Training on a screen that stays on disk, beside one in memory: speed and peak memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scvi
from anndata.io import sparse_dataset, write_elem
from lightning.pytorch.callbacks import Callback
from pandas.api.types import union_categoricals

from benchmarks._common import prepare, print_table
from benchmarks._speed import (
    in_own_process,
    peak_memory,
    random_screen,
    run_one,
    speed_parser,
    training_arguments,
)
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["EpochTimer", "main", "write_random_screen"]

_DENSITY = 0.05
_CELLS_AT_ONCE = 50_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: write, train from disk, and train a smaller part in memory."""
    arguments = speed_parser(__doc__)
    arguments.add_argument("--cells", type=int, default=1_000_000, help="of the screen on disk")
    arguments.add_argument(
        "--memory-cells", type=int, default=100_000, help="of the screen in memory"
    )
    arguments.add_argument("--genes", type=int, default=2_000)
    arguments.add_argument("--perturbations", type=int, default=10_000)
    arguments.add_argument(
        "--layout", default="sparse", choices=["sparse", "dense"], help="of the counts on disk"
    )
    arguments.add_argument("--folder", type=Path, help="where to write (temporary by default)")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.one:
        run_one(_run, arguments)
        return
    if arguments.quick:
        arguments.cells, arguments.memory_cells, arguments.perturbations = 50_000, 20_000, 1_000
    size = {"genes": arguments.genes, "perturbations": arguments.perturbations}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for placement, n_cells in (
            ("device", arguments.memory_cells),
            ("disk", arguments.cells),
        ):
            path = Path(folder) / f"{placement}.h5ad"
            start = time.perf_counter()
            write_random_screen(path, n_cells, **size, is_dense=arguments.layout == "dense")
            one = {"cells": n_cells, "kept": placement, "layout": arguments.layout}
            written = {
                "file, MiB": path.stat().st_size / 2**20,
                "seconds to write": time.perf_counter() - start,
            }
            found = in_own_process("out_of_core", one | {"path": str(path)}, arguments)
            rows.append(one | size | written | found)
            path.unlink()
    for row in rows:
        for clock in ("second", "processor second"):
            rate = f"cells a {clock}"
            row[f"{rate}, beside memory"] = row[rate] / rows[0][rate]
    print_table(f"Out of core, {arguments.accelerator}", rows, arguments, digits=2)


def write_random_screen(
    path: Path, n_cells: int, genes: int, perturbations: int, is_dense: bool = False
) -> None:
    """Write counts without structure to an h5ad file, some cells at a time.

    Parameters
    ----------
    path
        File to write.
    n_cells, genes, perturbations
        Sizes of the screen. One perturbation a cell, 5% of the counts not zero.
    is_dense
        Write the zeros too.
    """
    unfinished = path.with_suffix(".unfinished")
    labels = []
    for first in range(0, n_cells, _CELLS_AT_ONCE):
        n_now = min(_CELLS_AT_ONCE, n_cells - first)
        part = random_screen(n_now, genes, perturbations, _DENSITY, seed=first)
        labels.append(part.obs["perturbation"].array)
        if is_dense:
            if first == 0:
                ad.AnnData(obs=part.obs, var=part.var).write_h5ad(unfinished)
            with h5py.File(unfinished, "a") as file:
                if first == 0:
                    shape, chunks = (n_cells, genes), (min(256, n_cells), genes)
                    matrix = file.create_dataset("X", shape, np.float32, chunks=chunks)
                    matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
                for row in range(0, n_now, 5_000):
                    counts = part.X[row : row + 5_000].toarray()
                    file["X"][first + row : first + row + len(counts)] = counts
        elif first == 0:
            part.X.indptr = part.X.indptr.astype(np.int64)  # of all cells there may be many
            part.write_h5ad(unfinished)
        else:
            with h5py.File(unfinished, "a") as file:
                sparse_dataset(file["X"]).append(part.X)
    obs = pd.DataFrame(
        {"perturbation": union_categoricals(labels)}, index=np.arange(n_cells).astype(str)
    )
    with h5py.File(unfinished, "a") as file:
        write_elem(file, "obs", obs)
    unfinished.replace(path)


class EpochTimer(Callback):
    """Seconds of the first epoch, of the wall and of the processor."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def _run(one: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    start = time.perf_counter()
    adata = ad.read_h5ad(one["path"], backed="r" if one["kept"] == "disk" else None)
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = SAMSVAE(adata)
    before = peak_memory("cpu")
    seconds_before = time.perf_counter() - start
    timer = EpochTimer()
    start = time.perf_counter()
    model.train(
        max_epochs=1,
        data_placement=one["kept"],
        callbacks=[timer],
        # The masks are on from the first step, so that every step does the whole work.
        plan_kwargs={"mask_warmup_fraction": 0.0},
        **training_arguments(arguments),
    )
    return {
        "seconds to set up": seconds_before,
        "seconds of train()": time.perf_counter() - start,
        "cells a second": one["cells"] / timer.wall,
        "cells a processor second": one["cells"] / timer.cpu,
        "peak memory, MiB": peak_memory("cpu"),
        "of it before training, MiB": before,
    }
