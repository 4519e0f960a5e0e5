"""Power that a fit to some of the cells promises, and what fits to more or fewer find."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
from scipy.special import ndtri
from scipy.stats import norm

from benchmarks._common import parser, prepare, print_table, read_screen, train
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.tl import detectable_effects, mechanisms, plan_screen
from scvi_sams.tl.call_power import bh_threshold, calling_problem, learned_effects
from scvi_sams.tl.call_power import power as power_of
from scvi_sams.tl.effect_mixture import learn_effects
from scvi_sams.tl.latent_matching import matched_correlation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_FDR, _POWER = 0.1, 0.8
_FRACTIONS = (0.25, 0.5, 1.0)
_SCREEN: dict[str, Any] = {
    "n_cells": 6_000,
    "n_genes": 300,
    "n_perturbations": 40,
    "n_pairs": 0,
    "n_latent": 6,
    "mask_probability": 0.2,
    "inactive_fraction": 0.25,
    "effect_size": 0.8,
    "effect_jitter": 0.5,
    "control_fraction": 0.4,
    "library_size": 4_000.0,
    "n_batches": 1,
}
_BINS = (0.0, 0.2, 0.5, 0.8, 0.95, 1.0)
_N_DRAWS = 20
_NEAR = 0.2  # of the detectable effect: effects that are called about as often as was asked


class _Fit(NamedTuple):
    """What is kept of a fit to a part of the cells."""

    fraction: float
    calls: pd.DataFrame  # perturbations x latents
    effects: pd.DataFrame
    detectable: pd.DataFrame
    power_at: Any  # of effects, perturbations x latents
    genes: pd.DataFrame
    plan: pd.DataFrame


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    arguments.add_argument("--papalexi-seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    for name, seeds in (("simulated", arguments.seeds), ("Papalexi", arguments.papalexi_seeds)):
        entries, genes, plans = [], [], []
        for seed in seeds:
            if name == "simulated":
                screen = simulated_screen(**_SCREEN, seed=seed)
                setup: dict[str, Any] = {"layer": "counts"}
            else:
                screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
                setup = {"batch_key": "bio_rep", "size_factor_key": "total_umi_all_genes"}
            fits = _fits(screen, setup, seed)
            truth = None
            if name == "simulated":
                known = screen.uns["truth"]
                truth = pd.DataFrame(known["effect"], index=known["perturbation_names"])
            entries += [row for fit in fits for row in _entries(fit, fits[-1], truth)]
            genes += [_genes(fit, fits[-1]) for fit in fits[:-1]]
            plans += _plans(fits, truth, seed)
            print(f"{name}, seed {seed}: {plans[-1]}", flush=True)
        if seeds:
            _print(name, len(seeds), pd.DataFrame(entries), pd.concat(genes), plans, arguments)


def _fits(screen: AnnData, setup: dict[str, Any], seed: int) -> list[_Fit]:
    order = np.random.default_rng(seed).permutation(screen.n_obs)
    n_perturbations = screen.obs["perturbation"].nunique() - 1
    n_perturbed = int((screen.obs["perturbation"] != "control").sum())
    fits = []
    for fraction in _FRACTIONS:
        part = screen[np.sort(order[: int(fraction * screen.n_obs)])].copy()
        SAMSVAE.setup_anndata(part, perturbation_key="perturbation", control="control", **setup)
        scvi.settings.seed = seed
        model = SAMSVAE(part)
        train(model)
        table = mechanisms(model, _FDR)
        wide = {
            column: table.pivot(index="perturbation", columns="latent", values=column)
            for column in ("called", "effect_mean")
        }
        limits = detectable_effects(model, _FDR, _POWER, on="latents")
        detectable = limits.pivot(
            index="perturbation", columns="latent", values="detectable_effect"
        )
        # In the order of the model, which the table's is not.
        order_of = (
            model.perturbation_names,
            [f"latent_{k}" for k in range(wide["called"].shape[1])],
        )
        called, effect, detectable = (
            frame.loc[order_of[0], order_of[1]]
            for frame in (wide["called"], wide["effect_mean"], detectable)
        )
        problem = calling_problem(model, "benchmark")
        problem = problem._replace(
            variance=learned_effects(model, problem).excess * problem.variance
        )
        threshold = limits.attrs["threshold"]
        cells = [each * n_perturbed / n_perturbations for each in _FRACTIONS]
        fits.append(
            _Fit(
                fraction,
                called,
                effect,
                detectable,
                lambda e, problem=problem, threshold=threshold: problem.power(e, threshold),
                detectable_effects(model, _FDR, _POWER, on="genes"),
                plan_screen(model, cells, fdr=_FDR),
            )
        )
    return fits


def _entries(fit: _Fit, whole: _Fit, truth: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Effects, promised power and calls: of the truth, or of what the fit to all cells calls."""
    if truth is None:
        if fit is whole:
            return []
        truth = whole.effects.where(whole.calls, 0.0)
        truth = truth.loc[:, whole.calls.any()]
    names = fit.calls.index
    effect = truth.loc[names].to_numpy()
    rows, columns, _, _ = matched_correlation(effect, fit.effects.to_numpy())
    of_latent = np.zeros(fit.calls.shape)
    of_latent[:, columns] = effect[:, rows]
    promised = fit.power_at(of_latent)
    return [
        {
            "fraction": fit.fraction,
            "effect": abs(of_latent[t, k]),
            "detectable": fit.detectable.to_numpy()[t, k],
            "promised": promised[t, k],
            "found": fit.calls.to_numpy()[t, k],
        }
        for t, k in np.argwhere(of_latent != 0)
    ]


