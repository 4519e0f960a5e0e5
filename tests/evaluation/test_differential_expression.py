from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import (
    differential_expression_agreement,
    observed_average_treatment_effect,
    observed_differential_expression,
)

KEYS = ("perturbation", "control")


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """Six conditions, 60 genes: the k-th doubles genes 5k and 5k + 1 and quarters the next two."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", *(f"P{k}" for k in range(6))], [150, *[60] * 6])
    mean = np.full((len(labels), 60), 6.0)
    for k in range(6):
        mean[labels == f"P{k}", 5 * k : 5 * k + 4] *= [2, 2, 0.25, 0.25]
    counts = rng.poisson(mean * rng.gamma(10, 0.1, size=(len(labels), 1)))
    counts[:, 59] = 0
    obs = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(len(labels))])
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs)
    adata.var_names = [f"g{i}" for i in range(60)]
    return adata[rng.permutation(adata.n_obs)].copy()


@pytest.fixture(scope="module")
def observed(screen) -> ad.AnnData:
    return observed_differential_expression(screen, *KEYS)


class TestObserved:
    def test_effects_are_the_average_treatment_effects(self, screen, observed):
        effects = observed_average_treatment_effect(screen, *KEYS)
        np.testing.assert_array_equal(observed.X, effects.X)
        assert observed.obs.equals(effects.obs)
        assert observed.var.equals(effects.var)

    def test_agrees_with_one_gene_at_a_time(self, screen, observed):
        counts = screen.X.toarray().astype(float)
        expression = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True)).round(10)
        labels = screen.obs["perturbation"].to_numpy()
        for condition in ("P1", "P4"):
            expected = [
                mannwhitneyu(
                    expression[labels == condition, gene],
                    expression[labels == "control", gene],
                    method="asymptotic",
                ).pvalue
                for gene in range(59)
            ]
            found = observed[condition].layers["p_value"].ravel()
            np.testing.assert_allclose(found[:59], expected, rtol=1e-9)
            assert found[59] == 1  # no count in any cell

    def test_false_discovery_rates_by_hand(self, observed):
        p_values = observed["P2"].layers["p_value"].ravel()
        order = np.argsort(p_values)
        stepwise = p_values[order] * 60 / np.arange(1, 61)
        expected = np.minimum.accumulate(stepwise[::-1])[::-1].clip(max=1)
        np.testing.assert_allclose(observed["P2"].layers["fdr"].ravel()[order], expected)

    def test_finds_what_was_changed_and_little_else(self, observed):
        called = observed.layers["fdr"] < 0.05
        truth = np.zeros((6, 60), dtype=bool)
        for k in range(6):
            truth[k, 5 * k : 5 * k + 4] = True
        assert called[truth].mean() > 0.95
        assert called[~truth].mean() < 0.02

    def test_controls_against_controls_are_within_the_rate(self, screen):
        controls = screen[screen.obs["perturbation"] == "control"].copy()
        n_called = 0
        for seed in range(10):
            halves = np.random.default_rng(seed).permutation(150) < 75
            controls.obs["perturbation"] = np.where(halves, "control", "fake")
            table = observed_differential_expression(controls, *KEYS)
            n_called += (table.layers["fdr"] < 0.05).any()
        assert n_called <= 3  # with no true change, the rate is that of any call at all

    def test_storage_and_order_do_not_matter(self, screen, observed):
        other = ad.AnnData(np.zeros(screen.shape), obs=screen.obs, var=screen.var)
        other.layers["counts"] = screen.X.toarray()
        table = observed_differential_expression(
            other[::-1, ::-1], *KEYS, layer="counts", conditions=["P5", "P0"]
        )
        expected = observed[["P5", "P0"], observed.var_names[::-1]]
        np.testing.assert_allclose(table.layers["fdr"], expected.layers["fdr"], rtol=1e-9)

    @pytest.mark.slow  # pdex compiles itself on its first use
    def test_agrees_with_pdex(self, screen, observed):
        pdex = pytest.importorskip("pdex")
        counts = screen.X.toarray().astype(float)
        normalised = ad.AnnData(
            np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).round(10),
            obs=screen.obs.astype("category"),
            var=screen.var,
        )
        table = pdex.pdex(
            normalised, groupby="perturbation", reference="control", is_log1p=True, threads=1
        ).to_dict(as_series=False)
        frame = pd.DataFrame({name: table[name] for name in ("target", "feature", "fdr")})
        theirs = frame.pivot(index="target", columns="feature", values="fdr")
        theirs = theirs.loc[observed.obs_names, observed.var_names]
        np.testing.assert_allclose(observed.layers["fdr"], theirs, rtol=1e-6)

    def test_equal_shares_of_libraries_are_ties(self):
        counts = np.outer([1.0, 3, 7, 11, 13, 17], [1.0, 2, 3]).repeat(2, axis=0)
        labels = ["control", "A"] * 6  # the same shares in libraries of different size
        adata = ad.AnnData(
            sp.csr_matrix(counts),
            obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(12)]),
        )
        assert (observed_differential_expression(adata, *KEYS).layers["p_value"] == 1).all()

    def test_one_value_in_each_group(self):
        adata = ad.AnnData(
            np.array([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 5.0, 5.0], [0.0, 5.0, 5.0]]),
            obs=pd.DataFrame(
                {"perturbation": ["control", "control", "A", "A"]}, index=list("wxyz")
            ),
        )
        p_values = observed_differential_expression(adata, *KEYS).layers["p_value"][0]
        assert p_values[1] == 1  # the same everywhere
        assert p_values[0] == p_values[2] < 1  # constant in each group, but not the same

    def test_refusals(self, screen):
        with pytest.raises(ScreenError, match="'P9' with 0"):
            observed_differential_expression(screen, *KEYS, conditions=["P9"])
        with pytest.raises(ScreenError, match="no layer 'counts'"):
            observed_differential_expression(screen, *KEYS, layer="counts")


class TestAgreement:
    def test_perfect(self, observed):
        significant = observed.layers["fdr"] < 0.05
        observed = observed.copy()
        observed.X = observed.X + np.where(significant, 10 * np.sign(observed.X), 0)
        predicted = observed.copy()
        half_width = np.where(significant, 0.5, 2) * np.abs(observed.X)
        predicted.layers = {"lower": observed.X - half_width, "upper": observed.X + half_width}
        table = differential_expression_agreement(predicted[::-1, ::-1], observed)
        assert list(table.index) == list(observed.obs_names[::-1])
        assert (table["n_differential"] == significant.sum(axis=1)[::-1]).all()
        assert (table["detected"] == 1).all()
        assert (table["detected_elsewhere"] == 0).all()
        assert (table["sign_agreement"] == 1).all()
        assert (table["auroc"] == 1).all()

    def test_one_prediction_for_all_and_none(self, observed):
        constant = pd.DataFrame(1.0, index=observed.obs_names, columns=observed.var_names)
        table = differential_expression_agreement(constant, observed)
        assert (table["auroc"] == 0.5).all()
        assert table[["detected", "detected_elsewhere"]].isna().all(axis=None)
        rising = (observed.layers["fdr"] < 0.05) & (observed.X > 0)
        assert table["sign_agreement"].to_list() == pytest.approx(
            list(rising.sum(axis=1) / table["n_differential"])
        )
        nothing = differential_expression_agreement(0 * constant, observed)
        assert (nothing["sign_agreement"] == 0).all()

    def test_permuted_genes_are_chance(self, observed):
        rng = np.random.default_rng(0)
        tables = []
        for _ in range(40):
            permuted = observed.to_df().iloc[:, rng.permutation(60)]
            permuted.columns = observed.var_names
            tables.append(differential_expression_agreement(permuted, observed))
        means = pd.concat(tables).mean()
        assert means["auroc"] == pytest.approx(0.5, abs=0.03)
        assert means["sign_agreement"] == pytest.approx(0.5, abs=0.15)

    def test_agrees_with_loops(self, observed):
        rng = np.random.default_rng(1)
        predicted = observed.copy()
        predicted.X = observed.X + rng.normal(size=observed.shape)
        predicted.layers = {"lower": predicted.X - 0.8, "upper": predicted.X + 0.8}
        table = differential_expression_agreement(predicted, observed, fdr=0.2)
        for row, condition in enumerate(observed.obs_names):
            changed = observed.layers["fdr"][row] < 0.2
            sure = np.abs(predicted.X[row]) > 0.8
            same = predicted.X[row] * observed.X[row] > 0
            assert table.loc[condition].to_list() == pytest.approx(
                [
                    changed.sum(),
                    np.mean([s for s, c in zip(sure, changed, strict=True) if c]),
                    np.mean([s for s, c in zip(sure, changed, strict=True) if not c]),
                    np.mean([s for s, c in zip(same, changed, strict=True) if c]),
                    roc_auc_score(changed, np.abs(predicted.X[row])),
                ]
            )

    def test_nothing_differential_and_nothing_predicted(self, observed):
        quiet = observed.copy()
        quiet.layers["fdr"][0] = 1.0
        predicted = observed.to_df()
        predicted.iloc[1] = np.nan
        table = differential_expression_agreement(predicted, quiet)
        assert table["n_differential"].iloc[0] == 0
        assert table.iloc[0, 1:].isna().all()
        assert table.iloc[1, 1:].isna().all()
        assert table["sign_agreement"].iloc[2:].notna().all()

    def test_refusals(self, screen, observed):
        with pytest.raises(ValueError, match=r"fdr=5 must be between 0 and 1"):
            differential_expression_agreement(observed, observed, fdr=5)
        effects = observed_average_treatment_effect(screen, *KEYS)
        with pytest.raises(ScreenError, match="no layer 'fdr'"):
            differential_expression_agreement(observed, effects)
        with pytest.raises(ScreenError, match="'P0'"):
            differential_expression_agreement(observed, observed[1:])
