"""Scores of predictions on cells whose conditions are known, baselines and ceilings with them."""

from __future__ import annotations

__all__ = ["ScoreSettings", "score_cells", "scored_conditions"]

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._baseline_ridge import BilinearRidge
from scvi_sams.metrics._baselines import (
    AdditiveEffects,
    ConditionMean,
    MatchingMean,
    NearestMeasuredCombination,
    NoChange,
    PerturbedMean,
)
from scvi_sams.metrics._ceilings import half_weights
from scvi_sams.metrics._effect_agreement import perturbed_reference
from scvi_sams.metrics._profiles import dense, profile_frame
from scvi_sams.metrics._scorecard_cells import ScoredCells, energy_distances
from scvi_sams.metrics._scorecard_interactions import interaction_scores
from scvi_sams.metrics._scorecard_measures import (
    EffectTables,
    Yardstick,
    collapse_of,
    coverage_of,
    parts_of,
    score_tables,
)
from scvi_sams.metrics._scorecard_report import Scorecard
from scvi_sams.metrics._scorecard_summary import (
    compare_with_baselines,
    resamples,
    summarise,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scvi_sams.metrics._baselines import Baseline
    from scvi_sams.metrics._cell_groups import CellGroups
    from scvi_sams.metrics._profiles import ProfileTable
    from scvi_sams.metrics._scorecard_report import PredictorKind

_FEWEST_CELLS = 4  # two in each half, so that each has a variance
_MIN_CONTROLS = 10
_MIN_CONDITIONS_OF_STRATA = 6
_STRATA = ("weak", "medium", "strong")
_SPLIT_HALF, _BOOTSTRAP = "split half", "bootstrap"


class ScoreSettings(NamedTuple):
    """What does not depend on the cells."""

    min_cells: int = 10
    n_top_genes: int = 20
    n_bootstrap: int = 1_000
    seed: int = 0

    def check(self) -> None:
        """Raise where a setting makes no sense."""
        if self.min_cells < _FEWEST_CELLS:
            raise ValueError(
                f"min_cells={self.min_cells}: halves of a condition with variances take at least "
                f"{_FEWEST_CELLS} cells."
            )
        if self.n_bootstrap < 1:
            raise ValueError(f"n_bootstrap={self.n_bootstrap}: at least one draw is needed.")


def scored_conditions(
    held_out: CellGroups, conditions: Sequence[str] | None, min_cells: int
) -> list[str]:
    """Conditions with enough held-out cells; those asked for must have them."""
    n_cells = held_out.n_cells
    if conditions is None:
        kept = [str(name) for name in n_cells.index[n_cells >= min_cells]]
        if not kept:
            largest = f"{n_cells.idxmax()!r} has {n_cells.max()}" if len(n_cells) else "none is"
            raise ScreenError(
                f"No condition has {min_cells} held-out cells, {largest}: hold out more cells, or "
                "lower `min_cells`."
            )
        return kept
    wanted = list(dict.fromkeys(str(name) for name in conditions))
    if not wanted:
        raise ScreenError("`conditions` is empty: name one, or leave it out to score all.")
    counts = n_cells.reindex(wanted, fill_value=0)
    if (few := counts[counts < min_cells]).size:
        raise ScreenError(
            f"{few.size} of `conditions` have fewer than {min_cells} held-out cells, the first "
            f"{few.index[0]!r} with {few.iloc[0]}: leave them out, or lower `min_cells`."
        )
    return wanted


def score_cells(
    predictions: Mapping[str, ProfileTable],
    held_out: CellGroups,
    training: CellGroups,
    *,
    conditions: Sequence[str] | None,
    combination_delimiter: str | None,
    baselines: Sequence[Baseline] | None,
    predicted_cells: Mapping[str, ad.AnnData],
    settings: ScoreSettings,
    provenance: Mapping[str, Any] | None = None,
) -> Scorecard:
    """Score predictions on cells whose conditions are known."""
    settings.check()
    wanted = scored_conditions(held_out, conditions, settings.min_cells)
    if not training.has_controls:
        raise ScreenError("No training cell is a control: effects need controls to be against.")
    rng = np.random.default_rng(settings.seed)
    cells = ScoredCells.of(held_out, training, wanted, combination_delimiter, _MIN_CONTROLS)
    training_effects = training.effects(cells.training_controls, with_errors=False)
    if not training_effects.n_obs:
        raise ScreenError("No training cell is perturbed: there is nothing to predict from.")

    first = half_weights(cells.held_out, rng)
    observed = cells.with_halves(cells.tables(), first, 1 - first)
    yardstick = Yardstick(
        observed,
        perturbed_reference(training_effects),
        (cells.gene_weights(first), cells.gene_weights(1 - first)),
        combination_delimiter,
        settings.n_top_genes,
    )

    notes: list[str] = _notes_on_cells(cells)
    kinds: dict[str, PredictorKind] = {}
    tables: dict[str, ad.AnnData] = {}
    genes = held_out.adata.var_names
    for name, prediction in predictions.items():
        tables[name] = _checked_prediction(name, prediction, wanted, genes)
        kinds[name] = "model"
        n_open = int(np.isnan(dense(tables[name][wanted].X)).any(axis=1).sum())
        if n_open:
            notes.append(
                f"{name} has no prediction for {n_open} of {len(wanted)} conditions: they are "
                "left out of its means and comparisons."
            )
    asked = [*wanted, *cells.parts.conditions.difference(wanted)]
    if baselines is None:
        baselines = _default_baselines(combination_delimiter, training_effects, wanted)
    for baseline in baselines:
        if baseline.name in {*kinds, _SPLIT_HALF, _BOOTSTRAP}:
            raise ValueError(f"Two predictors are called {baseline.name!r}: rename one.")
        tables[baseline.name] = baseline.fit(training_effects).predict(asked)
        kinds[baseline.name] = "baseline"
        fallback = tables[baseline.name][wanted].obs["fallback"]
        if (fallback != "").any():
            notes.append(
                f"{baseline.name} does not apply to {int((fallback != '').sum())} of "
                f"{len(wanted)} conditions, for instance {fallback.ne('').idxmax()} "
                f"({fallback[fallback != ''].iloc[0]})."
            )
    if clash := {_SPLIT_HALF, _BOOTSTRAP}.intersection(predictions):
        raise ValueError(f"A ceiling is called {clash.pop()!r} too: rename the prediction.")

    scores = {
        name: score_tables(EffectTables(table, table, halves=(table, table)), yardstick)
        for name, table in tables.items()
    }
    for name in predictions:
        coverage = coverage_of(tables[name], observed.effects)
        if coverage is not None:
            scores[name][coverage.columns] = coverage
    if cells.combinations:
        interactions, note = interaction_scores(
            cells,
            held_out,
            {name: tables[name] for name in predictions},
            baselines,
            combination_delimiter,
            settings.min_cells,
            rng,
        )
        notes += [note] if note else []
        for name, correlation in interactions.items():
            scores[name]["interaction_correlation"] = correlation
    one, other = cells.split(rng)
    scores[_SPLIT_HALF] = score_tables(one, yardstick._replace(observed=other, weights=None))
    drawn_cells = cells.bootstrapped(first, rng)._replace(with_parts=None)
    scores[_BOOTSTRAP] = score_tables(drawn_cells, yardstick)
    kinds |= {_SPLIT_HALF: "ceiling", _BOOTSTRAP: "ceiling"}
    if predicted_cells:
        of_baselines = {name: tables[name] for name, kind in kinds.items() if kind == "baseline"}
        for name, distance in energy_distances(cells, predicted_cells, of_baselines, rng).items():
            scores[name]["e_distance"] = distance

    drawn = resamples(len(wanted), settings.n_bootstrap, settings.seed)
    overall = {}
    if len(wanted) > 1:
        overall = {
            name: {"collapse_index": collapse_of(table, observed.centred, drawn)}
            for name, table in tables.items()
        }
    summary = summarise(scores, overall, drawn)
    comparison = compare_with_baselines(scores, kinds, drawn)
    return Scorecard(
        per_condition=_tidy(scores, _strata(observed.effects), cells.held_out.n_cells),
        summary=summary,
        comparison=comparison,
        verdict=tuple(verdict(comparison, summary, kinds)),
        kinds=kinds,
        notes=tuple(notes),
        provenance={
            **_versions(),
            **(provenance or {}),
            "n_conditions": len(wanted),
            "n_genes": len(genes),
            "n_held_out_cells": int(cells.held_out.n_cells.sum()),
            "n_held_out_controls": int((held_out.condition == -1).sum()),
            "n_training_cells": training.adata.n_obs,
            **settings._asdict(),
        },
    )


def _default_baselines(
    delimiter: str | None, training_effects: ad.AnnData, conditions: Sequence[str]
) -> list[Baseline]:
    """Baselines that have something of their own to say of a condition."""
    combinations = list(parts_of(conditions, delimiter))
    chosen: list[Baseline] = [NoChange(delimiter), PerturbedMean(delimiter)]
    for baseline, of_interest in (
        (ConditionMean(delimiter), conditions),
        (AdditiveEffects(delimiter), combinations),
        (MatchingMean(delimiter), combinations),
        (NearestMeasuredCombination(delimiter), combinations),
        (BilinearRidge(delimiter), conditions),
    ):
        if of_interest and baseline.fit(training_effects).applies_to(of_interest):
            chosen.append(baseline)
    return chosen


def _checked_prediction(
    name: str, prediction: ProfileTable, conditions: Sequence[str], genes: pd.Index
) -> ad.AnnData:
    """Prediction with the genes of the cells, in their order; NaN for what is not finite."""
    frame = profile_frame(prediction, f"predictions[{name!r}]")
    frame.index, frame.columns = frame.index.astype(str), frame.columns.astype(str)
    for what, wanted, known in (
        ("conditions", pd.Index(conditions), frame.index),
        ("genes", genes, frame.columns),
    ):
        if (missing := wanted.difference(known)).size:
            raise ScreenError(
                f"predictions[{name!r}] lacks {missing.size} {what} that are scored, the first "
                f"{missing[0]!r}: add them, as NaN if they are not predicted."
            )
    finite = frame[genes].where(np.isfinite(frame[genes]).all(axis=1), np.nan)
    layers = {}
    if isinstance(prediction, ad.AnnData) and "std" in prediction.layers:
        spread = profile_frame(prediction, name, layer="std")
        layers["std"] = spread[genes].to_numpy()
    return ad.AnnData(
        finite.to_numpy(),
        obs=pd.DataFrame(index=frame.index),
        var=pd.DataFrame(index=genes.astype(str)),
        layers=layers,
    )


def _notes_on_cells(cells: ScoredCells) -> list[str]:
    notes = []
    if not cells.has_own_controls:
        notes.append(
            f"Fewer than {_MIN_CONTROLS} controls are held out: effects are against the training "
            "controls, whose noise predictions share, so that all scores flatter a little."
        )
    unseen = cells.held_out.conditions.difference(cells.training.conditions)
    seen = len(cells.held_out.conditions) - len(unseen)
    notes.append(
        f"{len(cells.held_out.conditions)} conditions are scored: {seen} with training cells of "
        f"their own, {len(unseen)} without."
    )
    return notes


def _strata(observed: ad.AnnData) -> pd.Series:
    """Thirds of the conditions by the size of the observed effect, noise taken off."""
    if observed.n_obs < _MIN_CONDITIONS_OF_STRATA:
        return pd.Series("all", index=observed.obs_names)
    signal = dense(observed.X) ** 2 - dense(observed.layers["standard_error"]) ** 2
    rank = pd.Series(signal.sum(axis=1), index=observed.obs_names).rank(method="first")
    third = np.ceil(3 * rank / len(rank)).astype(int) - 1
    names = third.map(dict(enumerate(_STRATA)))
    return names.astype(pd.CategoricalDtype(list(_STRATA), ordered=True))


def _tidy(
    scores: Mapping[str, pd.DataFrame], strata: pd.Series, n_cells: pd.Series
) -> pd.DataFrame:
    """One row for each predictor, condition and measure."""
    rows = []
    for predictor, table in scores.items():
        named = table.rename_axis(index="condition", columns="measure")
        rows.append(
            named.stack(future_stack=True)
            .rename("value")
            .reset_index()
            .assign(predictor=predictor)
        )
    tidy = pd.concat(rows, ignore_index=True)
    tidy["stratum"] = tidy["condition"].map(strata)
    tidy["n_cells"] = tidy["condition"].map(n_cells)
    return tidy[["predictor", "condition", "measure", "value", "stratum", "n_cells"]]


def _versions() -> dict[str, str]:
    packages = ("scvi-sams", "scvi-tools", "torch", "anndata", "numpy", "scipy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
