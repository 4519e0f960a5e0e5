from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams._exceptions import ScreenError, UnknownPerturbationError
from scvi_sams.data import (
    align_dosage,
    dosage_from_conditions,
    dosage_from_labels,
    dosage_from_matrix,
)

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
        matrix, names = dosage_from_labels(
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
        matrix, names = dosage_from_labels(
            labels, ["NT", "safe"], doses=doses if with_doses else None
        )
        assert names == sorted(names)
        assert _is_canonical(matrix)
        expected = _brute_force(labels, doses, names, {"NT", "safe"})
        np.testing.assert_array_equal(matrix.toarray(), expected)

    def test_column_types_agree(self):
        labels = ["NT", "1", "2", "1"]
        expected = dosage_from_labels(labels, "NT").matrix.toarray()
        for column in (
            pd.Series(labels, dtype="category"),
            pd.Series(labels, dtype="string"),
            pd.Series(["NT", 1, 2, 1], dtype=object),
            np.array(labels),
        ):
            np.testing.assert_array_equal(
                dosage_from_labels(column, "NT").matrix.toarray(), expected
            )

    def test_unused_categories_are_no_perturbations(self):
        column = pd.Series(["A", "B", "NT"], dtype="category")[[0, 2]]
        assert dosage_from_labels(column, "NT").names == ["A"]

    def test_delimiter(self):
        assert dosage_from_labels(["HLA-A_B", "B"], None, delimiter="_").names == ["B", "HLA-A"]
        assert dosage_from_labels(["A+B", "NT"], "NT", delimiter=None).names == ["A+B"]
        # A control label is whole, even where it holds the delimiter.
        assert dosage_from_labels(["neg+1", "A"], "neg+1").names == ["A"]

    def test_names_fix_the_columns(self):
        matrix, names = dosage_from_labels(["B", "NT"], "NT", names=["C", "B", "A"])
        assert names == ["C", "B", "A"]
        np.testing.assert_array_equal(matrix.toarray(), [[0, 1, 0], [0, 0, 0]])
        only_control = dosage_from_labels(["NT", "NT"], "NT", names=["A"])
        assert only_control.matrix.nnz == 0
        # A query need not have control cells.
        assert dosage_from_labels(["A"], "NT", names=["A"]).matrix.nnz == 1

    def test_unknown_names_the_nearest(self):
        with pytest.raises(UnknownPerturbationError, match=r"'klf2' \(nearest: 'KLF1'\).*'JAK2'"):
            dosage_from_labels(["klf2", "KLF1"], None, names=["KLF1", "JAK2"])

    def test_no_cells(self):
        assert dosage_from_labels([], None, names=["A"]).matrix.shape == (0, 1)

    @pytest.mark.parametrize("missing", [None, np.nan, "nan"])
    def test_missing_label(self, missing):
        with pytest.raises(ScreenError, match=r"without a label in column 'guide' \(1\): 'c1'"):
            dosage_from_labels(_column(["A", missing, "NT"]), "NT")

    @pytest.mark.parametrize("label", ["A+", "+A", "A++B", ""])
    def test_empty_part(self, label):
        message = re.escape(f"empty part in column 'guide': '{label}'")
        with pytest.raises(ScreenError, match=message):
            dosage_from_labels(_column([label, "NT"]), "NT")

    def test_unknown_control_lists_the_labels(self):
        column = _column(["control", "A", "A", "control", "control"])
        with pytest.raises(
            ScreenError,
            match=r"'Control' in column 'guide'.*'control' \(3\), 'A' \(2\)\. "
            r"Did you mean 'control'\?",
        ):
            dosage_from_labels(column, ["Control"])

    def test_all_control(self):
        with pytest.raises(ScreenError, match="column 'guide': the labels are all control"):
            dosage_from_labels(_column(["NT", "NT+NT"]), "NT")

    def test_repeated_names(self):
        with pytest.raises(ScreenError, match="more than once: 'B'"):
            dosage_from_labels(["A"], None, names=["B", "A", "B"])


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
            matrix = dosage_from_labels(labels, "NT", doses=doses).matrix
            np.testing.assert_array_equal(matrix.toarray(), expected)

    def test_dose_of_control_part_is_dropped(self):
        matrix, _ = dosage_from_labels(["NT+A", "NT"], "NT", doses=["7+0.5", "1"])
        np.testing.assert_array_equal(matrix.toarray(), [[0.5], [0]])

    def test_exponent_is_not_split(self):
        assert dosage_from_labels(["A"], None, doses=["1e+3"]).matrix[0, 0] == 1000

    def test_zero_dose_is_not_stored(self):
        matrix, names = dosage_from_labels(["A", "B"], None, doses=[0, 1])
        assert names == ["A", "B"]
        assert matrix.nnz == 1

    @pytest.mark.parametrize("dose", [-1, np.nan, np.inf, "much"])
    def test_invalid(self, dose):
        with pytest.raises(ScreenError, match=rf"cells 'c1' have '{dose} of B'"):
            dosage_from_labels(_column(["A", "B"]), None, doses=[1, dose])

    @pytest.mark.parametrize(("label", "dose"), [("A+B", "1"), ("A", "1+1"), ("A+B", "1+1+1")])
    def test_uneven(self, label, dose):
        with pytest.raises(ScreenError, match=r"cells 'c1': label 'A.*one dose for each part"):
            dosage_from_labels(_column(["B", label]), None, doses=["1", dose])

    def test_length(self):
        with pytest.raises(ScreenError, match="2 labels but 1 doses"):
            dosage_from_labels(["A", "B"], None, doses=[1])


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
            dosage = dosage_from_matrix(
                matrix, None if isinstance(matrix, pd.DataFrame) else names
            )
            assert dosage.names == names
            assert _is_canonical(dosage.matrix)
            np.testing.assert_array_equal(dosage.matrix.toarray(), dense)

    def test_agrees_with_labels(self):
        labels = ["NT", "A", "B+A"]
        matrix, names = dosage_from_labels(labels, "NT")
        frame = pd.DataFrame({"A": [False, True, True], "B": [0, 0, 1]})
        np.testing.assert_array_equal(
            dosage_from_matrix(frame, names).matrix.toarray(), matrix.toarray()
        )

    def test_canonical_and_leaves_its_input(self):
        given = sparse.csr_matrix(
            (np.array([1.0, 1.0, 0.0]), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 2)
        )
        matrix = dosage_from_matrix(given, ["A", "B"]).matrix
        assert _is_canonical(matrix)
        np.testing.assert_array_equal(matrix.toarray(), [[0, 2], [0, 0]])
        assert given.nnz == 3

    @pytest.mark.parametrize("dose", [-1.0, np.nan, np.inf, 1e300])
    @pytest.mark.parametrize("storage", [np.array, sparse.csr_matrix, sparse.csc_array])
    def test_invalid_dose(self, dose, storage):
        matrix = storage(np.array([[1.0, 0.0], [0.0, dose]]))
        with pytest.raises(ScreenError, match=r"the screen holds .* in cells 'c1', for 'B'"):
            dosage_from_matrix(matrix, ["A", "B"], cells=CELLS[:2], source="the screen")

    @pytest.mark.parametrize("dtype", [float, "Float64", pd.SparseDtype(float, np.nan)])
    def test_missing_dose_in_frame(self, dtype):
        frame = pd.DataFrame({"A": [1, 0], "B": [0, np.nan]}, index=CELLS[:2]).astype(dtype)
        with pytest.raises(ScreenError, match=r"in cells 'c1', for 'B'"):
            dosage_from_matrix(frame)

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
            dosage_from_matrix(matrix, names)


class TestAlign:
    def test_reorders_and_fills(self):
        dosage = dosage_from_matrix(np.array([[1.0, 2.0], [0.0, 3.0]]), ["A", "B"])
        aligned = align_dosage(dosage, ["B", "C", "A"])
        assert _is_canonical(aligned)
        np.testing.assert_array_equal(aligned.toarray(), [[2, 0, 1], [3, 0, 0]])
        np.testing.assert_array_equal(dosage.matrix.toarray(), [[1, 2], [0, 3]])

    def test_unknown(self):
        dosage = dosage_from_matrix(np.eye(2), ["A", "KLF2"])
        with pytest.raises(UnknownPerturbationError, match=r"'KLF2' \(nearest: 'KLF1'\)"):
            align_dosage(dosage, ["A", "KLF1"])


class TestConditions:
    NAMES = ("A", "B", "C")

    def _read(self, conditions, control="NT", delimiter="+"):
        matrix, labels = dosage_from_conditions(conditions, self.NAMES, control, delimiter)
        assert _is_canonical(matrix)
        assert matrix.shape == (len(labels), 3)
        return matrix.toarray().tolist(), labels

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
        matrix, _ = dosage_from_conditions(["A+B", "A"], ["A+B", "A"])
        np.testing.assert_array_equal(matrix.toarray(), np.eye(2))
        assert self._read("A_B", delimiter="_") == ([[1, 1, 0]], ["A_B"])
        assert self._read([{}], control=None) == ([[0, 0, 0]], ["control"])

    @pytest.mark.parametrize("condition", ["KLF2+A", {"KLF2": 1}, pd.DataFrame({"KLF2": [1.0]})])
    def test_unknown(self, condition):
        with pytest.raises(UnknownPerturbationError, match=r"'KLF2' \(nearest: 'KLF1'\)"):
            dosage_from_conditions(condition, ["KLF1", "A"])

    @pytest.mark.parametrize(
        ("conditions", "message"),
        [
            ([], "no condition"),
            ([1], "1 is no condition"),
            ({"A": -1}, "'A: -1'"),
            ({"A": np.nan}, "'A: nan'"),
            (np.ones((1, 2)), r"shape \(1, 2\) but 3 names"),
            (np.array([[1, np.inf, 0]]), "for 'B'"),
        ],
    )
    def test_refused(self, conditions, message):
        with pytest.raises(ScreenError, match=message):
            self._read(conditions)
