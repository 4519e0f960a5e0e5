"""The measures of a scorecard, each condition by itself."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import dense, ratio
from scvi_sams.evaluation._agreement import (
    collapse_index,
    effect_correlation_by_condition,
    interval_coverage,
    perturbation_discrimination,
    weighted_effect_error,
)
from scvi_sams.evaluation._interactions import interaction_residuals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import anndata as ad
    from numpy.typing import NDArray

__all__ = [
    "EffectTables",
    "MEASURES",
    "Measure",
    "Yardstick",
    "collapse_of",
    "coverage_of",
    "interaction_correlation",
    "parts_of",
    "score_tables",
]


class Measure(NamedTuple):
    """What a column of a scorecard says, and which way is up."""

    title: str
    better: Literal["higher", "lower", "target"]
    description: str
    target: float = float("nan")


_INTERVALS = "share of the detected genes whose observed effect is in the {:.0%} interval"
MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "pearson": Measure(
            "delta r",
            "higher",
            "correlation of effects against the controls, over genes; 0 if none is predicted",
        ),
        "pearson_top": Measure(
            "delta r (top)",
            "higher",
            "the same over the genes that respond most",
        ),
        "pearson_perturbed": Measure(
            "r vs mean", "higher", "correlation of effects relative to the perturbed mean"
        ),
        "pearson_perturbed_top": Measure(
            "r vs mean (top)", "higher", "the same over the genes that respond most"
        ),
        "relative_squared_error": Measure(
            "rel. error", "lower", "squared error over squared effect; 1 for no change"
        ),
        "weighted_mse": Measure(
            "WMSE", "lower", "squared error, weighted by differential expression in other cells"
        ),
        "weighted_r2": Measure(
            "weighted R2", "higher", "weighted R squared of effects relative to the perturbed mean"
        ),
        "perturbation_discrimination": Measure(
            "PDS", "higher", "rank of the right condition among all by L1 distance; 0.5 by chance"
        ),
        "interaction_correlation": Measure(
            "interaction r",
            "higher",
            "correlation of combinations less the sum of their parts; 0 for the sum itself",
        ),
        "e_distance": Measure(
            "E-distance", "lower", "energy distance between predicted and held-out cells"
        ),
        "collapse_index": Measure(
            "collapse index",
            "target",
            "variance between predicted conditions over that between true ones",
            1.0,
        ),
        "coverage_50": Measure("coverage 50%", "target", _INTERVALS.format(0.5), 0.5),
        "coverage_80": Measure("coverage 80%", "target", _INTERVALS.format(0.8), 0.8),
        "coverage_95": Measure("coverage 95%", "target", _INTERVALS.format(0.95), 0.95),
    }
)
"""Every measure, in the order of the columns."""

_LEVELS = {"coverage_50": 0.5, "coverage_80": 0.8, "coverage_95": 0.95}


class EffectTables(NamedTuple):
    """Effects (conditions x genes) as the measures need them: observed, or predicted.

    The tables of a prediction are all the same. Observed ones differ in the control cells that
    they are against, since noise of controls that is in both sides would look like agreement.
    """

    effects: ad.AnnData
    """Against controls that predictions have not used, where there are such."""
    centred: ad.AnnData
    """Against the training controls, which cancel where effects are compared with each other."""
    with_parts: ad.AnnData | None = None
    """Combinations with the perturbations they are made of; None without combinations."""
    halves: tuple[ad.AnnData, ad.AnnData] | None = None
    """As ``centred``, in each half of the cells."""


class Yardstick(NamedTuple):
    """What predictions are held against."""

    observed: EffectTables
    reference: pd.Series
    """Mean effect of the training conditions."""
    weights: tuple[pd.DataFrame, pd.DataFrame] | None
    """Weights of genes from each half of the held-out cells."""
    combination_delimiter: str | None
    n_top_genes: int


def score_tables(predicted: EffectTables, yardstick: Yardstick) -> pd.DataFrame:
    """Score the effects of every observed condition, conditions x measures."""
    observed, reference = yardstick.observed, yardstick.reference
    conditions = observed.effects.obs_names
    against_controls = effect_correlation_by_condition(
        predicted.effects[conditions], observed.effects, n_top_genes=yardstick.n_top_genes
    )
    against_mean = effect_correlation_by_condition(
        predicted.centred[conditions],
        observed.centred,
        reference,
        yardstick.n_top_genes,
        observed.effects,
    )
    scores = pd.DataFrame(
        {
            "pearson": against_controls["pearson"],
            "pearson_top": against_controls["pearson_top"],
            "pearson_perturbed": against_mean["pearson"],
            "pearson_perturbed_top": against_mean["pearson_top"],
            "relative_squared_error": against_controls["relative_squared_error"],
            "perturbation_discrimination": perturbation_discrimination(
                predicted.centred[conditions],
                observed.centred,
                combination_delimiter=yardstick.combination_delimiter,
            ),
        },
        index=conditions,
    )
    _count_flat_as_unrelated(scores, predicted.centred[conditions], observed.centred)
    if len(conditions) == 1:  # nothing to mistake it for
        scores["perturbation_discrimination"] = np.nan
    if yardstick.weights is not None and predicted.halves and observed.halves:
        # Weights of one half, errors in the other, and the other way round.
        first, second = (
            weighted_effect_error(
                predicted.halves[scored][conditions],
                observed.halves[scored],
                yardstick.weights[1 - scored],
                reference,
            )
            for scored in (0, 1)
        )
        scores[first.columns] = (first + second) / 2
    if observed.with_parts is not None and predicted.with_parts is not None:
        scores["interaction_correlation"] = interaction_correlation(
            predicted.with_parts, observed.with_parts, yardstick.combination_delimiter
        )
    return scores


def _count_flat_as_unrelated(
    scores: pd.DataFrame, predicted: ad.AnnData, observed: ad.AnnData
) -> None:
    """Give a prediction without variation a correlation of 0.

    It is not defined, but a prediction must not be left out of a mean for saying nothing.
    """
    finite = np.isfinite(dense(predicted.X)).all(axis=1) & (np.ptp(dense(observed.X), axis=1) > 0)
    columns = [name for name in scores if name.startswith("pearson")]
    flat = scores[columns].isna() & finite[:, None]
    scores[columns] = scores[columns].mask(flat, 0.0)


def coverage_of(predicted: ad.AnnData, observed: ad.AnnData) -> pd.DataFrame | None:
    """Coverage of the intervals of predicted effects; None for a prediction without intervals.

    Intervals are Normal, of the mean and ``layers["std"]``: the tails of a few draws are not
    known better. Genes without a count in the condition and the controls have no known error, and
    are left out.
    """
    if "std" not in predicted.layers:
        return None
    values = predicted[observed.obs_names].copy()
    unknown = ~(dense(observed.layers["standard_error"]) > 0)
    left_out, kept = unknown.sum(axis=1), (~unknown).sum(axis=1)
    spread = np.where(unknown, 0.0, values.layers["std"])
    spread[np.isnan(values.layers["std"]).any(axis=1)] = np.nan  # no posterior at all
    middle = np.where(unknown, dense(observed.X), dense(values.X))
    columns = {}
    for name, level in _LEVELS.items():
        width = norm.ppf((1 + level) / 2) * spread
        values.layers["lower"], values.layers["upper"] = middle - width, middle + width
        share = interval_coverage({level: values}, observed)[level].to_numpy()
        # Those left out were counted as inside.
        columns[name] = ratio(share * values.n_vars - left_out, kept.astype(np.float64))
    return pd.DataFrame(columns, index=values.obs_names)


def collapse_of(
    predicted: ad.AnnData, observed: ad.AnnData, drawn: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Noise-corrected collapse index over all conditions, and of draws of conditions.

    Parameters
    ----------
    predicted, observed
        Effects, conditions x genes.
    drawn
        Draws x conditions, how often each condition is drawn.
    """
    index = collapse_index(predicted[observed.obs_names], observed)
    n_conditions = observed.n_obs

    def variances(table: ad.AnnData) -> NDArray[np.float64]:
        # From the products of all pairs, so that a draw costs no pass over the genes.
        values = dense(table[observed.obs_names].X)
        products = values @ values.T
        within = drawn @ np.diag(products)
        between = np.einsum("dc,ck,dk->d", drawn, products, drawn, optimize=True)
        return (within - between / n_conditions) / (n_conditions - 1)

    # A drawn set repeats conditions, which takes 1 / n off every variance, noise included.
    noise = index.sampling_variance * (1 - 1 / n_conditions)
    true_variance = variances(observed) - noise
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(true_variance > 0, variances(predicted) / true_variance, np.nan)
    return index.noise_corrected_ratio, ratios


def parts_of(conditions: Sequence[str], delimiter: str | None) -> dict[str, list[str]]:
    """Parts of each combination among conditions."""
    parts = {condition: split_label(condition, delimiter) for condition in conditions}
    return {condition: of_it for condition, of_it in parts.items() if len(of_it) > 1}


def interaction_correlation(
    predicted: ad.AnnData, observed: ad.AnnData, delimiter: str | None
) -> pd.Series:
    """Correlation over genes of each combination that both sides have, with its parts."""
    assert delimiter is not None  # without it there are no combinations
    known = set(predicted.obs_names).intersection(observed.obs_names)
    combinations = [
        name
        for name, parts in parts_of(list(observed.obs_names), delimiter).items()
        if known.issuperset([name, *parts])
    ]
    if not combinations:
        return pd.Series(dtype=float)
    left, right = (
        interaction_residuals(table, combinations, delimiter) for table in (predicted, observed)
    )
    correlation = effect_correlation_by_condition(left, right)[["pearson"]].copy()
    _count_flat_as_unrelated(correlation, left, right)
    return correlation["pearson"]
