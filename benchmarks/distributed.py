"""One screen fitted by one process and by two, on the processor: the same model, as good."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table
from benchmarks._distributed import (
    fit,
    process_rank,
    read_found,
    run_together,
    torchrun,
    write_found,
)
from scvi_sams import SAMSVAE
from scvi_sams.datasets import benchmark_screen, simulated_screen
from scvi_sams.evaluation import (
    effect_correlation,
    mask_recovery,
    observed_effects,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_QUICK: dict[str, Any] = {
    "n_cells": 1_500,
    "n_genes": 60,
    "n_perturbations": 6,
    "n_pairs": 2,
    "n_latent": 3,
    "mask_probability": 0.3,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--max-epochs", type=int, default=60)
    arguments.add_argument("--quick", action="store_true", help="a screen of seconds")
    arguments.add_argument("--folder", type=Path, help="internal: one process, reported there")
    arguments.add_argument("--n-processes", type=int, help="internal: of how many")
    passed = list(argv or [])
    arguments = arguments.parse_args(passed)
    prepare(arguments)
    if arguments.folder:
        _run(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for n_processes in (1, 2):
            command = ["-m", "benchmarks", "distributed", *passed, "--folder", folder]
            command += ["--n-processes", str(n_processes)]
            if n_processes > 1:
                command = torchrun(f"--nproc_per_node={n_processes}", "--standalone", *command)
            run_together(command)
            rows += read_found(Path(folder), f"of_{n_processes}", n_processes)
    title = "quick" if arguments.quick else "small"
    print_table(f"One and two processes, simulated screen ({title})", rows, arguments)
    if rows[1]["parameter sum"] != rows[2]["parameter sum"]:
        raise SystemExit("The two processes ended with different models.")


def _run(arguments: argparse.Namespace) -> None:
    seed = arguments.seed
    if arguments.quick:
        screen = simulated_screen(**_QUICK, seed=seed)
    else:
        screen = benchmark_screen("small", seed=seed)
    model, found = fit(
        SAMSVAE,
        screen,
        model_kwargs={"n_latent": 6} if arguments.quick else {},
        train_kwargs={"max_epochs": arguments.max_epochs, "batch_size": 128},
        n_processes=arguments.n_processes,
        seed=seed,
    )
    labels = pd.unique(screen.obs["perturbation"].astype(str))
    observed = observed_effects(
        screen, layer="counts", perturbation_key="perturbation", control="control"
    )
    scvi.settings.seed = seed  # draws of their own were for training
    predicted = model.get_average_treatment_effect(
        sorted(set(labels) - {"control"}), n_samples=4, n_cells=100
    )
    total = sum(value.astype(float).sum() for value in found["state"].values())
    validation = found["history"].get("elbo_validation")  # which the first process keeps
    row = {
        "processes": arguments.n_processes,
        "rank": process_rank(),
        "parameter sum": f"{total:.9f}",
        "mask F1": mask_recovery(screen.uns["truth"]["mask"], model.get_perturbation_mask()).f1,
        "effect correlation": effect_correlation(predicted, observed),
        "validation bound": "" if validation is None else float(-validation[-1, 0]),
        "seconds": found["seconds"],
    }
    write_found(row, arguments.folder, f"of_{arguments.n_processes}")
