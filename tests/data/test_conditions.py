from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams._exceptions import ScreenError, UnknownPerturbationError
from scvi_sams.data import Conditions

CELLS = ["c0", "c1", "c2", "c3", "c4"]


def _column(values, name="guide"):
    return pd.Series(values, index=CELLS[: len(values)], name=name)


def _is_canonical(matrix):
    return (
        type(matrix) is sparse.csr_matrix
        and matrix.dtype == np.float32
        and matrix.has_canonical_format
        and (matrix.data != 0).all()
    )


def from_labels(*args, **kwargs):
    """Doses of cells, and the names of their columns."""
    conditions = Conditions.from_labels(*args, **kwargs)
    return conditions.cell_matrix, conditions.perturbations


def from_matrix(*args, **kwargs):
    conditions = Conditions.from_matrix(*args, **kwargs)
    return conditions.cell_matrix, conditions.perturbations


def _brute_force(labels, doses, names, controls):
    """One cell and one part at a time."""
    matrix = np.zeros((len(labels), len(names)), dtype=np.float32)
    for row, (label, dose) in enumerate(zip(labels, doses, strict=True)):
        for part, value in zip(label.split("+"), dose.split("+"), strict=True):
            if part not in controls:
                matrix[row, names.index(part)] += np.float32(value)
    return matrix


