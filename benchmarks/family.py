"""The family on the Papalexi screen (cells split 64/16/20) and on a simulation of known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, read_screen, train
from benchmarks._family import FAMILY, make_model
from scvi_sams.datasets import benchmark_screen
from scvi_sams.evaluation import (
    effect_correlation,
    mask_recovery,
    observed_effects,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_PAPALEXI = {
    "perturbation_key": "perturbation",
    "control": "control",
    "size_factor_key": "total_umi_all_genes",
}
_REFERENCE = "SAMSVAE mean-field"
_SIMULATED = {"layer": "counts", "perturbation_key": "perturbation", "control": "control"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--rows", nargs="+", default=list(FAMILY), choices=list(FAMILY))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--screens", nargs="+", default=["papalexi", "small"], choices=["papalexi", "small"]
    )
    arguments.add_argument("--max-epochs", type=int)
    arguments.add_argument("--particles", type=int, default=100)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    for screen_name in arguments.screens:
        runs = []
        for seed in arguments.seeds:
            if screen_name == "papalexi":
                screen, setup = read_screen(arguments, "papalexi2021_eccite.h5ad"), _PAPALEXI
            else:
                screen, setup = benchmark_screen("small", seed=seed), _SIMULATED
            for row in arguments.rows:
                run = _run(row, screen, setup, seed, arguments.max_epochs, arguments.particles)
                print({"seed": seed} | run, flush=True)
                runs.append({"seed": seed} | run)
        rows = _summary(pd.DataFrame(runs))
        print_table(f"The family, {screen_name}, {len(arguments.seeds)} seeds", rows, arguments)


def _summary(runs: pd.DataFrame) -> list[dict[str, Any]]:
    # Seeds differ in their held-out cells, and so by more than the models do: a likelihood is
    # compared with the plainest row of the same seed.
    gain = "IWELBO gain"
    bound = runs.pivot(index="seed", columns="model", values="IWELBO")
    if _REFERENCE in bound:
        gains = bound.sub(bound[_REFERENCE], axis=0).stack().rename(gain)
        runs = runs.join(gains, on=["seed", "model"])
        runs.insert(runs.columns.get_loc("IWELBO") + 1, gain, runs.pop(gain))
    statistics = runs.drop(columns="seed").groupby("model", sort=False).agg(["mean", "std"])
    with_deviation = {gain, "effect correlation"}
    rows = []
    for model in statistics.index:
        row: dict[str, Any] = {"model": model}
        for name in runs.columns.drop(["seed", "model"]):
            row[name] = statistics.loc[model, (name, "mean")]
            if name in with_deviation:
                row[f"{name} (sd)"] = statistics.loc[model, (name, "std")]
        rows.append(row)
    return rows


def _run(
    row: str,
    screen: AnnData,
    setup: dict[str, Any],
    seed: int,
    max_epochs: int | None,
    n_particles: int,
) -> dict[str, Any]:
    order = np.random.default_rng(seed).permutation(screen.n_obs)
    parts = np.split(order, [int(0.64 * len(order)), int(0.8 * len(order))])
    parts = [np.sort(part) for part in parts]
    test = parts[2]
    scvi.settings.seed = seed
    model = make_model(row, screen, setup)
    split = {"external_indexing": parts}
    watch = train(model, None, max_epochs=max_epochs, datasplitter_kwargs=split)
    held_out = observed_effects(screen[test].copy(), **setup)
    predicted = model.get_average_treatment_effect(held_out.obs_names.tolist())
    result = {
        "model": row,
        "IWELBO": model.get_iwelbo(indices=test, n_particles=n_particles),
        "effect correlation": effect_correlation(predicted, held_out),
    }
    if "truth" in screen.uns:
        has_masks = model.module.effects is not None and model.module.effects.sparse
        result["mask F1"] = np.nan
        is_single = "SVAEPlus" not in row  # there, pairs are perturbations of their own
        if has_masks and is_single:
            mask = model.get_perturbation_mask().to_numpy()
            result["mask F1"] = mask_recovery(screen.uns["truth"]["mask"], mask).f1
    return result | {"core seconds": watch.cpu}


if __name__ == "__main__":
    main()
