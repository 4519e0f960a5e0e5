"""The benchmark of several processes starts them, and says what each ends with."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks import distributed
from benchmarks._distributed import read_found, run_together, torchrun, write_found


def test_what_a_process_says_when_it_fails_is_told():
    with pytest.raises(RuntimeError, match="no such screen"):
        run_together(["-c", "pass"], ["-c", "raise SystemExit('no such screen')"])


def test_commands_run_at_the_same_time(tmp_path):
    """Each waits for the file of the other."""
    command = (
        "import pathlib, sys, time; a, b = map(pathlib.Path, sys.argv[1:]); a.touch()\n"
        "while not b.exists(): time.sleep(0.01)"
    )
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_together(["-c", command, first, second], ["-c", command, second, first], timeout=60)


def test_what_is_found_is_read_back_by_rank(tmp_path, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        write_found({"n_steps": 10 + rank}, tmp_path, "case")
    assert read_found(tmp_path, "case") == [{"n_steps": 10}, {"n_steps": 11}]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pickle", ".pickle"]


def test_torchrun_is_started_as_a_module():
    assert torchrun("--standalone", "script.py")[-2:] == ["--standalone", "script.py"]


@pytest.mark.slow
def test_rows(tmp_path, capsys):
    rows_file = tmp_path / "rows.json"
    distributed.main(["--quick", "--max-epochs", "20", "--json", str(rows_file)])
    assert "One and two processes" in capsys.readouterr().out
    one, first, second = json.loads(rows_file.read_text())
    assert [(row["processes"], row["rank"]) for row in (one, first, second)] == [
        (1, 0),
        (2, 0),
        (2, 1),
    ]
    assert first["parameter sum"] == second["parameter sum"] != one["parameter sum"]
    assert first["effect correlation"] == second["effect correlation"] > 0.95
    assert min(one["mask F1"], first["mask F1"]) > 0.9
    assert first["validation bound"] == pytest.approx(one["validation bound"], rel=0.01)
    assert second["validation bound"] == ""
