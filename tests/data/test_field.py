from __future__ import annotations

import pickle
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scvi.data import AnnDataManager
from scvi.data.fields import LayerField, NumericalObsField

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, UnknownPerturbationError
from scvi_sams.data.field import (
    DoseField,
    PerturbationField,
    add_dose_registry,
    registered_conditions,
    registered_dosage,
)

KEY, OBSM_KEY = SAMS_REGISTRY_KEYS.PERTURBATION_KEY, SAMS_REGISTRY_KEYS.INDEX_OBSM_KEY
DOSE_KEY, DOSE_OBSM_KEY = SAMS_REGISTRY_KEYS.DOSE_KEY, SAMS_REGISTRY_KEYS.DOSE_OBSM_KEY
LABELS = ["NT", "A", "B", "A+B", "C", "C", "B", "NT+A"]
NAMES = ["A", "B", "C"]
DOSES = np.array(
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
)


def _adata(labels=LABELS, matrix=None, names=None):
    n_obs = len(labels if matrix is None else matrix)
    adata = anndata.AnnData(sparse.csr_matrix(np.ones((n_obs, 2), dtype=np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    if matrix is None:
        adata.obs["guide"] = labels
    elif names is None:
        adata.obsm["doses"] = matrix
    else:
        adata.obsm["doses"] = pd.DataFrame(matrix, columns=names, index=adata.obs_names)
    return adata


def _register(adata, *args, source_registry=None, **kwargs):
    counts = LayerField("X", None, is_count_data=False)
    manager = AnnDataManager([counts, PerturbationField(*args, **kwargs), DoseField()])
    manager.register_fields(adata, source_registry)
    return manager


def _by_label(adata=None, **kwargs):
    return _register(_adata() if adata is None else adata, "guide", control="NT", **kwargs)


def _registered(manager):
    matrix = registered_dosage(manager)
    index, dose = manager.get_from_registry(KEY), manager.get_from_registry(DOSE_KEY)
    assert (index.dtype, dose.dtype) == (np.int32, np.float32)
    assert index.shape == dose.shape == (matrix.shape[0], max(1, np.diff(matrix.indptr).max()))
    conditions = registered_conditions(manager)
    np.testing.assert_array_equal(conditions.cell_matrix.toarray(), matrix.toarray())
    assert type(matrix) is sparse.csr_matrix
    assert matrix.dtype == np.float32
    return matrix.toarray()


def _names(manager):
    return manager.registry["field_registries"][KEY]["state_registry"]["column_names"]


class TestRegister:
    def test_labels(self):
        manager = _by_label()
        np.testing.assert_array_equal(_registered(manager), DOSES)
        assert manager.summary_stats.n_perturbation == 3
        assert dict(manager.data_registry[KEY]) == {"attr_name": "obsm", "attr_key": OBSM_KEY}
        assert dict(manager.data_registry[DOSE_KEY]) == {
            "attr_name": "obsm",
            "attr_key": DOSE_OBSM_KEY,
        }
        state = manager.registry["field_registries"][KEY]["state_registry"]
        assert state == {
            "column_names": NAMES,
            "control": ["NT"],
            "combination_delimiter": "+",
            "perturbation_key": "guide",
            "dosage_key": None,
            "perturbation_names_uns_key": None,
        }
        assert all(type(name) is str for name in state["column_names"])

    def test_labels_and_doses(self):
        adata = _adata()
        adata.obs["dose"] = ["0", "2", "1", "1+0.5", "1", "1", "1", "3"]
        expected = DOSES * [[1], [2], [1], [1], [1], [1], [1], [3]] * [1.0, 1, 1]
        expected[3, 1] = 0.5
        np.testing.assert_array_equal(_registered(_by_label(adata, dosage_key="dose")), expected)

    @pytest.mark.parametrize(
        "storage",
        [
            np.array,
            sparse.csr_matrix,
            sparse.csc_matrix,
            sparse.csr_array,
            sparse.csc_array,
            lambda matrix: np.asfortranarray(matrix.astype(np.int8)),
        ],
    )
    def test_matrix(self, storage):
        adata = _adata(matrix=DOSES)
        adata.obsm["doses"] = storage(DOSES)
        adata.uns["targets"] = np.array(NAMES)
        manager = _register(adata, dosage_key="doses", perturbation_names_uns_key="targets")
        np.testing.assert_array_equal(_registered(manager), DOSES)
        assert _names(manager) == NAMES

    def test_frame(self):
        manager = _register(_adata(matrix=DOSES, names=NAMES), dosage_key="doses")
        np.testing.assert_array_equal(_registered(manager), DOSES)
        assert _names(manager) == NAMES

    @pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*invariant checks")
    @pytest.mark.parametrize("as_sparse_tensors", [False, True])
    def test_loads_as_any_table(self, as_sparse_tensors):
        batch = _by_label().create_torch_dataset(load_sparse_tensor=as_sparse_tensors)[[3, 0]]
        np.testing.assert_array_equal(batch[KEY], [[0, 1], [0, 0]])
        np.testing.assert_array_equal(batch[DOSE_KEY], [[1, 1], [0, 0]])

    def test_one_perturbation_is_silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager = _by_label(_adata(["NT", "A", "A"]))
        assert manager.summary_stats.n_perturbation == 1

    def test_warns_without_control_cells(self):
        with pytest.warns(UserWarning, match="No cell is a control.*`control`"):
            _register(_adata(["A", "A", "B", "B"]), "guide")
        with pytest.warns(UserWarning, match="No cell is a control.*one another"):
            _register(_adata(matrix=np.ones((2, 1)), names=["A"]), dosage_key="doses")

    def test_warns_of_rare_perturbations(self):
        with pytest.warns(UserWarning, match=r"fewer than two cells \(2\): 'A', 'C'"):
            _by_label(_adata(["NT", "A", "B", "B", "C"]))

    def test_every_cell_a_control(self):
        with pytest.raises(ScreenError, match="Every cell is a control.*'A', 'B'"):
            _register(_adata(matrix=np.zeros((3, 2)), names=["A", "B"]), dosage_key="doses")

    def test_view(self):
        with pytest.raises(ValueError, match="copy"):
            _by_label(_adata()[:4])

    def test_errors_name_the_column(self):
        with pytest.raises(ScreenError, match="'ctrl' in column 'guide'.*'NT'"):
            _register(_adata(), "guide", control="ctrl")
        adata = _adata(matrix=-DOSES, names=NAMES)
        with pytest.raises(ScreenError, match=r"adata\.obsm\['doses'\].*'cell1'"):
            _register(adata, dosage_key="doses")

    def test_table_of_the_registry(self):
        field = PerturbationField("guide", control="NT")
        assert field.view_state_registry(field.register_field(_adata())).row_count == 3
        _by_label().view_registry()


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "`perturbation_key` names a column"),
            (
                {"perturbation_key": "guide", "perturbation_names_uns_key": "n"},
                "leave one of the two out",
            ),
            ({"dosage_key": OBSM_KEY}, f"'{OBSM_KEY}'.*another key"),
            ({"dosage_key": DOSE_OBSM_KEY}, f"'{DOSE_OBSM_KEY}'.*another key"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ScreenError, match=message):
            PerturbationField(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"perturbation_key": "gene"}, r"adata\.obs has no 'gene'.*holds 'guide', 'dose'"),
            (
                {"perturbation_key": "guide", "dosage_key": "doses"},
                "leave `perturbation_key` out",
            ),
            ({"dosage_key": "dose"}, r"adata\.obsm has no 'dose'.*as `perturbation_key`"),
            (
                {"dosage_key": "doses", "perturbation_names_uns_key": "targets"},
                r"adata\.uns has no 'targets' \(`perturbation_names_uns_key`\); it holds nothing",
            ),
            ({"dosage_key": "doses"}, "no names"),
        ],
    )
    def test_absent_keys(self, arguments, message):
        adata = _adata()
        adata.obs["dose"] = 1.0
        adata.obsm["doses"] = DOSES
        with pytest.raises(ScreenError, match=message):
            _register(adata, **arguments)


