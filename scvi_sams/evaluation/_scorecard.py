"""Score a model beside the baselines that it must beat and the ceiling of the data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_dosage
from scvi_sams.data.tables import dense, profile_frame
from scvi_sams.evaluation._agreement import differential_expression_weights, perturbed_reference
from scvi_sams.evaluation._baselines import (
    AdditiveEffects,
    BilinearRidge,
    ConditionMean,
    MatchingMean,
    NearestMeasuredCombination,
    NoChange,
    PerturbedMean,
)
from scvi_sams.evaluation._ceilings import bootstrap_weights, half_weights
from scvi_sams.evaluation._distribution import ExpressionPCA, energy_distance
from scvi_sams.evaluation._measures import (
    EffectTables,
    Yardstick,
    collapse_of,
    coverage_of,
    interaction_correlation,
    parts_of,
    score_tables,
)
from scvi_sams.evaluation._observed import CellGroups
from scvi_sams.evaluation._scorecard_report import (
    Scorecard,
    compare_with_baselines,
    resamples,
    summarise,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable
    from scvi_sams.evaluation._baselines import Baseline
    from scvi_sams.evaluation._observed import ControlMeans
    from scvi_sams.evaluation._scorecard_report import PredictorKind
    from scvi_sams.model._perturbation_vae import PerturbationVAE

__all__ = [
    "ScoreSettings",
    "ScoredCells",
    "energy_distances",
    "interaction_scores",
    "score_cells",
    "scorecard",
    "scored_conditions",
]


_CONDITION, _CONTROL, _LIBRARY = "condition", "control", "library_size"
_MAX_CELLS = 500  # of a condition, in distances, which cost the square of it


@dataclass(frozen=True)
class ScoredCells:
    """Held-out cells of the conditions that are scored, with the training cells."""

    held_out: CellGroups
    training: CellGroups
    parts: CellGroups
    """Training cells of the perturbations that scored combinations are made of."""
    training_controls: ControlMeans
    combinations: list[str]
    """Scored combinations whose parts were all measured alone in training."""
    has_own_controls: bool
    """Whether held-out controls are what effects are against."""

    @classmethod
    def of(
        cls,
        held_out: CellGroups,
        training: CellGroups,
        conditions: Sequence[str],
        combination_delimiter: str | None,
        min_controls: int,
    ) -> ScoredCells:
        """Pick the cells for the conditions."""
        trained = set(training.conditions)
        combinations = {
            name: parts
            for name, parts in parts_of(conditions, combination_delimiter).items()
            if trained.issuperset(parts)
        }
        singles = sorted({part for parts in combinations.values() for part in parts})
        return cls(
            held_out.restricted(conditions),
            training,
            training.restricted(singles),
            training.control_means(),
            list(combinations),
            int((held_out.condition == -1).sum()) >= max(min_controls, 1),
        )

    def tables(
        self,
        weights: NDArray[np.float64] | None = None,
        part_weights: NDArray[np.float64] | None = None,
        with_errors: bool = True,
    ) -> EffectTables:
        """Effects in the held-out cells, each counted as often as ``weights`` says."""
        if self.has_own_controls:
            controls = self.held_out.control_means(weights)
        else:
            controls = self.parts.control_means(part_weights)
        return EffectTables(
            self.held_out.effects(controls, weights, with_errors),
            self.held_out.effects(self.training_controls, weights, with_errors),
            self.with_parts(weights, part_weights, with_errors) if self.combinations else None,
        )

    def with_halves(
        self, tables: EffectTables, first: NDArray[np.float64], second: NDArray[np.float64]
    ) -> EffectTables:
        """Add the effects in two sets of cells."""
        halves = [
            self.held_out.effects(self.training_controls, weights, with_errors=False)
            for weights in (first, second)
        ]
        return tables._replace(halves=(halves[0], halves[1]))

    def bootstrapped(self, first_half: NDArray[np.float64], rng: Generator) -> EffectTables:
        """Effects in cells drawn with replacement, over all and within each half."""
        tables = self.tables(
            bootstrap_weights(self.held_out, rng),
            bootstrap_weights(self.parts, rng),
            with_errors=False,
        )
        drawn = []
        for half in (first_half, 1 - first_half):
            inside = np.where(half > 0, self.held_out.condition, -2)
            drawn.append(half * bootstrap_weights(replace(self.held_out, condition=inside), rng))
        return self.with_halves(tables, *drawn)

    def split(self, rng: Generator) -> tuple[EffectTables, EffectTables]:
        """Effects in two halves of the cells."""
        of_cells, of_parts = half_weights(self.held_out, rng), half_weights(self.parts, rng)
        first, second = (
            self.tables(*weights, with_errors=False)
            for weights in ((of_cells, of_parts), (1 - of_cells, 1 - of_parts))
        )
        return first, second

    def gene_weights(self, half: NDArray[np.float64]) -> pd.DataFrame:
        """Weights of genes by differential expression in some of the held-out cells."""
        rows = [_labelled(self.held_out, (half > 0) & (self.held_out.condition >= -1))]
        if not (rows[0].obs[_CONDITION] == _CONTROL).any():
            rows.append(_labelled(self.training, self.training.condition == -1))
        matrices = [row.X for row in rows]
        stacked = sp.vstack(matrices, "csr") if sp.issparse(matrices[0]) else np.vstack(matrices)
        obs = pd.concat([row.obs for row in rows], ignore_index=True)
        obs.index = obs.index.astype(str)
        cells = ad.AnnData(stacked, obs=obs, var=rows[0].var)
        return differential_expression_weights(
            cells, _CONDITION, _CONTROL, size_factor_key=_LIBRARY
        )

    def with_parts(
        self,
        weights: NDArray[np.float64] | None,
        part_weights: NDArray[np.float64] | None,
        with_errors: bool,
    ) -> ad.AnnData:
        """Effects of the combinations, and of their parts in training cells."""
        controls = self.parts.control_means(part_weights)
        tables = [
            self.held_out.restricted(self.combinations).effects(controls, weights, with_errors),
            self.parts.effects(controls, part_weights, with_errors),
        ]
        return ad.AnnData(
            np.vstack([table.X for table in tables]),
            obs=pd.concat([table.obs for table in tables]),
            var=tables[0].var,
            layers={
                name: np.vstack([table.layers[name] for table in tables])
                for name in tables[0].layers
            },
        )


def energy_distances(
    cells: ScoredCells,
    predicted_cells: Mapping[str, ad.AnnData],
    predicted_effects: Mapping[str, ad.AnnData],
    rng: Generator,
) -> dict[str, pd.Series]:
    """E-distance between predicted and held-out cells, by predictor and condition.

    Distances are unbiased ones, in principal components of the training cells. A baseline's cells
    are training controls, moved by the effect it predicts; the distance between two halves of the
    held-out cells is the ceiling ``"split half"``.
    """
    training, held_out = cells.training, cells.held_out
    pca = ExpressionPCA(scale=training.scale).fit(
        _labelled(training, _some(training.condition >= -1, 20_000, rng)), None, _LIBRARY
    )
    controls = pca.transform(
        _labelled(training, _some(training.condition == -1, _MAX_CELLS, rng)), None, _LIBRARY
    )
    observed = {}
    for code, condition in enumerate(held_out.conditions):
        drawn = _labelled(held_out, _some(held_out.condition == code, _MAX_CELLS, rng))
        observed[condition] = _coordinates(pca.transform(drawn, None, _LIBRARY))
    control_coordinates = _coordinates(controls)
    components = pca.components_.loc[:, list(training.adata.var_names)].to_numpy()

    distances = {}
    for name, simulated in predicted_cells.items():
        coordinates = _coordinates(pca.transform(simulated, None, _LIBRARY))
        of_condition = simulated.obs[_CONDITION].astype(str).to_numpy()
        distances[name] = pd.Series(
            {
                condition: energy_distance(
                    coordinates[of_condition == condition][:_MAX_CELLS], truth, unbiased=True
                )
                for condition, truth in observed.items()
            }
        )
    for name, effects in predicted_effects.items():
        moved = dense(effects[list(observed)].X) @ components.T
        distances[name] = pd.Series(
            {
                condition: energy_distance(control_coordinates + shift, truth, unbiased=True)
                for (condition, truth), shift in zip(observed.items(), moved, strict=True)
            }
        )
    halves = {}
    for condition, truth in observed.items():
        shuffled = rng.permutation(truth)
        half = len(truth) // 2
        halves[condition] = energy_distance(shuffled[:half], shuffled[half:], unbiased=True)
    distances["split half"] = pd.Series(halves)
    return distances


def _coordinates(table: Any) -> NDArray[np.float64]:
    return np.asarray(table, dtype=np.float64)


def _some(chosen: NDArray[np.bool_], limit: int, rng: Generator) -> NDArray[np.bool_]:
    """At most so many of the chosen cells."""
    positions = np.flatnonzero(chosen)
    kept = np.zeros(chosen.size, dtype=bool)
    kept[rng.permutation(positions)[:limit]] = True
    return kept


def _labelled(cells: CellGroups, kept: NDArray[np.bool_]) -> ad.AnnData:
    """Counts of some cells with their condition and library size, and nothing else."""
    matrix = cells.adata.X if cells.layer is None else cells.adata.layers[cells.layer]
    counts = matrix[np.flatnonzero(kept)]
    names = np.append(np.asarray(cells.conditions, dtype=object), [_CONTROL])
    if cells.library is None:
        library = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    else:
        library = cells.library[kept].to_numpy(dtype=float)
    obs = pd.DataFrame({_CONDITION: names[cells.condition[kept]], _LIBRARY: library})
    obs.index = obs.index.astype(str)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=cells.adata.var_names))


def interaction_scores(
    cells: ScoredCells,
    held_out: CellGroups,
    predictions: Mapping[str, ad.AnnData],
    baselines: Sequence[Baseline],
    combination_delimiter: str | None,
    min_cells: int,
    rng: Generator,
) -> tuple[dict[str, pd.Series], str]:
    """Correlate predicted with observed interactions, by predictor and combination.

    Where every part has enough held-out cells, parts are measured in these. Otherwise they are
    measured in one half of the training cells and baselines fitted on the other, both ways round;
    a model has seen both.

    Returns
    -------
    Scores, and what a reader should know of them.
    """
    names = [*cells.combinations, *cells.parts.conditions]
    enough = (held_out.n_cells.reindex(cells.parts.conditions, fill_value=0) >= min_cells).all()
    if enough and cells.has_own_controls:
        table = held_out.restricted(names).effects(held_out.control_means(), with_errors=False)
        training = cells.training.effects(cells.training_controls, with_errors=False)
        folds = [(table, training)]
        note = ""
    else:
        learned = cells.training.restricted(
            cells.training.n_cells[cells.training.n_cells >= 2].index
        )
        first = half_weights(learned, rng)
        folds = [
            (
                cells.with_parts(None, scored, with_errors=False),
                learned.effects(learned.control_means(fitted), fitted, with_errors=False),
            )
            for scored, fitted in ((first, 1 - first), (1 - first, first))
        ]
        note = (
            "interaction r: parts are measured in training cells. Baselines are fitted on other "
            "halves of them than those scored; models have seen both, which flatters a model that "
            "overfits."
        )
    scores: dict[str, list[pd.Series]] = {}
    for observed, training in folds:
        tables = dict(predictions)
        tables |= {baseline.name: baseline.fit(training).predict(names) for baseline in baselines}
        for name, table in tables.items():
            correlation = interaction_correlation(table, observed, combination_delimiter)
            scores.setdefault(name, []).append(correlation)
    means = {name: sum(each[1:], each[0]) / len(each) for name, each in scores.items()}
    return means, note


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


_CELLS_OF_DISTANCES = 200  # simulated of a condition


def scorecard(
    model: PerturbationVAE | Mapping[str, PerturbationVAE],
    adata: ad.AnnData | None = None,
    test_indices: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    conditions: Sequence[str] | None = None,
    baselines: Sequence[Baseline] | None = None,
    cell_level: bool = True,
    min_cells: int = 10,
    n_top_genes: int = 20,
    n_samples: int = 25,
    n_bootstrap: int = 1_000,
    seed: int = 0,
) -> Scorecard:
    """Score a model beside the simple baselines and the ceiling, on cells it has not seen.

    Baselines are fitted on the training cells of the model, in the same unit, against the same
    controls. Held-out cells of conditions that were trained on ask whether the model describes a
    condition; held-out conditions ask whether it predicts.

    Parameters
    ----------
    model
        A trained model of this package; or several by name, trained on the same cells, which come
        into one table.
    adata
        Held-out cells, laid out as what the model was set up with; by default that AnnData.
    test_indices
        Cells of ``adata`` to score on. By default ``model.test_indices``, or
        ``model.validation_indices`` where there are none, or all cells of another AnnData.
    conditions
        Conditions to score (``"A"``, ``"A+B"``); by default all with at least ``min_cells``
        held-out cells.
    baselines
        Baselines, not fitted yet. By default all of this package that apply to a condition that is
        scored.
    cell_level
        Whether to simulate cells for the energy distance.
    min_cells
        Held-out cells that a condition needs, at least 4.
    n_top_genes
        Genes that count as the strongest of a condition.
    n_samples
        Draws of masks and effects behind the model's means and intervals.
    n_bootstrap
        Draws of conditions for intervals.
    seed
        Seed of the model's draws, of halves and of the bootstrap.

    Returns
    -------
    The scorecard: means of each predictor and measure with intervals, scores by condition, and a
    verdict that says which baseline wins where.

    Raises
    ------
    ScreenError
        If there are no held-out cells, some of them were trained on, no condition has enough of
        them, there are no training controls, or models were trained on different cells.
    ValueError
        If a setting makes no sense, or a model has no count likelihood.

    Notes
    -----
    See :func:`score_predictions`, which has the same scores for the effects of
    ``model.get_average_treatment_effect`` and, for the energy distance, the cells of
    ``model.predict``. A prediction without variation has a correlation of 0.

    A baseline has no cells of its own: for the energy distance, training controls are moved by
    the effect that it predicts. The ceiling ``split half`` is an experiment of half the size,
    which a good model can pass. ``bootstrap`` bounds from above what the exact truth would score;
    for correlations of weak effects it is far above. Coverage adds the standard error of the
    observed mean to the posterior of the effect: that of masks and embeddings, not of the
    networks' weights.

    Examples
    --------
    >>> card = scvi_sams.evaluation.scorecard(model)  # doctest: +SKIP
    >>> print(card)  # doctest: +SKIP
    """
    models = dict(model) if isinstance(model, Mapping) else {type(model).__name__: model}
    if not models:
        raise ValueError("`model` is empty: give one, or several by name.")
    first = next(iter(models.values()))
    for name, other in models.items():
        if other.train_indices is None:
            raise ScreenError(f"{name} is not trained: call train() first.")
        if other.adata is None:
            raise ScreenError(f"{name} was loaded without its AnnData: load it with its AnnData.")
        if not np.array_equal(_training_indices(other), _training_indices(first)):
            raise ScreenError(f"{name} was trained on other cells than the first model.")
    cells = first.adata if adata is None else adata
    indices = _held_out_indices(first, cells, test_indices)
    training = _registered_cells(first, first.adata, _training_indices(first))
    held_out = _registered_cells(first, cells, indices)
    if cells is not first.adata:
        _check_other_cells(held_out.adata, training.adata)

    wanted = scored_conditions(held_out, conditions, min_cells)
    doses = dict(zip(held_out.conditions, held_out.doses, strict=True))
    doses |= dict(zip(training.conditions, training.doses, strict=True))
    delimiter = first.registry["setup_args"].get("combination_delimiter")
    predictions, predicted_cells = {}, {}
    # Perturbations alone are asked for too: what combinations do beyond them is scored.
    asked = [*wanted, *_parts_alone(wanted, doses, training)]
    for name, other in models.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            effects = other.get_average_treatment_effect(
                [doses[condition] for condition in asked],
                method="log_normalized",
                n_samples=n_samples,
            )
            effects.obs_names = asked
            predictions[name] = effects
            if cell_level:
                simulated = other.predict(
                    [doses[condition] for condition in wanted], n_samples=_CELLS_OF_DISTANCES
                )
                # In the order asked for, and named as the conditions are here.
                simulated.obs["condition"] = np.repeat(wanted, _CELLS_OF_DISTANCES)
                predicted_cells[name] = simulated
    return score_cells(
        predictions,
        held_out,
        training,
        conditions=wanted,
        combination_delimiter=delimiter,
        baselines=baselines,
        predicted_cells=predicted_cells,
        settings=ScoreSettings(min_cells, n_top_genes, n_bootstrap, seed),
        provenance={
            "model": ", ".join(type(other).__name__ for other in models.values()),
            "n_samples": n_samples,
        },
    )


def _training_indices(model: PerturbationVAE) -> NDArray[np.int64]:
    return np.sort(np.asarray(model.train_indices, dtype=np.int64))


def _held_out_indices(
    model: PerturbationVAE,
    adata: ad.AnnData,
    test_indices: Sequence[int] | NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Cells to score on, none of them trained on."""
    own = adata is model.adata
    if test_indices is None:
        if not own:
            return np.arange(adata.n_obs)
        for held_out in (model.test_indices, model.validation_indices):
            if held_out is not None and len(held_out):
                return np.sort(np.asarray(held_out, dtype=np.int64))
        raise ScreenError(
            "The model was trained on all its cells: give `adata` with others, or train with a "
            "`train_size` below 1."
        )
    indices = np.asarray(test_indices)
    if indices.dtype == bool and indices.shape == (adata.n_obs,):
        indices = np.flatnonzero(indices)
    if not indices.size or indices.dtype.kind not in "iu":
        raise ValueError("`test_indices` must be positions of cells, at least one.")
    if indices.min() < 0 or indices.max() >= adata.n_obs:
        raise ValueError(f"`test_indices` must lie between 0 and {adata.n_obs - 1}.")
    indices = np.unique(indices).astype(np.int64)
    if own and (seen := np.intersect1d(indices, _training_indices(model))).size:
        raise ScreenError(
            f"{seen.size} of `test_indices` were trained on, the first cell "
            f"{adata.obs_names[seen[0]]!r}: score on others."
        )
    return indices


