"""Every baseline against a table that can be worked out by hand."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import scvi_sams
from scvi_sams.evaluation import (
    AdditiveEffects,
    BilinearRidge,
    ConditionMean,
    MatchingMean,
    NearestMeasuredCombination,
    NoChange,
    PerturbedMean,
    batch_matched_treatment_effect,
    observed_average_treatment_effect,
)

# Three genes; A, B, C and D alone, A+C and B+D together.
EFFECTS = pd.DataFrame(
    [[1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 2, 1], [2, 0, 4], [0, 3, 1]],
    index=["A", "B", "C", "D", "A+C", "B+D"],
    columns=["g1", "g2", "g3"],
    dtype=float,
)
MEAN = np.array([3, 7, 9]) / 6
SINGLE_MEAN = np.array([1, 4, 4]) / 4


def predicted(baseline, condition, effects=EFFECTS):
    table = baseline.fit(effects).predict([condition])
    return table.X[0], table.obs["fallback"].iloc[0]


@pytest.mark.parametrize(
    ("baseline", "condition", "expected"),
    [
        (NoChange(), "A+B", [0, 0, 0]),
        (PerturbedMean(), "A+B", MEAN),
        (ConditionMean(), "A+C", [2, 0, 4]),
        (ConditionMean(), "C+A", [2, 0, 4]),
        (AdditiveEffects(), "A", [1, 0, 0]),
        (AdditiveEffects(), "A+B", [1, 2, 0]),
        (AdditiveEffects(), "A+B+C", [1, 2, 3]),
        (AdditiveEffects(), "A+A", [2, 0, 0]),
        (MatchingMean(), "A+B", [0.5, 1, 0]),
        (MatchingMean(), "A+B+C", [1 / 3, 2 / 3, 1]),
        # B+C sums to (0, 2, 3), nearer to B+D with (0, 4, 1) than to A+C with (1, 0, 3)? Squared
        # distances are 8 and 5: A+C.
        (NearestMeasuredCombination(), "B+C", [2, 0, 4]),
        # D+D sums to (0, 4, 2): distances to B+D and A+C are 1 and 18.
        (NearestMeasuredCombination(), "D+D", [0, 3, 1]),
        # Itself is not a neighbour.
        (NearestMeasuredCombination(), "A+C", [0, 3, 1]),
    ],
)
def test_predictions_worked_out_by_hand(baseline, condition, expected):
    effect, fallback = predicted(baseline, condition)
    np.testing.assert_allclose(effect, expected)
    assert fallback == ""


@pytest.mark.parametrize(
    ("baseline", "condition", "expected", "reason"),
    [
        (ConditionMean(), "A+D", MEAN, "not measured"),
        (AdditiveEffects(), "A+X", np.array([1, 0, 0]) + SINGLE_MEAN, "X not measured alone"),
        (AdditiveEffects(), "X", SINGLE_MEAN, "X not measured alone"),
        (MatchingMean(), "A+X", (np.array([1, 0, 0]) + SINGLE_MEAN) / 2, "X not measured alone"),
        (NearestMeasuredCombination(), "A+X", MEAN, "X not measured alone"),
        (BilinearRidge(), "g1+X", MEAN, "X not among the genes"),
        (BilinearRidge(), "g1", MEAN, "no training condition among the genes"),
    ],
)
def test_what_a_baseline_cannot_predict_falls_back_and_says_so(
    baseline, condition, expected, reason
):
    effect, fallback = predicted(baseline, condition)
    np.testing.assert_allclose(effect, expected)
    assert reason in fallback


def test_nearest_without_another_combination_is_the_mean():
    effect, fallback = predicted(NearestMeasuredCombination(), "A+B", EFFECTS.iloc[:4])
    np.testing.assert_allclose(effect, EFFECTS.iloc[:4].mean())
    assert "no other combination" in fallback


def test_a_delimiter_of_none_takes_names_whole():
    effect, fallback = predicted(AdditiveEffects(combination_delimiter=None), "A+C")
    np.testing.assert_allclose(effect, [2, 0, 4])
    assert fallback == ""


def test_applies_to():
    baseline = NearestMeasuredCombination().fit(EFFECTS)
    assert baseline.applies_to(["A+X", "A+B"])
    assert not baseline.applies_to(["A+X"])


class TestBilinearRidge:
    @pytest.fixture
    def effects(self):
        rng = np.random.default_rng(0)
        genes = [f"g{k}" for k in range(12)]
        return pd.DataFrame(rng.normal(size=(6, 12)), index=genes[:6], columns=genes)

    def test_coefficients_minimise_the_penalised_error(self, effects):
        ridge = BilinearRidge(n_components=2, ridge_penalty=0.3).fit(effects)
        response = effects.to_numpy().T - ridge.mean_[:, None]
        genes = ridge.gene_embedding_
        conditions = genes[:6]

        def loss(flat):
            k = flat.reshape(2, 2)
            return (
                np.sum((response - genes @ k @ conditions.T) ** 2)
                + 0.3 * np.sum((k @ conditions.T) ** 2)
                + 0.3 * np.sum((genes @ k) ** 2)
                + 0.3**2 * np.sum(k**2)
            )

        best = minimize(loss, np.zeros(4), tol=1e-12)
        np.testing.assert_allclose(ridge.coefficients_.ravel(), best.x, atol=1e-5)

    def test_prediction_is_the_formula(self, effects):
        predicted = BilinearRidge(n_components=2).fit(effects).predict(["g8", "g0+g8"])
        response = effects.to_numpy().T
        b = response.mean(axis=1, keepdims=True)
        u, s, _ = np.linalg.svd(response - b, full_matrices=False)
        g = (u * s)[:, :2]
        p = g[:6]
        ridge = 0.1 * np.eye(2)
        k = np.linalg.inv(g.T @ g + ridge) @ g.T @ (response - b) @ p
        k = k @ np.linalg.inv(p.T @ p + ridge)
        np.testing.assert_allclose(predicted.X[0], g @ k @ g[8] + b.ravel())
        np.testing.assert_allclose(predicted.X[1], g @ k @ (g[0] + g[8]) + b.ravel())
        assert (predicted.obs["fallback"] == "").all()

    def test_a_perturbation_may_be_named_other_than_its_gene(self, effects):
        renamed = effects.rename(index=lambda name: f"sg_{name}")
        mapping = {name: name.removeprefix("sg_") for name in renamed.index}
        ridge = BilinearRidge(perturbed_genes=mapping).fit(renamed)
        expected = BilinearRidge().fit(effects).predict(["g3"]).X
        np.testing.assert_allclose(ridge.predict(["sg_g3"]).X, expected)

    def test_conditions_without_an_embedding_take_no_part_in_the_regression(self, effects):
        other = pd.DataFrame(5.0, index=["no gene"], columns=effects.columns)
        ridge = BilinearRidge().fit(pd.concat([effects, other]))
        assert ridge.coefficients_ is not None
        assert ridge.predict(["no gene"]).obs["fallback"].iloc[0]

    def test_identical_effects_are_their_mean(self, effects):
        same = effects.copy()
        same[:] = effects.iloc[[0]].to_numpy()
        np.testing.assert_allclose(BilinearRidge().fit(same).predict(["g1"]).X[0], same.iloc[0])

    @pytest.mark.parametrize("argument", [{"n_components": 0}, {"ridge_penalty": 0.0}])
    def test_arguments_out_of_range(self, argument):
        with pytest.raises(ValueError, match=next(iter(argument))):
            BilinearRidge(**argument)


class TestTables:
    def test_expression_is_that_of_controls_plus_the_effect(self):
        adata = scvi_sams.datasets.simulated_screen(n_cells=1_000, n_genes=50)
        effects = observed_average_treatment_effect(adata, "perturbation", "control")
        table = ConditionMean().fit(effects).predict(["P002"])
        cells = adata[adata.obs["perturbation"] == "P002"]
        library = np.asarray(cells.X.sum(axis=1))
        expected = np.log2(1 + 1e4 * cells.X.toarray() / library).mean(axis=0)
        np.testing.assert_allclose(table.layers["expression"][0], expected, atol=1e-4)
        assert table.var_names.equals(adata.var_names)

    @pytest.mark.parametrize(
        ("effects", "message"),
        [
            (EFFECTS.iloc[:0], "no condition"),
            (EFFECTS.where(EFFECTS > 0), "'A' are not finite"),
            (EFFECTS.rename(index={"B+D": "C+A"}), "order of their parts"),
        ],
    )
    def test_tables_that_cannot_be_used(self, effects, message):
        with pytest.raises(scvi_sams.ScreenError, match=message):
            NoChange().fit(effects)

    def test_not_fitted(self):
        with pytest.raises(RuntimeError, match="fit"):
            NoChange().predict(["A"])


class TestBatches:
    @pytest.fixture
    def screen(self):
        """Two batches: in the second, gene 0 is high in every cell; A is mostly there."""
        rng = np.random.default_rng(0)
        batch = np.repeat(["one", "two"], 300)
        label = np.concatenate(
            [
                np.repeat(["control", "A", "B"], [200, 20, 80]),
                np.repeat(["control", "A"], [100, 200]),
            ]
        )
        rate = np.full((600, 4), 20.0)
        rate[batch == "two", 0] *= 4
        rate[label == "A", 1] *= 3
        obs = pd.DataFrame({"perturbation": label, "batch": batch})
        obs.index = obs.index.astype(str)
        return ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs.assign(library=200.0))

    def test_without_batches_it_is_the_observed_effect(self, screen):
        matched = batch_matched_treatment_effect(screen, "perturbation", "control")
        plain = observed_average_treatment_effect(screen, "perturbation", "control")
        plain = plain[matched.obs_names].copy()
        np.testing.assert_allclose(matched.X, plain.X, atol=1e-6)
        for layer in plain.layers:
            np.testing.assert_allclose(matched.layers[layer], plain.layers[layer], rtol=1e-4)
        pd.testing.assert_frame_equal(matched.var, plain.var, rtol=1e-4)
        assert (matched.obs["n_cells"] == plain.obs["n_cells"]).all()

    def test_each_cell_is_compared_with_its_own_batch(self, screen):
        matched = batch_matched_treatment_effect(
            screen, "perturbation", "control", batch_key="batch", size_factor_key="library"
        )
        expression = np.log2(1 + 1e4 * screen.X / 200)
        obs = screen.obs

        def mean(label, batch):
            return expression[(obs["perturbation"] == label) & (obs["batch"] == batch)].mean(0)

        expected = sum(
            share * (mean("A", batch) - mean("control", batch))
            for batch, share in (("one", 20 / 220), ("two", 200 / 220))
        )
        np.testing.assert_allclose(matched["A"].X[0], expected, rtol=1e-4, atol=1e-5)
        assert abs(matched["A"].X[0, 0]) < 0.1 < 1 < matched["A"].X[0, 1]

    def test_standard_errors_are_those_over_many_screens(self):
        rng = np.random.default_rng(1)
        effects, errors = [], []
        obs = pd.DataFrame(
            {
                "perturbation": np.tile(["control", "A"], 30),
                "batch": np.repeat(["one", "two"], [40, 20]),
                "library": 100.0,
            }
        )
        obs.index = obs.index.astype(str)
        for _ in range(150):
            counts = rng.poisson(np.where(obs["batch"] == "one", 5, 30)[:, None], (60, 3)) + 1.0
            table = batch_matched_treatment_effect(
                ad.AnnData(counts, obs=obs),
                "perturbation",
                "control",
                batch_key="batch",
                size_factor_key="library",
            )
            effects.append(table.X[0])
            errors.append(table.layers["standard_error"][0])
        np.testing.assert_allclose(np.mean(errors, 0), np.std(effects, 0), rtol=0.2)

    def test_a_batch_without_controls_is_compared_with_all(self, screen):
        kept = screen[
            ~((screen.obs["batch"] == "one") & (screen.obs["perturbation"] == "control"))
        ].copy()
        matched = batch_matched_treatment_effect(
            kept, "perturbation", "control", batch_key="batch", size_factor_key="library"
        )
        plain = observed_average_treatment_effect(
            kept, "perturbation", "control", size_factor_key="library"
        )
        np.testing.assert_allclose(matched["B"].X, plain["B"].X, atol=1e-5)

    def test_min_cells_and_order_of_parts(self, screen):
        screen.obs["perturbation"] = screen.obs["perturbation"].replace({"A": "Z+A"})
        matched = batch_matched_treatment_effect(screen, "perturbation", "control", min_cells=100)
        assert list(matched.obs_names) == ["A+Z"]

    def test_a_cell_without_a_batch_is_an_error(self, screen):
        screen.obs.loc["3", "batch"] = None
        with pytest.raises(scvi_sams.ScreenError, match="1 cells have no batch"):
            batch_matched_treatment_effect(screen, "perturbation", "control", "batch")
