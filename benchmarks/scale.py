"""Time and memory of training against perturbations, cells, genes, latents and particles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import scvi

from benchmarks._common import prepare, print_table
from benchmarks._global_updates import time_global_updates
from benchmarks._speed import (
    StepTimer,
    clock,
    in_own_process,
    peak_memory,
    random_screen,
    run_one,
    speed_parser,
    steady,
    training_arguments,
)
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_PAPER = {"basal_posterior": "amortized", "direct_effects": False}
_POSTERIORS: dict[str, dict[str, Any]] = {
    "closed form": {},
    "mean_field": _PAPER | {"embedding_posterior": "mean_field"},
    "correlated": _PAPER | {"embedding_posterior": "correlated"},
}
_UPDATE_LATENTS = [20, 50, 64, 65, 100, 200, 400]
_BASE = {"perturbations": 1_000, "cells": 20_000, "genes": 1_000, "latents": 50, "particles": 1}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: one size is changed at a time, each run in a process of its own."""
    arguments = speed_parser(__doc__)
    arguments.add_argument("--perturbations", type=int, nargs="*", default=[100, 1_000, 10_000])
    arguments.add_argument(
        "--cells", type=int, nargs="*", default=[10_000, 100_000], help="1000000 takes 3 GiB"
    )
    arguments.add_argument("--genes", type=int, nargs="*", default=[5_000])
    arguments.add_argument("--latents", type=int, nargs="*", default=[100])
    arguments.add_argument("--particles", type=int, nargs="*", default=[5])
    arguments.add_argument(
        "--updates",
        action="store_true",
        help="time frame and updates alone, without training, at --update-latents by "
        "--update-perturbations",
    )
    arguments.add_argument("--update-latents", type=int, nargs="+", default=_UPDATE_LATENTS)
    arguments.add_argument(
        "--update-perturbations", type=int, nargs="+", default=[100, 1_000, 20_000]
    )
    arguments.add_argument(
        "--posteriors", nargs="+", default=["closed form"], choices=list(_POSTERIORS)
    )
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.one:
        run_one(_run, arguments)
        return
    if arguments.updates:
        rows = []
        for n_latent in arguments.update_latents:
            for n in arguments.update_perturbations:
                found = time_global_updates(n_latent, n)
                rows.append({"latents": n_latent, "perturbations": n} | found)
                print(rows[-1], flush=True)
        print_table("Frame and updates, one processor", rows, arguments)
        return
    if arguments.quick:
        arguments.cells, arguments.genes, arguments.latents, arguments.particles = [], [], [], []
        arguments.perturbations = [100, 10_000]
    rows = []
    for posterior in arguments.posteriors:
        for axis in _BASE:
            for value in getattr(arguments, axis):
                if axis == "particles" and posterior == "closed form":
                    continue  # it draws nothing that particles would average
                one = _BASE | {axis: value}
                figures = in_own_process("scale", {"posterior": posterior} | one, arguments)
                rows.append({"posterior": posterior} | one | figures)
                print(rows[-1], flush=True)
    print_table(f"Scale, {arguments.accelerator}", rows, arguments, digits=2)


def _run(one: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    screen = random_screen(one["cells"], one["genes"], one["perturbations"], density=0.1)
    SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = SAMSVAE(screen, n_latent=one["latents"], **_POSTERIORS[one["posterior"]])
    before = peak_memory(arguments.accelerator)
    timer = StepTimer(arguments.accelerator)
    start = clock(arguments.accelerator)
    model.train(
        max_epochs=1 if one["cells"] > 50_000 else 2,
        callbacks=[timer],
        # The masks are on from the first step, so that every step does the whole work.
        plan_kwargs={"mask_warmup_fraction": 0.0, "n_particles": one["particles"]},
        **training_arguments(arguments),
    )
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return {
        "milliseconds a step": 1e3 * steady(timer.seconds),
        "seconds of train()": clock(arguments.accelerator) - start,
        "peak memory, MiB": peak_memory(arguments.accelerator),
        "of it before training, MiB": before,
        "parameters, million": parameters / 1e6,
    }
