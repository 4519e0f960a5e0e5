"""What every test shares: seeds, quiet libraries, no display, one thread, the real screens."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import scvi
import torch

plt.switch_backend("Agg")
# Python takes no notice of Ctrl-C where it is started in the background, as by `nohup ... &`.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
for _library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_library).setLevel(logging.ERROR)

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def _seeded_module():
    """Seed the fixtures that a module shares, which are made before those of a test."""
    scvi.settings.seed = 0


@pytest.fixture(autouse=True)
def _reproducible_and_quiet():
    """Seed every test alike, whatever ran before it, and leave no figure open."""
    # scvi-tools lengthens it at each seed; after some thousands no process can be started.
    os.environ.pop("XLA_FLAGS", None)
    scvi.settings.seed = 0
    scvi.settings.verbosity = logging.ERROR
    yield
    plt.close("all")


def _screen(name: str) -> Path:
    folder = Path(os.environ.get("SCVI_SAMS_TEST_DATA", _ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.is_file():
        message = f"{name} is not in {folder}; set SCVI_SAMS_TEST_DATA to the folder that has it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def papalexi_path() -> Path:
    """ECCITE-seq knock-outs in THP-1 cells: 20,729 cells x 299 genes, 25 perturbations."""
    return _screen("papalexi2021_eccite.h5ad")


@pytest.fixture(scope="session")
def norman_path() -> Path:
    """CRISPR activation in K562 cells: 3,375 cells x 500 genes, 18 genes and 15 pairs."""
    return _screen("norman2019_subset.h5ad")
