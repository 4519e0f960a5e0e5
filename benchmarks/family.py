"""The family on the Papalexi screen (cells split 64/16/20) and on a simulation of known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi

from benchmarks._common import Stopwatch, parser, prepare, print_table, read_screen
from benchmarks._family import FAMILY, make_model
from scvi_sams.datasets import benchmark_screen
from scvi_sams.metrics import (
    effect_correlation,
    mask_recovery,
    observed_average_treatment_effect,
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
                runs.append(run)
        table = pd.DataFrame(runs).groupby("model", sort=False).agg(["mean", "std"])
        # The mean over seeds, and the standard deviation where it says how much to believe.
        rows = [
            {"model": model}
            | {
                f"{name}{suffix}": table.loc[model, (name, statistic)]
                for name in table.columns.levels[0][table.columns.codes[0][::2]]
                for suffix, statistic in (("", "mean"), (" (sd)", "std"))
                if statistic == "mean" or name in {"IWELBO", "effect correlation"}
            }
            for model in table.index
        ]
        print_table(f"The family, {screen_name}, {len(arguments.seeds)} seeds", rows, arguments)


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
    train, validation, test = (np.sort(part) for part in parts)
    scvi.settings.seed = seed
    model = make_model(row, screen, setup)
    watch = Stopwatch()
    with watch():
        model.train(
            max_epochs=max_epochs,
            accelerator="cpu",
            enable_progress_bar=False,
            datasplitter_kwargs={"external_indexing": [train, validation, test]},
        )
    held_out = observed_average_treatment_effect(screen[test].copy(), **setup)
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