def _registered_cells(
    model: PerturbationVAE, adata: ad.AnnData, indices: NDArray[np.int64]
) -> CellGroups:
    """Cells with the doses, batches and library sizes that the model reads of them."""
    adata = model._validate_anndata(adata)
    manager = model.get_anndata_manager(adata, required=True)
    setup = model.registry["setup_args"]
    keys = [setup.get(name) for name in ("batch_key", "size_factor_key")]
    cells = ad.AnnData(
        manager.get_from_registry(REGISTRY_KEYS.X_KEY)[indices],
        obs=adata.obs.iloc[indices][[key for key in dict.fromkeys(keys) if key is not None]],
        var=pd.DataFrame(index=adata.var_names),
    )
    dosage = registered_dosage(manager)
    return CellGroups.from_dosage(
        cells,
        sp.csr_matrix(dosage[indices]),
        model.perturbation_names,
        setup.get("control"),
        batch_key=keys[0],
        size_factor_key=keys[1],
        combination_delimiter=setup.get("combination_delimiter"),
    )


def _parts_alone(
    conditions: Sequence[str], doses: Mapping[str, dict[str, float]], training: CellGroups
) -> list[str]:
    """Conditions of one perturbation each that scored combinations are made of."""
    needed = {
        part
        for condition in conditions
        if len(doses[condition]) > 1
        for part in doses[condition].items()
    }
    return [
        str(name)
        for name, of_it in zip(training.conditions, training.doses, strict=True)
        if len(of_it) == 1 and needed.issuperset(of_it.items()) and name not in conditions
    ]


def _check_other_cells(held_out: ad.AnnData, training: ad.AnnData) -> None:
    """Raise if a cell was trained on: the same name and the same counts."""
    common = held_out.obs_names.intersection(training.obs_names)
    if not common.size or not common.is_unique:
        return
    difference = held_out[common].X - training[common, held_out.var_names].X
    same = np.asarray(abs(difference).sum(axis=1)).ravel() == 0
    if same.any():
        raise ScreenError(
            f"{same.sum()} cells of `adata` were trained on, the first {common[same.argmax()]!r}: "
            "leave them out."
        )
