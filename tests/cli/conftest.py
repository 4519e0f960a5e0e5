from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

import scvi_sams
from scvi_sams.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, where a command says why it failed."""
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def run(capsys):
    """Run ``scvi-sams`` with some words, in this process."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def screen_path(tmp_path_factory) -> Path:
    """A small screen of known effects, as a user would have it on disk."""
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=500, n_genes=60, n_perturbations=6, n_pairs=2, control_fraction=0.2
    )
    del adata.uns["truth"]
    adata.write_h5ad(path)
    return path


@dataclass
class Training:
    """A training that was about to begin: which labels the cells of each part have."""

    labels: pd.Series
    held_out: np.ndarray

    def conditions_held_out(self) -> set[str]:
        """Conditions of which no cell is trained on."""
        return set(self.labels[self.held_out]) - set(self.labels[~self.held_out])


@pytest.fixture
def until_training(run, monkeypatch, tmp_path):
    """Run ``scvi-sams fit`` up to the training, and say what it would train on."""

    def until_training(*words: object) -> Training | Result:
        begun = []

        def train(model, *, datasplitter_kwargs, **_):
            held_out = np.zeros(model.adata.n_obs, bool)
            held_out[datasplitter_kwargs["external_indexing"][1]] = True
            begun.append(Training(model.adata.obs["condition"].astype(str), held_out))
            raise scvi_sams.ScreenError("far enough")

        monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train)
        done = run("fit", *words, "-o", tmp_path / "never")
        return begun[0] if begun else done

    return until_training
