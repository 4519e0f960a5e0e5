from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.cli._errors import CommandError
from scvi_sams.cli._held_out import MIN_CELLS, held_out_conditions
from scvi_sams.data import Conditions

NAMES = ["A", "B", "C", "D"]
CONDITIONS = ["A", "A+B", "B", "B+C", "C", "D"]
LABELS = pd.Categorical.from_codes(
    np.repeat([-1, 0, 1, 2, 3, 4, 5], [9, 5, 5, 5, MIN_CELLS - 1, 5, 5]), CONDITIONS
)
DOSES = Conditions.from_request(CONDITIONS, NAMES).matrix


def chosen(*words, seed=0, labels=LABELS, doses=DOSES):
    args = SimpleNamespace(
        held_out_conditions=list(words), seed=seed, control=["NT"], combination_delimiter="+"
    )
    return held_out_conditions(labels, doses, NAMES, args)


def test_none_by_default():
    assert chosen() == []


def test_names_in_any_order_and_spelling():
    assert chosen("C", "B+A", "A+B") == ["A+B", "C"]


def test_a_file_has_one_a_line(tmp_path):
    path = tmp_path / "conditions.txt"
    path.write_text("C\n\n  B + A \n")
    assert chosen(str(path)) == ["A+B", "C"]
    path.write_text("\n")
    with pytest.raises(CommandError, match="names no condition"):
        chosen(str(path))


def test_a_share_leaves_every_perturbation_in_training():
    drawn = {tuple(chosen("0.5", seed=seed)) for seed in range(30)}
    assert len(drawn) > 1
    for conditions in drawn:
        assert 1 <= len(conditions) <= 3
        assert not {"D", "B+C"} & set(conditions)  # D is nowhere else, B+C has too few cells
        rest = [part for name in CONDITIONS if name not in conditions for part in name.split("+")]
        assert set(rest) == set(NAMES)
    assert chosen("0.5", seed=3) == chosen("0.5", seed=3)


def test_a_share_of_unconnected_conditions_is_refused():
    labels = pd.Categorical.from_codes(np.repeat([0, 1, 2, 3], 9), NAMES)
    with pytest.raises(CommandError, match="one condition only"):
        chosen("0.2", labels=labels, doses=sparse.csr_matrix(np.eye(4)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1.5"], "above 0 and below 1"),
        (["A+C"], r"no cell of the screen received 'A\+C'; nearest: .*'A\+B'"),
        (["NT"], "is a control"),
        (["B+C"], "has 3 cells"),
        (["A", "E"], "E"),
    ],
)
def test_what_cannot_be_held_out_is_named(words, message):
    with pytest.raises(Exception, match=message) as error:
        chosen(*words)
    assert type(error.value).__name__ in {"CommandError", "UnknownPerturbationError"}


def test_something_is_left_to_train_on():
    labels = pd.Categorical.from_codes(np.repeat([0, 1], 9), ["A", "B"])
    with pytest.raises(CommandError, match="every condition"):
        chosen("A", "B", labels=labels, doses=sparse.csr_matrix(np.eye(4)[:2]))
