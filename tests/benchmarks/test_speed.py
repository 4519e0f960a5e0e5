"""The benchmarks of speed: what they measure, and that they run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scvi_sams.module import SAMSVAEModule

REASON = "run pytest as `python -m pytest` in the repository"
speed = pytest.importorskip("benchmarks._speed", reason=REASON)
step_time = pytest.importorskip("benchmarks.step_time", reason=REASON)
scale = pytest.importorskip("benchmarks.scale", reason=REASON)
throughput = pytest.importorskip("benchmarks.throughput", reason=REASON)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_screen_has_the_sizes_asked_for():
    screen = speed.random_screen(500, 200, 9, density=0.1)
    assert screen.shape == (500, 200)
    assert screen.X.has_canonical_format
    assert 0.08 < screen.X.nnz / np.prod(screen.shape) <= 0.1
    assert (screen.obs["perturbation"].value_counts() == 50).all()


def test_first_steps_do_not_count():
    assert speed.steady([100.0] + [1.0] * 9) == 1.0


def test_operations_are_those_of_the_linear_layers():
    module = SAMSVAEModule(30, 4, n_hidden=7, n_latent=3)
    encoder, decoder = 7 * 30, 7 * 3 + 30 * 7
    heads = 2 * 3 * 7
    # Batches of one category are no column; the decoder sees none.
    expected = 10 * (4 * encoder + 6 * heads + 6 * decoder)
    assert step_time._matrix_operations(module, 10) == expected


def test_global_updates_are_timed_on_a_problem_that_they_solve(tmp_path, capsys):
    path = tmp_path / "rows.json"
    sizes = ["--update-latents", "4", "8", "--update-perturbations", "40"]
    scale.main(["--updates", *sizes, "--json", str(path)])
    rows = json.loads(path.read_text())
    assert "an update, seconds" in capsys.readouterr().out
    assert [(row["latents"], row["perturbations"]) for row in rows] == [(4, 40), (8, 40)]
    for row in rows:
        assert row["masks on / true"] == pytest.approx(1, abs=0.1)
        assert all(row[f"{step}, seconds"] > 0 for step in ("switch on", "an update", "settle"))


@pytest.mark.parametrize("benchmark", [throughput, step_time])
def test_rows_are_written(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    sizes = ["--cells", "600", "--genes", "40", "--perturbations", "5", "--batch-sizes", "40"]
    benchmark.main([*sizes, "--json", str(path)])
    rows = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows[0] if name != "table")
    if benchmark is throughput:
        speeds = [rows[0][f"{name}, cells a second"] for name in ("SCVI", "SAMSVAE")]
        assert min(speeds) > 0
        assert rows[0]["lowest"] <= rows[0]["ratio"] <= rows[0]["highest"]
    else:
        assert [row["cells kept"] for row in rows] == ["device", "host"]
        for row in rows:
            assert row["step"] == pytest.approx(sum(row[part] for part in step_time._PARTS))
            assert row["step / products"] > 1
