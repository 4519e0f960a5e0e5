from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions, checks, matrices
from scvi_sams.data.checks import (
    check_conditions,
    check_confounding,
    check_counts,
    check_features,
    check_size_factor,
)

N_CELLS, N_GENES = 23, 7
STORAGES = [
    np.array,
    np.asfortranarray,
    sparse.csr_matrix,
    sparse.csc_matrix,
    sparse.csr_array,
    sparse.csc_array,
]


@pytest.fixture(params=[1, 16, 2**24])
def _block_entries(request, monkeypatch):
    """Run with one cell or gene a block, a few, and all of them."""
    monkeypatch.setattr(checks, "_BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(matrices, "_CHECKED_ENTRIES", request.param)


def _counts(dtype=np.float32):
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES)).astype(dtype)
    counts[:, 0] += 1
    return counts


def _adata(counts):
    adata = anndata.AnnData(counts)
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"gene{i}" for i in range(adata.n_vars)]
    return adata


@pytest.mark.usefixtures("_block_entries")
class TestCounts:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
    def test_accepts(self, storage, dtype):
        check_counts(_adata(storage(_counts(dtype))))

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf, -np.inf])
    def test_names_gene_and_cell(self, storage, value):
        counts = _counts()
        counts[17, 4] = value
        with pytest.raises(
            ScreenError, match=rf"adata\.X must.*gene 'gene4' of cell 'cell17' has {value:g}\."
        ):
            check_counts(_adata(storage(counts)))

    @pytest.mark.parametrize("storage", STORAGES)
    def test_names_cells_without_counts(self, storage):
        counts = _counts()
        counts[[0, 9, 22]] = 0
        with pytest.raises(
            ScreenError,
            match=r"adata\.X \(3\): 'cell0', 'cell9', 'cell22'.*filter_cells\(adata, min_counts=1",
        ):
            check_counts(_adata(storage(counts)))

    def test_stored_zeros_are_no_counts(self):
        counts = sparse.csr_matrix(_counts())
        counts.data[counts.indptr[5] : counts.indptr[6]] = 0
        with pytest.raises(ScreenError, match="'cell5'"):
            check_counts(_adata(counts))

    @pytest.mark.parametrize("storage", [np.array, sparse.csr_matrix, sparse.csc_matrix])
    def test_backed(self, tmp_path, storage):
        counts = _counts()
        _adata(storage(counts)).write_h5ad(tmp_path / "good.h5ad")
        counts[17, 4] = 0.5
        _adata(storage(counts)).write_h5ad(tmp_path / "bad.h5ad")
        check_counts(anndata.read_h5ad(tmp_path / "good.h5ad", backed="r"))
        with pytest.raises(ScreenError, match="gene 'gene4' of cell 'cell17' has 0.5"):
            check_counts(anndata.read_h5ad(tmp_path / "bad.h5ad", backed="r"))

    def test_layer(self):
        adata = _adata(np.log1p(_counts()))
        adata.layers["counts"] = _counts()
        check_counts(adata, "counts")
        with pytest.raises(ScreenError, match=r"adata\.layers holds 'counts'"):
            check_counts(adata)
        with pytest.raises(ScreenError, match=r"no 'raw'; it holds 'counts'"):
            check_counts(adata, "raw")
        adata.layers["log"] = adata.X
        with pytest.raises(ScreenError, match=r"adata\.layers\['log'\] must hold"):
            check_counts(adata, "log")

    def test_says_where_counts_may_be(self):
        adata = _adata(np.log1p(_counts()))
        with pytest.raises(ScreenError, match="reload"):
            check_counts(adata)
        adata.raw = adata
        with pytest.raises(ScreenError, match=r"adata\.raw"):
            check_counts(adata)
        del adata.X
        with pytest.raises(ScreenError, match=r"no adata\.X"):
            check_counts(adata)


@pytest.mark.usefixtures("_block_entries")
class TestFeatures:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
    def test_accepts_what_counts_may_not_be(self, storage, dtype):
        features = (_counts(np.float64) - 1.5).astype(dtype)
        features[3] = 0
        check_features(_adata(storage(features)))
        with pytest.raises(ScreenError):
            check_counts(_adata(storage(features)))

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_names_feature_and_cell(self, storage, value):
        features = _counts()
        features[17, 4] = value
        message = (
            rf"adata\.X must.*feature 'gene4' of cell 'cell17' has {value}\..*Fill in or drop"
        )
        with pytest.raises(ScreenError, match=message):
            check_features(_adata(storage(features)))

    @pytest.mark.parametrize("storage", [np.array, sparse.csr_matrix, sparse.csc_matrix])
    def test_backed(self, tmp_path, storage):
        features = _counts() - 0.5
        _adata(storage(features)).write_h5ad(tmp_path / "good.h5ad")
        features[17, 4] = np.nan
        _adata(storage(features)).write_h5ad(tmp_path / "bad.h5ad")
        check_features(anndata.read_h5ad(tmp_path / "good.h5ad", backed="r"))
        with pytest.raises(ScreenError, match="feature 'gene4' of cell 'cell17' has nan"):
            check_features(anndata.read_h5ad(tmp_path / "bad.h5ad", backed="r"))

    def test_layer(self):
        adata = _adata(np.full((N_CELLS, N_GENES), np.nan))
        adata.layers["scaled"] = _counts() - 0.5
        check_features(adata, "scaled")
        with pytest.raises(ScreenError, match=r"adata\.X must hold finite numbers"):
            check_features(adata)
        with pytest.raises(ScreenError, match=r"no 'raw'; it holds 'scaled'"):
            check_features(adata, "raw")
        adata.X = None
        with pytest.raises(ScreenError, match=r"There is no adata\.X"):
            check_features(adata)


