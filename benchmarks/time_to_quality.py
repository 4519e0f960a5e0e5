"""Seconds of training until a level of quality is reached, on cells that were not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi

from benchmarks._common import prepare, print_table, read_screen
from benchmarks._speed import clock, speed_parser, training_arguments
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    effect_correlation,
    mask_recovery,
    observed_effects,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}
_LEVELS = {
    "simulated": {"held-out effect correlation": 0.95, "mask F1": 0.95},
    "papalexi": {"held-out effect correlation": 0.81},
}
_STEPS = [300, 600, 1_000, 1_500, 2_000, 3_000]
_N_IWELBO_CELLS = 500


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Schedules follow the share of training that is done, so a level is reached by the shortest
    whole run that ends above it, not by a moment within a longer one.
    """
    arguments = speed_parser(__doc__)
    arguments.add_argument("--screens", nargs="+", default=list(_LEVELS), choices=list(_LEVELS))
    arguments.add_argument("--steps", type=int, nargs="+", default=_STEPS)
    arguments.add_argument("--seed", type=int, default=0)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.quick:
        arguments.screens, arguments.steps = ["simulated"], [300, 1_000]
    for name in arguments.screens:
        parts = _simulated(arguments) if name == "simulated" else _papalexi(arguments)
        layer = "counts" if name == "simulated" else None
        rows: list[dict[str, Any]] = []
        for n_steps in arguments.steps:
            rows.append(_run(*parts, layer, n_steps, arguments))
            print(rows[-1], flush=True)
            if all(rows[-1][key] >= level for key, level in _LEVELS[name].items()):
                break
        levels = ", ".join(f"{key} {level}" for key, level in _LEVELS[name].items())
        print_table(f"Time to quality, {name}: {levels}", rows, arguments)
        for key, level in _LEVELS[name].items():
            reached = [row["seconds"] for row in rows if row[key] >= level]
            found = f"after {reached[0]:.1f} s" if reached else "not reached"
            print(f"\n{name}, {key} of {level}: {found}", flush=True)


def _simulated(arguments: argparse.Namespace) -> tuple[AnnData, AnnData]:
    """Twice the cells of one truth; one half is trained on."""
    n_cells = 5_000 if arguments.quick else 20_000
    screen = simulated_screen(
        n_cells=2 * n_cells,
        n_genes=300 if arguments.quick else 1_000,
        n_perturbations=40 if arguments.quick else 200,
        n_pairs=10 if arguments.quick else 60,
        n_latent=10 if arguments.quick else 20,
        seed=arguments.seed,
    )
    return _halves(screen, arguments.seed)


def _papalexi(arguments: argparse.Namespace) -> tuple[AnnData, AnnData]:
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    return _halves(screen[screen.obs["guide_frac"] > 0.5].copy(), arguments.seed)


def _halves(screen: AnnData, seed: int) -> tuple[AnnData, AnnData]:
    order = np.random.default_rng(seed).permutation(screen.n_obs)
    half = screen.n_obs // 2
    first, second = (screen[np.sort(part)].copy() for part in (order[:half], order[half:]))
    return first, second


def _run(
    first: AnnData,
    second: AnnData,
    layer: str | None,
    n_steps: int,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    library = None if layer else "total_umi_all_genes"
    scvi.settings.seed = arguments.seed
    SAMSVAE.setup_anndata(first, layer=layer, size_factor_key=library, **_LABELS)
    model = SAMSVAE(first)
    n_epochs = max(2, round(n_steps * 128 / first.n_obs))
    start = clock(arguments.accelerator)
    model.train(max_epochs=n_epochs, **training_arguments(arguments))
    seconds = clock(arguments.accelerator) - start
    held_out = observed_effects(second, layer=layer, size_factor_key=library, **_LABELS)
    labels = pd.unique(first.obs["perturbation"].astype(str))
    conditions = sorted(set(labels) & set(second.obs["perturbation"].astype(str)) - {"control"})
    predicted = model.get_average_treatment_effect(conditions, n_samples=4, n_cells=100)
    row: dict[str, float] = {
        "steps": n_epochs * -(-first.n_obs // 128),
        "seconds": seconds,
        "held-out effect correlation": effect_correlation(predicted, held_out),
        "IWELBO, held out": model.get_iwelbo(
            second, indices=np.arange(min(_N_IWELBO_CELLS, second.n_obs)), n_particles=20
        ),
    }
    if "truth" in first.uns:
        masks = model.get_perturbation_mask().to_numpy()
        row["mask F1"] = mask_recovery(first.uns["truth"]["mask"], masks).f1
    return row
