"""Which cells and conditions a command line keeps from training."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

LABELS = ("--perturbation-key", "label", "--control", "NT")
SIZES = {"NT": 9, "A": 5, "A+B": 5, "B": 5, "B+C": 3, "C": 5, "D": 5}


@pytest.fixture
def held_out(until_training, tmp_path):
    """Fit to a screen of conditions of these sizes up to the training."""

    def held_out(*words, sizes=SIZES, labels=None, obs=None):
        labels = labels or [label for label, size in sizes.items() for _ in range(size)]
        counts = np.random.default_rng(0).poisson(3.0, (len(labels), 4)).astype(np.float32)
        index = [f"cell{i}" for i in range(len(labels))]
        obs = pd.DataFrame({"label": labels} | (obs or {}), index=index)
        path = tmp_path / "screen.h5ad"
        ad.AnnData(sparse.csr_matrix(counts), obs=obs).write_h5ad(path)
        return until_training(path, *LABELS, "--n-latent", 2, *words)

    return held_out


class TestCells:
    def test_every_condition_gives_its_share(self, held_out):
        training = held_out(
            "--held-out-fraction", 0.1, sizes={"NT": 1000, "A": 500, "B": 40, "C": 41}
        )
        taken = training.labels[training.held_out].value_counts()
        assert (np.abs(taken[["control", "A", "B", "C"]] - [100, 50, 4, 4.1]) < 1).all()

    def test_the_share_is_right_on_average_where_it_is_no_whole_number(self, held_out):
        sizes = {"NT": 3} | {f"P{number}": 3 for number in range(1_500)}
        training = held_out("--held-out-fraction", 0.25, sizes=sizes)
        assert training.held_out.mean() == pytest.approx(0.25, abs=0.015)

    @pytest.mark.parametrize("fraction", [0.5, 0.99])
    def test_no_condition_loses_its_last_cell(self, held_out, fraction):
        sizes = {"NT": 5, "A": 1, "B": 1, "C": 2, "D": 3}
        training = held_out("--held-out-fraction", fraction, sizes=sizes)
        left = set(training.labels[~training.held_out])
        assert left == {"control", "A", "B", "C", "D"}

    def test_nothing_is_held_out_of_nothing(self, held_out):
        assert not held_out("--held-out-fraction", 0).held_out.any()

    def test_one_seed_holds_out_the_same_cells(self, held_out):
        first, same, other = (held_out("--seed", seed).held_out for seed in (3, 3, 4))
        np.testing.assert_array_equal(first, same)
        assert (first != other).any()


class TestLabels:
    def test_spellings_of_one_condition_are_one(self, held_out):
        training = held_out(
            "--held-out-fraction", 0, labels=["B+A", "NT", "A", "A+B", "A+NT", "NT"]
        )
        assert training.labels.tolist() == ["A+B", "control", "A", "A+B", "A", "control"]

    def test_two_doses_are_two_conditions(self, held_out):
        training = held_out(
            *("--dosage-key", "dose", "--held-out-fraction", 0),
            labels=["A", "A", "NT"],
            obs={"dose": [1.0, 0.5, 0.0]},
        )
        assert training.labels.tolist() == ["A", "A:0.5", "control"]


class TestConditions:
    @pytest.fixture
    def chosen(self, held_out):
        def chosen(*words, **screen):
            words = ("--held-out-fraction", 0, "--held-out-conditions", *words)
            training = held_out(*words, **screen)
            return getattr(training, "conditions_held_out", lambda: training)()

        return chosen

    def test_names_in_any_order_and_spelling(self, chosen):
        assert chosen("C", "B+A", "A+B") == {"A+B", "C"}

    def test_a_file_has_one_a_line(self, chosen, tmp_path):
        path = tmp_path / "conditions.txt"
        path.write_text("C\n\n  B + A \n")
        assert chosen(path) == {"A+B", "C"}
        path.write_text("\n")
        assert "names no condition" in chosen(path).error

    def test_a_share_leaves_every_perturbation_in_training(self, chosen):
        drawn = {frozenset(chosen("0.5", "--seed", seed)) for seed in range(12)}
        assert len(drawn) > 1
        for conditions in drawn:
            assert 1 <= len(conditions) <= 3
            assert not {"D", "B+C"} & conditions  # D is nowhere else, B+C has too few cells
            rest = [part for name in SIZES if name not in conditions for part in name.split("+")]
            assert set(rest) >= set("ABCD")
        assert chosen("0.5", "--seed", 3) == chosen("0.5", "--seed", 3)

    @pytest.mark.parametrize(
        ("words", "sizes", "message"),
        [
            (["0.2"], {"NT": 9, "A": 9, "B": 9, "C": 9}, "one condition only"),
            (["1.5"], SIZES, "above 0 and below 1"),
            (["A+C"], SIZES, "No cell has the conditions 'A+C'. Did you mean"),
            (["NT"], SIZES, "is the control"),
            (["B+C"], SIZES, "has 3 cells, and a score takes 4"),
            (["A", "E"], SIZES, "'E'"),
            (["A", "B"], {"NT": 9, "A": 9, "B": 9}, "every condition"),
        ],
    )
    def test_what_cannot_be_held_out_is_named(self, chosen, words, sizes, message):
        done = chosen(*words, sizes=sizes)
        assert done.code == 1
        assert done.error.startswith("scvi-sams: error: --held-out-conditions")
        assert message in done.error
