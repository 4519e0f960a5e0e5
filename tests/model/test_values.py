"""What enters a model is finite and there, on any scale, or is refused by name."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks.covariates import bounds
from scvi_sams import SAMSVAE, ScreenError

from .conftest import SETUP, SIZE, fit, small_screen

STRESS = {"continuous_covariate_keys": "stress"}


@pytest.fixture
def with_stress(screen):
    screen.obs["stress"] = np.random.default_rng(0).random(screen.n_obs)
    return screen


class TestRefused:
    @staticmethod
    def _refused(adata, message, **kwargs):
        with pytest.raises(ScreenError, match=message):
            SAMSVAE.setup_anndata(adata, **SETUP, **kwargs)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
    def test_continuous_covariate(self, with_stress, value):
        cell = with_stress.obs_names[5]
        with_stress.obs.loc[cell, "stress"] = value
        self._refused(with_stress, f"'stress'.*{cell}", **STRESS)

    def test_missing_of_pandas(self, with_stress):
        with_stress.obs["stress"] = pd.array([pd.NA, *range(1, 600)], dtype="Int64")
        self._refused(with_stress, f"'stress'.*{with_stress.obs_names[0]}", **STRESS)

    def test_text(self, with_stress):
        with_stress.obs["stress"] = "high"
        self._refused(with_stress, "'stress'.*numeric", **STRESS)

    @pytest.mark.parametrize(
        ("argument", "kind"),
        [
            ("batch_key", "batch"),
            ("labels_key", "label"),
            ("categorical_covariate_keys", "category"),
        ],
    )
    @pytest.mark.parametrize("missing", [None, np.nan, "nan"])
    def test_categories(self, screen, argument, kind, missing):
        column = screen.obs["replicate"].astype(object)
        column.iloc[:4] = missing
        screen.obs["lane"] = column
        self._refused(
            screen,
            f"4 cells without a {kind}.*'lane'.*{screen.obs_names[0]}",
            **{argument: "lane"},
        )

    def test_absent(self, screen):
        self._refused(
            screen, "no column 'replicates'.*nearest is 'replicate'", batch_key="replicates"
        )

    def test_size_factor_beyond_single_precision(self, screen):
        screen.obs["total"] = 1e39
        self._refused(screen, "'total'", size_factor_key="total")

    @pytest.mark.parametrize("dose", [1e39, 1e-50])
    def test_doses_beyond_single_precision(self, screen, dose):
        screen.obs["dose"] = dose
        control = screen.obs["perturbation"] == "control"
        one = screen[control | (screen.obs["perturbation"] == "P001")].copy()
        self._refused(one, "single precision", dosage_key="dose")
        one.obsm["doses"] = pd.DataFrame(
            {"P001": dose * (one.obs["perturbation"] == "P001")}, index=one.obs_names
        )
        with pytest.raises(ScreenError, match="single precision"):
            SAMSVAE.setup_anndata(one, "counts", dosage_key="doses")

    @pytest.mark.parametrize("storage", [sparse.csr_matrix, sparse.csc_matrix])
    def test_sparse_indices(self, screen, storage):
        counts = screen.layers["counts"].toarray()
        for damage, message in (
            (lambda m: m.indices.__setitem__(50, 10**6), "out of range, 1000000"),
            (lambda m: m.indices.__setitem__(50, -2), "out of range, -2"),
            (lambda m: m.indptr.__setitem__(3, 10**6), "index pointers"),
            (lambda m: m.indices.__setitem__(m.indptr[0] + 1, m.indices[m.indptr[0]]), "several"),
        ):
            screen.layers["counts"] = storage(counts)
            damage(screen.layers["counts"])
            self._refused(screen, message)

    def test_transfer(self, fitted_covariates):
        """An AnnData that a method is given is checked as one that is set up."""
        adata = fitted_covariates.adata.copy()
        adata.obs.loc[adata.obs_names[2], "stress"] = np.nan
        with pytest.raises(ScreenError, match=f"'stress'.*{adata.obs_names[2]}"):
            fitted_covariates.get_elbo(adata)
        adata = fitted_covariates.adata.copy()
        adata.layers["counts"] = adata.layers["counts"].astype(float).log1p()
        with pytest.raises(ScreenError, match="raw counts"):
            fitted_covariates.get_elbo(adata)

    def test_counts_changed_in_place(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = fit(screen, max_epochs=1)
        screen.layers["counts"] = screen.layers["counts"].astype(np.float32).log1p()
        for call in (
            model.get_latent_representation,
            model.get_normalized_expression,
            model.get_elbo,
            lambda: model.train(max_epochs=1),
            lambda: model.predict(["P001"], basal="control"),
        ):
            with pytest.raises(ScreenError, match="held counts when it was set up"):
                call()


class TestAccepted:
    def test_numbers_of_any_type(self, screen):
        screen.obs["a"] = pd.array(range(screen.n_obs), dtype="Int64")
        screen.obs["b"] = screen.obs["a"] > 300
        SAMSVAE.setup_anndata(screen, **SETUP, continuous_covariate_keys=["a", "b"])
        assert np.isfinite(fit(screen, max_epochs=1).get_elbo())

    def test_constant(self, screen):
        screen.obs["stress"] = 0.1
        SAMSVAE.setup_anndata(screen, **SETUP, **STRESS)
        assert np.isfinite(fit(screen, max_epochs=1).get_elbo())


class TestScales:
    @pytest.mark.parametrize(("low", "high"), [(0.0, 1e4), (1e4, 1.1e5), (0.0, 1e-6)])
    def test_covariate_in_any_units(self, with_stress, low, high):
        share = with_stress.obs["stress"].copy()
        found = []
        for column in (share, low + (high - low) * share):
            with_stress.obs["stress"] = column
            SAMSVAE.setup_anndata(with_stress, **SETUP, **STRESS)
            model = fit(with_stress, max_epochs=4, encode_covariates=True)
            found.append(model.get_elbo(n_samples=1, return_mean=False))
        assert abs(found[0].mean() - found[1].mean()) < 0.5

    def test_queries_keep_the_scale(self, fitted_covariates, tmp_path):
        module = fitted_covariates.module
        adata = fitted_covariates.adata
        expected = adata.obs["stress"].iloc[fitted_covariates.train_indices]
        np.testing.assert_allclose(module.covariate_mean, [expected.mean()], atol=1e-5)
        np.testing.assert_allclose(module.covariate_std, [expected.std(ddof=0)], rtol=1e-4)
        other = adata.copy()
        other.obs["stress"] += 100
        query = SAMSVAE.load_query_data(other, fitted_covariates)
        np.testing.assert_array_equal(query.module.covariate_mean, module.covariate_mean)
        fitted_covariates.save(tmp_path / "model")
        loaded = SAMSVAE.load(tmp_path / "model", adata=adata)
        np.testing.assert_array_equal(loaded.module.covariate_std, module.covariate_std)

    def test_features_in_any_units(self):
        """The bound moves by the log of the scale, and predictions are in the users' units."""
        elbo, means = [], []
        scale = 1e4
        for factor in (1.0, scale):
            adata = small_screen()
            adata.X = factor * np.log1p(adata.layers["counts"].toarray()).astype(np.float64)
            SAMSVAE.setup_anndata(
                adata, None, "perturbation", control="control", is_count_data=False
            )
            model = fit(adata, max_epochs=6, gene_likelihood="normal")
            elbo.append(model.get_elbo(n_samples=2))
            means.append(model.predict(["P001"], return_mean=True, seed=0).X)
        assert abs(elbo[0] - elbo[1] - adata.n_vars * np.log(scale)) < 0.5
        np.testing.assert_allclose(means[1] / scale, means[0], rtol=0.02, atol=0.02)

    @pytest.mark.slow
    def test_bounds(self):
        found = list(bounds().values())
        assert max(found) - min(found) < 0.5


