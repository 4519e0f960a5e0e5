"""One method on one screen, run by an environment that has it: ``NAME screen.h5ad found.h5ad``.

The screen has counts, ``obs["perturbation"]`` and ``obs["size"]``; ``uns["asked"]`` names the
conditions to predict, ``uns["n_null"]`` the fakes that calls may be held against. Found are the
effects in log2(1 + 1e4 x / size), conditions x genes, with masks and calls in ``uns`` where a
method has some. Peers run as their own guides say.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

Found = tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]
"""Effects; masks (probabilities), perturbations x latents; calls at a nominal rate of 0.05."""


def _scvi_sams(screen: ad.AnnData) -> Found:
    import scvi

    from scvi_sams import SAMSVAE
    from scvi_sams.tl import add_control_null, mechanisms

    names = sorted(set(screen.obs["perturbation"]) - {"control"})
    key = "perturbation"
    if n_null := int(screen.uns["n_null"]):
        add_control_null(screen, key, "control", n_null=n_null, max_control_share=0.95, seed=0)
        key = "perturbation_with_null"
    SAMSVAE.setup_anndata(screen, perturbation_key=key, control="control", size_factor_key="size")
    scvi.settings.seed = 0
    model = SAMSVAE(screen)
    model.train(train_size=1.0, accelerator="cpu", enable_progress_bar=False)
    table = mechanisms(model, 0.05)
    called = table.pivot(index="perturbation", columns="latent", values="called")
    effects = model.get_average_treatment_effect(list(screen.uns["asked"])).to_df()
    return effects, model.get_perturbation_mask().loc[names], called.loc[names]


def _perturbvi(screen: ad.AnnData) -> Found:
    from perturbvi import PerturbData, fit_screen

    data = PerturbData(
        _log_expression(screen)[0],
        pd.get_dummies(screen.obs["perturbation"], dtype=float).reset_index(drop=True),
        gene_names=list(screen.var_names),
        covariates=pd.DataFrame({"log_size": np.log(screen.obs["size"].to_numpy(float))}),
        control="control",
    )
    n_genes = screen.n_vars
    fit = fit_screen(data, z_dim=20, l_dim=min(1_000, n_genes // 3), init="pca", verbose=False)
    return _summed(fit.BW, screen), fit.PIP_B, fit.PIP_B > 0.95


def _mixscape(screen: ad.AnnData) -> Found:
    import pertpy
    import scanpy

    expression, is_control = _log_expression(screen)
    cells = ad.AnnData(expression, obs=screen.obs[["perturbation"]], var=screen.var[[]])
    scanpy.pp.pca(cells, random_state=0)
    mixscape = pertpy.tl.Mixscape()
    mixscape.perturbation_signature(cells, "perturbation", "control", random_state=0)
    mixscape.mixscape(cells, "perturbation", "control", layer="X_pert", random_state=0)
    is_hit = (cells.obs["mixscape_class_global"] == "KO").to_numpy()
    rows = {}
    for name in sorted(set(cells.obs["perturbation"]) - {"control"}):
        hit = is_hit & (cells.obs["perturbation"] == name).to_numpy()
        mean = expression[hit if hit.any() else is_control].mean(axis=0)
        rows[name] = mean - expression[is_control].mean(axis=0)
    effects = pd.DataFrame(rows, index=screen.var_names).T
    called = (effects != 0).any(axis=1).to_frame("any latent")
    return _summed(effects, screen), None, called


def _raw_means(screen: ad.AnnData) -> Found:
    expression, is_control = _log_expression(screen)
    means = pd.DataFrame(expression, columns=screen.var_names).groupby(
        screen.obs["perturbation"].astype(str).to_numpy()
    )
    effects = means.mean().drop(index="control") - expression[is_control].mean(axis=0)
    return _summed(effects, screen), None, None


def _log_expression(screen: ad.AnnData) -> tuple[Any, Any]:
    counts = np.asarray(screen.X.todense(), dtype=float)
    size = screen.obs["size"].to_numpy(float)[:, None]
    return np.log2(1 + 1e4 * counts / size), (screen.obs["perturbation"] == "control").to_numpy()


def _summed(effects: pd.DataFrame, screen: ad.AnnData) -> pd.DataFrame:
    """Of a combination the sum of its parts."""
    asked = [str(name) for name in screen.uns["asked"]]
    return pd.DataFrame({name: effects.loc[name.split("+")].sum() for name in asked}).T


def _peak_memory() -> float:
    """GiB of this process; what the kernel sums for children has the parent's in it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return float(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


METHODS = {
    "scvi_sams": _scvi_sams,
    "perturbvi": _perturbvi,
    "Mixscape": _mixscape,
    "raw means": _raw_means,
}

if __name__ == "__main__":
    name, screen_path, found_path = sys.argv[1:]
    screen = ad.read_h5ad(screen_path)
    start = time.process_time()
    effects, mask, called = METHODS[name](screen)
    seconds = time.process_time() - start
    found = ad.AnnData(effects.astype(np.float32))
    found.uns["seconds"] = seconds
    found.uns["GiB"] = _peak_memory()
    for key, table in (("mask", mask), ("called", called)):
        if table is not None:
            found.uns[key] = table.to_numpy(dtype=float)
            found.uns["perturbations"] = np.array(table.index, dtype=object)
    found.write_h5ad(found_path)
