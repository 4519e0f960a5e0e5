"""Intervals of average effects, against the exact effects that screens were simulated with.

The pairs, and a share of the other cells, are held out. "Truth" is what no cell has: the share of
exact effects in an interval. "Cells" are the means of the cells that were held out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scvi
from scipy.stats import norm

from benchmarks._common import coverage, parser, prepare, print_table, train, with_mean
from benchmarks._single_genes import VARIANTS, single_gene_screen
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import observed_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    import pandas as pd

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}
_HELD_OUT = 0.15
_MIN_CELLS = 4  # of a mean whose error is known


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--cells", type=int, default=12_000)
    arguments.add_argument(
        "--train-size", type=float, default=0.9, help="of the cells not held out; 1 for all"
    )
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    for variant in arguments.variants:
        rows: dict[str, list[dict[str, float]]] = {"singles": [], "pairs": []}
        for seed in arguments.seeds:
            _run(variant, seed, arguments.cells, arguments.train_size, rows)
        for kind, some in rows.items():
            print_table(
                f"Simulated screens, {variant}, {kind}", with_mean(some, "seed"), arguments
            )


def _run(
    variant: str,
    seed: int,
    n_cells: int,
    train_size: float,
    rows: dict[str, list[dict[str, float]]],
) -> None:
    screen, truth = single_gene_screen(variant, seed, n_cells)
    labels = screen.obs["perturbation"]
    is_pair = labels.str.contains("+", regex=False).to_numpy()
    is_test = is_pair | (np.random.default_rng(seed).random(screen.n_obs) < _HELD_OUT)
    training, test = screen[~is_test].copy(), screen[is_test]
    scvi.settings.seed = seed
    SAMSVAE.setup_anndata(training, **_LABELS)
    model = SAMSVAE(training)
    watch = train(model, train_size)
    known, n_cells_of = set(training.obs["perturbation"]), test.obs["perturbation"].value_counts()
    scored = sorted(set(n_cells_of.index[n_cells_of >= _MIN_CELLS]) - {"control"})
    for kind, of_kind in rows.items():
        names = [
            name
            for name in scored
            if ("+" in name) == (kind == "pairs") and known.issuperset(name.split("+"))
        ]
        predicted = model.get_average_treatment_effect(names, seed=seed)
        observed = observed_effects(test, conditions=names, **_LABELS)
        of_cells = coverage(predicted, observed)
        of_kind.append(
            {
                "seed": seed,
                **{f"{name}, truth": share for name, share in _of_truth(predicted, truth).items()},
                **{f"{name}, cells": share for name, share in of_cells.items()},
                "squared error": _error(predicted, truth),
                "noise absorbed": float(model.module.gene_effects.absorbed),
                "core seconds": watch.cpu,
            }
        )


def _error(predicted: ad.AnnData, truth: pd.DataFrame) -> float:
    exact = truth.loc[predicted.obs_names].to_numpy()
    return float(((predicted.X - exact) ** 2).sum() / (exact**2).sum())


def _of_truth(predicted: ad.AnnData, truth: pd.DataFrame) -> dict[str, float]:
    distance = np.abs(predicted.X - truth.loc[predicted.obs_names].to_numpy())
    return {
        f"coverage {level:.0%}": float(
            (distance <= norm.ppf((1 + level) / 2) * predicted.layers["std"]).mean()
        )
        for level in (0.5, 0.8, 0.95)
    }
