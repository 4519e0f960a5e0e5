from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.datasets import simulated_bereket_2023, simulated_lopez_2023
from scvi_sams.evaluation import check_leakage

LABELS = {"perturbation_key": "perturbation", "control": "control"}


@pytest.fixture(scope="module")
def bereket() -> ad.AnnData:
    return simulated_bereket_2023(n_pairs=10, seed=3)


@pytest.fixture(scope="module")
def lopez() -> ad.AnnData:
    return simulated_lopez_2023(n_cells=8_000, seed=3)


def explained_variance(adata: ad.AnnData, n_neighbours: int = 0) -> float:
    """Share of the variance of the features that a linear map of the true latents explains."""
    design = np.column_stack([np.ones(adata.n_obs), adata.obsm["true_latent"]])
    fitted = design @ np.linalg.lstsq(design, adata.X, rcond=None)[0]
    return float(fitted.var(axis=0).sum() / adata.X.var(axis=0).sum())


class TestBereket:
    def test_layout(self, bereket):
        assert bereket.shape == (10_000, 200)
        assert bereket.X.dtype == np.float32
        assert bereket.X.min() < 0  # no counts
        truth = bereket.uns["truth"]
        assert truth["mask"].shape == truth["effect"].shape == (100, 15)
        np.testing.assert_array_equal(truth["effect"], truth["mask"] * truth["embedding"])
        labels = bereket.obs["perturbation"]
        assert (labels == "control").sum() == 1_000
        assert labels[labels.str.contains("+", regex=False)].nunique() == 10

    def test_latent_is_basal_plus_the_sum_of_effects(self, bereket):
        truth = bereket.uns["truth"]
        effect = dict(zip(truth["perturbation_names"], truth["effect"], strict=True))
        shift = np.array(
            [
                sum((effect[part] for part in label.split("+") if part in effect), np.zeros(15))
                for label in bereket.obs["perturbation"]
            ]
        )
        np.testing.assert_allclose(
            bereket.obsm["true_latent"], bereket.obsm["true_basal"] + shift, atol=1e-12
        )

    def test_basal_state_is_standard_normal(self, bereket):
        basal = bereket.obsm["true_basal"]
        assert np.abs(basal.mean(axis=0)).max() < 0.05
        np.testing.assert_allclose(np.cov(basal.T), np.eye(15), atol=0.06)

    def test_effects_have_the_scale_asked_for(self):
        truth = simulated_bereket_2023(
            n_cells=10, n_perturbations=2_000, embedding_scale=1.5, mask_probability=0.2
        ).uns["truth"]
        assert truth["embedding"].std() == pytest.approx(1.5, abs=0.02)
        assert truth["mask"].mean() == pytest.approx(0.2, abs=0.02)

    @pytest.mark.parametrize("noise_share", [0.0, 0.3, 1.0])
    def test_share_of_noise(self, noise_share):
        """A linear decoder is inverted exactly, so that what it leaves is the noise."""
        adata = simulated_bereket_2023(
            n_cells=20_000, n_features=20, noise_share=noise_share, n_hidden_layers=0
        )
        np.testing.assert_allclose(adata.X.var(axis=0), 1.0, atol=0.05)
        assert explained_variance(adata) == pytest.approx(1 - noise_share, abs=0.01)

    def test_decoder_is_not_linear(self):
        adata = simulated_bereket_2023(n_cells=20_000, n_features=20, noise_share=0.0)
        assert explained_variance(adata) < 0.97

    def test_same_seed_same_bits(self):
        first, second, third = (
            simulated_bereket_2023(n_cells=200, seed=seed) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first.X, second.X)
        assert (first.X != third.X).any()

    def test_truth_does_not_change_with_the_cells(self, bereket):
        few = simulated_bereket_2023(n_cells=50, n_pairs=10, seed=3)
        np.testing.assert_array_equal(few.uns["truth"]["effect"], bereket.uns["truth"]["effect"])

    def test_truth_survives_an_h5ad(self, bereket, tmp_path):
        bereket[:50].copy().write_h5ad(tmp_path / "screen.h5ad")
        read = ad.read_h5ad(tmp_path / "screen.h5ad")
        assert read.uns["truth"]["parameters"] == bereket.uns["truth"]["parameters"]
        np.testing.assert_array_equal(read.obsm["true_latent"], bereket.obsm["true_latent"][:50])


