"""Results in the user's AnnData, and what the rest of the ecosystem makes of a model."""

from __future__ import annotations

import sys
from importlib.metadata import version

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scvi_sams import SAMSVAE, ScreenError

from ._members import MEMBERS, SHIFTED, SPARSE, fit_member


class TestWriteResults:
    @pytest.fixture
    def written(self, fitted):
        adata = fitted.adata.copy()
        fitted.write_results(adata, n_cells=20)
        return adata

    def test_values(self, fitted, written):
        for key, representation in {
            "X_sams": "full",
            "X_sams_basal": "basal",
            "X_sams_perturbation": "perturbation",
        }.items():
            latent = fitted.get_latent_representation(representation=representation)
            np.testing.assert_array_equal(written.obsm[key], latent)
        programs = fitted.get_gene_programs(n_cells=20)
        np.testing.assert_array_equal(written.varm["sams_programs"].T, programs.X)
        assert written.varm["sams_programs"].columns.tolist() == programs.obs_names.tolist()
        found = written.uns["sams"]
        pd.testing.assert_frame_equal(found["latents"], programs.obs)
        pd.testing.assert_frame_equal(
            found["perturbation_effect"], fitted.get_perturbation_effect()
        )
        pd.testing.assert_frame_equal(found["perturbation_mask"], fitted.get_perturbation_mask())
        assert found["provenance"]["model"] == "SAMSVAE"
        assert found["programs"]["move"] == "1.0"

    def test_survives_a_file(self, written, tmp_path):
        written.write_h5ad(tmp_path / "screen.h5ad")
        read = ad.read_h5ad(tmp_path / "screen.h5ad")
        np.testing.assert_array_equal(read.obsm["X_sams"], written.obsm["X_sams"])
        pd.testing.assert_frame_equal(read.varm["sams_programs"], written.varm["sams_programs"])
        for name in ("latents", "perturbation_effect", "perturbation_mask"):
            pd.testing.assert_frame_equal(
                read.uns["sams"][name], written.uns["sams"][name], check_dtype=False
            )
        assert read.uns["sams"]["provenance"] == written.uns["sams"]["provenance"]
        sc.pp.neighbors(read, use_rep="X_sams")
        assert read.obsp["connectivities"].nnz > 0

    def test_own_adata_and_key(self):
        model = fit_member("SAMSVAE")
        before = set(model.adata.obsm)
        model.write_results(key="second", n_cells=5)
        assert set(model.adata.obsm) - before == {
            "X_second",
            "X_second_basal",
            "X_second_perturbation",
        }
        assert "second_programs" in model.adata.varm
        assert "second" in model.adata.uns

    def test_part_of_the_cells(self, fitted):
        some = fitted.adata[100:150].copy()
        fitted.write_results(some, n_cells=5)
        whole = fitted.get_latent_representation(representation="basal")
        np.testing.assert_allclose(some.obsm["X_sams_basal"], whole[100:150], atol=1e-5)

    def test_errors_leave_the_adata_as_it_was(self, fitted):
        adata = fitted.adata.copy()
        keys = (set(adata.obsm), set(adata.varm), set(adata.uns))
        with pytest.raises(ScreenError, match="view"):
            fitted.write_results(adata[:10])
        with pytest.raises(ScreenError, match="key='a/b'"):
            fitted.write_results(adata, key="a/b")
        with pytest.raises(ValueError, match="move=0"):
            fitted.write_results(adata, move=0)
        assert (set(adata.obsm), set(adata.varm), set(adata.uns)) == keys

    def test_without_adata(self, tmp_path):
        model = fit_member("SAMSVAE")
        model.save(tmp_path / "model", save_anndata=False)
        loaded = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
        with pytest.raises(ScreenError, match="without its AnnData"):
            loaded.write_results()
        with pytest.raises(ScreenError, match="without it"):
            loaded.rank_unmeasured_pairs()
        assert loaded.get_pair_interactions(["P001+P002"], 2, 3).obs["measured"].isna().all()
        assert np.isfinite(loaded.get_gene_programs(n_cells=5).X).all()

    @pytest.mark.parametrize("member", MEMBERS)
    def test_family(self, member, tmp_path):
        model = fit_member(member, covariates=True)
        adata = model.adata.copy()
        model.write_results(adata, n_cells=5)
        assert ("X_sams_perturbation" in adata.obsm) == (member in SHIFTED)
        assert ("perturbation_effect" in adata.uns["sams"]) == (member in SHIFTED)
        assert ("perturbation_mask" in adata.uns["sams"]) == (member in SPARSE)
        adata.write_h5ad(tmp_path / "screen.h5ad")


