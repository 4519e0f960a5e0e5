from __future__ import annotations

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams._exceptions import ScreenError
from scvi_sams.data import guides_from_features, guides_from_mudata, guides_from_table
from scvi_sams.data.field import registered_conditions
from scvi_sams.data.guides import guide_codes

CELLS = [f"cell{k}" for k in range(40)]
GUIDES = ["KLF1_g1", "KLF1_g2", "JAK2_g1", "NT_1", "NT_2"]
TARGETS = dict(zip(GUIDES, ["KLF1", "KLF1", "JAK2", "NT", "NT"], strict=True))
HAS = np.eye(5, dtype=int)[np.arange(40) % 5]
EXPECTED = [TARGETS[GUIDES[k % 5]] for k in range(40)]


def _counts(seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(3.0, (40, 6)).astype(np.float32) + 1)


def _screen():
    return anndata.AnnData(_counts(), pd.DataFrame({"lane": ["a", "b"] * 20}, CELLS))


def _labels(adata, **kwargs):
    SAMSVAE.setup_anndata(adata, **({"guide_key": "guides", "control": "NT"} | kwargs))
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    assert len(guide_codes(manager).names) == 3  # those that target
    return registered_conditions(manager).cell_labels


class TestTable:
    @staticmethod
    def _table():
        table = pd.DataFrame({"cell": CELLS, "gRNA": [GUIDES[k % 5] for k in range(40)]})
        return table.assign(batch=0, UMI_counts=9).sample(frac=1, random_state=0)

    def test_of_crispat(self, tmp_path):
        table = pd.concat([self._table(), self._table().iloc[:3]])  # rows that are there twice
        table.loc[len(table)] = {"cell": "filtered", "gRNA": "KLF1_g1"}
        table.to_csv(tmp_path / "assignments.csv", index=False)
        adata = guides_from_table(_screen(), tmp_path / "assignments.csv", TARGETS)
        assert _labels(adata) == EXPECTED

    def test_of_other_columns_and_several_guides_a_cell(self):
        table = self._table().rename(columns={"cell": "barcode", "gRNA": "guide"})
        more = pd.DataFrame({"barcode": ["cell0", "cell3"], "guide": ["JAK2_g1", "NT_2"]})
        adata = guides_from_table(
            _screen(),
            pd.concat([table, more]),
            cell_column="barcode",
            guide_column="guide",
        )
        labels = _labels(adata, guide_targets=pd.Series(TARGETS))
        assert labels[0] == "JAK2+KLF1"
        assert labels[1:] == EXPECTED[1:]

    def test_it_survives_a_file_and_a_subset(self, tmp_path):
        adata = guides_from_table(_screen(), self._table(), TARGETS)
        adata[5:, :4].copy().write_h5ad(tmp_path / "screen.h5ad")
        assert _labels(anndata.read_h5ad(tmp_path / "screen.h5ad")) == EXPECTED[5:]

    def test_what_is_no_table_of_guides(self, tmp_path):
        with pytest.raises(ScreenError, match="no column 'gRNA' .`guide_column`.; it has 'cell'"):
            guides_from_table(_screen(), pd.DataFrame({"cell": CELLS, "guide": "x"}))
        table = self._table().sort_index()
        with pytest.raises(ScreenError, match="No cell of the table.*'cell0-1'.*has 'cell0'"):
            guides_from_table(_screen(), table.assign(cell=table["cell"] + "-1"))
        with pytest.raises(ScreenError, match="cannot be read.*absent"):
            guides_from_table(_screen(), tmp_path / "absent.csv")


class TestFeatures:
    @staticmethod
    def _features(**columns):
        rng = np.random.default_rng(1)
        guides = HAS * rng.poisson(40, HAS.shape) + rng.poisson(0.3, HAS.shape)
        kinds = ["Gene Expression"] * 6 + ["CRISPR Guide Capture"] * 5 + ["Antibody Capture"]
        counts = sparse.hstack([_counts(), guides, np.ones((40, 1))]).tocsr().astype(np.float32)
        names = [f"gene{k}" for k in range(6)] + GUIDES + ["CD86"]
        var = pd.DataFrame({"feature_types": kinds, **columns}, index=names)
        return anndata.AnnData(counts, _screen().obs, var)

    def test_are_split_off(self):
        given = self._features()
        adata = guides_from_features(given, TARGETS)
        assert adata.var_names.tolist() == [f"gene{k}" for k in range(6)]
        assert (adata.X != _counts()).nnz == 0
        assert given.shape == (40, 12)
        with pytest.raises(ScreenError, match="look like counts of guides"):
            _labels(adata)
        assert _labels(adata, guide_threshold=5) == EXPECTED

    @pytest.mark.parametrize("column", ["target_gene_name", "gene"])
    def test_targets_of_the_reference(self, column):
        targets = [""] * 6 + list(TARGETS.values()) + [""]
        given = self._features(**{column: targets})
        adata = guides_from_features(given, None if column == "target_gene_name" else column)
        assert _labels(adata, guide_threshold=5) == EXPECTED

    def test_registration_names_what_splits(self):
        with pytest.raises(ScreenError, match="guides_from_features"):
            _labels(self._features())

    def test_what_has_no_guides(self):
        with pytest.raises(ScreenError, match="no column 'feature_types'.*has none"):
            guides_from_features(_screen())
        adata = self._features()
        with pytest.raises(ScreenError, match="No feature is 'CRISPR Guide Capture'.*gex_only"):
            guides_from_features(adata[:, :6])
        with pytest.raises(ScreenError, match="neither a column nor a key of adata.uns"):
            guides_from_features(adata, "gene")


