"""Masks and effects recovered from simulated screens of known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, train, with_mean
from scvi_sams import SAMSVAE
from scvi_sams.datasets import benchmark_screen
from scvi_sams.evaluation import (
    effect_correlation,
    latent_recovery,
    mask_recovery,
    observed_effects,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--variants",
        nargs="+",
        default=["default"],
        choices=("default", "weak", "shallow", "small"),
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    arguments.add_argument("--max-epochs", type=int)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    for variant in arguments.variants:
        rows = [_run(variant, seed, arguments.max_epochs) for seed in arguments.seeds]
        print_table(f"Simulated screens, {variant}", with_mean(rows, "seed"), arguments)


def _run(variant: str, seed: int, max_epochs: int | None) -> dict[str, float]:
    screen = benchmark_screen(variant, seed=seed)
    truth = screen.uns["truth"]
    scvi.settings.seed = seed
    SAMSVAE.setup_anndata(screen, layer="counts", **_LABELS)
    model = SAMSVAE(screen)
    watch = train(model, max_epochs=max_epochs)
    masks = mask_recovery(truth["mask"], model.get_perturbation_mask().to_numpy())
    effects = latent_recovery(truth["effect"], model.get_perturbation_effect().to_numpy())
    labels = pd.unique(screen.obs["perturbation"].astype(str))
    pairs = sorted(label for label in labels if "+" in label)
    singles = sorted(set(labels) - set(pairs) - {"control"})
    observed = observed_effects(screen, layer="counts", **_LABELS)
    correlations = [
        effect_correlation(
            model.get_average_treatment_effect(some, n_samples=4, n_cells=100), observed
        )
        for some in (singles, pairs)
    ]
    row = {
        "seed": seed,
        "F1": masks.f1,
        "precision": masks.precision,
        "recall": masks.recall,
        "MCC": effects.mean_correlation,
        "effect correlation": correlations[0],
        "pairs": correlations[1],
        "restarts": float(model.trainer.lightning_module.n_restarts),
        "loss": float(model.history["train_loss"].iloc[-1, 0]),
        "core seconds": watch.cpu,
    }
    print({key: round(float(value), 3) for key, value in row.items()}, flush=True)
    return row
