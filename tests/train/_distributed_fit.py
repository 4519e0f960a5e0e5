"""A script: fit one model in several processes; each writes what it ends with.

``python _distributed_fit.py FOLDER CASE...`` lets Lightning start the second process; under
torchrun the processes are there already, on one node or more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

import scvi_sams
from benchmarks._distributed import fit, write_found

SCREEN: dict[str, Any] = {
    "n_cells": 1_002,
    "n_genes": 50,
    "n_perturbations": 6,
    "n_pairs": 2,
    "n_latent": 3,
    "mask_probability": 0.3,
}
CASES: dict[str, dict[str, Any]] = {
    "closed_form": {
        "screen": {"n_cells": 3_000, "n_genes": 100, "n_perturbations": 15, "n_pairs": 0}
        | {"n_latent": 5, "mask_probability": 0.2, "library_size": 4_000.0, "seed": 1},
        "model": {"n_latent": 10, "n_hidden": 64},
        "train": {"max_epochs": 40, "batch_size": 128},
    },
    "gradient": {
        "seed": None,
        "model": {"global_inference": "gradient"},
        "train": {"strategy": "ddp_find_unused_parameters_true", "data_placement": "host"},
    },
    "divergence": {"train": {"max_epochs": 8}, "bad_step": 90},
    "short": {"train": {"max_epochs": 3, "data_placement": "host"}},
    "no_perturbation_latents": {"member": "ConditionalVAE", "train": {}},
}


class Watch(Callback):
    """Note what the first epoch reads and where the noise starts; spoil one step of rank 1."""

    def __init__(self, bad_step: int | None) -> None:
        self.bad_step = bad_step
        self.counts: Any = 0.0
        self.noise: Any = None

    def on_train_batch_start(self, trainer, plan, batch, batch_idx) -> None:
        if trainer.current_epoch == 0:
            self.counts = self.counts + batch["X"].double().sum(0).numpy()
        if self.noise is None:
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
            self.noise = torch.rand(4, generator=generator).numpy()
        if trainer.global_step == self.bad_step and trainer.global_rank == 1:
            batch["X"][:] = torch.inf


def fit_case(case: str, n_processes: int, n_nodes: int = 1) -> dict[str, Any]:
    """Fit a case; the minibatches of all processes together are of the size it says."""
    settings = CASES[case]
    adata = scvi_sams.datasets.simulated_screen(**settings.get("screen", SCREEN))
    watch = Watch(settings.get("bad_step"))
    train = {"max_epochs": 6, "batch_size": 64, "callbacks": [watch]} | settings["train"]
    model, found = fit(
        getattr(scvi_sams, settings.get("member", "SAMSVAE")),
        adata,
        model_kwargs={"n_latent": 6, "n_hidden": 32} | settings.get("model", {}),
        train_kwargs=train,
        n_processes=n_processes,
        n_nodes=n_nodes,
        seed=settings.get("seed", 0),
    )
    found |= {
        "counts": watch.counts,
        "noise": watch.noise,
        "training_counts": np.asarray(
            adata.layers["counts"][model.train_indices].astype(float).sum(0)
        ).ravel(),
    }
    if model.module.effects is not None:
        effects = model.get_average_treatment_effect(model.perturbation_names)
        found["effects"] = np.asarray(effects.X)
        found["mask"] = model.get_perturbation_mask()
        found["true_mask"] = adata.uns["truth"]["mask"]
    return found


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    for case in cases:
        write_found(fit_case(case, n_processes=2, n_nodes=n_nodes), Path(folder), case)


if __name__ == "__main__":
    main(*sys.argv[1:])
