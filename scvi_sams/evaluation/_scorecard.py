"""Score models, or any predictions, beside the baselines they must beat and the data's ceiling."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.data.conditions import as_labels, obs_column, split_label
from scvi_sams.data.field import PerturbationField
from scvi_sams.data.loader import cells_of
from scvi_sams.data.tables import dense, log_expression_chunks, profile_frame
from scvi_sams.evaluation._baselines import BASELINES
from scvi_sams.evaluation._distances import distribution_distance, fit_components
from scvi_sams.evaluation._measures import (
    EffectTables,
    Yardstick,
    collapse_of,
    coverage_of,
    interaction_correlation,
    measured_combinations,
    parts_of,
    score_tables,
)
from scvi_sams.evaluation._observed import CellGroups, gene_weights
from scvi_sams.evaluation._report import Scorecard, compare_with_baselines, summarise, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable
    from scvi_sams.evaluation._baselines import Baseline
    from scvi_sams.evaluation._report import PredictorKind


_FEWEST_CELLS = 4  # two in each half, so that each has a variance
_MIN_CONTROLS = 10
_MIN_CONDITIONS_OF_STRATA = 6
_STRATA = ("weak", "medium", "strong")
_CEILINGS = _SPLIT_HALF, _BOOTSTRAP = "split half", "bootstrap"
_OF_COMBINATIONS = {"additive", "matching mean", "nearest combination"}
_SIMULATED_CELLS = 200  # of a condition
_MAX_CELLS = 500  # of a condition, in distances, which cost the square of it
_CELLS_OF_COMPONENTS = 20_000
_PACKAGES = ("scvi-sams", "scvi-tools", "torch", "anndata", "numpy", "scipy", "scikit-learn")

_Weights: TypeAlias = "NDArray[np.float64] | None"


class Predictor(Protocol):
    """What a model must offer to be scored by :func:`scorecard`, of this package or not.

    Attributes are used if they are there: ``train_indices``, ``test_indices`` and
    ``validation_indices``, positions of cells in ``adata``, its screen, and
    ``registry["setup_args"]``, which say where that has counts and perturbations. Otherwise they
    are arguments of :func:`scorecard`.

    Examples
    --------
    >>> import pandas as pd
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(2_000, n_perturbations=8, n_pairs=2)
    >>> setup = {"perturbation_key": "perturbation", "control": "control"}
    >>> class Mean:
    ...     def __init__(self, cells):
    ...         self.effects = scvi_sams.evaluation.observed_effects(cells, **setup).to_df()
    ...
    ...     def get_average_treatment_effect(self, conditions, **kwargs):
    ...         return pd.DataFrame({name: self.effects.mean() for name in conditions}).T
    >>> train, test = range(0, 2_000, 2), range(1, 2_000, 2)
    >>> card = scvi_sams.evaluation.scorecard(
    ...     Mean(adata[::2]), adata, test, train_indices=train, setup=setup, cell_level=False
    ... )
    >>> float(card.table.loc["Mean", "collapse_index"].round(3))
    0.0
    """

    def get_average_treatment_effect(
        self, conditions: Sequence[str], *, method: Literal["log_normalized"], n_samples: int
    ) -> ProfileTable:
        """Predict effects of conditions against no perturbation.

        Parameters
        ----------
        conditions
            Labels: ``"A"``, ``"A+B"``, with doses ``"A:0.5"`` where they are not 1.
        method
            The unit: differences of the mean of ``log2(1 + 1e4 * x / library)``.
        n_samples
            Draws behind the means and intervals, of a model that has some.

        Returns
        -------
        anndata.AnnData or pandas.DataFrame
            Conditions x genes, in the order asked for; NaN for what it leaves open. In
            ``layers["std"]``, if there is one, the posterior standard deviation.
        """
        ...

    def predict(self, conditions: Sequence[str], *, n_samples: int) -> ad.AnnData:
        """Simulate cells, for the energy distance; not called with ``cell_level=False``.

        Parameters
        ----------
        conditions
            Labels, as above.
        n_samples
            Cells of each condition.

        Returns
        -------
        anndata.AnnData
            Cells x genes with counts in ``X`` and ``obs["library_size"]``: ``n_samples`` of the
            first condition, then of the next.
        """
        ...


def scorecard(
    model: Predictor | Mapping[str, Predictor],
    adata: ad.AnnData | None = None,
    test_indices: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    train_indices: Sequence[int] | NDArray[np.int64] | None = None,
    setup: Mapping[str, Any] | None = None,
    conditions: Sequence[str] | None = None,
    baselines: Sequence[str] | Mapping[str, Baseline] | None = None,
    cell_level: bool = True,
    min_cells: int = 4,
    n_top_genes: int = 20,
    n_samples: int = 25,
    n_bootstrap: int = 1_000,
    seed: int = 0,
) -> Scorecard:
    """Score a model beside the simple baselines and the ceiling, on cells it has not seen.

    Baselines are fitted on the training cells of the model, in the same unit. Held-out cells of
    conditions that were trained on ask whether the model describes a condition; held-out
    conditions ask whether it predicts.

    Parameters
    ----------
    model
        A trained model, see :class:`Predictor`; or several by name, trained on the same cells.
    adata
        Held-out cells, laid out as what the model was set up with; by default that AnnData.
    test_indices
        Cells of ``adata`` to score on. By default ``model.test_indices``, or
        ``model.validation_indices`` where there are none, or all cells of another AnnData.
    train_indices
        Cells of ``model.adata``, or of ``adata`` if it has none, that the model was fitted on; by
        default ``model.train_indices``.
    setup
        The arguments of ``setup_anndata``, by default ``model.registry["setup_args"]``.
    conditions
        Conditions to score; by default all with at least ``min_cells`` held-out cells.
    baselines
        Names in :data:`BASELINES`, or functions like those by name. By default all that apply to a
        condition that is scored.
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
        Seed of the model's draws (of torch), of halves and of the bootstrap.

    Returns
    -------
    Scorecard
        Means with intervals, scores by condition, and a verdict.

    Raises
    ------
    ScreenError
        If held-out cells were trained on, no condition has enough of them, there are no training
        controls, models were trained on different cells, or it is not known on which.
    ValueError
        If a setting makes no sense, or a model has no count likelihood.

    Notes
    -----
    A prediction without variation has a correlation of 0. For the energy distance of a baseline,
    training controls are moved by the effect that it predicts. The ceiling ``split half`` is an
    experiment of half the size, which a good model can pass; ``bootstrap`` bounds from above what
    the exact truth would score, for correlations of weak effects by far. Coverage adds the
    standard error of the observed mean to the posterior of masks and embeddings.

    Examples
    --------
    >>> card = scvi_sams.evaluation.scorecard(model)  # doctest: +SKIP
    >>> print(card)  # doctest: +SKIP
    """
    models = dict(model) if isinstance(model, Mapping) else {type(model).__name__: model}
    if not models:
        raise ValueError("`model` is empty: give one, or several by name.")
    held_out, training = _cells_of(models, adata, test_indices, train_indices, setup)
    wanted, n_few = _scored_conditions(held_out, conditions, min_cells)
    delimiter = training.found.delimiter
    # Perturbations alone are asked for too: what combinations do beyond them is scored.
    parts = {part for of_it in parts_of(wanted, delimiter).values() for part in of_it}
    asked = [*wanted, *(name for name in training.conditions if name in parts - set(wanted))]
    predictions, predicted_cells = {}, {}
    for name, other in models.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            effects = other.get_average_treatment_effect(
                asked, method="log_normalized", n_samples=n_samples
            )
            if isinstance(effects, ad.AnnData):
                effects.obs_names = asked
            predictions[name] = effects
            if cell_level:
                predicted_cells[name] = other.predict(wanted, n_samples=_SIMULATED_CELLS)
                predicted_cells[name].obs["condition"] = np.repeat(wanted, _SIMULATED_CELLS)
    return _score(
        predictions,
        predicted_cells,
        (held_out, training),
        (wanted, n_few),
        delimiter,
        baselines,
        settings={
            "min_cells": min_cells,
            "n_top_genes": n_top_genes,
            "n_bootstrap": n_bootstrap,
            "seed": seed,
        },
        model=", ".join(type(other).__name__ for other in models.values()),
        n_samples=n_samples,
    )


def score_predictions(
    predictions: Mapping[str, ProfileTable],
    held_out: ad.AnnData,
    training: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    *,
    conditions: Sequence[str] | None = None,
    baselines: Sequence[str] | Mapping[str, Baseline] | None = None,
    predicted_cells: Mapping[str, ad.AnnData] | None = None,
    min_cells: int = 4,
    n_top_genes: int = 20,
    n_bootstrap: int = 1_000,
    seed: int = 0,
) -> Scorecard:
    r"""Score any predictions beside the baselines and the ceiling.

    All is in one unit, effects in :math:`\log_2(1 + 10^4 x / l)` against the controls of the same
    batch (:func:`observed_effects`). Baselines are fitted on the training cells, and the held-out
    cells are used to score alone. For models see :func:`scorecard`.

    Parameters
    ----------
    predictions
        Effects of each predictor, conditions x genes, with every condition that is scored (NaN if
        it is left open, and then not in the means) and every gene; with perturbations alone, for
        interactions; with ``layers["std"]``, the posterior standard deviation, for coverage.
    held_out, training
        Cells x genes, with counts: the cells that are scored against, and those that every
        predictor was fitted on. They may share no cell.
    perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
        As for :func:`observed_effects`, the same for both.
    conditions, baselines, min_cells, n_top_genes, n_bootstrap, seed
        As for :func:`scorecard`.
    predicted_cells
        Simulated cells with ``obs["condition"]``, as from ``model.predict``, for the energy
        distance.

    Returns
    -------
    Scorecard
        As of :func:`scorecard`.

    Raises
    ------
    ScreenError, ValueError
        As :func:`scorecard`, or if a prediction lacks a condition or gene, or two have one name.

    Notes
    -----
    After Ahlmann-Eltze, Huber and Anders (Nature Methods 2025) and Mejia et al. (arXiv
    2506.22641). Where at least ten controls are held out, effects are against these, so that the
    noise of the training controls, which is in every prediction, does not look like agreement.

    Examples
    --------
    >>> import scvi_sams
    >>> from scvi_sams.evaluation import observed_effects, score_predictions
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=2_000, n_perturbations=8, n_pairs=2)
    >>> training, held_out = adata[::2].copy(), adata[1::2].copy()
    >>> halved = observed_effects(training, "perturbation", "control")
    >>> halved.X *= 0.5
    >>> card = score_predictions({"half": halved}, held_out, training, "perturbation", "control")
    >>> card.comparison.loc[("half", "relative_squared_error"), "outcome"]
    'behind'
    """
    # Held-out cells need no control of their own, and may have perturbations of their own.
    names = {
        part
        for cells in (training, held_out)
        for label in obs_column(cells, perturbation_key).dropna().astype(str).unique()
        for part in split_label(label, combination_delimiter)
    }
    found = Conditions.from_labels(
        held_out.obs[perturbation_key],
        control,
        combination_delimiter,
        perturbations=sorted(names.difference(as_labels(control))),
    )
    keys = batch_key, layer, size_factor_key
    scored = CellGroups.of(held_out, found, *keys)
    found = Conditions.from_obs(training, perturbation_key, control, combination_delimiter)
    return _score(
        predictions,
        predicted_cells or {},
        (scored, CellGroups.of(training, found, *keys)),
        _scored_conditions(scored, conditions, min_cells),
        combination_delimiter,
        baselines,
        settings={
            "min_cells": min_cells,
            "n_top_genes": n_top_genes,
            "n_bootstrap": n_bootstrap,
            "seed": seed,
        },
    )


# -- the cells of models -------------------------------------------------------------------------


def _cells_of(
    models: Mapping[str, Predictor],
    adata: ad.AnnData | None,
    test_indices: Sequence[int] | NDArray[np.int64] | None,
    train_indices: Sequence[int] | NDArray[np.int64] | None,
    setup: Mapping[str, Any] | None,
) -> tuple[CellGroups, CellGroups]:
    """Held-out and training cells: all that is asked of a model but predictions."""
    first = next(iter(models.values()))
    trained_on: list[NDArray[np.int64]] = []
    for name, model in models.items():
        own = getattr(model, "train_indices", None) if train_indices is None else train_indices
        if own is None:
            raise ScreenError(
                f"{name} is not trained, or does not say on which cells: call train(), or give "
                "`train_indices`."
            )
        if getattr(model, "adata", adata) is None:
            raise ScreenError(f"{name} has no AnnData: load it with its AnnData, or give `adata`.")
        trained_on.append(np.unique(np.asarray(own, dtype=np.int64)))
        if not np.array_equal(trained_on[-1], trained_on[0]):
            raise ScreenError(f"{name} was trained on other cells than the first model.")
    setup = getattr(first, "registry", {}).get("setup_args") if setup is None else setup
    if setup is None:
        raise ScreenError(
            "The model does not say where its cells have counts and perturbations: give `setup`, "
            'such as {"perturbation_key": "perturbation", "control": "control"}.'
        )
    screen: ad.AnnData = getattr(first, "adata", adata)
    cells = screen if adata is None else adata
    known = signature(PerturbationField).parameters
    field = PerturbationField(**{key: value for key, value in setup.items() if key in known})
    found = field.read(screen)
    training = _grouped(screen, trained_on[0], found, setup)
    seen = trained_on[0] if cells is screen else None
    indices = _held_out_indices(first, cells, test_indices, seen)
    if cells is screen:
        return _grouped(screen, indices, found, setup), training
    if (missing := screen.var_names.difference(cells.var_names)).size:
        raise ScreenError(f"`adata` lacks {missing.size} genes, the first {missing[0]!r}.")
    if not cells.var_names.equals(screen.var_names):
        cells = cells[:, screen.var_names]
    held_out = _grouped(cells, indices, field.read(cells, found.perturbations), setup)
    _check_other_cells(held_out.adata, training.adata)
    return held_out, training


def _grouped(
    adata: ad.AnnData, indices: NDArray[np.int64], found: Conditions, setup: Mapping[str, Any]
) -> CellGroups:
    """Some cells in memory, with their counts, batches and library sizes and nothing else."""
    layer, keys = setup.get("layer"), [setup.get("batch_key"), setup.get("size_factor_key")]
    counts = adata.X if layer is None else adata.layers[layer]
    cells = ad.AnnData(
        counts[indices],
        obs=adata.obs.iloc[indices][[key for key in dict.fromkeys(keys) if key is not None]],
        var=pd.DataFrame(index=adata.var_names),
    )
    return CellGroups.of(
        cells, replace(found, codes=found.codes[indices]), keys[0], size_factor_key=keys[1]
    )


def _held_out_indices(
    model: Predictor,
    adata: ad.AnnData,
    test_indices: Sequence[int] | NDArray[np.int64] | None,
    trained_on: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Cells to score on, none of them trained on; ``trained_on`` is None in another AnnData."""
    if test_indices is None:
        if trained_on is None:
            return np.arange(adata.n_obs)
        for name in ("test_indices", "validation_indices"):
            held_out = getattr(model, name, None)
            if held_out is not None and len(held_out):
                return np.sort(np.asarray(held_out, dtype=np.int64))
        raise ScreenError(
            "The model was trained on all its cells: give `adata` with others, or train with a "
            "`train_size` below 1."
        )
    indices = np.unique(cells_of(adata, test_indices))
    if trained_on is not None and (seen := np.intersect1d(indices, trained_on)).size:
        raise ScreenError(
            f"{seen.size} of `test_indices` were trained on, the first cell "
            f"{adata.obs_names[seen[0]]!r}: score on others."
        )
    return indices