class TestTransfer:
    def test_labels_missing_and_reordered(self):
        manager = _by_label()
        query = manager.transfer_fields(_adata(["C+B", "C"]))
        np.testing.assert_array_equal(_registered(query), [[0, 1, 1], [0, 0, 1]])
        assert _names(query) == NAMES
        assert query.summary_stats.n_perturbation == 3
        only_control = manager.transfer_fields(_adata(["NT", "NT"]))
        assert not _registered(only_control).any()

    def test_frame_in_another_order(self):
        manager = _register(_adata(matrix=DOSES, names=NAMES), dosage_key="doses")
        order = [2, 0]
        query = _adata(matrix=DOSES[:, order], names=[NAMES[i] for i in order])
        transferred = manager.transfer_fields(query)
        np.testing.assert_array_equal(_registered(transferred), DOSES * [1, 0, 1])
        # The user's own matrix stays as it was, so that a second transfer reads the same.
        again = transferred.transfer_fields(query.copy())
        np.testing.assert_array_equal(_registered(again), DOSES * [1, 0, 1])

    def test_uns_names_in_another_order(self):
        def adata(order):
            adata = _adata(matrix=sparse.csr_matrix(DOSES[:, order]).toarray())
            adata.uns["targets"] = np.array(NAMES)[order]
            return adata

        keys = {"dosage_key": "doses", "perturbation_names_uns_key": "targets"}
        manager = _register(adata([0, 1, 2]), **keys)
        query = manager.transfer_fields(adata([1, 2, 0]))
        np.testing.assert_array_equal(_registered(query), DOSES)
        frame = _adata(matrix=DOSES[:, ::-1], names=NAMES[::-1])
        frame.uns["targets"] = np.array(["not", "read"])
        np.testing.assert_array_equal(_registered(manager.transfer_fields(frame)), DOSES)

    def test_unknown(self):
        manager = _by_label(_adata(["NT", "KLF1", "KLF1", "JAK2", "JAK2"]))
        with pytest.raises(UnknownPerturbationError, match=r"'KLF2' \(nearest: 'KLF1'\)"):
            manager.transfer_fields(_adata(["KLF2"]))
        by_frame = _register(_adata(matrix=DOSES, names=NAMES), dosage_key="doses")
        with pytest.raises(UnknownPerturbationError, match="'X'"):
            by_frame.transfer_fields(_adata(matrix=np.eye(2), names=["A", "X"]))

    def test_unknown_names_follow_known_ones_where_categories_are_extended(self):
        manager = _by_label(_adata(["NT", "KLF1", "KLF1", "JAK2", "JAK2"]))
        query = _adata(["BRD4+KLF1", "NT", "BRD4"])
        extended = manager.transfer_fields(query, extend_categories=True)
        names = extended.get_state_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY).column_names
        assert list(names) == ["JAK2", "KLF1", "BRD4"]
        np.testing.assert_array_equal(_registered(extended), [[0, 1, 1], [0, 0, 0], [0, 0, 1]])

    def test_absent_column(self):
        query = _adata()
        del query.obs["guide"]
        with pytest.raises(ScreenError, match=r"adata\.obs has no 'guide'.*it holds nothing"):
            _by_label().transfer_fields(query)

    @pytest.mark.parametrize("of_sparse_matrix", [False, True])
    def test_saved_registry(self, of_sparse_matrix):
        adata = _adata()
        registry = pickle.loads(pickle.dumps(_by_label(adata).registry))
        if of_sparse_matrix:  # a model of version 0.1.0
            del registry["field_registries"][DOSE_KEY]
            add_dose_registry(registry)
        manager = _by_label(_adata(["B", "A", "NT"]), source_registry=registry)
        np.testing.assert_array_equal(_registered(manager), DOSES[[2, 1, 0]])
        assert _names(manager) == NAMES

    def test_copy_carries_its_own_doses(self):
        adata = _adata()
        manager = _by_label(adata)
        subset = adata[[3, 0]].copy()
        np.testing.assert_array_equal(_registered(manager.transfer_fields(subset)), DOSES[[3, 0]])
        np.testing.assert_array_equal(_registered(manager), DOSES)


