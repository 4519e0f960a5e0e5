from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError, tl
from scvi_sams.model.counterfactual import about_expectation

from ._members import SHIFTED, fit_member
from ._recovered import observed, pairs_of, recovered
from .conftest import SETUP, fit, small_screen

CONDITIONS = ["P001", "P002+P005", "P001+P006"]


def _scvi_tools_columns(model):
    table = model.differential_expression(
        groupby="perturbation", group1="P001", group2="control", mode="change", silent=True
    )
    return set(table.columns)


class TestTable:
    def test_shape_of_scvi_tools(self, fitted):
        table = tl.differential_expression(
            fitted, CONDITIONS, n_samples=10, counterfactual=fitted.counterfactual(n_cells=10)
        )
        assert len(table) == 3 * 80
        # What is left out is about measured cells, or of one way to choose a pseudocount.
        left_out = _scvi_tools_columns(fitted) - set(table.columns)
        assert left_out <= {
            "pseudocounts",
            "raw_mean1",
            "raw_mean2",
            "non_zeros_proportion1",
            "non_zeros_proportion2",
            "raw_normalized_mean1",
            "raw_normalized_mean2",
            "lfc_shrunk",
        }
        assert table["group1"].unique().tolist() == CONDITIONS
        assert set(table["comparison"]) == {f"{c} vs control" for c in CONDITIONS}
        for _, of_condition in table.groupby("group1"):
            assert set(of_condition.index) == set(fitted.adata.var_names)
            assert of_condition["proba_de"].is_monotonic_decreasing

    def test_effects_are_those_of_the_average_treatment_effect(self, any_fitted):
        """The same draws, cells and expectations, from the same seed."""
        sizes = {"n_cells": 30, "basal": "control"}
        cells = any_fitted.counterfactual(**sizes, seed=5)
        table = tl.differential_expression(
            any_fitted, CONDITIONS, n_samples=20, counterfactual=cells
        )
        scvi.settings.seed = 5
        effect = any_fitted.get_average_treatment_effect(
            CONDITIONS, method="mean", n_samples=20, **sizes
        )
        difference = (
            table.assign(difference=table["scale1"] - table["scale2"])
            .set_index("group1", append=True)["difference"]
            .unstack(0)
            .loc[CONDITIONS, any_fitted.adata.var_names]
        )
        np.testing.assert_allclose(difference, effect.X, rtol=1e-3, atol=1e-3)

    def test_brute_force(self, fitted, monkeypatch):
        """Log fold changes of the draws, decoded one by one."""
        drawn = []
        original = fitted.module.sample_globals

        def record(*args, **kwargs):
            drawn.append(about_expectation(fitted.module, original(*args, **kwargs)))
            return drawn[-1]

        monkeypatch.setattr(fitted.module, "sample_globals", record)
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        indices = np.arange(0, 600, 40)
        table = tl.differential_expression(
            fitted,
            ["P001+P003"],
            reference="P002",
            n_samples=6,
            pseudocount=0.5,
            delta=0.1,
            counterfactual=fitted.counterfactual(basal=indices, gene_effects=False),
        )
        (draws,) = drawn
        basal = fitted.get_latent_representation(indices=indices, representation="basal")
        states = fitted.module.to_network(torch.as_tensor(basal))
        library = torch.ones(len(indices), 1)
        batch = torch.zeros(len(indices), 1, dtype=torch.long)
        position = {row: k for k, row in enumerate(draws.rows.tolist())}
        lfc = []
        for draw in range(6):
            scale = []
            for condition in ([0, 2], [1]):
                shift = sum(draws.effects[draw, position[t]] for t in condition)
                with torch.inference_mode():
                    outputs = fitted.module.generative(states + shift, library, batch)
                scale.append(outputs["px"].scale.mean(0).numpy())
            lfc.append(np.log2((1e4 * scale[0] + 0.5) / (1e4 * scale[1] + 0.5)))
        lfc = np.array(lfc)
        table = table.loc[fitted.adata.var_names]
        np.testing.assert_allclose(table["lfc_mean"], lfc.mean(0), atol=1e-4)
        np.testing.assert_allclose(table["lfc_median"], np.median(lfc, 0), atol=1e-4)
        np.testing.assert_allclose(table["lfc_std"], lfc.std(0), atol=1e-4)
        clear = np.abs(np.abs(lfc) - 0.1).min(0) > 1e-3
        proba_de = (np.abs(lfc) >= 0.1).mean(0)
        np.testing.assert_allclose(table["proba_de"][clear], proba_de[clear])
        assert (table["group2"] == "P002").all()

    def test_swapped_and_equal(self, fitted):
        """A comparison the other way round has the other sign, one with itself has nothing."""
        sizes = {"n_samples": 30, "counterfactual": fitted.counterfactual(n_cells=20)}
        genes = fitted.adata.var_names
        there = tl.differential_expression(fitted, ["P001"], reference="P002", **sizes).loc[genes]
        back = tl.differential_expression(fitted, ["P002"], reference="P001", **sizes).loc[genes]
        np.testing.assert_allclose(there["lfc_mean"], -back["lfc_mean"], atol=1e-5)
        np.testing.assert_allclose(there["proba_de"], back["proba_de"], atol=1e-9)
        same = tl.differential_expression(fitted, ["P001"], reference="P001", **sizes)
        assert (same["lfc_mean"] == 0).all()
        assert not same["is_de_fdr_0.05"].any()
        assert (same["lfsr"] == 1).all()

    def test_control_changes_nothing(self, fitted):
        table = tl.differential_expression(
            fitted, ["control"], n_samples=3, counterfactual=fitted.counterfactual(n_cells=5)
        )
        assert (table["lfc_mean"] == 0).all()

    def test_all_singles_by_default(self, fitted):
        table = tl.differential_expression(
            fitted, n_samples=3, counterfactual=fitted.counterfactual(n_cells=5)
        )
        assert table["group1"].unique().tolist() == fitted.perturbation_names

    def test_seed(self, fitted):
        first, again, other = (
            tl.differential_expression(
                fitted, CONDITIONS, n_samples=5, counterfactual=fitted.counterfactual(seed=seed)
            )
            for seed in (0, 0, 1)
        )
        pd.testing.assert_frame_equal(again, first)
        assert (other.sort_index()["lfc_mean"] != first.sort_index()["lfc_mean"]).any()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"conditions": ["P0O1"]}, UnknownPerturbationError, "P001"),
            ({"conditions": ["P001", "P001"]}, ScreenError, "P001"),
            ({"reference": ["P001", "P002"]}, ScreenError, "more than one"),
            ({"n_samples": 0}, ScreenError, "n_samples=0"),
            ({"delta": -1}, ValueError, "delta=-1"),
            ({"fdr": 0}, ValueError, "fdr=0"),
            ({"credible_level": 1}, ValueError, "credible_level=1"),
            ({"pseudocount": 0}, ValueError, "pseudocount=0"),
        ],
    )
    def test_errors(self, fitted, arguments, error, message):
        with pytest.raises(error, match=message):
            tl.differential_expression(fitted, **arguments)


