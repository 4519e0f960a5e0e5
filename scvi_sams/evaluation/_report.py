"""The table of scores and the verdict: summaries over conditions, and how they are shown."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from scvi_sams.evaluation._measures import MEASURES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "PredictorKind",
    "Scorecard",
    "compare_with_baselines",
    "resamples",
    "summarise",
    "verdict",
]


_INTERVAL = (2.5, 97.5)
_OPENINGS = {
    "behind": "A baseline wins over {model}",
    "ahead": "{model} wins over the best baseline",
    "level": "Level within noise",
    "too few": "Too few conditions to say",
}
_SIGNS = {"higher": 1.0, "lower": -1.0, "target": 0.0}  # targets have no lead
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

    ``scores`` has conditions x measures of each predictor, ``overall`` those of all conditions
    together with their bootstrap values, ``drawn`` the draws of :func:`resamples`.
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
    models, baselines = _of_kind(kinds, "model"), _of_kind(kinds, "baseline")
    rows = []
    for model in models:
        for measure in MEASURES:
            sign = _SIGNS[MEASURES[measure].better]
            if not sign or measure not in scores[model]:
                continue
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
            n, n_ahead = int(both.sum()), int((lead[both] > 0).sum())
            means = own[both].mean(), other[both].mean(), _mean(lead)
            outcome = _outcome(lower, upper, n)
            rows.append((model, measure, baseline, *means, lower, upper, n, n_ahead, outcome))
    columns = ["predictor", "measure", "baseline", "mean", "baseline_mean", "lead", "lower"]
    columns += ["upper", "n_conditions", "n_conditions_ahead", "outcome"]
    return pd.DataFrame(rows, columns=columns).set_index(["predictor", "measure"])


def verdict(
    comparison: pd.DataFrame, summary: pd.DataFrame, kinds: Mapping[str, str]
) -> list[str]:
    """Say in plain sentences who wins where, the baselines first where they do."""
    sentences = []
    for model in _of_kind(kinds, "model"):
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
    baselines, blind = _of_kind(kinds, "baseline"), []
    for measure, specification in MEASURES.items():
        sign = _SIGNS[specification.better]
        if not sign or measure not in means:
            continue
        best = (sign * means[measure].reindex(baselines)).max()
        if best >= sign * means.loc["bootstrap", measure]:
            blind.append(specification.title)
    if not blind:
        return []
    return [
        f"The data cannot tell a perfect prediction from the best baseline on {', '.join(blind)}: "
        "the ceiling (bootstrap) is no better."
    ]


def _of_kind(kinds: Mapping[str, str], kind: str) -> list[str]:
    return [name for name, of_it in kinds.items() if of_it == kind]


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


PredictorKind: TypeAlias = Literal["model", "baseline", "ceiling"]

_ARROWS = {"higher": "↑", "lower": "↓", "target": "→"}
_DIGITS = 3


@dataclass(frozen=True)
class Scorecard:
    """Models, baselines and ceilings side by side, from :func:`scorecard`.

    Shown as text, or in a notebook, it is the table of means, the verdict, and the notes.

    Examples
    --------
    >>> card = scvi_sams.evaluation.scorecard(model)  # doctest: +SKIP
    >>> print(card)  # doctest: +SKIP
    >>> card.summary.loc["SAMSVAE"]  # doctest: +SKIP
    >>> card.to_csv("scorecard")  # doctest: +SKIP
    """

    per_condition: pd.DataFrame
    """A row for each ``predictor``, ``condition`` and ``measure`` with its ``value`` (NaN where it
    is not defined), the ``stratum`` of the condition by the size of its observed effect (``weak``,
    ``medium``, ``strong``; ``all`` where conditions are few), and its ``n_cells`` held out."""
    summary: pd.DataFrame
    """By ``predictor`` and ``measure``: ``mean`` over conditions, ends of its 95% bootstrap
    interval over conditions in ``lower`` and ``upper``, and the ``n_conditions`` with a value."""
    comparison: pd.DataFrame
    """By model and measure: the ``baseline`` that does best, both means on the conditions that
    both have, the ``lead`` of the model (above 0 is better, whichever way is up) with its 95%
    paired bootstrap interval, and the ``outcome``: ``ahead``, ``behind``, ``level``, or ``too
    few`` conditions to say."""
    verdict: tuple[str, ...]
    """Who wins where, in sentences."""
    kinds: Mapping[str, PredictorKind]
    """Whether each predictor is a model, a baseline or a ceiling."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how the scores came about."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, seed, settings and numbers of cells."""

    @property
    def table(self) -> pd.DataFrame:
        """Means, predictors x measures."""
        means = self.summary["mean"].unstack("measure")
        return means.reindex(
            index=list(self.kinds), columns=[name for name in MEASURES if name in means]
        )

    @property
    def by_stratum(self) -> pd.DataFrame:
        """Means by stratum of the size of the observed effect, (stratum, predictor) x measures."""
        means = self.per_condition.pivot_table(
            index=["stratum", "predictor"], columns="measure", values="value", observed=True
        )
        strata = self.per_condition["stratum"].sort_values().unique()
        order = pd.MultiIndex.from_product([strata, list(self.kinds)], names=means.index.names)
        return means.reindex(order, columns=[name for name in MEASURES if name in means])

    def best_baseline(self, measure: str) -> str | None:
        """Name the baseline with the best mean of a measure.

        Parameters
        ----------
        measure
            Measure, as in :attr:`summary`.

        Returns
        -------
        str or None
            Its name; None if no baseline has the measure.
        """
        loss = _loss(self.table.loc[_of_kind(self.kinds, "baseline"), measure]).dropna()
        return str(loss.idxmin()) if len(loss) else None

    @staticmethod
    def heading(measure: str) -> str:
        """Title of a measure, with an arrow that says which way is better.

        Examples
        --------
        >>> from scvi_sams.evaluation import Scorecard
        >>> Scorecard.heading("relative_squared_error")
        'rel. error ↓'
        """
        specification = MEASURES[measure]
        arrow = _ARROWS[specification.better]
        goal = f"{specification.target:g}" if specification.better == "target" else ""
        return f"{specification.title} {arrow}{goal}"

    def to_markdown(self) -> str:
        """Table of means, verdict, notes and provenance as Markdown.

        Returns
        -------
        str
            The best of models and baselines is bold in each column; ceilings are in italics.
        """
        table = self.table
        best = self._best()
        header = ["predictor", *(self.heading(measure) for measure in table)]
        lines = [header, ["---"] + ["---:"] * len(table.columns)]
        for predictor, row in table.iterrows():
            name = f"*{predictor}*" if self.kinds[predictor] == "ceiling" else str(predictor)
            cells = [
                f"**{_number(value)}**" if predictor in best[measure] else _number(value)
                for measure, value in row.items()
            ]
            lines.append([name, *cells])
        blocks = ["\n".join("| " + " | ".join(line) + " |" for line in lines)]
        blocks += [_bullets(self.verdict)]
        if self.notes:
            blocks.append("Notes\n\n" + _bullets(self.notes))
        measures = [f"{MEASURES[name].title}: {MEASURES[name].description}." for name in table]
        blocks.append("Columns\n\n" + _bullets(measures))
        if self.provenance:
            blocks.append("; ".join(f"{key} {value}" for key, value in self.provenance.items()))
        return "\n\n".join(blocks) + "\n"

    def to_csv(self, folder: str | Path) -> list[Path]:
        """Write every table, and the verdict, to a folder.

        Parameters
        ----------
        folder
            Folder, made if it is not there. Files of the same names are replaced.

        Returns
        -------
        list of pathlib.Path
            The files: ``scorecard.csv`` (summary), ``scorecard_per_condition.csv``,
            ``scorecard_comparison.csv``, ``scorecard.md`` and ``scorecard.json`` (provenance,
            kinds, verdict and notes).
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        record = {
            "provenance": dict(self.provenance),
            "kinds": dict(self.kinds),
            "verdict": list(self.verdict),
            "notes": list(self.notes),
        }
        contents = {
            "scorecard.csv": self.summary.to_csv(),
            "scorecard_per_condition.csv": self.per_condition.to_csv(index=False),
            "scorecard_comparison.csv": self.comparison.to_csv(),
            "scorecard.md": self.to_markdown(),
            "scorecard.json": json.dumps(record, indent=2) + "\n",
        }
        paths = []
        for name, text in contents.items():
            path = target / name
            staging = target / f".{name}.{os.getpid()}.partial"
            staging.write_text(text, encoding="utf-8")
            staging.replace(path)
            paths.append(path)
        return paths

    def __str__(self) -> str:
        shown = self.table.rename(columns=self.heading).round(_DIGITS)
        with pd.option_context("display.width", 250, "display.max_columns", None):
            parts = [shown.to_string(na_rep="-"), *self.verdict]
        return "\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _best(self) -> dict[str, set[str]]:
        """Of each measure, the models and baselines with the best mean."""
        rivals = self.table.loc[[name for name, kind in self.kinds.items() if kind != "ceiling"]]
        best = {}
        for measure, column in rivals.items():
            loss = _loss(column)
            best[measure] = set(column.index[np.isclose(loss, loss.min(), rtol=0, atol=1e-9)])
        return best


def _loss(column: pd.Series) -> pd.Series:
    """Values of a measure, turned so that the lowest is best."""
    specification = MEASURES[str(column.name)]
    if specification.better == "target":
        return (column - specification.target).abs()
    return column if specification.better == "lower" else -column


def _number(value: float) -> str:
    return f"{value:.{_DIGITS}f}" if np.isfinite(value) else "-"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
