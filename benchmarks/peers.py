"""Other methods on the same screens: masks, false calls, effects, pairs, seconds and memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from benchmarks import _peer_runner
from benchmarks._common import parser, prepare, print_table, read_screen
from benchmarks.papalexi_mechanisms import WITHOUT_EFFECT
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import effect_agreement, mask_recovery, observed_effects

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

# Modules that tell whether an environment has a method; ours, and means, need none.
_MODULES = {"perturbvi": "perturbvi", "Mixscape": "pertpy"}
_LABELS = {"perturbation_key": "perturbation", "control": "control"}
_SCREEN: dict[str, Any] = {
    "n_genes": 300,
    "n_perturbations": 30,
    "n_pairs": 15,
    "n_latent": 6,
    "mask_probability": 0.2,
    "inactive_fraction": 0.4,
    "effect_size": 1.2,
    "effect_jitter": 0.5,
    "control_fraction": 0.5,
    "library_size": 4_000.0,
    "n_batches": 1,
}
_N_NULL = 40
_CELLS_OF_TRUTH = 60_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--peer-python",
        default=sys.executable,
        help="python of an environment with peers (pip install perturbvi pertpy)",
    )
    arguments.add_argument(
        "--methods", nargs="+", default=list(_peer_runner.METHODS), choices=_peer_runner.METHODS
    )
    arguments.add_argument(
        "--seeds", type=int, nargs="*", default=[0], help="of simulated screens"
    )
    arguments.add_argument("--splits", type=int, nargs="*", default=[0], help="of Papalexi")
    arguments.add_argument("--cells", type=int, default=5_000, help="of a simulated screen")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    methods = [name for name in arguments.methods if _is_there(name, arguments.peer_python)]
    for title, score, runs in (
        (f"Simulated screens, {arguments.cells} cells", _simulated, arguments.seeds),
        ("Papalexi, half against half", _papalexi, arguments.splits),
    ):
        rows = [row for run in runs for row in score(run, methods, arguments)]
        if rows:
            means = pd.DataFrame(rows).groupby("method", sort=False).mean().reset_index()
            print_table(f"{title}, {len(runs)} runs", means.to_dict("records"), arguments)


def _is_there(method: str, python: str) -> bool:
    """Whether an environment has a method; says so if not."""
    if method not in _MODULES:
        return True
    check = [python, "-c", f"import {_MODULES[method]}"]
    found = subprocess.run(check, capture_output=True, check=False).returncode == 0
    if not found:
        print(
            f"{method} is not installed: give --peer-python, of an environment made by "
            f"`pip install {_MODULES[method]}`.",
            flush=True,
        )
    return found


def _found(method: str, screen: ad.AnnData, arguments: argparse.Namespace) -> ad.AnnData:
    """What a method finds, in a process of its own, so that memory is its own too."""
    python = arguments.peer_python if method in _MODULES else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, name)) for name in ("screen.h5ad", "found.h5ad")]
        screen.write_h5ad(paths[0])
        run = subprocess.run(
            [python, "-W", "ignore", _peer_runner.__file__, method, *paths],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise SystemExit(f"{method} failed:\n{run.stderr[-2_000:]}")
        return ad.read_h5ad(paths[1])


def _prepared(counts: ad.AnnData, layer: str | None, size: Any, n_null: int) -> ad.AnnData:
    matrix = sp.csr_matrix(counts.X if layer is None else counts.layers[layer], dtype=np.float32)
    obs = pd.DataFrame(
        {"perturbation": counts.obs["perturbation"].astype(str), "size": np.asarray(size, float)}
    )
    return ad.AnnData(matrix, obs=obs, var=counts.var[[]], uns={"n_null": n_null})


def _agreement(found: ad.AnnData, observed: ad.AnnData, names: Sequence[str]) -> list[float]:
    table = effect_agreement(found[list(names)], observed, pooled=True)
    return table[["pearson", "relative_squared_error"]].iloc[0].tolist()


def _simulated(
    seed: int, methods: Sequence[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    screen = simulated_screen(arguments.cells, **_SCREEN, seed=seed)
    labels, truth = screen.obs["perturbation"].astype(str), screen.uns["truth"]
    names = list(truth["perturbation_names"])
    pairs = sorted(label for label in labels.unique() if "+" in label)
    # What many more cells of the same truth show.
    many = simulated_screen(_CELLS_OF_TRUTH, **_SCREEN, seed=seed)
    expected = observed_effects(many, layer="counts", **_LABELS)
    singles = screen[~labels.isin(pairs).to_numpy()]
    size = np.asarray(singles.layers["counts"].sum(axis=1)).ravel()
    prepared = _prepared(singles, "counts", size, _N_NULL)
    prepared.uns["asked"] = np.array([*names, *pairs], dtype=object)
    mask = pd.DataFrame(truth["mask"], index=names)
    rows = []
    for method in methods:
        found = _found(method, prepared, arguments)
        row = {"method": method, "mask F1": np.nan, "false calls at 0.05": np.nan, "power": np.nan}
        if "mask" in found.uns:
            own = list(found.uns["perturbations"])
            row["mask F1"] = mask_recovery(mask.loc[own].to_numpy(), found.uns["mask"]).f1
            calls = mask_recovery(mask.loc[own].to_numpy(), found.uns["called"])
            row["false calls at 0.05"], row["power"] = 1 - calls.precision, calls.recall
        row["inactive called"] = np.nan
        if "called" in found.uns:
            is_called = (found.uns["called"] > 0).any(axis=1)
            is_active = mask.loc[list(found.uns["perturbations"])].any(axis=1).to_numpy()
            row["inactive called"] = float((is_called & ~is_active).sum())
        row["effects r"], row["effects error"] = _agreement(found, expected, names)
        row["pairs r"], row["pairs error"] = _agreement(found, expected, pairs)
        rows.append(row | {"core seconds": found.uns["seconds"], "GiB": found.uns["GiB"]})
        print(rows[-1], flush=True)
    return rows


def _papalexi(
    split: int, methods: Sequence[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    screen = screen[screen.obs["guide_frac"] > 0.5].copy()
    order = np.random.default_rng(split).permutation(screen.n_obs)
    half = screen.n_obs // 2
    first, second = (screen[np.sort(part)].copy() for part in (order[:half], order[half:]))
    observed = observed_effects(second, size_factor_key="total_umi_all_genes", **_LABELS)
    prepared = _prepared(first, None, first.obs["total_umi_all_genes"], 0)
    names = sorted(set(prepared.obs["perturbation"]) - {"control"})
    prepared.uns["asked"] = np.array(names, dtype=object)
    rows = []
    for method in methods:
        found = _found(method, prepared, arguments)
        row = {"method": method}
        row["effects r"], row["effects error"] = _agreement(found, observed, names)
        row["empty of ten null targets"] = row["share of masks on"] = np.nan
        which = "mask" if "mask" in found.uns else "called"
        if which in found.uns:
            on = pd.DataFrame(found.uns[which] > 0.5, index=found.uns["perturbations"])
            row["empty of ten null targets"] = float(
                (~on.loc[list(WITHOUT_EFFECT)].any(axis=1)).sum()
            )
            if which == "mask":
                row["share of masks on"] = float(on.to_numpy().mean())
        rows.append(row | {"core seconds": found.uns["seconds"], "GiB": found.uns["GiB"]})
        print(rows[-1], flush=True)
    return rows
