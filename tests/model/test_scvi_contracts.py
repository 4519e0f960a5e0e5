"""Contracts of scvi-tools' base classes: order of arguments, minibatches, what is inherited."""

from __future__ import annotations

import inspect

import anndata as ad
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from scvi.criticism import PosteriorPredictiveCheck
from scvi.model.base import BaseMinifiedModeModelClass, RNASeqMixin, VAEMixin
from torch.distributions import Normal

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError

from ._members import MEMBERS, fit_member, tiny_screen

CELLS = [5, 3, 40]
MIXINS = (VAEMixin, RNASeqMixin)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    "method",
    [
        "get_elbo",
        "get_latent_representation",
        "get_reconstruction_error",
        "get_normalized_expression",
        "get_aggregated_posterior",
        "differential_expression",
        "differential_abundance",
        "posterior_predictive_sample",
        "get_likelihood_parameters",
        "get_feature_correlation_matrix",
    ],
)
def test_positional_arguments_are_scvi_tools(member, method):
    theirs = next(getattr(mixin, method) for mixin in MIXINS if hasattr(mixin, method))
    ours = getattr(getattr(scvi_sams, member), method)

    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(theirs)


def test_the_bound_of_particles_follows_their_marginal_likelihood():
    theirs = list(inspect.signature(VAEMixin.get_marginal_ll).parameters)[:-1]
    ours = list(inspect.signature(SAMSVAE.get_iwelbo).parameters)
    assert [name.replace("n_mc_samples", "n_particles") for name in theirs] == ours


class TestMinibatches:
    READ_OUTS = {
        "get_elbo": {"n_samples": 2, "return_mean": False},
        "get_iwelbo": {"n_particles": 2, "return_mean": False},
        "get_latent_representation": {"give_mean": False},
    }

    @pytest.mark.parametrize("method", READ_OUTS)
    @pytest.mark.parametrize("once", [False, True])
    def test_say_what_the_cells_say(self, fitted, method, once):
        read = getattr(fitted, method)
        loader = fitted._make_data_loader(fitted.adata, indices=CELLS, batch_size=2)
        first, again = (list(loader), iter(list(loader))) if once else (None, loader)
        cells = {"dataloader": first} if once else {"indices": CELLS, "batch_size": 2}
        torch.manual_seed(0)
        expected = read(**cells, **self.READ_OUTS[method])
        torch.manual_seed(0)
        found = read(dataloader=again, **self.READ_OUTS[method])
        assert len(found) == len(CELLS)
        np.testing.assert_array_equal(found, expected)

    def test_read_once_serve_every_pass(self, fitted, monkeypatch):
        """More draws of effects than are held at once need another pass over the cells."""
        elements = 2 * fitted.module.n_global_elements
        monkeypatch.setattr("scvi_sams.model.read_outs.MAX_EFFECT_ELEMENTS", elements)
        loader = fitted._make_data_loader(fitted.adata, indices=CELLS)
        bound = fitted.get_elbo(dataloader=iter(loader), n_samples=5, return_mean=False)
        assert bound.shape == (3,)

    @pytest.mark.parametrize("method", ["get_elbo", "get_reconstruction_error", "get_iwelbo"])
    def test_beside_cells_are_refused(self, fitted, method):
        loader = fitted._make_data_loader(fitted.adata)
        with pytest.raises(ScreenError, match="adata beside dataloader"):
            getattr(fitted, method)(fitted.adata, dataloader=loader)
        with pytest.raises(ScreenError, match="indices beside dataloader"):
            getattr(fitted, method)(indices=[1], dataloader=loader)

    def test_arguments_of_the_loader(self, fitted):
        with pytest.raises(ScreenError, match="no 'batchsize'.*nearest is 'batch_size'"):
            fitted.get_elbo(data_loader_kwargs={"batchsize": 3})
        with pytest.raises(ScreenError, match="data loader has no 'representations'"):
            fitted.get_latent_representation(representations="basal")


def test_means_are_numbers_with_the_attributes_of_a_tensor(fitted):
    for bound in (fitted.get_elbo(n_samples=1), fitted.get_iwelbo(n_particles=1)):
        assert isinstance(bound, float)
        assert bound.ndim == 0
        assert bound.item() == bound


def test_what_was_the_third_argument_is_refused(fitted):
    """Before, it was the representation; scvi-tools has ``give_mean`` there."""
    with pytest.raises(ScreenError, match="give_mean='basal' cannot be used"):
        fitted.get_latent_representation(None, CELLS, "basal")


