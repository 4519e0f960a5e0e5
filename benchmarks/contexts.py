"""Effects by context: error rates, power, and what is gained over separate fits and one effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, read_screen, train
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import mask_recovery, observed_effects
from scvi_sams.tl import add_control_null, context_differences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_NOMINAL = (0.05, 0.1, 0.2)
_SCREEN: dict[str, Any] = {
    "n_genes": 200,
    "n_perturbations": 40,
    "n_pairs": 0,
    "n_latent": 6,
    "mask_probability": 0.2,
    "effect_size": 1.5,
    "effect_jitter": 0.5,
    "control_fraction": 0.3,
    "library_size": 4_000.0,
    "n_batches": 1,
    "n_contexts": 3,
}
_N_CELLS, _N_OBSERVED = 4_000, 40_000
_FRACTIONS = {"20% differ": 0.2, "none differs": 0.0}
_SETUP = {"layer": "counts", "perturbation_key": "perturbation", "control": "control"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments.add_argument("--max-epochs", type=int, help="of simulated screens")
    arguments.add_argument(
        "--papalexi-seeds", type=int, nargs="*", default=[0, 1, 2], help="none to skip"
    )
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    calls, errors = [], []
    for seed in arguments.seeds:
        for name, fraction in _FRACTIONS.items():
            found = _simulated(seed, fraction, arguments.max_epochs)
            calls += [{"screen": name, "seed": seed} | row for row in found[0]]
            errors += [{"screen": name, "seed": seed} | row for row in found[1]]
    if calls:
        for title, rows, keys in (
            ("calls of differences", calls, ["screen", "nominal"]),
            ("error of effects by context", errors, ["screen", "model"]),
        ):
            print_table(f"Simulated screens, {title}, each seed", rows, arguments)
            means = pd.DataFrame(rows).drop(columns="seed").groupby(keys, sort=False).mean()
            print_table(
                f"Simulated screens, {title}, mean of {len(arguments.seeds)} seeds",
                means.reset_index().to_dict("records"),
                arguments,
            )
    if arguments.papalexi_seeds:
        screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
        rows = [_papalexi(screen, seed) for seed in arguments.papalexi_seeds]
        print_table("Papalexi, replicates as contexts: a null", rows, arguments)


def _fit(screen: AnnData, seed: int, max_epochs: int | None, **setup: Any) -> tuple[Any, float]:
    SAMSVAE.setup_anndata(screen, **(_SETUP | setup))
    scvi.settings.seed = seed
    model = SAMSVAE(screen, n_latent=12)
    return model, train(model, None, max_epochs=max_epochs).cpu


def _simulated(
    seed: int, fraction: float, max_epochs: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    arguments = _SCREEN | {"context_fraction": fraction, "seed": seed}
    screen = simulated_screen(n_cells=_N_CELLS, **arguments)
    truth = screen.uns["truth"]
    names, contexts = list(truth["perturbation_names"]), list(screen.obs["context"].cat.categories)
    # What many more cells of the same truth show, in each context.
    many = simulated_screen(n_cells=_N_OBSERVED, **arguments)
    observed = {
        context: observed_effects(many[many.obs["context"] == context].copy(), **_SETUP)[names].X
        for context in contexts
    }
    differs = truth["context_difference"].any(axis=2)
    predicted, seconds = {}, {}
    by_context, seconds["by context"] = _fit(screen, seed, max_epochs, context_key="context")
    predicted["by context"] = _effects(dict.fromkeys(contexts, by_context), names, by_name=True)
    # The context is a covariate of the decoder, its effects are the same.
    shared, seconds["one shared effect"] = _fit(screen, seed, max_epochs, batch_key="context")
    predicted["one shared effect"] = _effects(dict.fromkeys(contexts, shared), names, batch=True)
    apart = {c: screen[screen.obs["context"] == c].copy() for c in contexts}
    fits = {c: _fit(part, seed, max_epochs) for c, part in apart.items()}
    seconds["separate fits"] = sum(time for _, time in fits.values())
    predicted["separate fits"] = _effects({c: m for c, (m, _) in fits.items()}, names)
    errors = [
        {
            "model": model,
            "error": _error(of_model, observed, np.ones_like(differs)),
            "error where they differ": _error(of_model, observed, differs),
            "core seconds": seconds[model],
        }
        for model, of_model in predicted.items()
    ]
    rows = []
    for nominal in _NOMINAL:
        table = context_differences(by_context, nominal)
        called = _cube(table, "called", names, contexts)
        n_calls = int(called.any(axis=2).sum())
        false = (called.any(axis=2) & ~differs).sum()
        rows.append(
            {
                "nominal": nominal,
                "calls": float(n_calls),
                "false": float(false),
                "FDR": false / max(n_calls, 1),
                "power": _share(called.any(axis=2) & differs, differs),
                "FDR, latents too": _false_of_latents(by_context, truth, called),
            }
        )
    print(f"seed {seed}, fraction {fraction}: {rows} {errors}", flush=True)
    return rows, errors


def _effects(
    models: dict[str, Any], names: list[str], *, by_name: bool = False, batch: bool = False
) -> dict[str, np.ndarray]:
    return {
        context: model.get_average_treatment_effect(
            names,
            n_samples=10,
            context=context if by_name else None,
            batch=context if batch else None,
            seed=0,
        ).X
        for context, model in models.items()
    }


def _error(
    predicted: dict[str, np.ndarray], observed: dict[str, np.ndarray], which: np.ndarray
) -> float:
    """Squared error relative to the squared effects, of perturbations in contexts."""
    if not which.any():
        return float("nan")
    error, size = (
        sum(np.square(v[which[:, k]]).sum() for k, v in enumerate(values))
        for values in (
            [predicted[context] - observed[context] for context in observed],
            list(observed.values()),
        )
    )
    return float(error / size)


def _cube(table: pd.DataFrame, column: str, names: list[str], contexts: list[str]) -> np.ndarray:
    wide = table.pivot(index="perturbation", columns=["context", "latent"], values=column)
    latents = table["latent"].unique()
    order = pd.MultiIndex.from_product([contexts, latents])
    return wide.loc[names, order].to_numpy().reshape(len(names), len(contexts), -1)


def _false_of_latents(model: Any, truth: dict[str, Any], called: np.ndarray) -> float:
    """Share of calls that are false, were they to name the latent too."""
    recovery = mask_recovery(truth["mask"], model.get_perturbation_mask())
    planted = np.zeros(called.shape, dtype=bool)
    planted[:, :, recovery.predicted_latents] = (truth["context_difference"] != 0)[
        :, :, recovery.true_latents
    ]
    return 1 - _share(called & planted, called)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")


def _papalexi(screen: AnnData, seed: int) -> dict[str, Any]:
    """Replicates are of the same cells: what differs between them is false."""
    fakes = add_control_null(screen, "perturbation", "control", n_cells=50, seed=seed)
    model, seconds = _fit(
        screen,
        seed,
        None,
        layer=None,
        perturbation_key="perturbation_with_null",
        context_key="bio_rep",
        size_factor_key="total_umi_all_genes",
    )
    tables = {nominal: context_differences(model, nominal) for nominal in _NOMINAL}
    without = context_differences(model, 0.2, ())
    return {
        "seed": seed,
        "fakes": len(fakes),
        **{f"calls at {nominal}": int(t["called"].sum()) for nominal, t in tables.items()},
        "calls at 0.2, no null": ", ".join(
            sorted(set(without["perturbation"][without["called"]]))
        ),
        "largest probability": float(without["probability"].max()),
        "perturbations with a mask": int((model.get_perturbation_mask() > 0.5).any(axis=1).sum()),
        "core seconds": seconds,
    }
