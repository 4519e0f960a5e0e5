"""The guard against regressions: planted differences are found, and noise is not."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest

REASON = "run pytest as `python -m pytest` in the repository"
compare = pytest.importorskip("benchmarks.compare", reason=REASON)
common = pytest.importorskip("benchmarks._common", reason=REASON)

STEP = {
    "batch size": 128,
    "cells kept": "device",
    "forward": 8.0,
    "step": 17.0,
    "step / products": 2.6,
    "measured GFLOP/s": 100.0,
    "peak memory, MiB": 700.0,
}


@pytest.fixture
def verdicts(tmp_path, capsys):
    """Compare rows; give the verdict of each measure that is not level, and the exit status."""

    def verdicts(old, new, *words):
        paths = []
        for name, rows in (("old", old), ("new", new)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(rows))
        status = compare.main([*map(str, paths), *words])
        printed = capsys.readouterr().out
        found, _ = compare.changes(*map(compare.read_rows, paths))
        assert all(c.measure in printed for c in found if c.verdict != "level")
        return {c.measure: c.verdict for c in found if c.verdict != "level"}, status

    return verdicts


def test_the_same_is_level(verdicts):
    assert verdicts([STEP], [STEP]) == ({}, 0)


def test_what_is_slower_is_found_and_what_is_faster(verdicts):
    new = STEP | {"forward": 14.0, "step": 10.0, "peak memory, MiB": 800.0}
    assert verdicts([STEP], [new]) == (
        {"forward": "worse", "step": "better", "peak memory, MiB": "worse"},
        1,
    )


def test_a_busy_machine_is_no_regression(verdicts):
    busy = {name: 1.4 * value for name, value in STEP.items() if isinstance(value, float)}
    busy |= {"step / products": 2.7, "peak memory, MiB": 700.0, "measured GFLOP/s": 100 / 1.4}
    assert verdicts([STEP], [STEP | busy]) == ({}, 0)


def test_a_ratio_measured_in_turn_is_judged_more_closely(verdicts):
    assert verdicts([STEP], [STEP | {"step / products": 3.3}])[0] == {"step / products": "worse"}


def test_on_a_quiet_machine_less_is_found(verdicts, capsys):
    new = STEP | {"forward": 11.0}
    assert verdicts([STEP], [new])[1] == 0
    assert verdicts([STEP], [new], "--noise", "0.5")[1] == 1


def seeds(rng, f1, n=8, sd=0.03, **rest):
    return [
        {"seed": seed, "F1": float(f1 + rng.normal(0, sd)), "core seconds": 50.0} | rest
        for seed in range(n)
    ]


def test_quality_that_fell_is_found():
    rng = np.random.default_rng(0)
    found = _judged(seeds(rng, 0.95), seeds(rng, 0.85))
    assert found == {"F1": "worse"}


def test_noise_over_seeds_is_none():
    """One in twenty true nulls is past what chance makes; the floor takes nearly all of these."""
    rng = np.random.default_rng(1)
    called = [_judged(seeds(rng, 0.9), seeds(rng, 0.9)) for _ in range(200)]
    assert np.mean([bool(found) for found in called]) < 0.08


def test_a_fall_by_less_than_the_floor_is_none():
    rng = np.random.default_rng(2)
    assert _judged(seeds(rng, 0.95, sd=1e-4), seeds(rng, 0.94, sd=1e-4)) == {}


def _judged(old, new):
    found, _ = compare.changes(*(_rows(rows) for rows in (old, new)))
    return {c.measure: c.verdict for c in found if c.verdict != "level"}


def _rows(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows))
        return compare.read_rows(path)


@pytest.mark.parametrize(
    ("measure", "old", "new", "verdict"),
    [
        ("held-out IWELBO", -186.4, -187.4, "worse"),
        ("coverage 95%", 0.89, 0.97, "better"),
        ("coverage 95%", 0.93, 0.99, "level"),
        ("their FDR", 0.05, 0.12, "worse"),
        ("squared error, model", 0.23, 0.30, "worse"),
        ("effect correlation", 0.9, float("nan"), "worse"),
        ("cells a second", 8000.0, 4000.0, "worse"),
    ],
)
def test_each_kind_knows_which_way_is_better(measure, old, new, verdict):
    rows = [[{"model": "ours", measure: value}] for value in (old, new)]
    (change,), _ = compare.changes(*map(_rows, rows))
    assert change.verdict == verdict


def test_whole_numbers_and_words_that_are_results_are_no_labels():
    row = {"seed": 0, "latents of the pathway": 1, "empty masks of ten": 8, "other masks": "CUL3"}
    worse = {"latents of the pathway": 3, "empty masks of ten": 5, "other masks": "CUL3, MYC"}
    assert _judged([row], [row | worse]) == {
        "latents of the pathway": "worse",
        "empty masks of ten": "worse",
    }


def test_means_with_a_deviation_are_judged_by_it():
    old = {"model": "ours", "mask F1": 0.85, "mask F1 (sd)": 0.03}
    assert _judged([old], [old | {"mask F1": 0.79}]) == {}
    assert _judged([old], [old | {"mask F1": 0.70}]) == {"mask F1": "worse"}


def test_repetitions_in_a_folder_say_what_noise_is(tmp_path):
    for side, seconds in (("old", (10.0, 18.0, 11.0)), ("new", (17.0, 9.0, 25.0))):
        (tmp_path / side).mkdir()
        for k, value in enumerate(seconds):
            rows = [{"size": 5, "seconds": value}]
            (tmp_path / side / f"scale-{k + 1}.json").write_text(json.dumps(rows))
    found, _ = compare.changes(*(compare.read_rows(tmp_path / side) for side in ("old", "new")))
    assert [(c.benchmark, c.row, c.verdict) for c in found] == [("scale", "size 5", "level")]


def test_what_is_on_one_side_alone_and_what_nobody_can_judge_is_said(verdicts, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([STEP, STEP | {"batch size": 512}]))
    (tmp_path / "b.json").write_text(json.dumps([STEP | {"oddness": 1.5}]))
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "Not in NEW: benchmark, batch size 512, device" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "b.json"), str(tmp_path / "b.json")]) == 0
    assert "which way is better: oddness" in capsys.readouterr().out
    (tmp_path / "c.json").write_text(json.dumps([STEP | {"batch size": 7}]))
    with pytest.raises(SystemExit, match="Nothing can be compared"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "c.json")])


def test_all_tables_of_a_benchmark_are_written(tmp_path, capsys):
    arguments = SimpleNamespace(json=tmp_path / "rows.json", threads=1)
    common.print_table("First", [{"seed": 0, "n": np.int64(3), "F1": np.float32(0.5)}], arguments)
    common.print_table("Second", [{"seed": 0, "F1": 0.25}], arguments)
    assert json.loads(arguments.json.read_text()) == [
        {"table": "First", "seed": 0, "n": 3, "F1": 0.5},
        {"table": "Second", "seed": 0, "F1": 0.25},
    ]
    assert isinstance(json.loads(arguments.json.read_text())[0]["n"], int)
    assert len(compare.read_rows(arguments.json)) == 2
