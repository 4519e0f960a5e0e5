"""What needs no library is answered at once, and no status is 0 without a result."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "scanpy", "scvi", "anndata", "pandas", "numpy", "matplotlib", "lightning"}


def _run(*words, code="from scvi_sams.cli import main; status = main(sys.argv[1:])"):
    """Run in a process of its own, and say what it imported."""
    code = f"import atexit, sys; atexit.register(lambda: print('IMPORTED', *sys.modules)); {code}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(status)", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done, set(done.stdout.split("IMPORTED")[1].split())


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["fit", "--help"], 0, ""),
        (["fit", "simulated"], 2, "-o/--output"),
        (["fit", "simulated", "-o", "out", "--latents", "3"], 2, "--latents"),
        (["fit", "none.h5ad", "-o", "out"], 1, "there is no file none.h5ad; give an .h5ad file"),
        (["fit", "simulated", "--targets", "none.csv", "-o", "out"], 1, "no file none.csv"),
        (["fit", "simulated", "-o", sys.executable], 1, "is not overwritten"),
        (["predict", "none", "--conditions", "A", "-o", "cells.h5ad"], 1, "no model in none"),
    ],
)
def test_arguments_are_answered_without_libraries(words, status, message):
    done, imported = _run(*words)
    assert done.returncode == status, done.stderr
    assert not HEAVY & imported
    assert message in done.stderr
    assert done.stderr.count("\n") == (1 if status else 0)


def test_a_wrong_file_is_answered_before_torch(tmp_path):
    (tmp_path / "counts.h5ad").write_text("gene,cell\n")
    done, imported = _run("fit", tmp_path / "counts.h5ad", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "counts.h5ad is not an .h5ad file" in done.stderr
    assert not (HEAVY - {"numpy"}) & imported  # h5py brings numpy


def test_a_column_that_is_not_there_is_answered_before_torch(screen_path, tmp_path):
    words = ("--perturbation-key", "guide", "--control", "control", "-o", tmp_path / "out")
    done, imported = _run("fit", screen_path, *words)
    assert done.returncode == 1
    assert "--perturbation-key: there is no obs column 'guide'" in done.stderr
    assert "'perturbation'" in done.stderr
    assert not (HEAVY - {"numpy"}) & imported


def test_the_package_is_imported_as_it_is_asked_for():
    done, imported = _run(code="import scvi_sams; status = 'SAMSVAE' not in dir(scvi_sams)")
    assert done.returncode == 0
    assert not HEAVY & imported
    done, imported = _run(code="from scvi_sams import SAMSVAE, pl; status = 0")
    assert done.returncode == 0
    assert {"torch", "scvi_sams.pl"} <= imported


def test_the_program_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "scvi_sams", "fit", "none.h5ad", "-o", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "scvi-sams: error: there is no file none.h5ad; give an .h5ad file or 'simulated'\n"
    )
