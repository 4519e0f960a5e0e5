"""Several processes that train one model: equal at the end, and as good as one process.

Processes are started as a user starts them, never inside of pytest.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scvi_sams
from scvi_sams.evaluation import mask_recovery

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks._distributed import read_found, run_together, torchrun

from ._distributed_fit import SCREEN, fit_case

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("_distributed_fit.py")
CASES = ("gradient", "divergence", "no_perturbation_latents", "closed_form")


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        np.testing.assert_array_equal(value, second["state"][name], err_msg=name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Every case, one after another, by two processes of torchrun."""
    folder = tmp_path_factory.mktemp("two_processes")
    launcher = torchrun("--standalone", "--nproc_per_node=2")
    run_together([*launcher, str(SCRIPT), str(folder), *CASES])
    return folder


@pytest.mark.parametrize("case", CASES)
class TestTwoProcesses:
    def test_end_with_the_same_model(self, two_processes, case):
        first, second = read_found(two_processes, case)
        assert_same_state(first, second)
        assert first["n_steps"] == second["n_steps"] > 0
        assert first["state"]["n_training_cells"] == len(first["train_indices"])
        assert all(np.isfinite(value).all() for value in first["state"].values())

    def test_read_each_training_cell_once_an_epoch(self, two_processes, case):
        first, second = read_found(two_processes, case)
        np.testing.assert_array_equal(first["train_indices"], second["train_indices"])
        read = first["counts"] + second["counts"]
        np.testing.assert_array_equal(read, first["training_counts"])
        assert (first["counts"] != second["counts"]).any()

    def test_draw_noise_of_their_own(self, two_processes, case):
        first, second = read_found(two_processes, case)
        assert (first["noise"] != second["noise"]).all()

    def test_log_one_history(self, two_processes, case):
        first, second = read_found(two_processes, case)
        assert not second["history"]
        for name in ("train_loss", "elbo_train", "elbo_validation"):
            assert np.isfinite(first["history"][name]).all()


def test_a_step_that_diverges_in_one_process_is_undone_in_both(two_processes):
    first, second = read_found(two_processes, "divergence")
    assert first["n_restarts"] == second["n_restarts"] == 1


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return fit_case("closed_form", n_processes=1)


@pytest.fixture(scope="module")
def of_two(two_processes) -> dict[str, Any]:
    return read_found(two_processes, "closed_form")[0]


class TestQuality:
    def test_masks_are_found(self, one_process, of_two):
        f1 = [mask_recovery(fit["true_mask"], fit["mask"]).f1 for fit in (one_process, of_two)]
        assert min(f1) > 0.95

    def test_effects_are_those_of_one_process(self, one_process, of_two):
        effects = [fit["effects"].ravel() for fit in (one_process, of_two)]
        assert np.corrcoef(effects)[0, 1] > 0.99

    def test_validation_bound_is_that_of_one_process(self, one_process, of_two):
        bounds = [fit["history"]["elbo_validation"][-1, 0] for fit in (one_process, of_two)]
        assert abs(bounds[0] - bounds[1]) < 0.01 * bounds[0]

    def test_cells_of_both_count(self, one_process, of_two):
        """In what is read before the first step, and in the statistics."""
        for name in (
            "encoder.input_mean",
            "encoder.input_std",
            "counts_per_cell",
            "closed_form.statistics.n_occurrences",
            "closed_form.statistics.n_cells_seen",
        ):
            np.testing.assert_allclose(of_two["state"][name], one_process["state"][name], 1e-6)


def test_nodes_and_processes_of_lightning_are_alike(tmp_path):
    """Two nodes of one process, and two processes of one node: the same bits."""
    for folder in ("nodes", "lightning"):
        (tmp_path / folder).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_together(
        *(
            torchrun("--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1")
            + ["--master_addr=127.0.0.1", f"--master_port={port}"]
            + [str(SCRIPT), str(tmp_path / "nodes"), "short"]
            for node in (0, 1)
        )
    )
    run_together([str(SCRIPT), str(tmp_path / "lightning"), "short"])
    first, second = read_found(tmp_path / "nodes", "short")
    assert_same_state(first, second)
    assert_same_state(first, read_found(tmp_path / "lightning", "short")[0])


@pytest.mark.parametrize("launcher", [[], torchrun("--standalone", "--nproc_per_node=2")])
def test_script_of_the_user_guide(tmp_path, launcher):
    """As it is written there, but for sizes, the processor and where files are."""
    page = SCRIPT.parents[2] / "docs" / "user_guide" / "clusters.md"
    if not page.is_file():
        pytest.skip("the user guide is not there")
    script = re.search(r"```python\n(# fit.py\n.*?)```", page.read_text(), re.DOTALL)[1]
    for written, tested in {
        '"gpu"': '"cpu"',
        "devices=4": "devices=2",
        "max_epochs=20": "max_epochs=2, enable_progress_bar=False",
        '"my_screen.h5ad"': repr(str(tmp_path / "screen.h5ad")),
        '"my_model"': repr(str(tmp_path / "model")),
    }.items():
        assert script.count(written) == 1, written
        script = script.replace(written, tested)
    scvi_sams.datasets.simulated_screen(**SCREEN).write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "fit.py").write_text(script)
    run_together([*launcher, str(tmp_path / "fit.py")])
    model = scvi_sams.SAMSVAE.load(tmp_path / "model", accelerator="cpu")
    assert len(model.history["elbo_train"]) == 2