def _check_other_cells(held_out: ad.AnnData, training: ad.AnnData) -> None:
    """Raise if a cell was trained on: the same name and the same counts."""
    common = held_out.obs_names.intersection(training.obs_names)
    if not common.size or not common.is_unique:
        return
    same = np.asarray(abs(held_out[common].X - training[common].X).sum(axis=1)).ravel() == 0
    if same.any():
        raise ScreenError(
            f"{same.sum()} cells of `adata` were trained on, the first {common[same.argmax()]!r}: "
            "leave them out."
        )


# -- scoring -------------------------------------------------------------------------------------


def _scored_conditions(
    held_out: CellGroups, conditions: Sequence[str] | None, min_cells: int
) -> tuple[list[str], int]:
    """Conditions with enough held-out cells, and how many have too few.

    Those asked for must have enough.
    """
    if min_cells < _FEWEST_CELLS:
        raise ValueError(
            f"min_cells={min_cells}: halves of a condition with variances take at least "
            f"{_FEWEST_CELLS} cells."
        )
    n_cells = held_out.n_cells
    if conditions is None:
        kept = [str(name) for name in n_cells.index[n_cells >= min_cells]]
        if not kept:
            largest = f"{n_cells.idxmax()!r} has {n_cells.max()}" if len(n_cells) else "none is"
            raise ScreenError(
                f"No condition has {min_cells} held-out cells, {largest}: hold out more cells, or "
                "lower `min_cells`."
            )
        return kept, len(n_cells) - len(kept)
    wanted = list(dict.fromkeys(str(name) for name in conditions))
    if not wanted:
        raise ScreenError("`conditions` is empty: name one, or leave it out to score all.")
    counts = n_cells.reindex(wanted, fill_value=0)
    if (few := counts[counts < min_cells]).size:
        raise ScreenError(
            f"{few.size} of `conditions` have fewer than {min_cells} held-out cells, the first "
            f"{few.index[0]!r} with {few.iloc[0]}: leave them out, or lower `min_cells`."
        )
    return wanted, 0


