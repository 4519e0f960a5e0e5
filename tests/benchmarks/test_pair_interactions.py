from __future__ import annotations

import json

import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks import pair_interactions


def test_coverage_of_both_kinds_of_intervals(tmp_path, capsys):
    file = tmp_path / "rows.json"
    pair_interactions.main(
        [
            *("--seeds", "1", "--cells", "2000", "--truth-cells", "6000", "--max-epochs", "2"),
            *("--samples", "4", "--measured", "35", "--json", str(file)),
        ]
    )
    printed = capsys.readouterr().out
    assert "in intervals of unmeasured pairs, 1 screens" in printed
    rows = json.loads(file.read_text())
    table = next(row["table"] for row in rows if "nominal" in row)
    rows = [{k: v for k, v in r.items() if k != "table"} for r in rows if r["table"] == table]
    one, mean = rows[:6], rows[6:]
    assert [row["seed"] for row in rows] == [1] * 6 + ["mean"] * 6
    for row, again in zip(one, mean, strict=True):
        assert {**row, "seed": "mean"} == pytest.approx(again)
    for narrow, wide in zip(one[:3], one[3:], strict=True):
        assert (narrow["intervals"], wide["intervals"]) == ("masks and effects", "calibrated")
        assert narrow["nominal"] == wide["nominal"]
        assert narrow["width of the score's"] < wide["width of the score's"]
        assert narrow["deviation of genes"] < wide["deviation of genes"] <= 1
