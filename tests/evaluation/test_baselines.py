"""Every baseline against a table that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import scvi_sams
from scvi_sams.evaluation import BASELINES

# Three genes; A, B, C and D alone, A+C and B+D together.
EFFECTS = pd.DataFrame(
    [[1, 0, 0], [0, 2, 0], [0, 0, 3], [0, 2, 1], [2, 0, 4], [0, 3, 1]],
    index=["A", "B", "C", "D", "A+C", "B+D"],
    columns=["g1", "g2", "g3"],
    dtype=float,
)
MEAN = np.array([3, 7, 9]) / 6
SINGLE_MEAN = np.array([1, 4, 4]) / 4


def predicted(baseline, condition, effects=EFFECTS, **options):
    table = BASELINES[baseline](effects, [condition], **options)
    return table.X[0], table.obs["fallback"].iloc[0]


@pytest.mark.parametrize(
    ("baseline", "condition", "expected"),
    [
        ("no change", "A+B", [0, 0, 0]),
        ("perturbed mean", "A+B", MEAN),
        ("training mean", "A+C", [2, 0, 4]),
        ("training mean", "C+A", [2, 0, 4]),
        ("additive", "A", [1, 0, 0]),
        ("additive", "A+B", [1, 2, 0]),
        ("additive", "A+B+C", [1, 2, 3]),
        ("additive", "A+A", [2, 0, 0]),
        ("matching mean", "A+B", [0.5, 1, 0]),
        ("matching mean", "A+B+C", [1 / 3, 2 / 3, 1]),
        # B+C sums to (0, 2, 3), nearer to B+D with (0, 4, 1) than to A+C with (1, 0, 3)? Squared
        # distances are 8 and 5: A+C.
        ("nearest combination", "B+C", [2, 0, 4]),
        # D+D sums to (0, 4, 2): distances to B+D and A+C are 1 and 18.
        ("nearest combination", "D+D", [0, 3, 1]),
        # Itself is not a neighbour.
        ("nearest combination", "A+C", [0, 3, 1]),
    ],
)
def test_predictions_worked_out_by_hand(baseline, condition, expected):
    effect, fallback = predicted(baseline, condition)
    np.testing.assert_allclose(effect, expected)
    assert fallback == ""


@pytest.mark.parametrize(
    ("baseline", "condition", "expected", "reason"),
    [
        ("training mean", "A+D", MEAN, "not measured"),
        ("additive", "A+X", np.array([1, 0, 0]) + SINGLE_MEAN, "X not measured alone"),
        ("additive", "X", SINGLE_MEAN, "X not measured alone"),
        ("matching mean", "A+X", (np.array([1, 0, 0]) + SINGLE_MEAN) / 2, "X not measured alone"),
        ("nearest combination", "A+X", MEAN, "X not measured alone"),
        ("bilinear ridge", "g1+X", MEAN, "X not among the genes"),
        ("bilinear ridge", "g1", MEAN, "no training condition among the genes"),
    ],
)
def test_what_a_baseline_cannot_predict_falls_back_and_says_so(
    baseline, condition, expected, reason
):
    effect, fallback = predicted(baseline, condition)
    np.testing.assert_allclose(effect, expected)
    assert reason in fallback


def test_nearest_without_another_combination_is_the_mean():
    effect, fallback = predicted("nearest combination", "A+B", EFFECTS.iloc[:4])
    np.testing.assert_allclose(effect, EFFECTS.iloc[:4].mean())
    assert "no other combination" in fallback


def test_a_delimiter_of_none_takes_names_whole():
    effect, fallback = predicted("additive", "A+C", combination_delimiter=None)
    np.testing.assert_allclose(effect, [2, 0, 4])
    assert fallback == ""


class TestBilinearRidge:
    @pytest.fixture
    def effects(self):
        rng = np.random.default_rng(0)
        genes = [f"g{k}" for k in range(12)]
        return pd.DataFrame(rng.normal(size=(6, 12)), index=genes[:6], columns=genes)

    def test_coefficients_minimise_the_penalised_error(self, effects):
        mean = effects.to_numpy().mean(axis=0)
        response = (effects.to_numpy() - mean).T
        left, singular, _ = np.linalg.svd(response, full_matrices=False)
        genes = (left * singular)[:, :2]
        conditions = genes[:6]

        def loss(flat):
            k = flat.reshape(2, 2)
            return (
                np.sum((response - genes @ k @ conditions.T) ** 2)
                + 0.3 * np.sum((k @ conditions.T) ** 2)
                + 0.3 * np.sum((genes @ k) ** 2)
                + 0.3**2 * np.sum(k**2)
            )

        best = minimize(loss, np.zeros(4), tol=1e-12).x.reshape(2, 2)
        predicted = BASELINES["bilinear ridge"](
            effects, ["g2", "g8"], n_components=2, ridge_penalty=0.3
        )
        np.testing.assert_allclose(predicted.X, mean + genes[[2, 8]] @ best.T @ genes.T, atol=1e-5)

    def test_prediction_is_the_formula(self, effects):
        predicted = BASELINES["bilinear ridge"](effects, ["g8", "g0+g8"], n_components=2)
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
        ridge = BASELINES["bilinear ridge"]
        found = ridge(renamed, ["sg_g3"], perturbed_genes=mapping)
        np.testing.assert_allclose(found.X, ridge(effects, ["g3"]).X)

    def test_conditions_without_an_embedding_take_no_part_in_the_regression(self, effects):
        other = pd.DataFrame(5.0, index=["no gene"], columns=effects.columns)
        found = BASELINES["bilinear ridge"](pd.concat([effects, other]), ["no gene", "g3"])
        assert found.obs["fallback"].ne("").tolist() == [True, False]

    def test_identical_effects_are_their_mean(self, effects):
        same = effects.copy()
        same[:] = effects.iloc[[0]].to_numpy()
        found = BASELINES["bilinear ridge"](same, ["g1"])
        np.testing.assert_allclose(found.X[0], same.iloc[0])

    @pytest.mark.parametrize("argument", [{"n_components": 0}, {"ridge_penalty": 0.0}])
    def test_arguments_out_of_range(self, effects, argument):
        with pytest.raises(ValueError, match=next(iter(argument))):
            BASELINES["bilinear ridge"](effects, ["g1"], **argument)


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        (EFFECTS.iloc[:0], "no condition"),
        (EFFECTS.where(EFFECTS > 0), "'A' are not finite"),
        (EFFECTS.rename(index={"B+D": "C+A"}), "order of their parts"),
    ],
)
def test_tables_that_cannot_be_used(effects, message):
    with pytest.raises(scvi_sams.ScreenError, match=message):
        BASELINES["no change"](effects, ["A"])


class TestControlCovariance:
    def test_is_the_regression_of_controls_on_the_target(self):
        """With one target, what changes by least squares is the effect along a regression."""
        rng = np.random.default_rng(0)
        latent = rng.normal(size=(500, 1))
        values = 3 + latent @ [[1.0, 0.5, 0.0, -1.0]] + 0.1 * rng.normal(size=(500, 4))
        cells = pd.DataFrame(values, columns=["g1", "g2", "g3", "g4"])
        covariance = np.cov(values.T)
        shape = {g: values[:, g].mean() * covariance[g] / covariance[g, g] for g in range(4)}
        effects = pd.DataFrame([-0.7 * shape[0]], index=["g1"], columns=cells.columns)
        rule = BASELINES["control covariance"]
        found = rule(effects, ["g1", "g2", "g1+g4", "X"], controls=cells)
        np.testing.assert_allclose(found.X[0], effects.to_numpy()[0])
        np.testing.assert_allclose(found.X[1], -0.7 * shape[1])
        np.testing.assert_allclose(found.X[2], -0.7 * (shape[0] + shape[3]))
        np.testing.assert_allclose(found.X[3], effects.to_numpy()[0])
        assert found.obs["fallback"].tolist()[:3] == ["", "", ""]
        assert "X not among the genes" in found.obs["fallback"].iloc[3]
        named = rule(effects, ["Y"], controls=cells, perturbed_genes={"Y": "g2"})
        np.testing.assert_allclose(named.X[0], -0.7 * shape[1])

    def test_without_controls_or_targets_it_says_so(self):
        assert "no control cells" in predicted("control covariance", "A")[1]
        cells = pd.DataFrame(np.eye(3), columns=EFFECTS.columns)
        effect, reason = predicted("control covariance", "A", controls=cells)
        np.testing.assert_allclose(effect, MEAN)
        assert "no training condition among the genes" in reason
        with pytest.raises(scvi_sams.ScreenError, match="lacks the gene 'g3'"):
            predicted("control covariance", "A", controls=cells[["g1", "g2"]])
        with pytest.raises(scvi_sams.ScreenError, match="fewer than two cells"):
            predicted("control covariance", "A", controls=cells.iloc[:1])