class TestAggregatedPosterior:
    def test_is_the_mean_density_of_the_cells(self, fitted):
        mean, variance = fitted.get_latent_representation(indices=CELLS, return_dist=True)
        points = torch.as_tensor(fitted.get_latent_representation(indices=[7, 8]))
        cells = Normal(torch.as_tensor(mean), torch.as_tensor(variance).sqrt())
        density = cells.log_prob(points[:, None]).sum(-1).exp().mean(1)
        found = fitted.get_aggregated_posterior(indices=CELLS, dof=None)
        torch.testing.assert_close(found.log_prob(points), density.log(), rtol=1e-4, atol=1e-3)

    def test_student(self, fitted):
        found = fitted.get_aggregated_posterior(indices=CELLS)
        assert found.component_distribution.base_dist.df.unique().tolist() == [3.0]

    def test_differential_abundance(self, fitted):
        adata = fitted.adata.copy()
        adata.obs["half"] = ["a", "b"] * (adata.n_obs // 2)
        fitted.differential_abundance(adata, sample_key="half", batch_size=64)
        found = adata.obsm["da_log_probs"]
        assert found.columns.tolist() == ["a", "b"]
        first = fitted.get_aggregated_posterior(adata, np.arange(0, adata.n_obs, 2), dof=None)
        states = torch.as_tensor(fitted.get_latent_representation(adata))
        np.testing.assert_allclose(found["a"], first.log_prob(states), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("key", [None, "nothing"])
    def test_unknown_samples(self, fitted, key):
        with pytest.raises(ScreenError, match="sample_key is missing|no column 'nothing'"):
            fitted.differential_abundance(sample_key=key)


class TestDifferentialExpression:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"groupby": "perturbations"}, "no column 'perturbations'. The nearest is 'pert"),
            ({"groupby": "perturbation", "group1": "P01"}, "group1.*no 'P01'. The nearest is"),
            ({"groupby": "perturbation", "group1": ["P001"], "group2": "ctrl"}, "group2.*'ctrl'"),
            ({"idx1": [True, False]}, "mask of 2 cells"),
            ({"idx1": [10**6]}, "out of range"),
        ],
    )
    def test_groups_that_are_not_there(self, fitted, arguments, message):
        with pytest.raises(ScreenError, match=message):
            fitted.differential_expression(silent=True, **arguments)

    def test_importance_weights_are_refused_by_their_name(self, fitted):
        with pytest.raises(NotImplementedError, match="weights='importance'"):
            fitted.differential_expression(
                groupby="perturbation", group1="P001", weights="importance"
            )

    def test_positions_are_those_of_the_group(self, fitted):
        is_one = (fitted.adata.obs["perturbation"] == "P001").to_numpy()
        found = []
        for first in ({"groupby": "perturbation", "group1": "P001"}, {"idx1": is_one}):
            np.random.seed(0)  # noqa: NPY002 - scvi-tools draws from it
            torch.manual_seed(0)
            found.append(
                fitted.differential_expression(silent=True, **first)["raw_mean1"].sort_index()
            )
        np.testing.assert_array_equal(*found)

    def test_from_disk(self, tmp_path):
        model = fit_member("SAMSVAE", setup={"layer": None}, max_epochs=1)
        model.adata.write_h5ad(tmp_path / "cells.h5ad")
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        groups = {"groupby": "perturbation", "group1": "P001", "silent": True}
        with pytest.raises(ScreenError, match="all_stats=False"):
            model.differential_expression(backed, **groups)
        assert len(model.differential_expression(backed, **groups, all_stats=False)) == 40


def test_genes_that_the_model_has_not(fitted):
    for method in (fitted.get_normalized_expression, fitted.posterior_predictive_sample):
        with pytest.raises(ScreenError, match="gene_list: the model has no 'gene_001'"):
            method(gene_list=["gene_001"])


def test_posterior_predictive_check(fitted):
    """What a criticism report of scvi-tools is made of."""
    adata = fitted.adata.copy()
    adata.X = adata.layers["counts"].toarray()
    check = PosteriorPredictiveCheck(adata, {"model": fitted}, count_layer_key=None, n_samples=3)
    check.coefficient_of_variation()
    table = check.metrics["cv_gene"]
    assert table.shape == (80, 2)
    assert table["model"].corr(table["Raw"]) > 0.3


def test_any_logger(tmp_path):
    """Figures go to a logger of Lightning's, as MLflow's, in place of the history."""
    model = fit_member("SAMSVAE", tiny_screen(), max_epochs=1)
    model.train(1, logger=CSVLogger(tmp_path), enable_progress_bar=False, accelerator="cpu")
    assert "train_loss" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_minification_is_not_offered():
    """Its class keeps latents in place of counts, of which effects could not be told."""
    assert not issubclass(SAMSVAE, BaseMinifiedModeModelClass)
    assert not hasattr(SAMSVAE, "minify_adata")
