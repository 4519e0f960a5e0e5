"""Screens of many guides a cell: masks, effects, and calls against permuted guides."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi

from benchmarks._common import parser, prepare, print_table, train
from scvi_sams import SAMSVAE
from scvi_sams.data.tables import log_expression, row_correlation
from scvi_sams.datasets._simulation import draw_masks, numbered_names, scaled_rates
from scvi_sams.evaluation import latent_recovery, mask_recovery
from scvi_sams.tl import active_perturbations, add_permuted_null, mechanisms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["high_moi_screen", "main"]

_NOMINAL = (0.05, 0.1, 0.2)
_N_HIDDEN = 64


def high_moi_screen(
    guides_per_cell: float,
    n_cells: int = 4_000,
    n_genes: int = 200,
    n_targets: int = 60,
    n_latent: int = 6,
    *,
    guides_per_target: int = 2,
    mask_probability: float = 0.2,
    inactive_fraction: float = 0.5,
    effect_size: float = 1.0,
    library_size: float = 4_000.0,
    seed: int = 0,
) -> ad.AnnData:
    """Simulate a screen as ``simulated_screen`` does, with a Poisson number of guides a cell.

    No cell has fewer than one, and none of the guides is a control. Counts of guides, with ambient
    ones, are in ``obsm["guides"]``, targets in ``uns["guides"]``, masks, effects and their
    consequence for expression (targets x genes) in ``uns["truth"]``.
    """
    rng = np.random.default_rng(seed)
    mask = draw_masks(rng, n_targets, n_latent, mask_probability, inactive_fraction)
    embedding = 0.3 * rng.standard_normal(mask.shape)
    effect = mask * (embedding + effect_size * rng.choice([-1.0, 1.0], mask.shape))
    w_in = rng.standard_normal((n_latent, _N_HIDDEN)) / np.sqrt(n_latent)
    w_out = rng.standard_normal((_N_HIDDEN, n_genes)) / np.sqrt(_N_HIDDEN)
    intercept = rng.normal(-1.0, 1.2, n_genes)

    def logits(state: NDArray[np.float64]) -> NDArray[np.float64]:
        hidden = state @ w_in
        return (np.tanh(hidden) + 0.2 * hidden) @ w_out + intercept

    n_guides = n_targets * guides_per_target
    target = np.arange(n_guides) // guides_per_target
    has = np.zeros((n_cells, n_guides), dtype=bool)
    number = np.clip(rng.poisson(guides_per_cell, n_cells), 1, n_guides)
    for cell, k in enumerate(number):
        has[cell, rng.choice(n_guides, k, replace=False)] = True
    received = np.zeros((n_cells, n_targets), dtype=bool)
    for guide in range(n_guides):
        received[:, target[guide]] |= has[:, guide]
    basal = rng.standard_normal((n_cells, n_latent))
    library = rng.lognormal(np.log(library_size), 0.3, (n_cells, 1))
    rate = scaled_rates(logits(basal + received @ effect), library)
    counts = rng.poisson(rng.gamma(5.0, rate / 5.0)).astype(np.float32)

    # Effects among the cells as they are, in log2(1 + 1e4 x share).
    some = rng.permutation(n_cells)[:500]
    shift = basal[some] + received[some] @ effect

    def level(state: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log2(1 + scaled_rates(logits(state), np.full((len(state), 1), 1e4))).mean(0)

    without = [level(shift - received[some][:, [t]] * effect[t]) for t in range(n_targets)]
    change = [
        level(shift + ~received[some][:, [t]] * effect[t]) - without[t] for t in range(n_targets)
    ]
    names = numbered_names("P", n_targets, min_width=3)
    guides = [f"{names[t]}_g{k % guides_per_target + 1}" for k, t in enumerate(target)]
    umis = has * (1 + rng.poisson(30, has.shape)) + rng.poisson(0.05, has.shape)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"cell_{k}" for k in range(n_cells)]
    adata.var_names = numbered_names("gene_", n_genes)
    adata.obsm["guides"] = sp.csr_matrix(umis)
    adata.uns["guides"] = pd.DataFrame({"target": np.array(names, object)[target]}, index=guides)
    adata.uns["truth"] = {
        "mask": mask,
        "effect": effect,
        "change": np.array(change),
        "perturbation_names": np.array(names, object),
    }
    return adata


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--guides", type=float, nargs="+", default=[5.0, 30.0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--max-epochs", type=int)
    arguments.add_argument("--n-null", type=int, default=60)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    warnings.filterwarnings("ignore", message="No cell is a control")
    # Few nulls cannot show a small rate: that the table has no calls there says so.
    warnings.filterwarnings("ignore", message="With .* null perturbations the estimated rate")
    rows, rates = [], []
    for number in arguments.guides:
        for seed in arguments.seeds:
            row, of_calls = _run(number, seed, arguments)
            rows.append(row)
            rates.extend(of_calls)
            print({k: round(float(v), 3) for k, v in row.items()}, flush=True)
    print_table("Many guides a cell", _means(rows, ["guides a cell"]), arguments)
    print_table(
        "Calls against permuted guides", _means(rates, ["guides a cell", "nominal"]), arguments
    )


def _run(
    number: float, seed: int, arguments: Any
) -> tuple[dict[str, float], list[dict[str, float]]]:
    screen = high_moi_screen(number, seed=seed)
    truth, names = screen.uns["truth"], list(screen.uns["truth"]["perturbation_names"])
    add_permuted_null(screen, guide_threshold=5, n_null=arguments.n_null, seed=seed)
    SAMSVAE.setup_anndata(screen, guide_key="guides_with_null")
    scvi.settings.seed = seed
    model = SAMSVAE(screen, n_latent=12)
    watch = train(model, max_epochs=arguments.max_epochs)
    masks = mask_recovery(truth["mask"], model.get_perturbation_mask().loc[names].to_numpy())
    effects = latent_recovery(
        truth["effect"], model.get_perturbation_effect().loc[names].to_numpy()
    )
    active = truth["mask"].any(axis=1)
    predicted = model.get_average_treatment_effect(names, n_samples=4, n_cells=100, seed=0)
    row = {
        "guides a cell": number,
        "seed": seed,
        "F1": masks.f1,
        "precision": masks.precision,
        "recall": masks.recall,
        "MCC": effects.mean_correlation,
        "effect correlation": float(
            np.nanmean(row_correlation(np.asarray(predicted.X)[active], truth["change"][active]))
        ),
        "of regression": float(
            np.nanmean(
                row_correlation(_regression(screen, names)[active], truth["change"][active])
            )
        ),
        "restarts": float(model.trainer.lightning_module.n_restarts),
        "core seconds": watch.cpu,
    }
    rates = []
    for nominal in _NOMINAL:
        table = mechanisms(model, nominal)
        of_target = active_perturbations(model, nominal)["called"].loc[names].to_numpy()
        called = table.pivot(index="perturbation", columns="latent", values="called")
        found = mask_recovery(truth["mask"], called.loc[names])
        rates.append(
            {
                "guides a cell": number,
                "nominal": nominal,
                "calls": float(called.loc[names].to_numpy().sum()),
                "FDR": 1 - found.precision,
                "power": found.recall,
                "targets called": float(of_target.sum()),
                "their FDR": float((of_target & ~active).sum() / max(of_target.sum(), 1)),
                "their power": float((of_target & active).sum() / active.sum()),
            }
        )
    return row, rates


def _regression(screen: ad.AnnData, names: list[str]) -> NDArray[np.float64]:
    """Effects by least squares of log expression on targets, with an intercept."""
    calls = (screen.obsm["guides"] >= 5).astype(float)
    targets = screen.uns["guides"]["target"].to_numpy()
    received = np.column_stack(
        [np.asarray(calls[:, targets == name].sum(1)).ravel() > 0 for name in names]
    ).astype(float)
    library = np.asarray(screen.X.sum(1)).ravel()
    y = log_expression(screen.X, library).toarray()
    centred = received - received.mean(0)
    return np.linalg.solve(centred.T @ centred + np.eye(len(names)), centred.T @ (y - y.mean(0)))


def _means(rows: list[dict[str, float]], by: list[str]) -> list[dict[str, Any]]:
    table = pd.DataFrame(rows).groupby(by, sort=False).mean().reset_index()
    return table.drop(columns="seed", errors="ignore").to_dict("records")