class TestLabels:
    def test_parts_controls_and_repeats(self):
        matrix, names = from_labels(
            ["NT", "B", "B+A", "A+NT", "NT+safe", "A+A", "C + A+B"], ["NT", "safe"]
        )
        assert names == ["A", "B", "C"]
        assert _is_canonical(matrix)
        np.testing.assert_array_equal(
            matrix.toarray(),
            [[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [2, 0, 0], [1, 1, 1]],
        )

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("with_doses", [False, True])
    def test_agrees_with_brute_force(self, seed, with_doses):
        rng = np.random.default_rng(seed)
        parts = np.array(["NT", "safe", *(f"G{i}" for i in range(12))])
        chosen = [rng.choice(parts, rng.integers(1, 5)) for _ in range(300)]
        labels = ["+".join(choice) for choice in chosen] + ["NT", "safe"]
        doses = ["+".join(rng.choice(["0", "0.5", "1e0", "2"], len(c))) for c in chosen]
        doses = [*doses, "1", "1"]
        if not with_doses:
            doses = ["+".join(["1"] * len(label.split("+"))) for label in labels]
        matrix, names = from_labels(labels, ["NT", "safe"], doses=doses if with_doses else None)
        assert names == sorted(names)
        assert _is_canonical(matrix)
        expected = _brute_force(labels, doses, names, {"NT", "safe"})
        np.testing.assert_array_equal(matrix.toarray(), expected)

    def test_column_types_agree(self):
        labels = ["NT", "1", "2", "1"]
        expected = from_labels(labels, "NT")[0].toarray()
        for column in (
            pd.Series(labels, dtype="category"),
            pd.Series(labels, dtype="string"),
            pd.Series(["NT", 1, 2, 1], dtype=object),
            np.array(labels),
        ):
            np.testing.assert_array_equal(from_labels(column, "NT")[0].toarray(), expected)

    def test_unused_categories_are_no_perturbations(self):
        column = pd.Series(["A", "B", "NT"], dtype="category")[[0, 2]]
        assert from_labels(column, "NT")[1] == ["A"]

    def test_delimiter(self):
        assert from_labels(["HLA-A_B", "B"], None, delimiter="_")[1] == ["B", "HLA-A"]
        assert from_labels(["A+B", "NT"], "NT", delimiter=None)[1] == ["A+B"]
        # A control label is whole, even where it holds the delimiter.
        assert from_labels(["neg+1", "A"], "neg+1")[1] == ["A"]

    def test_names_fix_the_columns(self):
        matrix, names = from_labels(["B", "NT"], "NT", perturbations=["C", "B", "A"])
        assert names == ["C", "B", "A"]
        np.testing.assert_array_equal(matrix.toarray(), [[0, 1, 0], [0, 0, 0]])
        only_control = from_labels(["NT", "NT"], "NT", perturbations=["A"])
        assert only_control[0].nnz == 0
        # A query need not have control cells.
        assert from_labels(["A"], "NT", perturbations=["A"])[0].nnz == 1

    def test_unknown_names_the_nearest(self):
        with pytest.raises(UnknownPerturbationError, match=r"'klf2' \(nearest: 'KLF1'\).*'JAK2'"):
            from_labels(["klf2", "KLF1"], None, perturbations=["KLF1", "JAK2"])

    def test_no_cells(self):
        assert from_labels([], None, perturbations=["A"])[0].shape == (0, 1)

    @pytest.mark.parametrize(
        "missing", [None, np.nan, "nan", "NaN", "<NA>", "None", "na", "N/A", "NaT", "null", ""]
    )
    def test_missing_label(self, missing):
        with pytest.raises(ScreenError, match=r"without a label in column 'guide' \(1\): 'c1'"):
            from_labels(_column(["A", missing, "NT"]), "NT")

    @pytest.mark.parametrize("label", ["A+", "+A", "A++B", "A+nan"])
    def test_empty_part(self, label):
        message = re.escape(f"empty part in column 'guide': '{label}'")
        with pytest.raises(ScreenError, match=message):
            from_labels(_column([label, "NT"]), "NT")

    def test_unknown_control_lists_the_labels(self):
        column = _column(["control", "A", "A", "control", "control"])
        with pytest.raises(
            ScreenError,
            match=r"'Control' in column 'guide'.*'control' \(3\), 'A' \(2\)\. "
            r"Did you mean 'control'\?",
        ):
            from_labels(column, ["Control"])

    def test_all_control(self):
        with pytest.raises(ScreenError, match="column 'guide': the labels are all control"):
            from_labels(_column(["NT", "NT+NT"]), "NT")

    def test_repeated_names(self):
        with pytest.raises(ScreenError, match="more than once: 'B'"):
            from_labels(["A"], None, perturbations=["B", "A", "B"])


class TestDoses:
    def test_numbers_and_text(self):
        labels = ["A", "B", "NT", "A+NT"]
        expected = [[0.5, 0], [0, 2], [0, 0], [3, 0]]
        for doses in (
            [0.5, 2.0, np.nan, 3.0],
            ["0.5", "2", "", "3+0"],
            pd.Series(["0.5", "2", None, "3"], dtype="category"),
            pd.Series([0.5, 2, pd.NA, 3], dtype="Float64"),
        ):
            matrix = from_labels(labels, "NT", doses=doses)[0]
            np.testing.assert_array_equal(matrix.toarray(), expected)

    def test_dose_of_control_part_is_dropped(self):
        matrix, _ = from_labels(["NT+A", "NT"], "NT", doses=["7+0.5", "1"])
        np.testing.assert_array_equal(matrix.toarray(), [[0.5], [0]])

    def test_exponent_is_not_split(self):
        assert from_labels(["A"], None, doses=["1e+3"])[0][0, 0] == 1000

    def test_zero_dose_is_not_stored(self):
        matrix, names = from_labels(["A", "B"], None, doses=[0, 1])
        assert names == ["A", "B"]
        assert matrix.nnz == 1

    @pytest.mark.parametrize("dose", [-1, np.nan, np.inf, "much"])
    def test_invalid(self, dose):
        with pytest.raises(ScreenError, match=rf"cells 'c1' have '{dose} of B'"):
            from_labels(_column(["A", "B"]), None, doses=[1, dose])

    @pytest.mark.parametrize(("label", "dose"), [("A+B", "1"), ("A", "1+1"), ("A+B", "1+1+1")])
    def test_uneven(self, label, dose):
        with pytest.raises(ScreenError, match=r"cells 'c1': label 'A.*one dose for each part"):
            from_labels(_column(["B", label]), None, doses=["1", dose])

    def test_length(self):
        with pytest.raises(ScreenError, match="2 labels but 1 doses"):
            from_labels(["A", "B"], None, doses=[1])


class TestMatrix:
    def test_every_storage_agrees(self):
        dense = np.array([[0, 1.5, 0], [1, 0, 2], [0, 0, 0]])
        names = ["A", "B", "C"]
        frame = pd.DataFrame(dense, columns=names)
        for matrix in (
            dense,
            dense.astype(np.float32),
            np.asfortranarray(dense),
            sparse.csr_matrix(dense),
            sparse.csc_matrix(dense),
            sparse.coo_matrix(dense),
            sparse.csr_array(dense),
            sparse.csc_array(dense),
            sparse.coo_array(dense),
            frame,
            frame.astype("Float64"),
            frame.astype(pd.SparseDtype(float, 0)),
            frame.astype({"A": pd.SparseDtype(float, 0)}),
        ):
            doses, columns = from_matrix(
                matrix, None if isinstance(matrix, pd.DataFrame) else names
            )
            assert columns == names
            assert _is_canonical(doses)
            np.testing.assert_array_equal(doses.toarray(), dense)

    def test_agrees_with_labels(self):
        labels = ["NT", "A", "B+A"]
        matrix, names = from_labels(labels, "NT")
        frame = pd.DataFrame({"A": [False, True, True], "B": [0, 0, 1]})
        np.testing.assert_array_equal(from_matrix(frame, names)[0].toarray(), matrix.toarray())

    def test_canonical_and_leaves_its_input(self):
        given = sparse.csr_matrix(
            (np.array([1.0, 1.0, 0.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2)
        )
        matrix = from_matrix(given, ["A", "B"])[0]
        assert _is_canonical(matrix)
        np.testing.assert_array_equal(matrix.toarray(), [[0, 2], [0, 0]])
        assert given.nnz == 3

    @pytest.mark.parametrize("dose", [-1.0, np.nan, np.inf, 1e300])
    @pytest.mark.parametrize("storage", [np.array, sparse.csr_matrix, sparse.csc_array])
    def test_invalid_dose(self, dose, storage):
        matrix = storage(np.array([[1.0, 0.0], [0.0, dose]]))
        with pytest.raises(ScreenError, match=r"the screen holds .* in cells 'c1', for 'B'"):
            from_matrix(matrix, ["A", "B"], cells=CELLS[:2], source="the screen")

    @pytest.mark.parametrize("dtype", [float, "Float64", pd.SparseDtype(float, np.nan)])
    def test_missing_dose_in_frame(self, dtype):
        frame = pd.DataFrame({"A": [1, 0], "B": [0, np.nan]}, index=CELLS[:2]).astype(dtype)
        with pytest.raises(ScreenError, match=r"in cells 'c1', for 'B'"):
            from_matrix(frame)

    @pytest.mark.parametrize(
        ("matrix", "names", "message"),
        [
            (np.eye(2), None, "no names.*perturbation_names_uns_key"),
            (np.eye(2), ["A"], r"shape \(2, 2\) but 1 names"),
            (np.zeros((2, 0)), [], r"shape \(2, 0\) but 0 names"),
            (np.eye(2), ["A", "A"], "more than once: 'A'"),
            (np.ones(2), ["A"], r"array of shape \(2,\)"),
            (np.array([["1"]]), ["A"], "dtype <U1"),
            (pd.DataFrame({"A": [1.0], "B": ["x"]}), None, "not numeric: 'B'"),
        ],
    )
    def test_refused(self, matrix, names, message):
        with pytest.raises(ScreenError, match=message):
            from_matrix(matrix, names)


class TestAlign:
    def test_reorders_and_fills(self):
        conditions = Conditions.from_matrix(np.array([[1.0, 2.0], [0.0, 3.0]]), ["A", "B"])
        aligned = conditions.align(["B", "C", "A"])
        assert _is_canonical(aligned.cell_matrix)
        np.testing.assert_array_equal(aligned.cell_matrix.toarray(), [[2, 0, 1], [3, 0, 0]])
        np.testing.assert_array_equal(conditions.cell_matrix.toarray(), [[1, 2], [0, 3]])

    def test_unknown(self):
        conditions = Conditions.from_matrix(np.eye(2), ["A", "KLF2"])
        with pytest.raises(UnknownPerturbationError, match=r"'KLF2' \(nearest: 'KLF1'\)"):
            conditions.align(["A", "KLF1"])


class TestRequest:
    NAMES = ("A", "B", "C")

    def _read(self, conditions, control="NT", delimiter="+"):
        read = Conditions.from_request(conditions, self.NAMES, control, delimiter)
        assert _is_canonical(read.cell_matrix)
        assert read.cell_matrix.shape == (len(read.cell_labels), 3)
        return read.cell_matrix.toarray().tolist(), read.cell_labels

    @pytest.mark.parametrize(
        ("condition", "row", "label"),
        [
            ("A", [1, 0, 0], "A"),
            ("B+A", [1, 1, 0], "B+A"),
            ("A+A", [2, 0, 0], "A+A"),
            ("NT", [0, 0, 0], "NT"),
            ("NT+C", [0, 0, 1], "NT+C"),
            ({"A": 1, "B": 1.0}, [1, 1, 0], "A+B"),
            ({"A": 0.5, "B": 1.0}, [0.5, 1, 0], "A:0.5+B:1"),
            ({"A": 1, "B": 0}, [1, 0, 0], "A"),
            ({"NT": 1}, [0, 0, 0], "NT"),
            ({}, [0, 0, 0], "NT"),
            (np.array([0, 2.0, 0]), [0, 2, 0], "B:2"),
        ],
    )
    def test_one(self, condition, row, label):
        assert self._read(condition) == ([row], [label])

    def test_sequences(self):
        expected = ([[1, 0, 0], [0, 0, 0]], ["A", "NT"])
        for conditions in (
            ["A", "NT"],
            ("A", {}),
            np.array(["A", "NT"]),
            pd.Series(["A", "NT"], dtype="category"),
            pd.Index(["A", "NT"]),
        ):
            assert self._read(conditions) == expected

    def test_matrices(self):
        dense = np.array([[1.0, 0, 1], [0, 0, 0]])
        expected = (dense.tolist(), ["A+C", "NT"])
        for matrix in (dense, dense == 1, sparse.csr_matrix(dense), sparse.coo_array(dense)):
            assert self._read(matrix) == expected
        assert self._read(pd.DataFrame({"C": [1, 0], "A": [1.0, 0]})) == expected
        named = pd.DataFrame({"C": [1]}, index=["my condition"])
        assert self._read(named) == ([[0, 0, 1]], ["my condition"])

    def test_name_that_holds_the_delimiter(self):
        matrix = Conditions.from_request(["A+B", "A"], ["A+B", "A"]).cell_matrix
        np.testing.assert_array_equal(matrix.toarray(), np.eye(2))
        assert self._read("A_B", delimiter="_") == ([[1, 1, 0]], ["A_B"])
        assert self._read([{}], control=None) == ([[0, 0, 0]], ["control"])

    @pytest.mark.parametrize("condition", ["KLF2+A", {"KLF2": 1}, pd.DataFrame({"KLF2": [1.0]})])
    def test_unknown(self, condition):
        with pytest.raises(UnknownPerturbationError, match=r"'KLF2' \(nearest: 'KLF1'\)"):
            Conditions.from_request(condition, ["KLF1", "A"])

    @pytest.mark.parametrize(
        ("conditions", "message"),
        [
            ([], "no condition"),
            ([1.5], "1.5 is no condition"),
            ({"A": -1}, "'A: -1'"),
            ({"A": np.nan}, "'A: nan'"),
            (np.ones((1, 2)), r"shape \(1, 2\) but 3 names"),
            (np.array([[1, np.inf, 0]]), "for 'B'"),
        ],
    )
    def test_refused(self, conditions, message):
        with pytest.raises(ScreenError, match=message):
            self._read(conditions)


class TestSpelling:
    """Labels that the package writes, and those of users who write otherwise."""

    @pytest.mark.parametrize("delimiter", ["+", "|", None])
    def test_what_is_written_is_read(self, delimiter):
        names = ["A", "B", "chr1:20-30"]
        doses = np.array([[1, 0, 0], [0.5, 1, 0], [1, 0, 1], [0.1, 0, 1e-7], [3e10, 1 / 3, 2]])
        written = Conditions.from_request(doses, names, "NT", delimiter)
        read = Conditions.from_request(written.labels, names, "NT", delimiter)
        np.testing.assert_array_equal(read.matrix.toarray(), doses.astype(np.float32))
        cells = Conditions.from_matrix(doses, names, "NT", delimiter)
        assert sorted(written.labels) == cells.labels
        assert cells.find(written.labels) == list(range(5))

    def test_a_known_name_wins_over_a_dose(self):
        names = ["A", "A:2", "chr1:20"]
        read = Conditions.from_request(["A:2", "A:3", "chr1:20", "A:2:3"], names)
        expected = [[0, 1, 0], [3, 0, 0], [0, 0, 1], [0, 3, 0]]
        np.testing.assert_array_equal(read.matrix.toarray(), expected)
        for label in ("A:-1", "A:much", "A:inf", "B:1"):
            with pytest.raises(UnknownPerturbationError, match=label):
                Conditions.from_request(label, names)

    def test_doses_in_labels_of_cells_are_read_of_known_names_alone(self):
        assert from_labels(["chr1:20", "A:0.5"])[1] == ["A:0.5", "chr1:20"]
        matrix, _ = from_labels(["A:0.5+B", "A"], perturbations=["A", "B"])
        np.testing.assert_array_equal(matrix.toarray(), [[0.5, 1], [1, 0]])

    def test_a_sum_is_told_from_a_name_that_looks_like_it(self):
        written = Conditions.from_request(
            np.eye(3)[[0, 2]] + [[0, 1, 0], [0, 0, 0]], ["A", "B", "A+B"]
        )
        assert written.labels == ["A:1+B:1", "A+B"]

    @pytest.mark.parametrize(
        ("labels", "control"),
        [([0, 1, 1, 0], 0), ([False, True, True, False], False), ([0, 1, 1, 0], np.int64(0))],
    )
    def test_labels_that_are_no_text(self, labels, control):
        conditions = Conditions.from_labels(labels, control)
        assert conditions.n_cells.tolist() == [2, 2]
        assert conditions.is_control[conditions.codes].tolist() == [True, False, False, True]
        name = conditions.perturbations[0]
        asked = Conditions.from_request(labels[1], [name], control)
        assert asked.labels == [name]
        assert Conditions.from_request([labels[0]], [name], control).is_control.all()

    @pytest.mark.parametrize("label", ["None", "NA", "null"])
    def test_missing_unless_it_is_a_known_label(self, label):
        assert from_labels([label, "A"], label)[1] == ["A"]
        assert from_labels([label, "A"], None, perturbations=["A", label])[0].nnz == 2
        with pytest.raises(ScreenError, match=rf"cells|Cells.*'c0', written '{label}'"):
            from_labels(_column([label, "A"]), None)

    def test_one_condition_asked_twice(self):
        asked = Conditions.from_request(["A+B", "A", "B+A"], ["A", "B"])
        assert asked.labels == ["A+B", "A"]
        assert asked.codes.tolist() == [0, 1, 0]
        assert asked.n_cells.tolist() == [2, 1]

    def test_a_repeated_part_is_a_condition_of_its_own(self):
        conditions = Conditions.from_labels(["A", "A+A", "A"])
        assert conditions.labels == ["A", "A:2"]
        assert conditions.find(["A"]) == [0]
        assert conditions.find(["A+A"]) == conditions.find(["A:2"]) == [1]

    def test_find(self):
        conditions = Conditions.from_labels(["NT", "A+B", "A"], "NT")
        with pytest.raises(ScreenError, match="'NT' is the control"):
            conditions.find(["NT"])
        with pytest.raises(ScreenError, match="No cell has the conditions 'A:2'"):
            conditions.find(["A:2"])


@pytest.mark.parametrize("seed", range(3))
def test_padded_columns_agree_with_the_matrix(seed):
    rng = np.random.default_rng(seed)
    doses = rng.choice([0.0, 0.5, 1.0], (200, 5), p=[0.7, 0.1, 0.2])
    conditions = Conditions.from_matrix(doses, list("edcba"))
    rebuilt = np.zeros_like(doses)
    for row, (index, dose) in enumerate(
        zip(conditions.cell_index, conditions.cell_dose, strict=True)
    ):
        np.add.at(rebuilt[row], index, dose)
        given = np.flatnonzero(dose)
        assert (given == np.arange(len(given))).all()  # padding comes last, in column order
        assert (np.diff(index[given]) > 0).all()
    np.testing.assert_array_equal(rebuilt, doses.astype(np.float32))
    np.testing.assert_array_equal(conditions.cell_matrix.toarray(), rebuilt)
    assert len(conditions.labels) == len(np.unique(doses, axis=0))
    assert conditions.labels == sorted(conditions.labels)
    np.testing.assert_array_equal(conditions.is_control, conditions.matrix.getnnz(axis=1) == 0)
