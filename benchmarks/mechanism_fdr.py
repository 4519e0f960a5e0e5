"""False discovery rates of called mechanisms: simulated truth, and fakes made of control cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, read_screen, train
from benchmarks.papalexi_mechanisms import WITHOUT_EFFECT
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import mask_recovery
from scvi_sams.tl import (
    active_perturbations,
    add_control_null,
    mechanism_stability,
    mechanisms,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_NOMINAL = (0.05, 0.1, 0.2)
_SCREEN: dict[str, Any] = {
    "n_cells": 5_000,
    "n_genes": 300,
    "n_perturbations": 30,
    "n_pairs": 0,
    "n_latent": 6,
    "mask_probability": 0.2,
    "inactive_fraction": 0.4,
    "effect_size": 1.2,
    "effect_jitter": 0.5,
    "control_fraction": 0.6,
    "library_size": 4_000.0,
    "n_batches": 1,
}
_N_NULL = 40
_OTHER_SEED = 1_000  # added for the fit that calls are compared with
_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact posterior": {"mask_evidence_cells": None},
    "gradient": {"global_inference": "gradient"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="*", default=list(range(8)))
    arguments.add_argument(
        "--settings", nargs="*", default=["default", "exact posterior"], choices=list(_SETTINGS)
    )
    arguments.add_argument(
        "--papalexi-seeds", type=int, nargs="*", default=[0, 1, 2], help="none to skip"
    )
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    size = ", ".join(f"{name}={value}" for name, value in _SCREEN.items())
    print(f"Simulated screens: {size}, {_N_NULL} fakes", flush=True)
    for setting in arguments.settings:
        rows = [row for seed in arguments.seeds for row in _simulated(seed, _SETTINGS[setting])]
        title = (
            f"Simulated screens ({size}, {_N_NULL} fakes), {setting}, {len(arguments.seeds)} seeds"
        )
        print_table(title, _over_seeds(rows), arguments)
    if len(arguments.papalexi_seeds) > 1:
        screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
        _papalexi(screen, arguments)


def _simulated(seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    screen = simulated_screen(**_SCREEN, seed=seed)
    add_control_null(
        screen, "perturbation", "control", n_null=_N_NULL, max_control_share=0.95, seed=seed
    )
    SAMSVAE.setup_anndata(
        screen,
        layer="counts",
        perturbation_key="perturbation_with_null",
        control="control",
    )
    models = []
    for model_seed in (seed, seed + _OTHER_SEED):
        scvi.settings.seed = model_seed
        model = SAMSVAE(screen, **settings)
        train(model)
        models.append(model)
    truth = screen.uns["truth"]
    mask = pd.DataFrame(truth["mask"], index=truth["perturbation_names"])
    rows = []
    for nominal in _NOMINAL:
        tables = [mechanisms(model, nominal) for model in models]
        active = [active_perturbations(model, nominal) for model in models]
        again = mechanism_stability(tables)
        again = again[again["share_called"] == 1].set_index(["perturbation", "latent"]).index
        entries = pd.MultiIndex.from_frame(tables[0][["perturbation", "latent"]])
        for threshold, calls, perturbations in (
            (
                "posterior",
                tables[0]["bayesian_q_value"] <= nominal,
                active[0]["bayesian_q_value"] <= nominal,
            ),
            ("null", tables[0]["null_q_value"] <= nominal, active[0]["called"]),
            ("both (as called)", tables[0]["called"], active[0]["called"]),
            (
                "both, again with another seed",
                entries.isin(again),
                active[0]["called"] & active[1]["called"],
            ),
        ):
            called = tables[0].assign(called=calls)
            called = called.pivot(index="perturbation", columns="latent", values="called")
            rows.append(
                {"nominal": nominal, "threshold": threshold}
                | _rates(mask, called.loc[mask.index], perturbations.loc[mask.index])
            )
    print(f"seed {seed}: {rows[4:8]}", flush=True)
    return rows


def _rates(mask: pd.DataFrame, called: pd.DataFrame, active: pd.Series) -> dict[str, float]:
    """False discoveries and power of calls, for mechanisms and for whole perturbations."""
    is_active = mask.any(axis=1)
    recovery = mask_recovery(mask, called)
    n_calls, n_active = int(called.to_numpy().sum()), int(active.sum())
    return {
        "calls": float(n_calls),
        "FDR": 1 - recovery.precision,
        "power": recovery.recall,
        "share of inactive perturbations": called[~is_active].to_numpy().sum() / max(n_calls, 1),
        "perturbations called": float(n_active),
        "their FDR": (active & ~is_active).sum() / max(n_active, 1),
        "their power": (active & is_active).sum() / is_active.sum(),
    }


def _over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the standard error of the two rates."""
    table = pd.DataFrame(rows)
    groups = table.groupby(["nominal", "threshold"], sort=False)
    means = groups.mean()
    for rate in ("FDR", "their FDR"):
        position = means.columns.get_loc(rate) + 1
        means.insert(position, f"{rate}, standard error", groups[rate].sem())
    return means.reset_index().to_dict("records")


def _papalexi(screen: AnnData, arguments: Any) -> None:
    """Each fit's fakes are judged as if they were real, calibrated on the fakes of the others."""
    for kind, chosen in (("guides", {"guide_key": "guide"}), ("cells, 50 each", {"n_cells": 50})):
        fits = []
        for seed in arguments.papalexi_seeds:
            names = add_control_null(
                screen,
                "perturbation",
                "control",
                seed=seed,
                **chosen,
            )
            SAMSVAE.setup_anndata(
                screen,
                perturbation_key="perturbation_with_null",
                control="control",
                batch_key="bio_rep",
                size_factor_key="total_umi_all_genes",
            )
            scvi.settings.seed = seed
            model = SAMSVAE(screen)
            train(model, None)
            fits.append((model, names, mechanisms(model, include_null=True)))
        n_fakes = [len(names) for _, names, _ in fits]
        rows = []
        for nominal in _NOMINAL:
            for by in ("posterior", "null and posterior"):
                per_fit = []
                for k, (model, names, _) in enumerate(fits):
                    others = [table for j, (_, _, table) in enumerate(fits) if j != k]
                    others = others if by != "posterior" else []
                    table = mechanisms(model, nominal, (), null_tables=others)
                    active = active_perturbations(model, nominal, (), null_tables=others)
                    called = table[table["called"]]
                    is_fake = called["perturbation"].isin(names.index)
                    known = called["perturbation"].isin(WITHOUT_EFFECT)
                    per_fit.append(
                        {
                            "calls": len(called),
                            "of fakes": is_fake.sum(),
                            "of ten targets without a changed gene": known.sum(),
                            "false share at least": (is_fake | known).sum() / max(len(called), 1),
                            "perturbations called": active["called"].sum(),
                            "fakes among them": active.loc[names.index, "called"].sum(),
                        }
                    )
                means = pd.DataFrame(per_fit).mean().to_dict()
                rows.append({"nominal": nominal, "threshold": by} | means)
        title = f"Papalexi, fakes of control {kind} ({n_fakes} in the fits), mean of fits"
        print_table(title, rows, arguments)
        tables = [mechanisms(model, 0.1, ()) for model, _, _ in fits]
        real = [table[~table["perturbation"].str.startswith("control_null")] for table in tables]
        stability = mechanism_stability(real)
        print(
            f"\nBayesian calls at 0.1 that another seed makes too: "
            f"{stability.attrs['agreement']:.3f} of {len(stability)}; correlation of their "
            f"latents {stability['latent_correlation'].mean():.3f}",
            flush=True,
        )