class TestEcosystem:
    @pytest.mark.parametrize("member", MEMBERS)
    def test_hub(self, member, tmp_path):
        """A saved model is a model of scvi-tools' hub, with metadata that find its class."""
        pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        from scvi.hub import HubMetadata, HubModel

        model, folder = fit_member(member), str(tmp_path / "model")
        returned = model.save_for_hub(folder, "mit", description="Five genes.", tissues=["lung"])
        metadata = HubMetadata.from_dir(
            folder, anndata_version=version("anndata"), model_parent_module="scvi_sams"
        )
        hub_model = HubModel(folder)
        assert hub_model.metadata == returned.metadata == metadata
        assert metadata.scvi_version == version("scvi-tools")
        card = hub_model.model_card
        assert card.data.license == "mit"
        assert card.data.library_name == "scvi-tools"
        assert {f"model_cls_name:{member}", "modality:rna", "tissue:lung"} <= set(card.data.tags)
        for told in ("Five genes.", "300 cells, 40 genes, ", '"n_hidden": ', "Karaletsos"):
            assert told in card.text
        loaded = hub_model.model
        assert type(loaded) is MEMBERS[member]
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), model.get_latent_representation()
        )
        with pytest.raises(ValueError, match="already exists"):
            model.save_for_hub(folder, "mit", description="")
        model.save_for_hub(folder, "apache-2.0", description="", overwrite=True)
        assert HubModel(folder).model_card.data.license == "apache-2.0"

    def test_hub_without_adata(self, tmp_path):
        pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        model, folder = fit_member("SAMSVAE"), tmp_path / "model"
        model.save(folder, save_anndata=False)
        loaded = SAMSVAE.load(folder, adata=False, accelerator="cpu")
        with pytest.raises(ScreenError, match="save_anndata=False"):
            loaded.save_for_hub(folder, "mit", description="")
        loaded.save_for_hub(tmp_path / "hub", "mit", description="", save_anndata=False)
        assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
            "README.md",
            "_scvi_required_metadata.json",
            "model.pt",
        ]

    def test_hub_without_its_library(self, fitted, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[:2] == ["scvi", "hub"]]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r'pip install "scvi-sams\[hub\]"'):
            fitted.save_for_hub(tmp_path / "model", "mit", description="")

    @pytest.mark.slow  # the library of sparse arrays compiles for half a minute
    def test_posterior_predictive_check(self, fitted):
        """scvi-tools' check reads our samples, and finds them near the counts."""
        pytest.importorskip("sparse", reason="scvi.criticism needs sparse")
        pytest.importorskip("xarray", reason="scvi.criticism needs xarray")
        from scvi.criticism import PosteriorPredictiveCheck

        adata = fitted.adata.copy()
        # scvi-tools cannot tell whether sparse floats are integers.
        adata.layers["integers"] = adata.layers["counts"].astype(int)
        check = PosteriorPredictiveCheck(
            adata, {"SAMSVAE": fitted}, count_layer_key="integers", n_samples=5
        )
        check.coefficient_of_variation("cells")
        variation = check.metrics["cv_gene"]
        assert variation.shape == (80, 2)
        assert np.corrcoef(variation["SAMSVAE"], variation["Raw"])[0, 1] > 0.8
        check.zero_fraction()
        zeros = check.metrics["zero_fraction"]
        assert np.abs(zeros["SAMSVAE"] - zeros["Raw"]).mean() < 0.05


@pytest.mark.slow
def test_scanpy_finds_the_neighbours_of_many_cells():
    """Above 8,192 cells it asks a library of whose versions some do not fit it."""
    latents = np.random.default_rng(0).normal(size=(8_500, 5)).astype(np.float32)
    adata = ad.AnnData(obsm={"X_sams": latents})
    sc.pp.neighbors(adata, use_rep="X_sams")
    assert adata.obsp["connectivities"].shape == (8_500, 8_500)
