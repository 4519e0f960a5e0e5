"""Conditions and cells a second after training, with their memory."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import scvi

from benchmarks._common import prepare, print_table
from benchmarks._speed import (
    clock,
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

__all__ = ["main"]

_PANEL = 100
_N_TRAINING_CELLS = 5_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = speed_parser(__doc__)
    arguments.add_argument("--genes", type=int, default=1_000)
    arguments.add_argument("--pairs", type=int, nargs="+", default=[495, 4_950])
    arguments.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    arguments.add_argument("--samples", type=int, default=4, help="draws of the effects")
    arguments.add_argument("--population", type=int, default=100, help="cells a condition")
    arguments.add_argument("--particles", type=int, default=5, help="of the IWELBO")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.one:
        run_one(_run, arguments)
        return
    if arguments.quick:
        arguments.pairs, arguments.cells = [100, 495], [2_000, 10_000]
    shared = {key: getattr(arguments, key) for key in ("genes", "samples", "population")}
    shared["particles"] = arguments.particles
    rows = []
    for task, sizes in (("effects of pairs", arguments.pairs), ("IWELBO", arguments.cells)):
        for size in sizes:
            one = {"task": task, "size": size}
            rows.append(one | in_own_process("prediction_throughput", shared | one, arguments))
            print(rows[-1], flush=True)
    title = (
        f"Prediction, {arguments.genes} genes, {arguments.samples} draws x "
        f"{arguments.population} cells a pair, {arguments.particles} particles, "
        f"{arguments.accelerator}"
    )
    print_table(title, rows, arguments, digits=1)


def _run(one: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    is_iwelbo = one["task"] == "IWELBO"
    n_cells = max(_N_TRAINING_CELLS, one["size"]) if is_iwelbo else _N_TRAINING_CELLS
    screen = random_screen(n_cells, one["genes"], _PANEL, density=0.1)
    SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = SAMSVAE(screen)
    training = training_arguments(arguments) | {"train_size": _N_TRAINING_CELLS / n_cells}
    model.train(max_epochs=2, plan_kwargs={"mask_warmup_fraction": 0.0}, **training)
    before = peak_memory(arguments.accelerator)
    start = clock(arguments.accelerator)
    if is_iwelbo:
        model.get_iwelbo(indices=range(one["size"]), n_particles=one["particles"])
    else:
        names = [f"P{k}" for k in range(_PANEL)]
        pairs = ["+".join(pair) for pair in combinations(names, 2)][: one["size"]]
        model.get_average_treatment_effect(
            pairs, n_samples=one["samples"], n_cells=one["population"]
        )
    seconds = clock(arguments.accelerator) - start
    return {
        "seconds": seconds,
        "a second": one["size"] / seconds,
        "peak memory, MiB": peak_memory(arguments.accelerator),
        "of it before, MiB": before,
    }
