"""What SAMSVAE inherits from scvi-tools works, or says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .conftest import counts_per_library


class TestNormalizedExpression:
    def test_sums_to_the_library(self, any_fitted):
        share = any_fitted.get_normalized_expression()
        assert share.shape == (600, 80)
        assert share.index.equals(any_fitted.adata.obs_names)
        assert share.columns.tolist() == any_fitted.adata.var_names.tolist()
        in_panel = counts_per_library(any_fitted)
        tolerance = 1e-4 if in_panel == 1 else 0.25  # of a size factor the total is free
        np.testing.assert_allclose(share.sum(axis=1), in_panel, rtol=tolerance)
        assert share.sum(axis=1).mean() == pytest.approx(in_panel, rel=0.05)
        scaled = any_fitted.get_normalized_expression(indices=[4, 2], library_size=1e4)
        assert scaled.index.tolist() == any_fitted.adata.obs_names[[4, 2]].tolist()
        np.testing.assert_allclose(scaled.sum(axis=1), 1e4 * in_panel, rtol=tolerance)

    def test_follows_the_counts(self, any_fitted):
        counts = any_fitted.adata.layers["counts"].toarray()
        observed = counts / counts.sum(1, keepdims=True)
        expected = any_fitted.get_normalized_expression(n_samples=5).to_numpy()
        per_gene = [np.corrcoef(x, y)[0, 1] for x, y in zip(observed.T, expected.T, strict=True)]
        assert np.median(per_gene) > 0.3

    def test_samples(self, any_fitted):
        draws = any_fitted.get_normalized_expression(
            indices=[1, 2, 3], n_samples=4, return_mean=False
        )
        assert draws.shape == (4, 3, 80)
        assert (draws[0] != draws[1]).any()

    def test_genes(self, any_fitted):
        genes = any_fitted.adata.var_names[[7, 2]].tolist()
        assert set(any_fitted.get_normalized_expression(gene_list=genes).columns) == set(genes)

    def test_transform_batch(self, fitted_covariates, monkeypatch):
        monkeypatch.setattr(torch, "randn", torch.zeros)
        first, second = (
            fitted_covariates.get_normalized_expression(transform_batch=batch)
            for batch in ("replicate_1", "replicate_2")
        )
        own = fitted_covariates.get_normalized_expression()
        in_first = (fitted_covariates.adata.obs["replicate"] == "replicate_1").to_numpy()
        np.testing.assert_allclose(own[in_first], first[in_first], rtol=1e-4)
        np.testing.assert_allclose(own[~in_first], second[~in_first], rtol=1e-4)
        assert np.abs(first - second).to_numpy().max() > 1e-5


class TestDifferentialExpression:
    def test_finds_the_changed_genes(self, fitted):
        result = fitted.differential_expression(
            groupby="perturbation", group1="P001", group2="control", mode="change", silent=True
        )
        assert result.shape[0] == 80
        effect = fitted.get_average_treatment_effect("P001", method="log_normalized")
        by_model = effect.to_df().loc["P001", result.index]
        assert np.corrcoef(result["lfc_mean"], by_model)[0, 1] > 0.7


class TestPosteriorPredictive:
    def test_samples(self, any_fitted):
        one = any_fitted.posterior_predictive_sample(indices=[3, 8])
        assert one.shape == (2, 80)
        several = any_fitted.posterior_predictive_sample(indices=[3, 8], n_samples=200)
        assert several.shape == (2, 80, 200)
        totals = np.asarray(several.sum(1).todense()).mean(1)
        observed = np.ravel(any_fitted.adata.layers["counts"][[3, 8]].sum(1))
        np.testing.assert_allclose(totals, observed, rtol=0.1)

    def test_correlation(self, any_fitted):
        correlation = any_fitted.get_feature_correlation_matrix(n_samples=2)
        assert correlation.shape == (80, 80)
        np.testing.assert_allclose(np.diag(correlation), 1)
        np.testing.assert_allclose(correlation, correlation.T, atol=1e-8)


def test_reconstruction_error(any_fitted):
    """It is the expected log-likelihood, above the bound by the divergence."""
    error = any_fitted.get_reconstruction_error()["reconstruction_loss"].item()
    assert np.isfinite(error)
    assert -abs(error) > any_fitted.get_elbo(n_samples=2, include_global=False)


def test_likelihood_parameters(any_fitted):
    parameters = any_fitted.get_likelihood_parameters()
    assert set(parameters) == {"mean", "dispersions"}
    assert all(values.shape == (600, 80) for values in parameters.values())
    assert all((values > 0).all() for values in parameters.values())


class TestNotOffered:
    def test_marginal_likelihood(self, any_fitted):
        with pytest.raises(NotImplementedError, match="get_iwelbo"):
            any_fitted.get_marginal_ll(n_mc_samples=10)

    def test_latent_library(self, any_fitted):
        with pytest.raises(NotImplementedError, match="size_factor_key"):
            any_fitted.get_latent_library_size()
