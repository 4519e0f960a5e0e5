"""Results in the user's AnnData, and what the rest of the ecosystem makes of a model."""

from __future__ import annotations

from importlib.metadata import version

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scvi_sams import SAMSVAE, ScreenError, tl

from ._members import MEMBERS, SHIFTED, SPARSE, fit_member


class TestWriteResults:
    @pytest.fixture
    def written(self, fitted):
        adata = fitted.adata.copy()
        tl.write_results(fitted, adata, counterfactual=fitted.counterfactual(n_cells=20))
        return adata

    def test_values(self, fitted, written):
        for key, representation in {
            "X_sams": "full",
            "X_sams_basal": "basal",
            "X_sams_perturbation": "perturbation",
        }.items():
            latent = fitted.get_latent_representation(representation=representation)
            np.testing.assert_array_equal(written.obsm[key], latent)
        programs = tl.gene_programs(fitted, counterfactual=fitted.counterfactual(n_cells=20))
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
        tl.write_results(model, key="second", counterfactual=model.counterfactual(n_cells=5))
        assert set(model.adata.obsm) - before == {
            "X_second",
            "X_second_basal",
            "X_second_perturbation",
        }
        assert "second_programs" in model.adata.varm
        assert "second" in model.adata.uns

    def test_part_of_the_cells(self, fitted):
        some = fitted.adata[100:150].copy()
        tl.write_results(fitted, some, counterfactual=fitted.counterfactual(n_cells=5))
        whole = fitted.get_latent_representation(representation="basal")
        np.testing.assert_allclose(some.obsm["X_sams_basal"], whole[100:150], atol=1e-5)

    def test_genes_are_matched_by_name(self, fitted):
        """In another order and among others, the rows of a gene are its own."""
        adata = fitted.adata.copy()
        cells = fitted.counterfactual(n_cells=5)
        tl.write_results(fitted, adata, counterfactual=cells)
        others = adata[:, :3].copy()
        others.var_names = ["x", "y", "z"]
        more = ad.concat([adata, others], axis=1, merge="same", uns_merge="same")
        more = more[:, np.random.default_rng(0).permutation(more.n_vars)].copy()
        tl.write_results(fitted, more, counterfactual=cells)
        programs = more.varm["sams_programs"]
        assert programs.loc[["x", "y", "z"]].isna().all(axis=None)
        pd.testing.assert_frame_equal(programs.loc[adata.var_names], adata.varm["sams_programs"])
        np.testing.assert_allclose(more.obsm["X_sams"], adata.obsm["X_sams"], atol=1e-5)

    def test_errors_leave_the_adata_as_it_was(self, fitted):
        adata = fitted.adata.copy()
        keys = (set(adata.obsm), set(adata.varm), set(adata.uns))
        with pytest.raises(ScreenError, match="lacks the gene 'gene_01'"):
            tl.write_results(fitted, adata[:, 1:].copy())
        with pytest.raises(ScreenError, match="view"):
            tl.write_results(fitted, adata[:10])
        with pytest.raises(ScreenError, match="key='a/b'"):
            tl.write_results(fitted, adata, key="a/b")
        with pytest.raises(ValueError, match="move=0"):
            tl.write_results(fitted, adata, move=0)
        assert (set(adata.obsm), set(adata.varm), set(adata.uns)) == keys

    def test_without_adata(self, tmp_path):
        model = fit_member("SAMSVAE")
        model.save(tmp_path / "model", save_anndata=False)
        loaded = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
        with pytest.raises(ScreenError, match="without its AnnData"):
            tl.write_results(loaded)
        with pytest.raises(ScreenError, match="without it"):
            tl.rank_unmeasured_pairs(loaded)
        assert tl.pair_interactions(loaded, ["P001+P002"], 2).obs["measured"].isna().all()
        assert np.isfinite(
            tl.gene_programs(loaded, counterfactual=loaded.counterfactual(n_cells=5)).X
        ).all()

    @pytest.mark.parametrize("member", MEMBERS)
    def test_family(self, member, tmp_path):
        model = fit_member(member, covariates=True)
        adata = model.adata.copy()
        tl.write_results(model, adata, counterfactual=model.counterfactual(n_cells=5))
        assert ("X_sams_perturbation" in adata.obsm) == (member in SHIFTED)
        assert ("perturbation_effect" in adata.uns["sams"]) == (member in SHIFTED)
        assert ("perturbation_mask" in adata.uns["sams"]) == (member in SPARSE)
        adata.write_h5ad(tmp_path / "screen.h5ad")


class TestEcosystem:
    @pytest.mark.parametrize("member", MEMBERS)
    def test_hub(self, member, tmp_path):
        """A saved model is a model of scvi-tools' hub, by the recipe of the user guide."""
        hub = pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        from scvi.hub import HubMetadata, HubModel

        model, folder = fit_member(member), str(tmp_path / "model")
        model.save(folder, save_anndata=True)
        metadata = HubMetadata.from_dir(
            folder, anndata_version=version("anndata"), model_parent_module="scvi_sams"
        )
        assert metadata.model_cls_name == member
        card = hub.ModelCard("---\nlicense: mit\nlibrary_name: scvi-tools\n---\nForty genes.")
        HubModel(folder, metadata=metadata, model_card=card).save(overwrite=True)
        loaded = HubModel(folder).model
        assert type(loaded) is MEMBERS[member]
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), model.get_latent_representation()
        )

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
