"""A search by scvi-tools: what it is told, and two trials of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from scvi_sams.train import autotune_arguments

SEARCH = """
import json, sys
from ray import tune
from scvi.autotune import run_autotune
import scvi, scvi_sams

adata = scvi_sams.datasets.simulated_screen(
    n_cells=400, n_genes=40, n_perturbations=5, n_pairs=0, n_latent=3
)
scvi_sams.SAMSVAE.setup_anndata(
    adata, layer="counts", perturbation_key="perturbation", control="control"
)
quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
arguments = scvi_sams.train.autotune_arguments(
    3,
    model_params={"n_hidden": 16, "n_latent": tune.choice([3, 5])},
    train_params=quiet,
)
search = run_autotune(
    scvi_sams.SAMSVAE, adata, num_samples=2, seed=1, resources={"cpu": 1}, **arguments
)
best = search.result_grid.get_best_result("elbo_validation", "min")
scvi.settings.seed = 1
model = scvi_sams.SAMSVAE(adata, **best.config["model_params"])
model.train(check_val_every_n_epoch=1, **best.config["train_params"])
found = {
    "errors": [str(result.error) for result in search.result_grid if result.error],
    "trials": [
        {
            "bound": result.metrics["elbo_validation"],
            "n_epochs": result.metrics["training_iteration"],
            "config": result.config,
        }
        for result in search.result_grid
    ],
    "best": best.metrics["elbo_validation"],
    "again": float(model.history["elbo_validation"].iloc[-1, 0]),
}
json.dump(found, open(sys.argv[1], "w"))
"""


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "scvi-sams\[autotune\]"'):
        autotune_arguments()


def test_errors():
    with pytest.raises(ValueError, match="max_epochs=0"):
        autotune_arguments(0)
    for name in ("max_epochs", "plan_kwargs"):
        with pytest.raises(ValueError, match=f"train_params sets '{name}'"):
            autotune_arguments(train_params={name: 3})


class TestSpace:
    @pytest.fixture(autouse=True)
    def tune(self):
        return pytest.importorskip("ray.tune", reason="the extra autotune is not installed")

    def test_defaults(self):
        arguments = autotune_arguments(7)
        space = arguments.pop("search_space")
        assert arguments == {"metrics": "elbo_validation", "mode": "min", "scheduler": "fifo"}
        assert set(space["model_params"]) == {"n_latent", "n_hidden", "dropout_rate"}
        assert space["train_params"]["max_epochs"] == 7
        rates = [space["train_params"]["plan_kwargs"]["lr"].sample() for _ in range(50)]
        assert 1e-3 <= min(rates) < max(rates) <= 8e-3

    def test_own_values_and_spaces(self, tune):
        evidence = tune.choice([30, 100])
        space = autotune_arguments(
            model_params={"n_latent": 8, "mask_evidence_cells": evidence},
            train_params={"batch_size": 256},
            plan_kwargs={"lr": 1e-3, "n_particles": 2},
        )["search_space"]
        assert space["model_params"]["n_latent"] == 8
        assert space["model_params"]["mask_evidence_cells"] is evidence
        assert "n_hidden" in space["model_params"]
        assert space["train_params"] == {
            "max_epochs": 40,
            "batch_size": 256,
            "plan_kwargs": {"lr": 1e-3, "n_particles": 2},
        }


@pytest.mark.slow
def test_two_trials(tmp_path):
    """In a process of its own, as Ray starts processes and leaves warnings."""
    for package in ("ray.tune", "hyperopt", "scib_metrics"):
        pytest.importorskip(package, reason="the extra autotune is not installed")
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(tmp_path / "found.json")],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["errors"]
    assert [trial["n_epochs"] for trial in found["trials"]] == [3, 3]
    rates = {trial["config"]["train_params"]["plan_kwargs"]["lr"] for trial in found["trials"]}
    assert len(rates) == 2
    assert found["best"] == min(trial["bound"] for trial in found["trials"])
    # The best trial is what its arguments and the seed give outside of the search too.
    assert found["again"] == pytest.approx(found["best"], rel=1e-5)