class TestLopez:
    def test_layout(self, lopez):
        for matrix in (lopez.X, lopez.layers["counts"]):
            assert sp.issparse(matrix)
            assert matrix.format == "csr"
            assert (matrix.data == np.round(matrix.data)).all()
        assert not np.shares_memory(lopez.X.data, lopez.layers["counts"].data)
        assert lopez.uns["truth"]["mask"].shape == (100, 15)

    def test_one_to_three_targets_each_number_as_likely(self):
        mask = simulated_lopez_2023(n_cells=10, n_perturbations=3_000).uns["truth"]["mask"]
        sizes = np.bincount(mask.sum(axis=1), minlength=16)
        assert sizes[0] == sizes[4:].sum() == 0
        np.testing.assert_allclose(sizes[1:4] / 3_000, 1 / 3, atol=0.03)
        np.testing.assert_allclose(mask.mean(axis=0), 2 / 15, atol=0.03)

    def test_shifts_have_size_five_and_either_sign(self, lopez):
        effect = lopez.uns["truth"]["effect"]
        assert set(np.unique(effect)) == {-5.0, 0.0, 5.0}

    def test_cells_of_an_intervention_are_about_its_shift(self, lopez):
        truth = lopez.uns["truth"]
        for name, effect in zip(truth["perturbation_names"][:10], truth["effect"], strict=False):
            cells = (lopez.obs["perturbation"] == name).to_numpy()
            mean = lopez.obsm["true_latent"][cells].mean(axis=0)
            np.testing.assert_allclose(mean, effect, atol=4.5 / np.sqrt(cells.sum()))

    def test_counts_are_poisson(self):
        """One gene takes the whole library, whose mean and variance are then known."""
        counts = simulated_lopez_2023(n_cells=20_000, n_genes=1, library_size=50.0).X.toarray()
        assert counts.mean() == pytest.approx(50.0, rel=0.01)
        assert counts.var() == pytest.approx(50.0, rel=0.04)

    def test_last_interventions_are_held_out(self, lopez):
        held_out = set(lopez.obs.loc[lopez.obs["split"] == "test", "perturbation"])
        assert held_out == {f"P{i:03d}" for i in range(81, 101)}
        assert check_leakage(lopez).loc["held out", "status"] == "passed"
        lopez = lopez.copy()
        lopez.obs["split"] = "train"
        with pytest.raises(ScreenError, match="perturbations held out are seen"):
            check_leakage(lopez)

    def test_same_seed_same_bits(self):
        first, second, third = (simulated_lopez_2023(n_cells=200, seed=s) for s in (1, 1, 2))
        np.testing.assert_array_equal(first.X.toarray(), second.X.toarray())
        assert (first.X != third.X).nnz > 0

    def test_can_be_set_up(self, lopez):
        SAMSVAE.setup_anndata(lopez, layer="counts", **LABELS)
        SAMSVAE(lopez, gene_likelihood="poisson", n_hidden=8)


@pytest.mark.parametrize(
    ("simulate", "arguments", "message"),
    [
        (simulated_bereket_2023, {"n_features": 0}, "`n_features` must be at least 1"),
        (simulated_bereket_2023, {"noise_share": 1.5}, "`noise_share` must be between 0 and 1"),
        (simulated_bereket_2023, {"embedding_scale": -1}, "`embedding_scale` must be 0 or more"),
        (simulated_bereket_2023, {"n_perturbations": 3, "n_pairs": 4}, "make only 3 pairs"),
        (simulated_bereket_2023, {"control_fraction": 0.9}, "add up to more than 1"),
        (simulated_lopez_2023, {"max_targets": 16}, "there are 15 latents"),
        (simulated_lopez_2023, {"n_held_out": 100}, "leave some to train on"),
        (simulated_lopez_2023, {"library_size": 0.0}, "`library_size` must be above 0"),
    ],
)
def test_refuses_what_is_out_of_range(simulate, arguments, message):
    with pytest.raises(ScreenError, match=message):
        simulate(**arguments)
