from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError
from scvi_sams.tl import PairThresholds, classify_pairs
from scvi_sams.tl.pair_statistics import PAIR_CLASSES, pair_class, regress_pair

FIRST, SECOND, NOVEL = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)))[0].T


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (FIRST + SECOND, "additive"),
        (FIRST + SECOND + 0.2 * NOVEL, "additive"),
        (1.6 * FIRST + 1.5 * SECOND, "synergistic"),
        (2.5 * FIRST + 1.0 * SECOND, "synergistic"),  # nothing is masked
        (0.6 * FIRST + 0.5 * SECOND, "buffering"),
        (0.0 * FIRST, "buffering"),  # suppressed
        (-0.5 * (FIRST + SECOND), "buffering"),
        (FIRST, "epistatic"),
        (1.2 * SECOND, "epistatic"),
        (FIRST + SECOND + 2 * NOVEL, "neomorphic"),
    ],
)
def test_classes(pair, expected):
    code = pair_class(regress_pair(FIRST, SECOND, pair))
    assert PAIR_CLASSES[int(code)] == expected


def test_symmetry_and_scale():
    """Which part comes first, and the unit of effects, do not matter."""
    rng = np.random.default_rng(1)
    weights = rng.normal(0.7, 0.7, (200, 3))
    pairs = weights @ np.stack([FIRST, SECOND, NOVEL])
    codes = pair_class(regress_pair(FIRST, SECOND, pairs))
    assert len(np.unique(codes)) == len(PAIR_CLASSES)
    np.testing.assert_array_equal(codes, pair_class(regress_pair(SECOND, FIRST, pairs)))
    np.testing.assert_array_equal(
        codes, pair_class(regress_pair(10 * FIRST, 10 * SECOND, 10 * pairs))
    )


def test_thresholds():
    regression = regress_pair(FIRST, SECOND, FIRST + SECOND + 0.4 * NOVEL)
    for limit, expected in ((0.5, "additive"), (0.1, "buffering")):
        code = pair_class(regression, PairThresholds(relative_deviation=limit))
        assert (PAIR_CLASSES[int(code)] == "additive") == (expected == "additive")


class TestClassifyPairs:
    @pytest.fixture
    def effects(self):
        rows = {
            "A": FIRST,
            "B": SECOND,
            "C": NOVEL,
            "A+B": FIRST,
            "B + C": SECOND + NOVEL,
            "A+X": FIRST,
            "A+B+C": NOVEL,
        }
        return pd.DataFrame(rows, index=[f"G{i}" for i in range(40)]).T

    def test_table(self, effects):
        table = classify_pairs(effects)
        assert table.index.tolist() == ["A+B", "B + C"]
        assert table["first"].tolist() == ["A", "B"]
        assert table["second"].tolist() == ["B", "C"]
        assert table["class"].tolist() == ["epistatic", "additive"]
        assert table["class"].cat.categories.tolist() == list(PAIR_CLASSES)
        by_hand = regress_pair(FIRST, SECOND, FIRST)
        for name, value in by_hand._asdict().items():
            assert table.loc["A+B", name] == pytest.approx(float(value))

    def test_chosen(self, effects):
        assert classify_pairs(effects, ["B + C"]).index.tolist() == ["B + C"]

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [(["A"], "'A' is no pair"), (["A+X"], "needs 'X'"), (["A+C"], r"needs 'A\+C'")],
    )
    def test_errors(self, effects, pairs, message):
        with pytest.raises(ScreenError, match=message):
            classify_pairs(effects, pairs)

    def test_no_pairs(self, effects):
        with pytest.raises(ScreenError, match="add the single perturbations"):
            classify_pairs(effects.loc[["A", "A+X"]])
