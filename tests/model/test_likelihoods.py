"""Likelihoods of counts and features, and what shares their dispersion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scvi_sams import SAMSVAE, ScreenError

from ._members import MEMBERS, fit_member, read_outs, tiny_screen
from .conftest import SETUP, SIZE

FEATURES = {"layer": "features", "is_count_data": False}


def feature_screen(**kwargs):
    """Features that are normal about a linear function of the perturbations."""
    adata = tiny_screen(**kwargs)
    rng = np.random.default_rng(0)
    doses = adata.obs["perturbation"].astype(str).str.get_dummies("+").drop(columns="control")
    effect = rng.normal(size=(doses.shape[1], adata.n_vars)) * (
        rng.random((doses.shape[1], 1)) < 0.7
    )
    noise = rng.normal(size=adata.shape) * np.linspace(0.3, 1.0, adata.n_vars)
    adata.layers["features"] = (doses.to_numpy() @ effect + noise - 2.0).astype(np.float32)
    adata.uns["effect"] = effect
    return adata


def fit_features(member="SAMSVAE", adata=None, **kwargs):
    adata = feature_screen() if adata is None else adata
    return fit_member(member, adata, setup=FEATURES, gene_likelihood="normal", **kwargs)


class TestCounts:
    @pytest.mark.parametrize("member", MEMBERS)
    @pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
    @pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
    def test_trains(self, member, gene_likelihood, dispersion):
        model = fit_member(
            member,
            setup={"batch_key": "replicate"},
            gene_likelihood=gene_likelihood,
            dispersion=dispersion,
            max_epochs=3,
        )
        loss = model.history["reconstruction_loss_train"].to_numpy(dtype=float).ravel()
        assert loss[-1] < loss[0]
        found = read_outs(model, ["P001"])
        for name, value in found.items():
            assert np.isfinite(value).all(), name
        assert (found["cells"] >= 0).all()
        assert (found["cells"] == found["cells"].round()).all()
        shape = (40,) if dispersion == "gene" else (40, 2)
        assert model.module.px_r.shape == shape
        is_learned = bool(model.module.px_r.detach().abs().max() > 0)
        assert is_learned == (gene_likelihood != "poisson")

    def test_dispersion_of_a_batch(self):
        """Counts of one batch are spread by a gamma factor, those of the other are not."""
        adata = tiny_screen(n_cells=1_000, inverse_dispersion=50.0)
        rng = np.random.default_rng(0)
        counts = adata.layers["counts"].toarray()
        is_second = (adata.obs["replicate"] == "replicate_2").to_numpy()
        factor = rng.gamma(1.0, 1.0, counts[is_second].shape)
        counts[is_second] = rng.poisson(counts[is_second] * factor)
        adata.layers["counts"] = sparse.csr_matrix(counts)
        model = fit_member(
            "SAMSVAE",
            adata,
            setup={"batch_key": "replicate", "size_factor_key": "total"},
            dispersion="gene-batch",
            max_epochs=10,
            train={"plan_kwargs": {"lr": 0.02}},
        )
        log_inverse = model.module.px_r.detach().numpy()
        is_expressed = counts.mean(0) > 20
        assert is_expressed.sum() > 10
        first, second = log_inverse[is_expressed].T
        assert (first > second).mean() > 0.9
        assert np.median(first - second) > 0.5

    def test_zero_inflation(self):
        """Genes that drop out of half the cells are told from those that do not."""
        adata = tiny_screen(n_cells=1_000, library_size=4_000.0)
        rng = np.random.default_rng(0)
        counts = adata.layers["counts"].toarray()
        expressed = np.argsort(counts.mean(0))[-12:]
        dropped, kept = expressed[::2], expressed[1::2]
        counts[:, dropped] *= rng.random((len(counts), len(dropped))) < 0.5
        adata.layers["counts"] = sparse.csr_matrix(counts)
        setup = {"size_factor_key": "total"}
        models = {
            name: fit_member("SAMSVAE", adata, setup=setup, gene_likelihood=name, max_epochs=15)
            for name in ("nb", "zinb")
        }
        zeros = (models["zinb"].predict(["control"], n_samples=400).X.toarray() == 0).mean(0)
        assert zeros[dropped].min() > 0.3
        assert zeros[kept].max() < 0.3
        bounds = {
            name: model.get_iwelbo(indices=model.validation_indices, return_mean=False)
            for name, model in models.items()
        }
        gain = bounds["zinb"] - bounds["nb"]
        assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


class TestFeatures:
    @pytest.mark.parametrize("member", MEMBERS)
    @pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
    def test_trains(self, member, dispersion):
        model = fit_features(member, dispersion=dispersion)
        loss = model.history["reconstruction_loss_train"].to_numpy(dtype=float).ravel()
        assert loss[-1] < loss[0]
        found = read_outs(model, ["P001"])
        for name, value in found.items():
            assert np.isfinite(value).all(), name
        assert (found["cells"] < 0).any()
        assert (found["cells"] != found["cells"].round()).all()

    def test_effects_are_differences_of_means(self):
        adata = feature_screen(n_cells=1_500, pair_fraction=0.0, n_pairs=0)
        model = fit_features(adata=adata, max_epochs=30)
        effect = model.get_average_treatment_effect()
        assert effect.uns["scvi_sams"]["method"] == "mean"
        truth = adata.uns["effect"].ravel()
        assert np.corrcoef(effect.X.ravel(), truth)[0, 1] > 0.95
        assert np.abs(effect.X.ravel() - truth).mean() < 0.2
        # The spread of each feature about its mean is learned too.
        log_std = model.module.px_r.detach().numpy()
        assert np.corrcoef(log_std, np.log(np.linspace(0.3, 1.0, 40)))[0, 1] > 0.9

    def test_no_log_of_features(self):
        model = fit_features(max_epochs=1)
        with pytest.raises(ValueError, match=r"for counts.*'normal'; use method='mean'"):
            model.get_average_treatment_effect(method="log_normalized")

    def test_saved(self, tmp_path):
        model = fit_features(max_epochs=2)
        model.save(str(tmp_path / "model"))
        loaded = SAMSVAE.load(str(tmp_path / "model"), feature_screen(), accelerator="cpu")
        for name, value in read_outs(loaded, ["P001"]).items():
            np.testing.assert_array_equal(value, read_outs(model, ["P001"])[name], err_msg=name)


class TestWrongData:
    def test_features_are_no_counts(self):
        with pytest.raises(ScreenError, match=r"must hold raw counts"):
            SAMSVAE.setup_anndata(feature_screen(), **(SETUP | {"layer": "features"}))

    @pytest.mark.parametrize("member", MEMBERS)
    @pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
    def test_counts_likelihood_of_features(self, member, gene_likelihood):
        adata = feature_screen()
        MEMBERS[member].setup_anndata(adata, **(SETUP | FEATURES))
        message = rf"'{gene_likelihood}' is for counts.*gene_likelihood='normal'"
        with pytest.raises(ScreenError, match=message):
            MEMBERS[member](adata, gene_likelihood=gene_likelihood)

    def test_missing_features(self):
        adata = feature_screen()
        adata.layers["features"][3, 4] = np.nan
        with pytest.raises(ScreenError, match=r"feature 'gene_05' of cell 'cell_004' has nan"):
            SAMSVAE.setup_anndata(adata, **(SETUP | FEATURES))

    @pytest.mark.parametrize(
        ("argument", "value"), [("gene_likelihood", "gamma"), ("dispersion", "gene-cell")]
    )
    def test_unknown(self, argument, value):
        adata = tiny_screen()
        SAMSVAE.setup_anndata(adata, **SETUP)
        with pytest.raises(ValueError, match=rf"{argument}='{value}'"):
            SAMSVAE(adata, **SIZE, **{argument: value})
