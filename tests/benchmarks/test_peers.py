from __future__ import annotations

import sys

import pytest

from benchmarks import peers


def test_it_scores_what_is_there_and_says_what_is_not(capsys, monkeypatch):
    monkeypatch.setattr(peers, "_CELLS_OF_TRUTH", 3_000)
    monkeypatch.setitem(peers._MODULES, "perturbvi", "no_such_module")
    peers.main(
        ["--methods", "raw means", "perturbvi", "--cells", "3000", "--splits"]
        + ["--peer-python", sys.executable]
    )
    out = capsys.readouterr().out
    assert "perturbvi is not installed: give --peer-python" in out
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in table] == ["| method", "| ---", "| raw means"]
    scores = dict(zip(table[0], table[2], strict=True))
    # Means of the cells that the truth was taken from.
    assert float(scores["effects r"]) > 0.99
    assert float(scores["effects error"]) < 0.02
    assert scores["mask F1"] == "nan"


def test_a_peer_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "runner.py"
    broken.write_text("raise ValueError('no such tool')")
    monkeypatch.setattr(peers._peer_runner, "__file__", str(broken))
    monkeypatch.setattr(peers, "_CELLS_OF_TRUTH", 1_000)
    with pytest.raises(SystemExit, match="(?s)raw means failed:.*no such tool"):
        peers.main(["--methods", "raw means", "--cells", "1000", "--splits"])
