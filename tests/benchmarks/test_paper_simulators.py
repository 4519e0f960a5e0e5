from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("benchmarks", reason="run pytest as `python -m pytest` in the repository")

from benchmarks import paper_simulators
from benchmarks.paper_simulators import transfer_f1

TRUE = pd.DataFrame(
    np.array([[1, 0], [0, 1], [1, 1], [0, 1]], dtype=bool), index=["A", "B", "C", "D"]
)


def test_transfer_uses_the_matching_of_the_known_perturbations():
    swapped = TRUE[[1, 0]].astype(float)
    assert transfer_f1(TRUE, swapped.loc[["A", "B"]], swapped.loc[["C", "D"]]) == 1.0
    # The new ones alone would match the other way round and look better.
    assert transfer_f1(TRUE, swapped.loc[["A", "B"]], TRUE.loc[["D"]].astype(float)) == 0.0


def test_transfer_by_hand():
    known = TRUE.loc[["A", "B"]].astype(float)
    new = pd.DataFrame([[1.0, 0.0], [1.0, 1.0]], index=["C", "D"])
    assert transfer_f1(TRUE, known, new) == pytest.approx(2 * 2 / (3 + 3))
    nothing = pd.DataFrame(np.zeros((2, 2), dtype=bool), index=["A", "B"])
    assert transfer_f1(nothing, nothing.loc[["A"]], nothing.loc[["B"]]) == 1.0


def test_every_simulator_and_kind_of_model(tmp_path, capsys):
    rows = ["ConditionalVAE", "SVAEPlus", "SAMSVAE closed form"]
    file = tmp_path / "rows.json"
    paper_simulators.main(
        [
            *("--rows", *rows, "--seeds", "0", "--cells", "1500", "--max-epochs", "2"),
            *("--json", str(file)),
        ]
    )
    assert "Simulators of the papers, 1 seeds" in capsys.readouterr().out
    table = {(row["simulator"], row["model"]): row for row in json.loads(file.read_text())}
    assert set(table) == {(name, row) for name in ("bereket", "lopez") for row in rows}
    for (simulator, model), row in table.items():
        has_masks = model != "ConditionalVAE"
        assert math.isnan(row["mask F1"]) != has_masks
        assert math.isnan(row["F1 of held-out"]) != (has_masks and simulator == "lopez")
        assert 0 < row["MCC"] <= 1
        assert 0 < row["linear R2"] <= 1