class TestSizeFactor:
    @pytest.mark.parametrize("dtype", ["int64", "float32", "Int64", "Float32"])
    def test_accepts(self, dtype):
        adata = _adata(_counts())
        adata.obs["total"] = pd.array(np.arange(1, N_CELLS + 1), dtype=dtype)
        check_size_factor(adata, "total")

    @pytest.mark.parametrize("value", [0, -2, pd.NA])
    @pytest.mark.parametrize("dtype", ["Int64", "Float64"])
    def test_names_the_cells(self, value, dtype):
        adata = _adata(_counts())
        adata.obs["total"] = pd.array([1] * (N_CELLS - 1) + [value], dtype=dtype)
        with pytest.raises(ScreenError, match=r"adata\.obs\['total'\] holds .* cells 'cell22'"):
            check_size_factor(adata, "total")

    @pytest.mark.parametrize("value", [np.inf, np.nan])
    def test_not_finite(self, value):
        adata = _adata(_counts())
        adata.obs["total"] = [value] + [1.0] * (N_CELLS - 1)
        with pytest.raises(ScreenError, match=f"holds '{value}' in cells 'cell0'"):
            check_size_factor(adata, "total")

    def test_column(self):
        adata = _adata(_counts())
        adata.obs["total"] = "12"
        with pytest.raises(ScreenError, match=r"no column 'umi'.*it holds 'total'"):
            check_size_factor(adata, "umi")
        with pytest.raises(ScreenError, match=r"'total'.*to_numeric"):
            check_size_factor(adata, "total")


class TestConfounding:
    def _adata(self, with_controls_in="xy"):
        """12 cells of A in batch x, 12 of B in both, 3 of C in x, and some controls."""
        guides = ["A"] * 12 + ["B"] * 12 + ["C"] * 3 + ["NT"] * len(with_controls_in)
        batches = ["x"] * 12 + ["x", "y"] * 6 + ["x"] * 3 + list(with_controls_in)
        obs = pd.DataFrame({"batch": batches}, index=[str(i) for i in range(len(guides))])
        return anndata.AnnData(obs=obs), Conditions.from_labels(guides, "NT")

    def test_names_the_confounded(self):
        with pytest.warns(UserWarning, match=r"'batch'\] \(1\): 'A'") as caught:
            check_confounding(*self._adata(), "batch")
        assert "no control cell" not in str(caught[0].message)

    def test_says_where_there_is_no_control(self):
        with pytest.warns(UserWarning, match="The batch of 'A' has no control cell"):
            check_confounding(*self._adata("y"), "batch")

    def test_min_cells(self):
        with pytest.warns(UserWarning, match=r"\(2\): 'A', 'C'"):
            check_confounding(*self._adata(), "batch", min_cells=3)

    def test_silent(self):
        adata, conditions = self._adata()
        adata.obs["same"] = pd.Categorical(["x"] * adata.n_obs, categories=["x", "unused"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_confounding(adata, conditions, None)
            check_confounding(adata, conditions, "same")
            check_confounding(adata, conditions, "batch", min_cells=13)


class TestConditions:
    """Labels that were probably read otherwise than they were meant."""

    def _check(self, labels, control="NT", delimiter="+", **kwargs):
        check_conditions(Conditions.from_labels(labels, control, delimiter, **kwargs))

    def test_silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self._check(["NT", "A", "A+B", "B", "B", "HLA-A", "HLA-A", "C_1", "C_1", "(D)", "(D)"])
            self._check(2 * ["NT", "A", "A+B"])  # B alone is not known, but A is

    def test_delimiter_within_a_name(self):
        match = r"\(1 groups\): 'A and HLA'.*If '-' is part of .* combination_delimiter=None"
        with pytest.warns(UserWarning, match=match):
            self._check(["NT", "HLA-A", "HLA-A", "B", "B", "B-C", "C"], delimiter="-")
        with pytest.warns(UserWarning, match=r"halves of a name: 'A\]', '\[B'"):
            self._check(["NT", "[B,A]", "C", "[B,C", "C,A]"], delimiter=",")
        with pytest.warns(UserWarning, match="halves of a name: 'sg_'"):
            self._check(["NT", "sg_+A", "sg_", "A"])

    def test_guides_that_are_always_together(self):
        matrix = np.array([[0, 0, 0], [1, 2, 0], [0.5, 1, 3], [0, 0, 1]])
        conditions = Conditions.from_matrix(matrix, ["A", "B", "C"])
        with pytest.warns(UserWarning, match="'A and B'. Their effects .* take them as one.$"):
            check_conditions(conditions, is_labelled=False)
        matrix[2, 1] = 2  # in another ratio
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_conditions(Conditions.from_matrix(matrix, ["A", "B", "C"]), is_labelled=False)

    @pytest.mark.parametrize("delimiter", ["+", "|"])
    def test_repeated_parts(self, delimiter):
        labels = ["NT", "A", "A", f"A{delimiter}A", f"B{delimiter}B", "B", "B"]
        with pytest.warns(UserWarning, match=r"repeat a part \(2 cells\).*'A:2', 'B:2'"):
            self._check(labels, delimiter=delimiter)
        conditions = Conditions.from_labels(["NT", "A", "A"], "NT", doses=[0, 2, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_conditions(conditions, has_doses=True)

    @pytest.mark.parametrize("label", ["Unassigned", "multiplet", "DOUBLET", "negative"])
    def test_what_is_no_perturbation(self, label):
        with pytest.warns(UserWarning, match=f"Taken for perturbations: '{label}'.*drop them"):
            self._check(["NT", "A", "A", label, label])
        self._check([label, "A", "A"], control=label)