def _score(
    predictions: Mapping[str, ProfileTable],
    predicted_cells: Mapping[str, ad.AnnData],
    held_out_and_training: tuple[CellGroups, CellGroups],
    wanted_and_few: tuple[list[str], int],
    delimiter: str | None,
    baselines: Sequence[str] | Mapping[str, Baseline] | None,
    settings: Mapping[str, int],
    **provenance: object,
) -> Scorecard:
    """Score predictions on cells whose conditions are known."""
    (held_out, training), (wanted, n_few) = held_out_and_training, wanted_and_few
    if settings["n_bootstrap"] < 1:
        raise ValueError(f"n_bootstrap={settings['n_bootstrap']}: at least one draw is needed.")
    if not training.is_control.any():
        raise ScreenError("No training cell is a control: effects need controls to be against.")
    rng = np.random.default_rng(settings["seed"])
    cells = _ScoredCells(held_out, training, wanted, delimiter)
    training_effects = training.effects(cells.training_controls)
    if not training_effects.n_obs:
        raise ScreenError("No training cell is perturbed: there is nothing to predict from.")

    first = cells.held_out.half_weights(rng)
    observed = cells.with_halves(cells.tables(), first, 1 - first)
    yardstick = Yardstick(
        observed,
        training_effects.to_df().astype(np.float64).mean(),
        (cells.gene_weights(first), cells.gene_weights(1 - first)),
        delimiter,
        settings["n_top_genes"],
    )
    notes = cells.notes(n_few, settings["min_cells"])
    genes = held_out.adata.var_names
    tables = {
        name: _checked_prediction(name, prediction, wanted, genes)
        for name, prediction in predictions.items()
    }
    for name, table in tables.items():
        if n_open := int(np.isnan(dense(table[wanted].X)).any(axis=1).sum()):
            notes.append(
                f"{name} has no prediction for {n_open} of {len(wanted)} conditions: they are "
                "left out of its means and comparisons."
            )
    asked = [*wanted, *cells.parts.conditions.difference(wanted)]
    used, fitted = _fitted_baselines(baselines, training_effects, asked, wanted, delimiter)
    every_name = [*predictions, *used, *_CEILINGS]
    if twice := [name for name in every_name if every_name.count(name) > 1]:
        raise ValueError(f"Two predictors are called {twice[0]!r}: rename one.")
    for name, table in fitted.items():
        fallback = table[wanted].obs["fallback"]
        if n_fallback := int((fallback != "").sum()):
            first_one = fallback[fallback != ""]
            notes.append(
                f"{name} does not apply to {n_fallback} of {len(wanted)} conditions, for instance "
                f"{first_one.index[0]} ({first_one.iloc[0]})."
            )
    kinds: dict[str, PredictorKind] = dict.fromkeys(predictions, "model")
    kinds |= dict.fromkeys(used, "baseline")

    tables |= fitted
    scores = {
        name: score_tables(EffectTables(table, table, halves=(table, table)), yardstick)
        for name, table in tables.items()
    }
    for name in predictions:
        if (coverage := coverage_of(tables[name], observed.effects)) is not None:
            scores[name][coverage.columns] = coverage
    if cells.combinations:
        models = {name: tables[name] for name in predictions}
        interactions, note = _interaction_scores(
            cells, held_out, models, used, delimiter, settings["min_cells"], rng
        )
        notes += [note] if note else []
        for name, correlation in interactions.items():
            scores[name]["interaction_correlation"] = correlation
    one, other = cells.split(rng)
    scores[_SPLIT_HALF] = score_tables(one, yardstick._replace(observed=other, weights=None))
    drawn_cells = cells.bootstrapped(first, rng)._replace(with_parts=None)
    scores[_BOOTSTRAP] = score_tables(drawn_cells, yardstick)
    kinds |= dict.fromkeys(_CEILINGS, "ceiling")
    if predicted_cells:
        for name, distance in _energy_distances(cells, predicted_cells, fitted, rng).items():
            scores[name]["e_distance"] = distance

    n = len(wanted)  # every predictor is resampled alike
    draws = np.random.default_rng(settings["seed"])
    drawn = draws.multinomial(n, np.full(n, 1 / n), size=settings["n_bootstrap"]).astype(float)
    overall = {
        name: ("collapse_index", *collapse_of(table, observed.centred, drawn))
        for name, table in tables.items()
        if n > 1
    }
    summary = summarise(scores, overall, drawn)
    comparison = compare_with_baselines(scores, kinds, drawn)
    rows = {
        name: table.rename_axis(index="condition", columns="measure").stack(future_stack=True)
        for name, table in scores.items()
    }
    tidy = pd.concat(rows, names=["predictor"]).rename("value").reset_index()
    return Scorecard(
        per_condition=tidy.assign(
            stratum=tidy["condition"].map(_strata(observed.effects)),
            n_cells=tidy["condition"].map(cells.held_out.n_cells),
        ),
        summary=summary,
        comparison=comparison,
        verdict=tuple(verdict(comparison, summary, kinds)),
        kinds=kinds,
        notes=tuple(notes),
        provenance={
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
            **provenance,
            "n_conditions": n,
            "n_genes": len(genes),
            "n_held_out_cells": int(cells.held_out.n_cells.sum()),
            "n_held_out_controls": int(held_out.is_control.sum()),
            "n_training_cells": training.adata.n_obs,
            **settings,
        },
    )


