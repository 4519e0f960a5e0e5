from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics import (
    _effects,
    effect_correlation,
    effect_correlation_by_condition,
    observed_average_treatment_effect,
    relative_squared_error,
)


@pytest.fixture
def screen() -> ad.AnnData:
    rng = np.random.default_rng(0)
    labels = rng.choice(["control", "NT", "A", "B", "A+B"], 200)
    labels[:3] = "rare"
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(1.5, (200, 12)).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "perturbation": pd.Categorical(labels),
                "library": pd.array(rng.integers(50, 90, 200), dtype="Int32"),
            },
            index=[f"cell{i}" for i in range(200)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )


@pytest.fixture
def effects() -> ad.AnnData:
    rng = np.random.default_rng(1)
    return ad.AnnData(
        rng.normal(size=(4, 6)),
        obs=pd.DataFrame({"n_cells": [5, 6, 7, 8]}, index=list("ABCD")),
        var=pd.DataFrame(index=list("uvwxyz")),
    )


def brute_force(adata, condition, controls=("control",), library=None, scale=1e4) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    size = counts.sum(1) if library is None else adata.obs[library].to_numpy(float)
    expression = np.log2(1 + scale * counts / size[:, None])
    labels = adata.obs["perturbation"]
    return expression[labels == condition].mean(0) - expression[labels.isin(controls)].mean(0)


def observe(adata, **kwargs) -> ad.AnnData:
    arguments = {"perturbation_key": "perturbation", "control": "control"} | kwargs
    return observed_average_treatment_effect(adata, **arguments)


class TestObserved:
    def test_agrees_with_brute_force(self, screen):
        observed = observe(screen)
        assert list(observed.obs_names) == ["A", "A+B", "B", "NT", "rare"]
        assert list(observed.var_names) == list(screen.var_names)
        for name in observed.obs_names:
            np.testing.assert_allclose(
                observed[name].X.ravel(), brute_force(screen, name), rtol=1e-5, atol=1e-6
            )
            n_cells = (screen.obs["perturbation"] == name).sum()
            assert observed.obs.loc[name, "n_cells"] == n_cells
        n_control = (screen.obs["perturbation"] == "control").sum()
        assert observed.uns["n_control_cells"] == n_control

    def test_several_controls_a_library_and_a_scale(self, screen):
        observed = observe(
            screen, control=["control", "NT"], size_factor_key="library", scale=100.0
        )
        assert "NT" not in observed.obs_names
        expected = brute_force(screen, "A+B", ["control", "NT"], "library", 100.0)
        np.testing.assert_allclose(observed["A+B"].X.ravel(), expected, rtol=1e-5, atol=1e-6)

    def test_storage_and_chunks_make_no_difference(self, screen, monkeypatch, tmp_path):
        expected = observe(screen).X
        screen.write_h5ad(tmp_path / "screen.h5ad")
        screen.layers["csc"], screen.layers["dense"] = screen.X.tocsc(), screen.X.toarray()
        monkeypatch.setattr(_effects, "_CELLS_PER_CHUNK", 7)
        for layer in (None, "csc", "dense"):
            np.testing.assert_allclose(observe(screen, layer=layer).X, expected, atol=1e-6)
        backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
        np.testing.assert_allclose(observe(backed).X, expected, atol=1e-6)
        backed.file.close()

    def test_leaves_the_screen_as_it_was(self, screen):
        before = screen.copy()
        observe(screen, size_factor_key="library")
        assert (screen.X != before.X).nnz == 0
        assert screen.X.dtype == np.float32

    def test_conditions_in_the_order_wanted(self, screen):
        observed = observe(screen, conditions=["B", "A"])
        assert list(observed.obs_names) == ["B", "A"]
        np.testing.assert_array_equal(observed.X, observe(screen)[["B", "A"]].X)

    def test_min_cells(self, screen):
        assert "rare" not in observe(screen, min_cells=4).obs_names
        with pytest.raises(ScreenError, match="fewer than 4 cells, the first 'rare' with 3"):
            observe(screen, conditions=["A", "rare"], min_cells=4)

    def test_cells_without_a_label_are_left_out(self, screen):
        labels = screen.obs["perturbation"].copy()
        labels[labels == "NT"] = np.nan
        full = observe(screen)
        screen.obs["perturbation"] = labels
        np.testing.assert_array_equal(observe(screen).X, full[["A", "A+B", "B", "rare"]].X)

    def test_refusals_name_the_culprit(self, screen):
        with pytest.raises(ScreenError, match=r"no obs\['guide'\], only 'perturbation'"):
            observe(screen, perturbation_key="guide")
        with pytest.raises(ScreenError, match="is a control: `control` is 'DMSO'"):
            observe(screen, control="DMSO")
        with pytest.raises(ScreenError, match="no layer 'raw'"):
            observe(screen, layer="raw")
        with pytest.raises(ScreenError, match="fewer than 1 cells, the first 'C' with 0"):
            observe(screen, conditions=["C"])
        with pytest.raises(ScreenError, match="names one twice, or a control"):
            observe(screen, conditions=["A", "control"])
        empty = screen.copy()
        empty.X[4] = 0
        with pytest.raises(ScreenError, match="'cell4' has library size 0"):
            observe(empty)
        screen.obs["library"] = screen.obs["library"].mask(screen.obs_names == "cell7")
        with pytest.raises(ScreenError, match="'cell7' has library size nan"):
            observe(screen, size_factor_key="library")


