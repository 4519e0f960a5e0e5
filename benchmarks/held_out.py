"""Held-out cells as the model, and the least of models, describes them, over screens of all sizes.

"trivial" is a negative binomial with one rate a gene, library size given: it knows no state and no
effect. Subsets are of the cells; effects are scored against those of all cells that were not
trained on, so that they are scored well where the subset is small. Several settings are fitted to
the same cells from the same seed, in turn.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import scvi
import torch

from benchmarks._common import parser, prepare, print_table, read_screen, train
from scvi_sams import SAMSVAE
from scvi_sams.datasets import benchmark_screen, simulated_screen
from scvi_sams.evaluation import (
    effect_agreement,
    effect_correlation,
    mask_recovery,
    observed_effects,
)
from scvi_sams.model.trivial import trivial_log_likelihood

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import anndata as ad

__all__ = ["main"]

_SIMULATED = {  # the cells that a subset is drawn from, and that effects are scored against
    # a drug or cytokine screen: few perturbations, many genes
    "panel": {"n_cells": 4_000, "n_genes": 1_300, "n_perturbations": 6, "library_size": 2_500.0},
    "shallow": {"n_cells": 6_000, "n_genes": 1_000, "library_size": 400.0, "effect_size": 1.5},
    "sparse": {"n_cells": 5_000, "n_genes": 2_000, "library_size": 100.0, "effect_size": 1.5},
    "deep": {"n_cells": 6_000, "n_genes": 500, "library_size": 8_000.0},
}
_SHARED = {"n_perturbations": 20, "n_pairs": 0, "inactive_fraction": 0.3, "n_batches": 1}
_SCREENS = [
    *(f"{name}:{n}" for name in ("papalexi", "norman") for n in (800, 2_500)),
    *("panel:800", "shallow:800", "sparse:800", "sparse:3000", "deep:800"),
    *("papalexi", "norman", "benchmark small", "benchmark default"),
]
_HELD_OUT = 0.2
_N_SCORED = 600  # cells whose bounds are taken; the mean is good to a fraction of a nat


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--screens", nargs="+", default=_SCREENS, help="a name, or name:cells for a subset"
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--settings",
        type=json.loads,
        default={"default": {}},
        help='JSON, such as {"wide": {"model": {"n_hidden": 400}, "train": {}}, "default": {}}',
    )
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    rows = [
        row
        for name in arguments.screens
        for seed in arguments.seeds
        for row in _run(name, seed, arguments)
    ]
    print_table("Held-out cells", _means(rows), arguments)


def _screen(name: str, seed: int, arguments: argparse.Namespace) -> tuple[ad.AnnData, str | None]:
    """A screen, and its column of library sizes."""
    if name in _SIMULATED:
        return simulated_screen(**(_SHARED | _SIMULATED[name]), seed=seed), None
    if name.startswith("benchmark "):
        return benchmark_screen(name.removeprefix("benchmark "), seed=seed), None
    files = {"papalexi": "papalexi2021_eccite.h5ad", "norman": "norman2019_subset.h5ad"}
    screen = read_screen(arguments, files[name])
    if name == "papalexi":
        screen = screen[screen.obs["guide_frac"] > 0.5].copy()
    return screen, "total_umi_all_genes"


def _run(name_and_size: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    name, _, size = name_and_size.partition(":")
    screen, size_factor_key = _screen(name, seed, arguments)
    labels = {"perturbation_key": "perturbation", "control": "control"}
    labels["size_factor_key"] = size_factor_key
    rng = np.random.default_rng(seed)
    order = rng.permutation(screen.n_obs)
    n_training = round((1 - _HELD_OUT) * int(size or screen.n_obs))
    training, others = np.sort(order[:n_training]), np.sort(order[n_training:])
    scored = {
        kind: np.sort(rng.permutation(cells)[:_N_SCORED]).tolist()
        for kind, cells in (("held out", others), ("training", training))
    }
    fitted = screen[training].copy()  # alone: what a model takes from its screen is from these
    observed = observed_effects(screen[others].copy(), **labels)
    trivial = _trivial(screen, size_factor_key, training, scored["held out"])
    rows = []
    for setting, options in arguments.settings.items():
        scvi.settings.seed = seed
        SAMSVAE.setup_anndata(fitted, **labels)
        model = SAMSVAE(fitted, **options.get("model", {}))
        watch = train(model, plan_kwargs=options.get("plan", {}), **options.get("train", {}))
        bound = {kind: model.get_iwelbo(screen[cells].copy()) for kind, cells in scored.items()}
        mask = model.get_perturbation_mask()
        effects = model.get_average_treatment_effect(n_samples=4, n_cells=200)
        shared = observed.obs_names.intersection(effects.obs_names)
        effects, truth = effects[shared], observed[shared]
        agreement = effect_agreement(effects, truth, pooled=True)
        known = "truth" in screen.uns
        rows.append(
            {
                "screen": name_and_size,
                "setting": setting,
                "width": model.module.decoder.logits.in_features,
                "held out": bound["held out"],
                "trivial": trivial,
                "gain": bound["held out"] - trivial,
                "training": bound["training"],
                "perturbations with a mask": int((mask > 0.5).any(axis=1).sum()),
                "latents": int((mask > 0.5).any(axis=0).sum()),
                "mask F1": mask_recovery(screen.uns["truth"]["mask"], mask.to_numpy()).f1
                if known
                else np.nan,
                "correlation": effect_correlation(effects, truth),
                "squared error": agreement["relative_squared_error"].item(),
                "core seconds": watch.cpu,
            }
        )
        print(
            {k: v if isinstance(v, str) else round(v, 3) for k, v in rows[-1].items()}, flush=True
        )
    return rows


def _trivial(
    screen: ad.AnnData, size_factor_key: str | None, training: np.ndarray, held_out: list[int]
) -> float:
    """Log-likelihood of held-out cells under the trivial model, nats a cell."""

    def cells(indices: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = torch.as_tensor(screen.X[indices].toarray(), dtype=torch.float32)
        library = counts.sum(1)
        if size_factor_key is not None:
            sizes = screen.obs[size_factor_key].to_numpy(dtype=np.float32)
            library = torch.as_tensor(sizes[indices])
        return counts, library, torch.zeros(len(counts), dtype=torch.long)

    some = training[:: -(-len(training) // 5_000)]  # enough for two numbers a gene
    return float(trivial_log_likelihood(*cells(some), *cells(held_out)).mean())


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of every screen and setting, and how far the seeds lie apart in gain."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["screen"], row["setting"]), []).append(row)
    return [
        {"screen": screen, "setting": setting}
        | {
            name: float(np.mean([row[name] for row in group]))
            for name in group[0]
            if name not in ("screen", "setting")
        }
        | {"least gain": min(row["gain"] for row in group)}
        for (screen, setting), group in groups.items()
    ]
