"""Masks and latents recovered from the simulations of the papers of SAMS-VAE and SVAE+."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, train
from benchmarks._family import FAMILY, make_model
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_bereket_2023, simulated_lopez_2023
from scvi_sams.evaluation import latent_recovery, mask_recovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData

__all__ = ["SIMULATORS", "main", "transfer_f1"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}

SIMULATORS: dict[str, tuple[Callable[..., AnnData], dict[str, Any], str]] = {
    "bereket": (simulated_bereket_2023, {"is_count_data": False}, "normal"),
    "lopez": (simulated_lopez_2023, {"layer": "counts"}, "poisson"),
}
"""Simulator, how its screens are set up, and the likelihood of its observations."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--rows", nargs="+", default=list(FAMILY), choices=list(FAMILY))
    arguments.add_argument(
        "--simulators", nargs="+", default=list(SIMULATORS), choices=list(SIMULATORS)
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--cells", type=int, help="in place of the simulator's default")
    arguments.add_argument("--n-latent", type=int, default=15, help="15 is the true number")
    arguments.add_argument("--mask-prior", type=float, help="of SAMSVAE; its default if not given")
    arguments.add_argument("--max-epochs", type=int)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    tables = []
    for name in arguments.simulators:
        runs = []
        for seed in arguments.seeds:
            for row in arguments.rows:
                run = _run(name, row, seed, arguments)
                print({"simulator": name, "seed": seed} | run, flush=True)
                runs.append(run)
        groups = pd.DataFrame(runs).groupby("model", sort=False)
        tables += [
            {"simulator": name, "model": model}
            | mean.to_dict()
            | {"mask F1 (sd)": float(groups["mask F1"].std()[model])}
            for model, mean in groups.mean().iterrows()
        ]
    print_table(f"Simulators of the papers, {len(arguments.seeds)} seeds", tables, arguments)


def _run(simulator: str, row: str, seed: int, arguments: Any) -> dict[str, Any]:
    simulate, setup, likelihood = SIMULATORS[simulator]
    size = {} if arguments.cells is None else {"n_cells": arguments.cells}
    screen = simulate(**size, seed=seed)
    held_out = None
    if "split" in screen.obs:
        is_held_out = (screen.obs["split"] == "test").to_numpy()
        screen, held_out = screen[~is_held_out].copy(), screen[is_held_out].copy()
    kwargs: dict[str, Any] = {"gene_likelihood": likelihood, "n_latent": arguments.n_latent}
    if FAMILY[row][0] is SAMSVAE and arguments.mask_prior is not None:
        kwargs["mask_prior"] = arguments.mask_prior
    scvi.settings.seed = seed
    model = make_model(row, screen, _LABELS | setup, **kwargs)
    watch = train(model, max_epochs=arguments.max_epochs)
    latents = latent_recovery(screen.obsm["true_latent"], model.get_latent_representation())
    result = {
        "model": row,
        "mask F1": math.nan,
        "F1 of held-out": math.nan,
        "MCC": latents.mean_correlation,
        "linear R2": latents.linear_r2,
        "seconds": watch.wall,
        "core seconds": watch.cpu,
    }
    if model.module.effects is not None and model.module.effects.sparse:
        truth = screen.uns["truth"]
        true_mask = pd.DataFrame(truth["mask"], index=truth["perturbation_names"])
        mask = model.get_perturbation_mask()
        result["mask F1"] = mask_recovery(true_mask.loc[mask.index], mask).f1
        if held_out is not None:
            query = type(model).load_query_data(held_out, model, new_perturbations=True)
            query.train(accelerator="cpu", enable_progress_bar=False)
            result["F1 of held-out"] = transfer_f1(
                true_mask,
                mask,
                query.get_perturbation_mask().drop(index=mask.index, errors="ignore"),
            )
    return result


def transfer_f1(true_mask: pd.DataFrame, mask: pd.DataFrame, new_mask: pd.DataFrame) -> float:
    """F1 of the masks of new perturbations, latents matched by those of the known ones.

    A predicted entry of a latent without a match is false, a true one is missed.
    """
    match = mask_recovery(true_mask.loc[mask.index], mask)
    true, predicted = true_mask.loc[new_mask.index].to_numpy(), new_mask.to_numpy() > 0.5
    common = (true[:, match.true_latents] & predicted[:, match.predicted_latents]).sum()
    n_entries = int(true.sum() + predicted.sum())
    return float(2 * common / n_entries) if n_entries else 1.0


if __name__ == "__main__":
    main()