class TestScores:
    def test_perfect_in_any_order(self, effects):
        shuffled = effects[list("CABD"), list("zyxwvu")]
        assert effect_correlation(shuffled, effects) == pytest.approx(1.0)
        assert relative_squared_error(shuffled, effects) == 0.0

    def test_agree_with_the_formulas(self, effects):
        predicted = effects.copy()
        predicted.X = predicted.X + np.random.default_rng(2).normal(size=(4, 6))
        expected = np.corrcoef(predicted.X.ravel(), effects.X.ravel())[0, 1]
        assert effect_correlation(predicted, effects) == pytest.approx(expected)
        error = ((predicted.X - effects.X) ** 2).sum() / (effects.X**2).sum()
        assert relative_squared_error(predicted, effects) == pytest.approx(error)
        table = effect_correlation_by_condition(predicted, effects)
        assert list(table.index) == list("ABCD")
        for i, name in enumerate("ABCD"):
            row = table.loc[name]
            assert row["pearson"] == pytest.approx(np.corrcoef(predicted.X[i], effects.X[i])[0, 1])
            assert row["relative_squared_error"] == pytest.approx(
                ((predicted.X[i] - effects.X[i]) ** 2).sum() / (effects.X[i] ** 2).sum()
            )

    def test_scale_shows_in_the_error_only(self, effects):
        doubled = effects.copy()
        doubled.X = 2 * doubled.X
        assert effect_correlation(doubled, effects) == pytest.approx(1.0)
        assert relative_squared_error(doubled, effects) == pytest.approx(1.0)

    def test_no_effect_predicted(self, effects):
        nothing = effects.copy()
        nothing.X = np.zeros((4, 6))
        assert relative_squared_error(nothing, effects) == 1.0
        assert np.isnan(effect_correlation(nothing, effects))
        assert np.isnan(relative_squared_error(effects, nothing))

    def test_observed_may_hold_more(self, effects):
        table = effect_correlation_by_condition(effects[["D", "B"], ["x", "u", "v"]], effects)
        assert table["n_cells"].to_dict() == {"D": 8, "B": 6}
        assert table["pearson"].tolist() == pytest.approx([1.0, 1.0])

    def test_sparse_effects(self, effects):
        sparse = effects.copy()
        sparse.X = sp.csr_matrix(sparse.X)
        assert effect_correlation(sparse, effects) == pytest.approx(1.0)

    def test_refuses_what_was_not_observed(self, effects):
        with pytest.raises(ScreenError, match="1 conditions of `predicted`.*'D'"):
            effect_correlation(effects, effects[list("ABC")])
        with pytest.raises(ScreenError, match="2 genes of `predicted`.*'u'"):
            relative_squared_error(effects, effects[:, list("wxyz")])