def _fitted_baselines(
    baselines: Sequence[str] | Mapping[str, Baseline] | None,
    training_effects: ad.AnnData,
    asked: Sequence[str],
    wanted: Sequence[str],
    delimiter: str | None,
) -> tuple[dict[str, Baseline], dict[str, ad.AnnData]]:
    """Baselines and what they predict; by default those that say something of their own."""
    chosen: Mapping[str, Baseline] = BASELINES
    if isinstance(baselines, Mapping):
        chosen = baselines
    elif baselines is not None:
        if unknown := [name for name in baselines if name not in BASELINES]:
            raise ValueError(f"There is no baseline {unknown[0]!r}, only {', '.join(BASELINES)}.")
        chosen = {name: BASELINES[name] for name in baselines}
    fitted, combinations = {}, list(parts_of(wanted, delimiter))
    for name, baseline in chosen.items():
        table = baseline(training_effects, asked, delimiter)
        of_interest = combinations if name in _OF_COMBINATIONS else list(wanted)
        if baselines is not None or (table[of_interest].obs["fallback"] == "").any():
            fitted[name] = table
    return {name: chosen[name] for name in fitted}, fitted


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
    table = ad.AnnData(finite.set_axis(genes.astype(str), axis=1))
    if isinstance(prediction, ad.AnnData) and "std" in prediction.layers:
        table.layers["std"] = profile_frame(prediction, name, layer="std")[genes].to_numpy()
    return table


