"""What the benchmarks share: data, timing and tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch

from scvi_sams.evaluation._measures import coverage_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Stopwatch",
    "coverage",
    "parser",
    "prepare",
    "print_table",
    "read_screen",
    "train",
    "with_mean",
]


_WRITTEN: dict[str, list[dict[str, Any]]] = {}


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("SCVI_SAMS_TEST_DATA", "../shared/data")),
        help="folder of the real screens (default: $SCVI_SAMS_TEST_DATA)",
    )
    arguments.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments.add_argument("--json", type=Path, help="write the rows to this file too")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Fix the number of threads, and quieten what is not a result."""
    torch.set_num_threads(arguments.threads)
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def read_screen(arguments: argparse.Namespace, name: str) -> ad.AnnData:
    """Read a real screen, or say where it is missed."""
    path = arguments.data / name
    if not path.exists():
        raise SystemExit(f"{path} is not there: give its folder with --data.")
    return ad.read_h5ad(path)


class Stopwatch:
    """Seconds of wall time and of processor time (all threads) of a block."""

    wall = 0.0
    cpu = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Time a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


def train(model: Any, train_size: float | None = 1.0, **kwargs: Any) -> Stopwatch:
    """Train on a CPU, on all cells by default, and say how long it took."""
    watch = Stopwatch()
    with watch():
        model.train(train_size=train_size, accelerator="cpu", enable_progress_bar=False, **kwargs)
    return watch


def coverage(predicted: ad.AnnData, observed: ad.AnnData) -> dict[str, float]:
    """Share of observed effects in the 50, 80 and 95% intervals, which noise of theirs widens."""
    shares = coverage_of(predicted, observed)
    if shares is None:
        raise ValueError("The prediction has no standard deviations.")
    return {name.replace("_", " ") + "%": float(shares[name].mean()) for name in shares}


def with_mean(rows: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """Append the means of the columns, labelled in the column ``label``."""
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != label}
    return [*rows, {label: "mean"} | means]


def print_table(
    title: str, rows: list[dict[str, Any]], arguments: argparse.Namespace, digits: int = 3
) -> None:
    """Print rows as a Markdown table, and write them as JSON if asked.

    Later tables of a run are added to the file, whose rows name their table.
    """
    table = pd.DataFrame(rows)
    print(
        f"\n### {title}\n\ntorch.set_num_threads({arguments.threads}), "
        f"torch {torch.__version__}, scvi-tools {scvi.__version__}\n"
    )
    cells = table.map(lambda value: f"{value:.{digits}f}" if isinstance(value, float) else value)
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)
    if arguments.json:
        written = _WRITTEN.setdefault(str(arguments.json.resolve()), [])
        written += [{"table": title} | row for row in rows]
        arguments.json.write_text(json.dumps(written, indent=2, default=lambda v: v.item()))