class TestUnknownNames:
    """What a query holds that the model does not know."""

    @staticmethod
    def _field(**kwargs):
        return PerturbationField(**({"perturbation_key": "guide", "control": "NT"} | kwargs))

    def test_labels(self):
        query = _adata(["X+A", "NT", "W", "B+W", "NT+X", " A "])
        assert self._field().unknown_names(query, NAMES) == ["W", "X"]
        assert self._field().unknown_names(query, [*NAMES, "W", "X"]) == []
        assert self._field(control=None).unknown_names(query, NAMES) == ["NT", "W", "X"]

    def test_doses_and_missing_labels_are_no_names(self):
        query = _adata(["A:0.5+X", "nan", "B:2", "Y:1", "None"])
        assert self._field().unknown_names(query, NAMES) == ["X", "Y:1"]
        integers = _adata([1, 0, 2, 1])
        assert self._field(control=0).unknown_names(integers, ["1"]) == ["2"]

    def test_labels_without_a_delimiter(self):
        field = self._field(combination_delimiter=None)
        assert field.unknown_names(_adata(["A", "A+B", "NT"]), NAMES) == ["A+B"]

    def test_a_known_name_holds_the_delimiter(self):
        query = _adata(["HLA+A", "HLA"])
        assert self._field().unknown_names(query, ["HLA+A", "B"]) == ["HLA"]

    def test_nothing_missing_is_a_name(self):
        query = _adata(["A", None, "A+"])
        assert self._field().unknown_names(query, NAMES) == []
        with pytest.raises(ScreenError):
            _by_label().transfer_fields(query, extend_categories=True)

    @pytest.mark.parametrize("in_frame", [True, False])
    def test_matrix(self, in_frame):
        names = ["C", "X", "A"]
        query = _adata(matrix=DOSES, names=names if in_frame else None)
        query.uns["targets"] = np.array(names)
        keys = {"dosage_key": "doses", "perturbation_names_uns_key": "targets"}
        field = PerturbationField(**keys)
        assert field.unknown_names(query, NAMES) == ["X"]
        assert field.unknown_names(query, names) == []

    def test_absent_column(self):
        with pytest.raises(ScreenError, match=r"adata\.obs has no 'sgRNA'"):
            self._field(perturbation_key="sgRNA").unknown_names(_adata(), NAMES)