def _strata(observed: ad.AnnData) -> pd.Series:
    """Thirds of the conditions by the size of the observed effect, noise taken off."""
    if observed.n_obs < _MIN_CONDITIONS_OF_STRATA:
        return pd.Series("all", index=observed.obs_names)
    signal = dense(observed.X) ** 2 - dense(observed.layers["standard_error"]) ** 2
    rank = pd.Series(signal.sum(axis=1), index=observed.obs_names).rank(method="first")
    return pd.cut(3 * rank / len(rank), [0, 1, 2, 3], labels=list(_STRATA))


class _ScoredCells:
    """Held-out cells of the conditions that are scored, with the training cells.

    ``parts`` are training cells of the perturbations that scored ``combinations`` are made of,
    where all of these were measured alone. ``has_own_controls`` says whether effects are against
    held-out controls.
    """

    def __init__(
        self,
        held_out: CellGroups,
        training: CellGroups,
        conditions: Sequence[str],
        delimiter: str | None,
    ) -> None:
        self.held_out, self.training = held_out.restricted(conditions), training
        self.combinations = measured_combinations(conditions, training.conditions, delimiter)
        parts = parts_of(self.combinations, delimiter).values()
        self.parts = training.restricted(sorted({part for of_it in parts for part in of_it}))
        self.training_controls = training.control_means()
        self.has_own_controls = int(held_out.is_control.sum()) >= _MIN_CONTROLS

    def notes(self, n_few: int, min_cells: int) -> list[str]:
        """What a reader should know of the cells."""
        notes = []
        if n_few:
            notes.append(
                f"{n_few} conditions with fewer than {min_cells} held-out cells are not scored."
            )
        if not self.has_own_controls:
            notes.append(
                f"Fewer than {_MIN_CONTROLS} controls are held out: effects are against the "
                "training controls, whose noise predictions share, so that all scores flatter a "
                "little. Hold out some, with `test_controls` of the splits."
            )
        scored = self.held_out.conditions
        n_unseen = len(scored.difference(self.training.conditions))
        notes.append(
            f"{len(scored)} conditions are scored: {len(scored) - n_unseen} with training cells "
            f"of their own, {n_unseen} without."
        )
        return notes

    def tables(self, weights: _Weights = None, part_weights: _Weights = None) -> EffectTables:
        """Effects in the held-out cells, each counted as often as ``weights`` says."""
        if self.has_own_controls:
            controls = self.held_out.control_means(weights)
        else:
            controls = self.parts.control_means(part_weights)
        return EffectTables(
            self.held_out.effects(controls, weights),
            self.held_out.effects(self.training_controls, weights),
            self.with_parts(weights, part_weights) if self.combinations else None,
        )

    def with_parts(self, weights: _Weights, part_weights: _Weights) -> ad.AnnData:
        """Effects of the combinations, and of their parts in training cells."""
        controls = self.parts.control_means(part_weights)
        return ad.concat(
            [
                self.held_out.restricted(self.combinations).effects(controls, weights),
                self.parts.effects(controls, part_weights),
            ]
        )

    def with_halves(
        self, tables: EffectTables, first: NDArray[np.float64], second: NDArray[np.float64]
    ) -> EffectTables:
        """Add the effects in two sets of cells."""
        one, other = (
            self.held_out.effects(self.training_controls, weights) for weights in (first, second)
        )
        return tables._replace(halves=(one, other))

    def bootstrapped(self, first_half: NDArray[np.float64], rng: Generator) -> EffectTables:
        """Effects in cells drawn with replacement, over all and within each half."""
        tables = self.tables(
            self.held_out.bootstrap_weights(rng), self.parts.bootstrap_weights(rng)
        )
        drawn = []
        for half in (first_half, 1 - first_half):
            condition = np.where(half > 0, self.held_out.condition, -2)
            drawn.append(half * replace(self.held_out, condition=condition).bootstrap_weights(rng))
        return self.with_halves(tables, *drawn)

    def split(self, rng: Generator) -> tuple[EffectTables, EffectTables]:
        """Effects in two halves of the cells."""
        of_cells, of_parts = self.held_out.half_weights(rng), self.parts.half_weights(rng)
        return self.tables(of_cells, of_parts), self.tables(1 - of_cells, 1 - of_parts)

    def gene_weights(self, half: NDArray[np.float64]) -> pd.DataFrame:
        """Weights of genes by differential expression in some of the held-out cells."""
        moments = self.held_out.moments(half)
        if not moments[0][0]:  # no control among them
            of_controls = self.training.restricted([]).moments()
            for own, other in zip(moments, of_controls, strict=True):
                own[0] = other[0]
        return pd.DataFrame(
            gene_weights(*moments),
            index=self.held_out.conditions,
            columns=self.held_out.adata.var_names,
        )


