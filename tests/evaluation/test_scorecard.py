"""Predictors of known merit, and models, through the scorecard."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import poisson

import scvi_sams
from scvi_sams import ScreenError
from scvi_sams.evaluation import (
    BASELINES,
    observed_effects,
    score_predictions,
    scorecard,
)

KEYS = ("perturbation", "control")
SETUP = {"perturbation_key": "perturbation", "control": "control", "batch_key": "replicate"}


def is_pair(adata):
    return adata.obs["perturbation"].astype(str).str.contains("+", regex=False).to_numpy()


@pytest.fixture(scope="module")
def screen():
    return scvi_sams.datasets.simulated_screen(
        n_cells=3_000, n_genes=120, n_perturbations=12, n_pairs=8, pair_fraction=0.4
    )


@pytest.fixture(scope="module")
def halves(screen):
    """Training cells without pairs, and held-out cells of everything."""
    training = screen[::2]
    return screen[1::2].copy(), training[~is_pair(training)].copy()


@pytest.fixture(scope="module")
def observed(halves):
    return observed_effects(halves[0], *KEYS).to_df()


@pytest.fixture(scope="module")
def card(halves, observed):
    """The held-out effects themselves, their mean, and those of another condition."""
    order = np.roll(np.arange(len(observed)), 7)
    return score_predictions(
        {
            "perfect": observed,
            "constant": observed * 0 + observed.mean(),
            "permuted": observed.iloc[order].set_axis(observed.index),
        },
        *halves,
        *KEYS,
    )


def test_a_perfect_prediction_has_every_perfect_score(card):
    scores = card.table.loc["perfect"]
    assert scores[["pearson", "pearson_top"]].to_numpy() == pytest.approx(1, abs=1e-5)
    assert scores["relative_squared_error"] == pytest.approx(0, abs=1e-6)
    assert scores["perturbation_discrimination"] == 1
    # Observed against the training controls here, whose noise differs a little.
    assert scores["pearson_perturbed"] > 0.97


def test_a_constant_prediction_is_seen_to_be_one(card):
    scores = card.table.loc["constant"]
    n_conditions = card.provenance["n_conditions"]
    assert scores["perturbation_discrimination"] == pytest.approx(
        (n_conditions + 1) / (2 * n_conditions)
    )
    assert scores["collapse_index"] == pytest.approx(0, abs=1e-6)
    assert card.table.loc["no change", "relative_squared_error"] == 1


def test_the_wrong_condition_is_no_better_than_chance(card):
    scores = card.table.loc["permuted"]
    assert abs(scores["perturbation_discrimination"] - 0.5) < 0.2
    assert abs(scores["pearson"]) < 0.4
    assert scores["relative_squared_error"] > 1
    # It is as diverse as the truth all the same.
    assert scores["collapse_index"] == pytest.approx(
        card.table.loc["perfect", "collapse_index"], rel=1e-4
    )


def test_a_prediction_without_variation_does_not_escape_correlation(card):
    for measure in ("pearson", "pearson_top"):
        assert card.table.loc["no change", measure] == 0
    assert card.table.loc["perturbed mean", "pearson_perturbed"] == 0
    assert card.table.loc["additive", "interaction_correlation"] == 0


def test_noise_of_the_parts_is_no_interaction():
    """Half the sum of the parts shares their noise, but says nothing of additive pairs."""
    rng = np.random.default_rng(0)
    singles = [f"P{k}" for k in range(8)]
    pairs = [f"{a}+{b}" for a, b in zip(singles[::2], singles[1::2], strict=True)]
    labels = np.repeat(["control", *singles, *pairs], 30)
    adata = ad.AnnData(rng.poisson(40, size=(len(labels), 200)).astype(np.float32))
    adata.obs["perturbation"] = labels
    training, held_out = adata[~is_pair(adata)].copy(), adata[is_pair(adata)].copy()
    means = observed_effects(training, *KEYS).to_df()
    noisy = pd.DataFrame({pair: means.loc[pair.split("+")].sum() / 2 for pair in pairs}).T
    predictions = {"noisy": pd.concat([noisy, means])}
    card = score_predictions(predictions, held_out, training, *KEYS)
    assert abs(card.table.loc["matching mean", "interaction_correlation"]) < 0.1
    # A prediction of the very same cells is flattered, and the card says so.
    assert card.table.loc["noisy", "interaction_correlation"] > 0.3
    assert any("flatters a model" in note for note in card.notes)


def test_means_are_those_of_the_conditions(card):
    rows = card.per_condition
    means = rows.groupby(["predictor", "measure"], observed=True)["value"].mean()
    for (predictor, measure), mean in means.dropna().items():
        assert card.summary.loc[(predictor, measure), "mean"] == pytest.approx(mean)
    inside = card.summary.dropna()
    assert (inside["lower"] <= inside["mean"] + 1e-9).all()
    assert (inside["mean"] <= inside["upper"] + 1e-9).all()
    assert not rows.duplicated(["predictor", "condition", "measure"]).any()


def test_intervals_are_about_as_wide_as_the_standard_error_says(card):
    values = card.per_condition.query("predictor == 'permuted' and measure == 'pearson'")["value"]
    row = card.summary.loc[("permuted", "pearson")]
    expected = 2 * 1.96 * values.std(ddof=0) / np.sqrt(len(values))
    assert row["upper"] - row["lower"] == pytest.approx(expected, rel=0.15)


def test_baselines_agree_with_their_own_predictions(card, halves, observed):
    held_out, training = halves
    effects = observed_effects(training, *KEYS)
    predicted = BASELINES["additive"](effects, list(observed.index))
    expected = scvi_sams.evaluation.effect_agreement(predicted, observed_effects(held_out, *KEYS))[
        "pearson"
    ]
    rows = card.per_condition.query("predictor == 'additive' and measure == 'pearson'")
    np.testing.assert_allclose(
        rows.set_index("condition")["value"][expected.index], expected, atol=1e-4
    )


def test_the_verdict_names_the_winner(card):
    constant = [line for line in card.verdict if "constant" in line]
    assert any(line.startswith("A baseline wins over constant: delta r (") for line in constant)
    assert not any("constant wins" in line for line in constant)
    assert card.comparison.loc[("constant", "pearson"), "outcome"] == "behind"
    assert card.comparison.loc[("constant", "pearson"), "lead"] < 0
    assert any("perfect wins over the best baseline: delta r (" in line for line in card.verdict)
    assert card.comparison.loc[("perfect", "relative_squared_error"), "outcome"] == "ahead"
    # Of a measure where lower is better, the lead is still above 0 for the better one.
    assert card.comparison.loc[("perfect", "relative_squared_error"), "lead"] > 0


def test_a_baseline_under_another_name_is_level_with_itself(halves, observed):
    effects = observed_effects(halves[1], *KEYS)
    additive = BASELINES["additive"](effects, list(observed.index))
    card = score_predictions({"sum": additive}, *halves, *KEYS, baselines=["additive"])
    measured = card.comparison.query("outcome != 'too few'")
    assert set(measured["outcome"]) == {"level"}
    assert (measured["lead"] == 0).all()
    assert not any("wins" in line for line in card.verdict)


def test_few_conditions_give_no_verdict(halves, observed):
    conditions = list(observed.index[:4])
    card = score_predictions({"perfect": observed}, *halves, *KEYS, conditions=conditions)
    assert set(card.comparison["outcome"]) == {"too few"}
    assert any(line.startswith("Only 4 conditions can be compared") for line in card.verdict)
    assert not any("wins" in line for line in card.verdict)
    assert set(card.per_condition["stratum"]) == {"all"}


def test_one_condition_can_be_scored(halves, observed):
    card = score_predictions({"perfect": observed}, *halves, *KEYS, conditions=["P001"])
    assert card.table.loc["perfect", "pearson"] == pytest.approx(1, abs=1e-5)
    assert "collapse_index" not in card.table
    assert np.isnan(card.summary.loc[("perfect", "perturbation_discrimination"), "mean"])


def test_conditions_left_open_are_left_out_and_said(halves, observed):
    gaps = observed.copy()
    gaps.iloc[:3] = np.nan
    gaps.iloc[3, 0] = np.inf
    card = score_predictions({"gaps": gaps}, *halves, *KEYS)
    assert any("gaps has no prediction for 4 of 20 conditions" in note for note in card.notes)
    row = card.summary.loc[("gaps", "pearson")]
    assert row["n_conditions"] == 16
    assert row["mean"] == pytest.approx(1, abs=1e-5)
    assert np.isfinite(card.summary.loc[("gaps", "relative_squared_error"), "mean"])
    assert card.comparison.loc[("gaps", "pearson"), "n_conditions"] == 16
    assert np.isnan(card.table.loc["gaps", "collapse_index"])


def test_strata_are_thirds_by_the_size_of_the_effect(card, observed):
    rows = card.per_condition.drop_duplicates("condition").set_index("condition")
    size = (observed**2).sum(axis=1)
    of_stratum = size.groupby(rows["stratum"], observed=True)
    assert of_stratum.count().tolist() == [6, 7, 7]
    means = of_stratum.mean()
    assert means["weak"] < means["medium"] < means["strong"]
    by_stratum = card.by_stratum
    assert list(by_stratum.index.get_level_values("stratum").unique()) == list(means.index)
    assert by_stratum.loc[("weak", "no change"), "relative_squared_error"] == 1


def test_held_out_controls_are_used_where_there_are_some(halves, observed):
    held_out, training = halves
    without = held_out[held_out.obs["perturbation"] != "control"].copy()
    controls = training[training.obs["perturbation"] == "control"]
    against_training = observed_effects(ad.concat([without, controls]), *KEYS)
    card = score_predictions({"a": against_training}, without, training, *KEYS)
    assert card.table.loc["a", "relative_squared_error"] == pytest.approx(0, abs=1e-6)
    assert any("controls are held out" in note for note in card.notes)
    assert card.provenance["n_held_out_controls"] == 0
    with_own = score_predictions({"a": against_training}, held_out, training, *KEYS)
    assert with_own.table.loc["a", "relative_squared_error"] > 0.01
    assert not any("controls are held out" in note for note in with_own.notes)


def test_ceilings_are_below_perfect_and_above_chance(card):
    table = card.table
    for measure in ("pearson", "pearson_perturbed"):
        assert 0.5 < table.loc["split half", measure] < table.loc["bootstrap", measure] < 1
    assert (
        table.loc["split half", "relative_squared_error"]
        > table.loc["bootstrap", "relative_squared_error"]
        > 0
    )


def test_normalised_scores_are_0_at_the_mean_response_and_1_at_a_replicate():
    """A half against a half has four times the error of the mean of all n cells: 2/n + 2/n.

    So has a replicate of a third of the cells against all of them: 3/n + 1/n.
    """
    rng = np.random.default_rng(3)
    names = [f"P{k}" for k in range(12)]
    rate = 6 * rng.lognormal(0, 0.25, size=(13, 150))

    def cells(n):
        labels = np.repeat(["control", *names], [4_000, *[n] * 12])
        row = np.repeat(np.arange(13), [4_000, *[n] * 12])
        adata = ad.AnnData(rng.poisson(rate[row]).astype(np.float32))
        adata.obs["perturbation"] = labels
        return adata

    held_out, training, third = cells(60), cells(60), cells(20)
    learned = observed_effects(training, *KEYS).to_df()
    card = score_predictions(
        {"mean": learned * 0 + learned.mean(), "replicate": observed_effects(third, *KEYS)},
        held_out,
        training,
        *KEYS,
        n_bootstrap=10,
    )
    normalised = card.normalised
    for measure in ("relative_squared_error", "pearson", "pearson_perturbed"):
        assert normalised.loc["mean", measure] == pytest.approx(0, abs=1e-6)
        assert normalised.loc["perturbed mean", measure] == 0
        assert normalised.loc["split half", measure] == 1
        assert normalised.loc["replicate", measure] == pytest.approx(1, abs=0.05)
    assert "0 at the mean response, 1 at a split-half replicate" in card.to_markdown()
    without = score_predictions(
        {"replicate": observed_effects(third, *KEYS)},
        held_out,
        training,
        *KEYS,
        baselines=["no change"],
        n_bootstrap=10,
    )
    assert without.normalised.empty
    assert "split-half replicate" not in without.to_markdown()


def test_cells_drawn_from_the_held_out_ones_have_no_distance(halves, observed):
    held_out, training = halves
    cells = held_out[held_out.obs["perturbation"] != "control"].copy()
    cells.obs["condition"] = cells.obs["perturbation"].astype(str)
    cells.obs["library_size"] = np.asarray(cells.X.sum(axis=1)).ravel()
    shuffled = cells.copy()
    shuffled.obs["condition"] = np.random.default_rng(0).permutation(cells.obs["condition"])
    card = score_predictions(
        {"same": observed, "shuffled": observed},
        held_out,
        training,
        *KEYS,
        predicted_cells={"same": cells, "shuffled": shuffled},
    )
    distance = card.table["e_distance"]
    assert distance["same"] < 0.05 < distance["shuffled"]
    assert distance["shuffled"] > distance["split half"]
    assert distance["no change"] > distance["additive"]
    assert np.isnan(distance["bootstrap"])


def test_coverage_is_right_for_right_intervals_and_wrong_for_narrow_ones():
    rng = np.random.default_rng(0)
    names = [f"P{k}" for k in range(8)]
    rate = rng.lognormal(1.5, 0.3, size=(9, 500))
    rate[:, 400:] = 0  # genes without a count say nothing, whatever is predicted
    numbers = np.arange(100)[:, None, None]
    mean = (poisson.pmf(numbers, rate) * np.log2(1 + numbers)).sum(axis=0)
    labels = np.repeat(["control", *names], [200, *[25] * 8])
    row = np.repeat(np.arange(9), [200, *[25] * 8])
    cells = ad.AnnData(rng.poisson(rate[np.tile(row, 2)]).astype(np.float32))
    cells.obs["perturbation"], cells.obs["size"] = np.tile(labels, 2), 1e4
    parts = cells[::2].copy(), cells[1::2].copy()

    def coverage(spread, genes=slice(None)):
        table = ad.AnnData(mean[1:] - mean[0], obs=pd.DataFrame(index=names))
        table.X[:, :400] += rng.normal(scale=0.15, size=(8, 400))
        table.X[:, 400:] = 5.0
        table.layers["std"] = np.broadcast_to(spread, table.shape).copy()
        card = score_predictions(
            {"model": table[:, genes]},
            *(part[:, genes] for part in parts),
            *KEYS,
            size_factor_key="size",
            n_bootstrap=10,
        )
        return card.summary.loc["model"].loc[["coverage_50", "coverage_80", "coverage_95"]]

    np.testing.assert_allclose(coverage(0.15)["mean"], [0.5, 0.8, 0.95], atol=0.03)
    assert (coverage(0.0)["mean"] < [0.45, 0.75, 0.92]).all()
    rng, again = (np.random.default_rng(1) for _ in range(2))
    everything = coverage(0.15)
    rng = again
    pd.testing.assert_frame_equal(coverage(0.15, slice(400)), everything)
    one_open = np.full((8, 1), 0.15)
    one_open[0] = np.nan
    assert (coverage(one_open)["n_conditions"] == 7).all()


def test_coverage_is_of_models_with_a_posterior_alone(halves, observed):
    with_posterior = ad.AnnData(
        observed.to_numpy(), obs=observed[[]], var=pd.DataFrame(index=observed.columns)
    )
    with_posterior.layers["std"] = np.full(observed.shape, 0.1)
    card = score_predictions({"with": with_posterior, "without": observed}, *halves, *KEYS)
    assert card.table.loc["with", "coverage_95"] > 0.99
    assert card.table.loc[["without", "additive"], "coverage_95"].isna().all()


def test_the_same_seed_gives_the_same_card(halves, observed):
    one, two, other = (
        score_predictions({"a": observed}, *halves, *KEYS, seed=seed, n_bootstrap=50)
        for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(one.per_condition, two.per_condition)
    pd.testing.assert_frame_equal(one.summary, two.summary)
    assert not one.summary.equals(other.summary)


def test_files_hold_what_the_card_holds(card, tmp_path):
    paths = card.to_csv(tmp_path / "deep" / "folder")
    assert {path.name for path in paths} == {path.name for path in paths[0].parent.iterdir()}
    summary = pd.read_csv(paths[0], index_col=[0, 1])
    pd.testing.assert_frame_equal(summary, card.summary)
    record = json.loads((paths[0].parent / "scorecard.json").read_text())
    assert record["provenance"]["seed"] == 0
    assert record["provenance"]["scvi-sams"] == scvi_sams.__version__
    assert record["verdict"] == list(card.verdict)
    markdown = (paths[0].parent / "scorecard.md").read_text()
    assert markdown == card.to_markdown()
    header, _, first, *_ = markdown.splitlines()
    assert header.count("|") == first.count("|") == len(card.table.columns) + 2
    assert "| perfect | **1.000**" in first
    for text in (str(card), card._repr_markdown_()):
        assert "split half" in text
        assert card.verdict[0][:30] in text


def test_bad_input_is_named(halves, observed):
    with pytest.raises(ScreenError, match=r"lacks 1 conditions .* 'P001'"):
        score_predictions({"a": observed.drop("P001")}, *halves, *KEYS)
    with pytest.raises(ScreenError, match="lacks 1 genes"):
        score_predictions({"a": observed.iloc[:, 1:]}, *halves, *KEYS)
    with pytest.raises(ScreenError, match="fewer than 100000 held-out cells"):
        score_predictions({"a": observed}, *halves, *KEYS, conditions=["P001"], min_cells=100_000)
    with pytest.raises(ScreenError, match="No condition has 100000"):
        score_predictions({"a": observed}, *halves, *KEYS, min_cells=100_000)
    with pytest.raises(ValueError, match="at least 4"):
        score_predictions({"a": observed}, *halves, *KEYS, min_cells=2)
    for name in ("additive", "bootstrap"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            score_predictions({name: observed}, *halves, *KEYS)
    perturbed = halves[1][halves[1].obs["perturbation"] != "control"].copy()
    with pytest.raises(ScreenError, match="control"):
        score_predictions({"a": observed}, halves[0], perturbed, *KEYS)


def outcomes_of(own, rival):
    """Outcomes of models of these relative squared errors against one baseline, models x 1."""
    names = [f"P{k:02d}" for k in range(len(rival))]
    rng = np.random.default_rng(9)
    labels = np.repeat(["control", *names], 12)
    cells = ad.AnnData(rng.poisson(9, size=(2 * len(labels), 6)).astype(np.float32))
    cells.obs["perturbation"] = np.tile(labels, 2)
    held_out, training = cells[: len(labels)].copy(), cells[len(labels) :].copy()
    observed = observed_effects(held_out, *KEYS).to_df()

    no_fallback = pd.DataFrame({"fallback": ""}, index=names)

    def predicted(errors):
        return observed.mul(1 - np.sqrt(np.asarray(errors)), axis=0)

    card = score_predictions(
        {f"model {k}": predicted(errors) for k, errors in enumerate(own)},
        held_out,
        training,
        *KEYS,
        baselines={"rival": lambda *_: ad.AnnData(predicted(rival), obs=no_fallback)},
        n_bootstrap=400,
    )
    return list(card.comparison.xs("relative_squared_error", level="measure")["outcome"])


def test_a_small_lead_on_every_condition_is_seen_in_scores_that_vary():
    rng = np.random.default_rng(0)
    rival = rng.uniform(1, 3, size=30)
    lead = 0.01 + 0.005 * rng.normal(size=30)
    assert outcomes_of([rival - lead, rival + lead], rival) == ["ahead", "behind"]


def test_chance_is_called_a_lead_about_as_often_as_it_should_be():
    errors = 10 + np.random.default_rng(1).normal(size=(200, 40))
    outcomes = outcomes_of(errors, np.full(40, 10.0))
    assert 0.9 < outcomes.count("level") / 200 < 0.98


# -- models ----------------------------------------------------------------------------------


def trained(model_class, adata, held_out, **kwargs):
    model_class.setup_anndata(adata, layer="counts", **SETUP)
    model = model_class(adata, n_latent=6, n_hidden=32, **kwargs)
    split = [np.flatnonzero(~held_out), np.array([], dtype=int), np.flatnonzero(held_out)]
    model.train(max_epochs=2, accelerator="cpu", datasplitter_kwargs={"external_indexing": split})
    return model


@pytest.fixture(scope="module")
def model(screen):
    """Pairs, and some cells of everything else, were not trained on."""
    held_out = is_pair(screen) | (np.arange(screen.n_obs) % 4 == 0)
    return trained(scvi_sams.SAMSVAE, screen.copy(), held_out)


@pytest.fixture(scope="module")
def model_card(model):
    return scorecard(model, n_samples=5, n_bootstrap=100)


def test_a_model_is_scored_on_cells_it_has_not_seen(model, model_card):
    assert model_card.kinds["SAMSVAE"] == "model"
    held_out = model.adata[model.test_indices].obs["perturbation"].astype(str)
    counts = held_out.value_counts()
    rows = model_card.per_condition.drop_duplicates("condition").set_index("condition")
    assert (rows["n_cells"] == counts[rows.index]).all()
    assert set(rows.index) == set(counts.index[counts >= 4]) - {"control"}
    scores = model_card.table.loc["SAMSVAE"]
    assert scores.notna().all()
    assert {"interaction_correlation", "e_distance", "coverage_95"} <= set(scores.index)
    assert any("SAMSVAE" in line for line in model_card.verdict)
    assert model_card.provenance["model"] == "SAMSVAE"


def test_a_model_scores_what_its_effects_score(model, model_card):
    held_out = model.adata[model.test_indices].copy()
    conditions = list(model_card.per_condition["condition"].unique())
    effects = observed_effects(held_out, *KEYS, batch_key="replicate")
    predicted = model.get_average_treatment_effect(conditions, n_samples=5)
    expected = scvi_sams.evaluation.effect_agreement(predicted, effects)["pearson"]
    rows = model_card.per_condition.query("predictor == 'SAMSVAE' and measure == 'pearson'")
    # Both draw basal states: equal but for that noise.
    values = rows.set_index("condition")["value"]
    np.testing.assert_allclose(values[expected.index], expected, atol=0.1)


def test_a_model_is_scored_alike_twice_and_randomness_is_left_alone(model):
    before = torch.random.get_rng_state()
    one, two = (scorecard(model, n_samples=2, n_bootstrap=20, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one.per_condition, two.per_condition)
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_models_share_a_table(model):
    cpa = trained(
        scvi_sams.CPAVAE, model.adata.copy(), ~np.isin(np.arange(3_000), model.train_indices)
    )
    card = scorecard(
        {"sparse": model, "dense": cpa}, n_samples=2, n_bootstrap=20, cell_level=False
    )
    assert [name for name, kind in card.kinds.items() if kind == "model"] == ["sparse", "dense"]
    assert "e_distance" not in card.table
    assert card.comparison.index.get_level_values(0).unique().tolist() == ["sparse", "dense"]


def test_other_cells_can_be_given(model):
    new = scvi_sams.datasets.simulated_screen(
        n_cells=1_500, n_genes=120, n_perturbations=12, n_pairs=8, seed=5
    )
    new.obs_names = [f"new_{name}" for name in new.obs_names]
    card = scorecard(model, new, n_samples=2, n_bootstrap=20, cell_level=False)
    assert card.provenance["n_held_out_cells"] > 500
    chosen = scorecard(
        model,
        test_indices=model.test_indices[:400],
        n_samples=2,
        n_bootstrap=20,
        cell_level=False,
        min_cells=4,
    )
    assert 100 < chosen.provenance["n_held_out_cells"] <= 400


def test_conditions_of_few_cells_are_left_out_and_said(halves, observed):
    held_out, training = halves
    few = (held_out.obs["perturbation"] == "P001").to_numpy(copy=True)
    few[np.flatnonzero(few)[:3]] = False
    card = score_predictions({"a": observed}, held_out[~few].copy(), training, *KEYS)
    assert "P001" not in set(card.per_condition["condition"])
    assert any("1 conditions with fewer than 4 held-out cells are not" in n for n in card.notes)


class Outsider:
    """A predictor of another package: two methods, and nothing that says what it was fitted on."""

    def __init__(self, adata):
        self.effects = observed_effects(adata, *KEYS).to_df()
        self.controls = adata[adata.obs["perturbation"] == "control"].copy()

    def get_average_treatment_effect(self, conditions, *, method, n_samples):
        assert method == "log_normalized"
        return BASELINES["additive"](self.effects, conditions).to_df()

    def predict(self, conditions, *, n_samples):
        cells = ad.AnnData(
            self.controls.X[np.arange(n_samples * len(conditions)) % self.controls.n_obs],
            var=self.controls.var,
        )
        cells.obs["library_size"] = np.asarray(cells.X.sum(axis=1)).ravel()
        return cells


def test_a_model_of_another_package_is_scored_by_two_methods(screen, halves):
    is_test = np.arange(screen.n_obs) % 2 == 1
    train = np.flatnonzero(~is_test & ~is_pair(screen))
    outsider = Outsider(screen[train])
    setup = {"perturbation_key": "perturbation", "control": "control"}
    arguments = {"train_indices": train, "setup": setup}
    card = scorecard(outsider, screen, is_test, **arguments)
    assert card.kinds["Outsider"] == "model"
    for measure, value in card.table.loc["additive"].drop("e_distance").dropna().items():
        if measure != "interaction_correlation":  # for which baselines are fitted on halves
            assert card.table.loc["Outsider", measure] == pytest.approx(value, abs=1e-6)
    tables = score_predictions(
        {
            "Outsider": BASELINES["additive"](
                outsider.effects,
                list(outsider.effects.index)
                + [name for name in card.per_condition["condition"].unique() if "+" in name],
            )
        },
        *halves,
        *KEYS,
    )
    pd.testing.assert_frame_equal(
        card.table.drop(columns="e_distance"), tables.table, check_exact=False, atol=1e-6
    )
    for missing in ("train_indices", "setup"):
        rest = {name: value for name, value in arguments.items() if name != missing}
        with pytest.raises(ScreenError, match=f"give `{missing}`"):
            scorecard(outsider, screen, is_test, **rest)
    with pytest.raises(ScreenError, match="give `adata`"):
        scorecard(outsider, **arguments)
    with pytest.raises(ScreenError, match="trained on all its cells"):
        scorecard(outsider, screen, **arguments)


def test_cells_that_were_trained_on_are_refused(model, screen):
    with pytest.raises(ScreenError, match="were trained on"):
        scorecard(model, test_indices=model.train_indices[:50])
    with pytest.raises(ScreenError, match="were trained on"):
        scorecard(model, screen.copy())
    with pytest.raises(ScreenError, match="out of range: .10000."):
        scorecard(model, test_indices=[10_000])
    with pytest.raises(ValueError, match="no cell"):
        scorecard(model, test_indices=[])


def test_a_model_that_kept_no_cells_out_is_refused(screen):
    adata = screen[:600].copy()
    scvi_sams.SAMSVAE.setup_anndata(adata, layer="counts", **SETUP)
    model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16)
    with pytest.raises(ScreenError, match="not trained"):
        scorecard(model)
    model.train(max_epochs=1, train_size=1.0, accelerator="cpu")
    with pytest.raises(ScreenError, match="trained on all its cells"):
        scorecard(model)