class TestMuData:
    @staticmethod
    def _mudata(rna="gene", guides="guide", order=slice(None, None, -1), **var):
        """As IGVF's pipelines write it; the guides' cells are in another order."""
        table = {
            "intended_target_name": ["KLF1", "KLF1", "JAK2", "none", "none"],
            "targeting": [True, True, True, False, False],
        } | var
        counts = sparse.csr_matrix(HAS * 30.0)
        guide = anndata.AnnData(counts, pd.DataFrame(index=CELLS), pd.DataFrame(table, GUIDES))
        guide.layers["guide_assignment"] = sparse.csr_matrix(HAS.astype(float))
        mdata = mudata.MuData({rna: _screen(), guides: guide[order].copy()})
        mdata.obs["pool"] = pd.Series(["x", "y", "x", "y"] * 10, CELLS).reindex(mdata.obs_names)
        return mdata

    EXPECTED = tuple(label.replace("NT", "non-targeting") for label in EXPECTED)

    @pytest.mark.parametrize("rna", ["rna", "gene"])
    def test_setup_and_fit(self, rna, tmp_path):
        mdata = self._mudata(rna)
        SAMSVAE.setup_mudata(mdata, batch_key="pool")
        model = SAMSVAE(mdata, n_latent=2, n_hidden=8)
        assert model.adata is mdata.mod[rna]
        assert registered_conditions(model.adata_manager).cell_labels == list(self.EXPECTED)
        assert model.adata.obs["pool"].tolist() == ["x", "y", "x", "y"] * 10
        assert "pool" not in mdata.mod["guide"].obs
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        model.save(tmp_path / "model")
        fresh = guides_from_mudata(self._mudata(rna))
        fresh.obs["pool"] = model.adata.obs["pool"]
        loaded = SAMSVAE.load(tmp_path / "model", fresh)
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), model.get_latent_representation()
        )

    def test_names_of_modalities_and_counts(self):
        mdata = self._mudata(guides="sgRNA")
        with pytest.raises(ScreenError, match="No modality is 'guide'; there are 'gene', 'sgRNA'"):
            SAMSVAE.setup_mudata(mdata)
        modalities = {"rna_layer": "gene", "guide_layer": "sgRNA"}
        del mdata.mod["sgRNA"].layers["guide_assignment"]
        with pytest.raises(ScreenError, match="look like counts of guides"):
            SAMSVAE.setup_mudata(mdata, modalities=modalities)
        SAMSVAE.setup_mudata(mdata, modalities=modalities, guide_threshold=5)
        with pytest.raises(ScreenError, match="modalities names 'rna'"):
            SAMSVAE.setup_mudata(mdata, modalities={"rna": "gene"})

    @pytest.mark.parametrize(
        "var",
        [
            {"targeting": ["TRUE", "TRUE", "TRUE", "FALSE", "FALSE"]},
            {
                "targeting": [True] * 5,
                "type": ["targeting"] * 3 + ["non-targeting", "safe-targeting"],
            },
        ],
    )
    def test_guides_that_do_not_target(self, var):
        adata = guides_from_mudata(self._mudata(**var), control="NT")
        assert _labels(adata) == EXPECTED

    def test_targets_that_are_given(self):
        adata = guides_from_mudata(self._mudata(), guide_targets=TARGETS, control="NT")
        assert _labels(adata) == EXPECTED
        mdata = self._mudata(gene=["KLF1", "KLF1", "JAK2", "", ""])
        assert _labels(guides_from_mudata(mdata, guide_targets="gene", control="NT")) == EXPECTED
        mdata.mod["guide"].var.drop(columns=["intended_target_name", "gene"], inplace=True)
        with pytest.raises(ScreenError, match="none of the columns 'intended_target_name'"):
            guides_from_mudata(mdata)

    def test_cells_without_guides(self):
        mdata = self._mudata(order=slice(3, None))
        with pytest.raises(ScreenError, match="3 cells with counts.*'cell0'.*intersect_obs"):
            guides_from_mudata(mdata)

    def test_what_is_not_set_up(self):
        mdata = self._mudata()
        with pytest.raises(ScreenError, match="no modality is set up: call `setup_mudata"):
            SAMSVAE(mdata)
        with pytest.raises(ScreenError, match="is a AnnData: give a MuData"):
            SAMSVAE.setup_mudata(_screen())
        with pytest.raises(ScreenError, match="mdata = mdata.copy"):
            SAMSVAE.setup_mudata(mdata[:20])
        with pytest.raises(ScreenError, match="no layer 'calls'.*only 'guide_assignment'"):
            guides_from_mudata(mdata, guide_layer="calls")
        with pytest.raises(ScreenError, match="setup_mudata"):
            SAMSVAE.setup_anndata(mdata, guide_key="guides")