def _interaction_scores(
    cells: _ScoredCells,
    held_out: CellGroups,
    predictions: Mapping[str, ad.AnnData],
    baselines: Mapping[str, Baseline],
    delimiter: str | None,
    min_cells: int,
    rng: Generator,
) -> tuple[dict[str, pd.Series], str]:
    """Correlate predicted with observed interactions, and say what a reader should know of it.

    Parts are measured in held-out cells where these suffice, otherwise in one half of the training
    cells, with baselines fitted on the other.
    """
    names, note = [*cells.combinations, *cells.parts.conditions], ""
    enough = (held_out.n_cells.reindex(cells.parts.conditions, fill_value=0) >= min_cells).all()
    if enough and cells.has_own_controls:
        table = held_out.restricted(names).effects(held_out.control_means())
        folds = [(table, cells.training.effects(cells.training_controls))]
    else:
        n_cells = cells.training.n_cells
        learned = cells.training.restricted(n_cells[n_cells >= 2].index)
        first, folds = learned.half_weights(rng), []
        for scored, fitted in ((first, 1 - first), (1 - first, first)):
            training = learned.effects(learned.control_means(fitted), fitted)
            folds.append((cells.with_parts(None, scored), training))
        note = (
            "interaction r: parts are measured in training cells. Baselines are fitted on other "
            "halves of them than those scored; models have seen both, which flatters a model that "
            "overfits."
        )
    scores: dict[str, list[pd.Series]] = {}
    for observed, training in folds:
        fitted_tables = {name: of(training, names, delimiter) for name, of in baselines.items()}
        for name, table in {**predictions, **fitted_tables}.items():
            correlation = interaction_correlation(table, observed, delimiter)
            scores.setdefault(name, []).append(correlation)
    return {name: sum(each[1:], each[0]) / len(each) for name, each in scores.items()}, note