def _genes(fit: _Fit, whole: _Fit) -> pd.DataFrame:
    """Changes of genes, as the cells that the fit has not seen show them, and calls."""
    both = fit.genes.merge(
        whole.genes, on=["perturbation", "gene"], suffixes=("", "_whole"), validate="1:1"
    )
    share = fit.fraction
    change = (both["difference_whole"] - share * both["difference"]) / (1 - share)
    # Standard errors fall with the root of the number of cells.
    error = both["standard_error_whole"] / np.sqrt(1 - share)
    # What is chosen for being large is smaller than it looks: draws from the posterior are not.
    truth = learn_effects(change.to_numpy()[:, None], error.to_numpy()[:, None], 0.02)
    rng = np.random.default_rng(0)
    promised = np.zeros(len(both))
    z = both["difference"] / both["standard_error"]
    p_value = pd.Series(2 * norm.sf(np.abs(z)))
    threshold = p_value.groupby(both["perturbation"]).transform(
        lambda p: bh_threshold(p.to_numpy(), _FDR)
    )
    for _ in range(_N_DRAWS):
        signal = truth.sample(rng)[:, 0] / both["standard_error"]
        promised += power_of(signal, -ndtri(threshold / 2)) / _N_DRAWS
    return pd.DataFrame(
        {"fraction": share, "promised": promised, "found": both["called"].astype(float)}
    )


def _plans(fits: list[_Fit], truth: pd.DataFrame | None, seed: int) -> list[dict[str, Any]]:
    rows = []
    for pilot in fits:
        for place, fit in enumerate(fits):
            plan = pilot.plan.iloc[place]
            called = fit.calls.to_numpy()
            n_perturbations, n = called.any(axis=1).sum(), called.sum()
            if truth is not None:
                effect = truth.loc[fit.calls.index].to_numpy()
                true, columns, _, _ = matched_correlation(effect, fit.effects.to_numpy())
                n_perturbations = (called.any(axis=1) & effect.any(axis=1)).sum()
                n_right = (called[:, columns] & (effect[:, true] != 0)).sum()
            row = {"pilot": pilot.fraction, "cells": fit.fraction}
            for name, number in (("perturbations", n_perturbations), ("mechanisms", n)):
                inside = plan[f"{name}_lower"] <= number <= plan[f"{name}_upper"]
                row |= {f"{name} promised": plan[name], f"{name} called": float(number)}
                row[f"{name} inside 90%"] = float(inside)
            if truth is not None:
                row["power promised"] = plan["mechanisms_share"]
                row["power found"] = n_right / (np.abs(truth.to_numpy()) > 0.2).sum()
            rows.append({"seed": seed} | row)
    return rows


def _print(
    name: str,
    n_seeds: int,
    entries: pd.DataFrame,
    genes: pd.DataFrame,
    plans: list[dict[str, Any]],
    arguments: Any,
) -> None:
    known = "truth" if name == "simulated" else "called in all cells"
    seeds = f"{name}, {n_seeds} seeds"
    print_table(f"Power on latents, {known}: {seeds}", _binned(entries), arguments)
    rows = []
    for fraction, part in entries.groupby("fraction"):
        ratio = part["effect"] / part["detectable"]
        near, above = np.abs(ratio - 1) <= _NEAR, ratio >= 1
        rows.append(
            {
                "cells": fraction,
                "median detectable effect": part["detectable"].replace(np.inf, np.nan).median(),
                "effects above it": int(above.sum()),
                "of these promised": part["promised"][above].mean(),
                "and found": part["found"][above].mean(),
                "within a fifth of it": int(near.sum()),
                "of these promised ": part["promised"][near].mean(),
                "and found ": part["found"][near].mean(),
            }
        )
    print_table(f"Detectable effects at {_POWER:.0%} power: {seeds}", rows, arguments)
    print_table(
        f"Power on genes, changes as other cells show them: {seeds}", _binned(genes), arguments
    )
    table = pd.DataFrame(plans).drop(columns="seed").groupby(["pilot", "cells"]).mean()
    print_table(
        f"Plans from a pilot, means: {seeds}", table.reset_index().to_dict("records"), arguments
    )


def _binned(entries: pd.DataFrame) -> list[dict[str, Any]]:
    """Promised and found power, by what was promised."""
    rows = []
    for fraction, part in entries.groupby("fraction"):
        for low, high in zip(_BINS, _BINS[1:], strict=False):
            inside = (part["promised"] >= low) & (part["promised"] < high + (high == 1))
            rows.append(
                {
                    "cells": fraction,
                    "promised power": f"{low:g} to {high:g}",
                    "effects": int(inside.sum()),
                    "promised": part["promised"][inside].mean(),
                    "found": part["found"][inside].mean(),
                }
            )
        rows.append(
            {
                "cells": fraction,
                "promised power": "all",
                "effects": len(part),
                "promised": part["promised"].mean(),
                "found": part["found"].mean(),
            }
        )
    return rows
