"""From scores of conditions to means with intervals, comparisons, and sentences."""

from __future__ import annotations

__all__ = ["compare_with_baselines", "summarise", "verdict"]

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams.metrics._scorecard_measures import MEASURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_INTERVAL = (2.5, 97.5)
_OPENINGS = {
    "behind": "A baseline wins over {model}",
    "ahead": "{model} wins over the best baseline",
    "level": "Level within noise",
    "too few": "Too few conditions to say",
}
_FEW_CONDITIONS = 6  # with fewer, resampling them says little about others


def resamples(n_conditions: int, n_bootstrap: int, seed: int) -> NDArray[np.float64]:
    """How often each condition is drawn, draws x conditions; the same draws for all predictors."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(
        n_conditions, np.full(n_conditions, 1 / n_conditions), size=n_bootstrap
    ).astype(np.float64)


def summarise(
    scores: Mapping[str, pd.DataFrame],
    overall: Mapping[str, Mapping[str, tuple[float, NDArray[np.float64]]]],
    drawn: NDArray[np.float64],
) -> pd.DataFrame:
    """Mean and interval over conditions of each predictor and measure.

    Parameters
    ----------
    scores
        Of each predictor, conditions x measures; NaN where a measure is not defined.
    overall
        Of each predictor, measures of all conditions together, with their bootstrap values.
    drawn
        Draws x conditions, from :func:`resamples`.
    """
    rows = []
    for predictor, table in scores.items():
        of_all = overall.get(predictor, {})
        for measure in MEASURES:
            if measure in of_all:
                mean, draws = of_all[measure]
                n_conditions = len(table)
            elif measure in table:
                values = table[measure].to_numpy(dtype=float)
                n_conditions = int(np.isfinite(values).sum())
                mean, draws = _mean(values), _resampled_mean(values, drawn)
            else:
                continue
            lower, upper = _interval(draws)
            rows.append((predictor, measure, mean, lower, upper, n_conditions))
    return pd.DataFrame(
        rows, columns=["predictor", "measure", "mean", "lower", "upper", "n_conditions"]
    ).set_index(["predictor", "measure"])


def compare_with_baselines(
    scores: Mapping[str, pd.DataFrame], kinds: Mapping[str, str], drawn: NDArray[np.float64]
) -> pd.DataFrame:
    """Each model against the baseline that does best, by measure, on the conditions of both.

    The baseline is the best of many on the same conditions, which favours it a little.
    """
    models = [name for name in scores if kinds[name] == "model"]
    baselines = [name for name in scores if kinds[name] == "baseline"]
    rows = []
    for model in models:
        for measure, specification in MEASURES.items():
            if specification.better == "target" or measure not in scores[model]:
                continue
            sign = 1.0 if specification.better == "higher" else -1.0
            own = scores[model][measure].to_numpy(dtype=float)
            rivals = []
            for baseline in baselines:
                if measure not in scores[baseline]:
                    continue
                other = scores[baseline][measure].to_numpy(dtype=float)
                both = np.isfinite(own) & np.isfinite(other)
                if both.any():
                    rivals.append((sign * (own - other)[both].mean(), baseline, other, both))
            if not rivals:
                continue
            # The baseline over which the lead is smallest.
            _, baseline, other, both = min(rivals, key=lambda rival: rival[0])
            lead = np.where(both, sign * (own - other), np.nan)
            lower, upper = _interval(_resampled_mean(lead, drawn))
            n_conditions = int(both.sum())
            rows.append(
                {
                    "predictor": model,
                    "measure": measure,
                    "baseline": baseline,
                    "mean": own[both].mean(),
                    "baseline_mean": other[both].mean(),
                    "lead": _mean(lead),
                    "lower": lower,
                    "upper": upper,
                    "n_conditions": n_conditions,
                    "n_conditions_ahead": int((lead[both] > 0).sum()),
                    "outcome": _outcome(lower, upper, n_conditions),
                }
            )
    columns = ["predictor", "measure", "baseline", "mean", "baseline_mean", "lead", "lower"]
    columns += ["upper", "n_conditions", "n_conditions_ahead", "outcome"]
    return pd.DataFrame(rows, columns=columns).set_index(["predictor", "measure"])


def verdict(
    comparison: pd.DataFrame, summary: pd.DataFrame, kinds: Mapping[str, str]
) -> list[str]:
    """Say in plain sentences who wins where, the baselines first where they do."""
    sentences = []
    for model in [name for name, kind in kinds.items() if kind == "model"]:
        own = comparison[comparison.index.get_level_values("predictor") == model]
        if own.empty:
            sentences.append(f"{model} cannot be compared: no baseline has a score it has too.")
            continue
        by_outcome = {
            outcome: own[own["outcome"] == outcome].droplevel("predictor")
            for outcome in ("behind", "ahead", "level", "too few")
        }
        n_few = len(by_outcome["too few"])
        if n_few == len(own):
            sentences.append(
                f"Only {int(own['n_conditions'].max())} conditions can be compared: too few to "
                f"tell a lead of {model} from chance. What follows describes these conditions."
            )
        else:
            few = f", with too few conditions to say on {n_few}" if n_few else ""
            sentences.append(
                f"{model} is ahead of every baseline on {len(by_outcome['ahead'])} of {len(own)} "
                f"measures, behind the best one on {len(by_outcome['behind'])}, and level with it "
                f"on {len(by_outcome['level'])}{few}."
            )
        sentences += [
            f"{opening.format(model=model)}: {'; '.join(_comparisons(model, rows, outcome))}."
            for outcome, opening in _OPENINGS.items()
            if len(rows := by_outcome[outcome])
        ]
        sentences += _target_sentences(model, summary)
    sentences += _ceiling_sentences(summary, kinds)
    return sentences


def _comparisons(model: str, rows: pd.DataFrame, outcome: str) -> list[str]:
    phrases = []
    for measure, row in rows.iterrows():
        scores = f"{row['baseline']} {row['baseline_mean']:.3f}, {model} {row['mean']:.3f}"
        if outcome == "too few":
            margin = f"{model} better on {row['n_conditions_ahead']} of {row['n_conditions']}"
        else:
            margin = f"lead of the model {row['lower']:+.3f} to {row['upper']:+.3f}"
        phrases.append(f"{MEASURES[measure].title} ({scores}; {margin})")
    return phrases


def _target_sentences(model: str, summary: pd.DataFrame) -> list[str]:
    sentences = []
    for measure, specification in MEASURES.items():
        if specification.better != "target" or (model, measure) not in summary.index:
            continue
        row = summary.loc[(model, measure)]
        if np.isfinite(row["mean"]):
            sentences.append(
                f"{specification.title}: {model} {row['mean']:.3f}, 95% interval "
                f"{row['lower']:.3f} to {row['upper']:.3f}, where {specification.target:g} "
                "is right."
            )
    return sentences


def _ceiling_sentences(summary: pd.DataFrame, kinds: Mapping[str, str]) -> list[str]:
    """Name the measures on which even a perfect prediction would hardly beat the baselines."""
    if "bootstrap" not in kinds:
        return []
    means = summary["mean"].unstack("measure")
    baselines = [name for name, kind in kinds.items() if kind == "baseline"]
    blind = []
    for measure, specification in MEASURES.items():
        if specification.better == "target" or measure not in means:
            continue
        sign = 1.0 if specification.better == "higher" else -1.0
        best = (sign * means[measure].reindex(baselines)).max()
        if best >= sign * means.loc["bootstrap", measure]:
            blind.append(specification.title)
    if not blind:
        return []
    return [
        f"The data cannot tell a perfect prediction from the best baseline on {', '.join(blind)}: "
        "the ceiling (bootstrap) is no better."
    ]


def _outcome(lower: float, upper: float, n_conditions: int) -> str:
    if n_conditions < _FEW_CONDITIONS:
        return "too few"
    if lower > 0:
        return "ahead"
    return "behind" if upper < 0 else "level"


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _resampled_mean(
    values: NDArray[np.float64], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means over the conditions drawn that have a value."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return drawn @ np.where(finite, values, 0.0) / (drawn @ finite)


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not finite.size:
        return float("nan"), float("nan")
    lower, upper = np.percentile(finite, _INTERVAL)
    return float(lower), float(upper)