@pytest.mark.parametrize("member", SHIFTED)
def test_family(member):
    model = fit_member(member, covariates=True)
    table = tl.differential_expression(
        model, ["P001+P002"], n_samples=4, counterfactual=model.counterfactual(n_cells=8)
    )
    assert np.isfinite(table.select_dtypes(float)).all(axis=None)


def test_without_a_posterior():
    model = fit_member("ConditionalVAE")
    with pytest.raises(NotImplementedError, match="get_average_treatment_effect"):
        tl.differential_expression(model, ["P001"])


def test_features_are_subtracted():
    adata = small_screen()
    adata.layers["features"] = np.log1p(adata.layers["counts"].toarray())
    SAMSVAE.setup_anndata(adata, **(SETUP | {"layer": "features"}), is_count_data=False)
    model = fit(adata, max_epochs=2, gene_likelihood="normal")
    table = tl.differential_expression(
        model, ["P001"], n_samples=4, counterfactual=model.counterfactual(n_cells=10)
    )
    np.testing.assert_allclose(table["lfc_mean"], table["scale1"] - table["scale2"], atol=1e-5)


@pytest.mark.slow
def test_finds_the_genes_of_a_simulation():
    """Against a tenfold of cells of the same truth: direction, ranking, and few false calls."""
    model = recovered()
    effects = observed().to_df()
    conditions = [name for name in effects.index if "+" not in name]
    conditions += [name for name in effects.index if "+" in name][-10:]  # never measured
    assert not set(conditions[-10:]) & set(pairs_of(model.adata))
    table = tl.differential_expression(model, conditions, delta=0.25)
    for condition in conditions:
        of_condition = table[table["group1"] == condition]
        truth = effects.loc[condition, of_condition.index]
        assert np.corrcoef(of_condition["lfc_mean"], truth)[0, 1] > 0.8
    truth = np.concatenate(
        [effects.loc[c, table.index[table["group1"] == c]].to_numpy() for c in conditions]
    )
    called = table["is_de_fdr_0.05"].to_numpy()
    assert called.sum() > 100
    assert (np.sign(table["lfc_mean"]) == np.sign(truth))[called].mean() > 0.95
