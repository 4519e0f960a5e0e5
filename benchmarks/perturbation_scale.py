"""Cost of a training step against the number of perturbations, for several posteriors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch

from benchmarks._common import Stopwatch, parser, prepare, print_table
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_POSTERIORS = {
    "correlated": {"basal_posterior": "amortized", "embedding_posterior": "correlated"},
    "mean_field": {"basal_posterior": "amortized", "embedding_posterior": "mean_field"},
    "closed form": {},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, each size in a process of its own, whose peak of memory is its own."""
    arguments = parser(__doc__)
    arguments.add_argument("--perturbations", type=int, nargs="+", default=[100, 1_000, 10_000])
    arguments.add_argument(
        "--posteriors", nargs="+", default=list(_POSTERIORS), choices=list(_POSTERIORS)
    )
    arguments.add_argument("--cells", type=int, default=20_000)
    arguments.add_argument("--genes", type=int, default=500)
    arguments.add_argument("--latents", type=int, default=50)
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--one", help="internal: one run, reported as JSON")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.one:
        print(json.dumps(_run(json.loads(arguments.one), arguments)))
        return
    rows = []
    for posterior in arguments.posteriors:
        for n_perturbations in arguments.perturbations:
            one = {"posterior": posterior, "perturbations": n_perturbations}
            command = [sys.executable, "-m", "benchmarks", "perturbation_scale"]
            for name in ("threads", "cells", "genes", "latents", "epochs"):
                command += [f"--{name}", str(getattr(arguments, name))]
            done = subprocess.run(
                [*command, "--one", json.dumps(one)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(one | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    title = f"{arguments.cells} cells, {arguments.genes} genes, {arguments.latents} latents"
    print_table(title, rows, arguments)


def _run(one: dict[str, Any], arguments: Any) -> dict[str, float]:
    rng = np.random.default_rng(0)
    n_cells, n_genes = arguments.cells, arguments.genes
    counts = sp.csr_matrix(rng.poisson(0.5, (n_cells, n_genes)).astype(np.float32))
    labels = rng.permutation(np.arange(n_cells) % (one["perturbations"] + 1))
    names = np.array(["control", *(f"P{k}" for k in range(one["perturbations"]))])
    obs = pd.DataFrame({"perturbation": names[labels]}, index=np.arange(n_cells).astype(str))
    screen = ad.AnnData(counts, obs=obs)
    scvi.settings.seed = 0
    SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
    model = SAMSVAE(screen, n_latent=arguments.latents, **_POSTERIORS[one["posterior"]])
    # The masks are on from the first step, so that every step does the whole work.
    plan = {"mask_warmup_fraction": 0.0}
    before = _peak_memory()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "train_size": 1.0}
    model.train(max_epochs=1, plan_kwargs=plan, **quiet)
    watch = Stopwatch()
    with watch():
        model.train(max_epochs=arguments.epochs, plan_kwargs=plan, **quiet)
    n_steps = arguments.epochs * -(-n_cells // 128)
    parameters = sum(p.numel() for p in model.module.effects.parameters())
    return {
        "milliseconds a step": 1e3 * watch.cpu / n_steps,
        "peak memory, MiB": _peak_memory(),
        "of it before training, MiB": before,
        "parameters of effects, million": parameters / 1e6,
        "threads": float(torch.get_num_threads()),
    }


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