class TestWarned:
    def test_few_controls(self, screen):
        controls = np.flatnonzero(screen.obs["perturbation"] == "control")
        lane = np.where(np.arange(screen.n_obs) % 2, "x", "y").astype(object)
        lane[controls], lane[controls[:3]] = "x", "y"
        screen.obs["lane"] = lane
        with pytest.warns(UserWarning, match=r"fewer than 20 controls \(1\): 'y: 3'"):
            SAMSVAE.setup_anndata(screen, **SETUP, batch_key="lane")

    def test_no_controls_in_any_batch(self, screen):
        screen.obs["lane"] = np.where(screen.obs["perturbation"] == "control", "x", "y")
        with pytest.warns(UserWarning, match="The batch of 'P001'.*has no control cell"):
            SAMSVAE.setup_anndata(screen, **SETUP, batch_key="lane")

    @staticmethod
    def _dosage(adata, factor):
        names = ["P001", "P002", "P003"]
        doses = {n: factor * adata.obs["perturbation"].str.contains(n) for n in names}
        adata.obsm["doses"] = pd.DataFrame(doses, index=adata.obs_names).astype(float)

    def test_guide_counts(self, screen):
        self._dosage(screen, np.random.default_rng(0).poisson(300, screen.n_obs))
        with pytest.warns(UserWarning, match="look like counts.*threshold"):
            SAMSVAE.setup_anndata(screen, "counts", dosage_key="doses")

    @pytest.mark.parametrize("factor", [1e-8, 2.5])
    def test_dose_one_is_not_seen(self, screen, factor):
        self._dosage(screen, factor)
        with pytest.warns(UserWarning, match="Dose 1 lies outside"):
            SAMSVAE.setup_anndata(screen, "counts", dosage_key="doses")


@pytest.mark.parametrize("storage", [pd.DataFrame, np.asarray, sparse.csr_matrix])
def test_control_column_of_a_dosage_matrix(screen, storage):
    single = screen[~screen.obs["perturbation"].str.contains("+", regex=False)].copy()
    dummies = pd.get_dummies(single.obs["perturbation"].astype(str)).astype(float)
    single.obsm["doses"] = storage(dummies)
    single.uns["guides"] = list(dummies.columns)
    names = None if storage is pd.DataFrame else "guides"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMSVAE.setup_anndata(
            single,
            "counts",
            dosage_key="doses",
            perturbation_names_uns_key=names,
            control="control",
        )
    model = SAMSVAE(single, **SIZE)
    assert model.perturbation_names == [f"P{number:03d}" for number in range(1, 7)]