class TestExtendCategories:
    """Transfer to a query whose perturbations are to be added."""

    def test_frame_in_another_order(self):
        manager = _register(_adata(matrix=DOSES, names=NAMES), dosage_key="doses")
        query = _adata(matrix=DOSES, names=["X", "C", "W"])
        extended = manager.transfer_fields(query, extend_categories=True)
        assert _names(extended) == [*NAMES, "X", "W"]
        expected = np.zeros((8, 5))
        expected[:, [3, 2, 4]] = DOSES
        np.testing.assert_array_equal(_registered(extended), expected)
        assert _names(manager) == NAMES

    def test_doses_of_labels(self):
        adata = _adata(["A", "B", "A", "B", "NT"])
        adata.obs["dose"] = ["0.1", "1", "10", "100", ""]
        manager = _register(adata, "guide", "dose", control="NT")
        query = _adata(["X", "X+A"])
        query.obs["dose"] = ["0.5", "2+3"]
        extended = manager.transfer_fields(query, extend_categories=True)
        assert _names(extended) == ["A", "B", "X"]
        np.testing.assert_array_equal(_registered(extended), [[0, 0, 0.5], [3, 0, 2]])

    def test_nothing_new(self):
        manager = _by_label()
        extended = manager.transfer_fields(_adata(["C", "NT"]), extend_categories=True)
        assert _names(extended) == NAMES
        np.testing.assert_array_equal(_registered(extended), [[0, 0, 1], [0, 0, 0]])

    def test_a_query_of_a_query(self):
        once = _by_label().transfer_fields(_adata(["X", "A"]), extend_categories=True)
        twice = once.transfer_fields(_adata(["W", "X"]), extend_categories=True)
        assert _names(twice) == [*NAMES, "X", "W"]
        np.testing.assert_array_equal(_registered(twice), [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]])
        with pytest.raises(UnknownPerturbationError, match="'V'"):
            once.transfer_fields(_adata(["V"]), extend_categories=False)


class TestFiles:
    @pytest.mark.parametrize("backed", [None, "r", "r+"])
    def test_h5ad(self, tmp_path, backed):
        adata = _adata()
        source = _by_label(adata)
        adata.obs["guide"] = adata.obs["guide"].astype("category")
        adata.write_h5ad(tmp_path / "screen.h5ad")
        read = anndata.read_h5ad(tmp_path / "screen.h5ad", backed=backed)
        for manager in (_by_label(read), source.transfer_fields(read)):
            np.testing.assert_array_equal(_registered(manager), DOSES)
            batch = manager.create_torch_dataset()[[0, 3]]
            np.testing.assert_array_equal(batch[KEY], [[0, 0], [0, 1]])
            np.testing.assert_array_equal(batch[DOSE_KEY], [[0, 0], [1, 1]])

    def test_h5ad_with_frame(self, tmp_path):
        _adata(matrix=DOSES, names=NAMES).write_h5ad(tmp_path / "screen.h5ad")
        read = anndata.read_h5ad(tmp_path / "screen.h5ad")
        manager = _register(read, dosage_key="doses")
        np.testing.assert_array_equal(_registered(manager), DOSES)
        assert _names(manager) == NAMES


class TestTogether:
    def test_two_screens_do_not_touch_each_other(self):
        first = _by_label()
        second = _register(_adata(["ctrl", "X_Y", "X", "Y"]), "guide", None, None, "ctrl", "_")
        assert (_names(first), _names(second)) == (NAMES, ["X", "Y"])
        np.testing.assert_array_equal(_registered(first), DOSES)
        np.testing.assert_array_equal(_registered(second), [[0, 0], [1, 1], [1, 0], [0, 1]])

    def test_two_setups_of_one_screen(self):
        adata = _adata()
        adata.obs["other"] = ["X", "X"] + ["NT"] * 6
        first = _by_label(adata)
        second = _register(adata, "other", control="NT")
        assert _registered(second).shape == (8, 1)
        first.validate()  # what every method of a model calls
        np.testing.assert_array_equal(_registered(first), DOSES)

    def test_nullable_size_factor_loads(self):
        """What `check_size_factor` accepts, scvi-tools' own field must be able to load."""
        adata = _adata()
        adata.obs["total"] = pd.array(range(1, 9), dtype="Int64")
        manager = AnnDataManager([NumericalObsField("size_factor", "total")])
        manager.register_fields(adata)
        factors = manager.create_torch_dataset()[[0, 7]]["size_factor"]
        assert factors.dtype == np.float32
        np.testing.assert_array_equal(factors, [[1], [8]])