def _energy_distances(
    cells: _ScoredCells,
    predicted_cells: Mapping[str, ad.AnnData],
    predicted_effects: Mapping[str, ad.AnnData],
    rng: Generator,
) -> dict[str, pd.Series]:
    """E-distance between predicted and held-out cells, by predictor and condition.

    Distances are unbiased ones, in principal components of the training cells. A baseline's cells
    are training controls, moved by the effect it predicts; the distance between two halves of the
    held-out cells is the ceiling.
    """
    training, held_out = cells.training, cells.held_out
    everything = np.ones(training.adata.n_obs, dtype=bool)
    pca = fit_components(_expression(training, everything, _CELLS_OF_COMPONENTS, rng))

    def coordinates(chunks: Sequence[Any]) -> NDArray[np.float64]:
        return np.vstack([pca.transform(chunk) for chunk in chunks]).astype(np.float64)

    def some(groups: CellGroups, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        return coordinates(_expression(groups, chosen, _MAX_CELLS, rng))

    controls = some(training, training.is_control)
    observed = {
        condition: some(held_out, held_out.condition == code)
        for code, condition in enumerate(held_out.conditions)
    }

    def distances(predicted: Mapping[str, Any], true: Mapping[str, Any] = observed) -> pd.Series:
        return pd.Series(
            {
                condition: distribution_distance(
                    predicted[condition], true[condition], unbiased=True
                )
                for condition in observed
            }
        )

    found = {}
    genes = training.adata.var_names
    for name, simulated in predicted_cells.items():
        if (missing := genes.difference(simulated.var_names)).size:
            raise ScreenError(
                f"predicted_cells[{name!r}] lacks {missing.size} genes, the first {missing[0]!r}."
            )
        simulated = simulated[:, genes]
        library = obs_column(simulated, "library_size")
        chunks = [chunk for _, chunk in log_expression_chunks(simulated, None, library)]
        of_cells, label = coordinates(chunks), obs_column(simulated, "condition").astype(str)
        found[name] = distances({c: of_cells[label == c][:_MAX_CELLS] for c in observed})
    for name, effects in predicted_effects.items():
        moved = dense(effects[list(observed)].X) @ pca.components_.T
        found[name] = distances({c: controls + moved[k] for k, c in enumerate(observed)})
    shuffled = {condition: rng.permutation(truth) for condition, truth in observed.items()}
    halves = (
        {c: part[: len(part) // 2] for c, part in shuffled.items()},
        {c: part[len(part) // 2 :] for c, part in shuffled.items()},
    )
    return found | {_SPLIT_HALF: distances(*halves)}


def _expression(
    cells: CellGroups, chosen: NDArray[np.bool_], limit: int, rng: Generator
) -> list[Any]:
    """Log expression, in chunks, of at most so many of the chosen cells."""
    kept = np.sort(rng.permutation(np.flatnonzero(chosen))[:limit])
    return [chunk for _, chunk in cells.log_expression(kept)]
