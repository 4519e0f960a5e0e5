"""Cells per second of training, beside scvi.model.SCVI with the same layers, in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scvi

from benchmarks._common import prepare, print_table
from benchmarks._speed import StepTimer, random_screen, speed_parser, steady, training_arguments
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "from the AnnData": ({}, {"data_placement": "host"}),
    "bfloat16": ({}, {"precision": "bf16-mixed"}),
    # Without the last minibatch, for whose size the compiler would start anew.
    "compiled": (
        {},
        {"plan_kwargs": {"compile": True}, "datasplitter_kwargs": {"drop_last": True}},
    ),
    "paper's posteriors": (
        {
            "basal_posterior": "amortized",
            "embedding_posterior": "correlated",
            "direct_effects": False,
        },
        {},
    ),
    "five particles": (
        {
            "basal_posterior": "amortized",
            "embedding_posterior": "correlated",
            "direct_effects": False,
        },
        {"plan_kwargs": {"n_particles": 5}},
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: the models take turns, so that what else runs slows both."""
    arguments = speed_parser(__doc__)
    arguments.add_argument("--cells", type=int, default=20_000)
    arguments.add_argument("--genes", type=int, default=1_200)
    arguments.add_argument("--perturbations", type=int, default=170)
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512])
    arguments.add_argument("--settings", nargs="+", default=["default"], choices=list(_SETTINGS))
    arguments.add_argument("--rounds", type=int, default=3)
    arguments = arguments.parse_args(argv)
    if arguments.quick:
        arguments.cells, arguments.rounds, arguments.batch_sizes = 5_000, 1, [128]
    prepare(arguments)
    screen = random_screen(arguments.cells, arguments.genes, arguments.perturbations)
    scvi.model.SCVI.setup_anndata(screen)
    SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
    rows = [
        {"setting": setting, "batch size": batch_size}
        | _compare(screen, setting, batch_size, arguments)
        for setting in arguments.settings
        for batch_size in arguments.batch_sizes
    ]
    title = (
        f"Training, {arguments.cells} cells x {arguments.genes} genes x "
        f"{arguments.perturbations} perturbations, one hidden layer of 400, 40 latents, "
        f"{arguments.accelerator}"
    )
    print_table(title, rows, arguments, digits=2)


def _compare(
    screen: AnnData, setting: str, batch_size: int, arguments: argparse.Namespace
) -> dict[str, float]:
    layers = {"n_layers": 1, "n_hidden": 400, "n_latent": 40}
    model_kwargs, train_kwargs = _SETTINGS[setting]
    plan = {"mask_warmup_fraction": 0.0} | train_kwargs.get("plan_kwargs", {})
    per_second: dict[str, list[float]] = {"SCVI": [], "SAMSVAE": []}
    for round_ in range(arguments.rounds):
        scvi.settings.seed = round_
        models = {
            "SCVI": (scvi.model.SCVI(screen, gene_likelihood="nb", **layers), {}),
            # The masks are on from the first step, so that every step does the whole work.
            "SAMSVAE": (
                SAMSVAE(screen, **layers, **model_kwargs),
                train_kwargs | {"plan_kwargs": plan},
            ),
        }
        for name, (model, kwargs) in models.items():
            timer = StepTimer(arguments.accelerator)
            model.train(
                max_epochs=1,
                batch_size=batch_size,
                callbacks=[timer],
                **(training_arguments(arguments) | kwargs),
            )
            per_second[name].append(batch_size / steady(timer.seconds))
    ratios = np.divide(per_second["SAMSVAE"], per_second["SCVI"])
    return {
        **{f"{name}, cells a second": float(np.median(v)) for name, v in per_second.items()},
        "ratio": float(np.median(ratios)),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
    }
