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


PredictorKind: TypeAlias = Literal["model", "baseline", "ceiling"]

_OPENINGS = {
    "behind": "A baseline wins over {model}",
    "ahead": "{model} wins over the best baseline",
    "level": "Level within noise",
    "too few": "Too few conditions to say",
}
_SIGNS = {"higher": 1.0, "lower": -1.0}  # targets have no lead
_FEW_CONDITIONS = 6  # with fewer, resampling them says little about others
_ARROWS = {"higher": "↑", "lower": "↓", "target": "→"}
_DIGITS = 3


def summarise(
    scores: Mapping[str, pd.DataFrame],
    overall: Mapping[str, tuple[str, float, NDArray[np.float64]]],
    drawn: NDArray[np.float64],
) -> pd.DataFrame:
    """Mean and interval over conditions of each predictor and measure.

    ``scores`` has conditions x measures of each predictor, ``overall`` a measure of all conditions
    together with its bootstrap values, ``drawn`` how often each condition is drawn (draws x
    conditions).
    """
    rows = []
    for predictor, table in scores.items():
        of_all, value, draws_of_all = overall.get(predictor, ("", 0.0, drawn))
        for measure in MEASURES:
            if measure == of_all:
                n_conditions, mean, draws = len(table), value, draws_of_all
            elif measure in table:
                column = table[measure].astype(float)
                n_conditions, mean = column.count(), column.mean()
                draws = _resampled_mean(column.to_numpy(), drawn)
            else:
                continue
            rows.append((predictor, measure, mean, *_interval(draws), n_conditions))
    columns = ["predictor", "measure", "mean", "lower", "upper", "n_conditions"]
    return pd.DataFrame(rows, columns=columns).set_index(["predictor", "measure"])


def compare_with_baselines(
    scores: Mapping[str, pd.DataFrame], kinds: Mapping[str, str], drawn: NDArray[np.float64]
) -> pd.DataFrame:
    """Each model against the baseline that does best, by measure, on the conditions of both.

    The baseline is the best of many on the same conditions, which favours it a little.
    """
    rows = []
    for model in _of_kind(kinds, "model"):
        for measure, specification in MEASURES.items():
            sign = _SIGNS.get(specification.better)
            if not sign or measure not in scores[model]:
                continue
            own = scores[model][measure].astype(float)
            rivals = {
                name: scores[name][measure].astype(float).where(own.notna())
                for name in _of_kind(kinds, "baseline")
                if measure in scores[name]
            }
            leads = {name: (sign * (own - other)).dropna() for name, other in rivals.items()}
            leads = {name: lead for name, lead in leads.items() if len(lead)}
            if not leads:
                continue
            baseline = min(leads, key=lambda name: leads[name].mean())
            lead, n = leads[baseline], len(leads[baseline])
            lower, upper = _interval(_resampled_mean(lead.reindex(own.index).to_numpy(), drawn))
            means = own[lead.index].mean(), rivals[baseline].mean(), lead.mean()
            outcome = "ahead" if lower > 0 else "behind" if upper < 0 else "level"
            outcome = "too few" if n < _FEW_CONDITIONS else outcome
            n_ahead = int((lead > 0).sum())
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
        n = {outcome: int((own["outcome"] == outcome).sum()) for outcome in _OPENINGS}
        if n["too few"] == len(own):
            sentences.append(
                f"Only {int(own['n_conditions'].max())} conditions can be compared: too few to "
                f"tell a lead of {model} from chance. What follows describes these conditions."
            )
        else:
            few = f", with too few conditions to say on {n['too few']}" if n["too few"] else ""
            sentences.append(
                f"{model} is ahead of every baseline on {n['ahead']} of {len(own)} measures, "
                f"behind the best one on {n['behind']}, and level with it on {n['level']}{few}."
            )
        for outcome, opening in _OPENINGS.items():
            if n[outcome]:
                rows = own[own["outcome"] == outcome].droplevel("predictor")
                phrases = [_comparison(model, measure, row) for measure, row in rows.iterrows()]
                sentences.append(f"{opening.format(model=model)}: {'; '.join(phrases)}.")
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
    means = summary["mean"].unstack("measure")
    blind = [
        MEASURES[measure].title
        for measure in _with_direction(means)
        if _loss(means[measure].reindex(_of_kind(kinds, "baseline"))).min()
        <= _loss(means[measure]).get("bootstrap", np.nan)
    ]
    if blind:
        sentences.append(
            "The data cannot tell a perfect prediction from the best baseline on "
            f"{', '.join(blind)}: the ceiling (bootstrap) is no better."
        )
    return sentences


def _comparison(model: str, measure: str, row: pd.Series) -> str:
    """One measure of a model beside that of the best baseline."""
    margin = f"lead of the model {row['lower']:+.3f} to {row['upper']:+.3f}"
    if row["outcome"] == "too few":
        margin = f"{model} better on {row['n_conditions_ahead']} of {row['n_conditions']}"
    scores = f"{row['baseline']} {row['baseline_mean']:.3f}, {model} {row['mean']:.3f}"
    return f"{MEASURES[measure].title} ({scores}; {margin})"


def _of_kind(kinds: Mapping[str, str], kind: str) -> list[str]:
    return [name for name, of_it in kinds.items() if of_it == kind]


def _with_direction(table: pd.DataFrame) -> list[str]:
    """Measures of a table of which more, or less, is better."""
    return [name for name in MEASURES if MEASURES[name].better in _SIGNS and name in table]


def _loss(column: pd.Series) -> pd.Series:
    """Values of a measure, turned so that the lowest is best."""
    specification = MEASURES[str(column.name)]
    if specification.better == "target":
        return (column - specification.target).abs()
    return -_SIGNS[specification.better] * column


def _resampled_mean(
    values: NDArray[np.float64], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means over the conditions drawn that have a value."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return drawn @ np.where(finite, values, 0.0) / (drawn @ finite)


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    lower, upper = pd.Series(draws).quantile([0.025, 0.975])
    return lower, upper


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
    def normalised(self) -> pd.DataFrame:
        """Means that are 0 at the mean response and 1 at a replicate, predictors x measures.

        With :math:`b` the score of ``"perturbed mean"`` and :math:`r` that of ``"split half"``,
        one half of the held-out cells scored on the other, :math:`(u - b) / (r - b)`, unclipped,
        as the Virtual Cell Challenge of 2026 does. Measures in which the replicate is no better
        than the mean response, which say nothing of the perturbation, are left out.
        """
        table = self.table
        table = table[_with_direction(table)]
        mean, replicate = table.reindex(["perturbed mean", "split half"]).to_numpy()
        losses = table.apply(_loss).reindex(["perturbed mean", "split half"])
        better = losses.loc["split half"] < losses.loc["perturbed mean"]
        return ((table - mean) / (replicate - mean)).loc[:, better]

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
        """Name the baseline with the best mean of a measure; None if no baseline has it.

        Parameters
        ----------
        measure
            Measure, as in :attr:`summary`.
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
        goal = f"{specification.target:g}" if specification.better == "target" else ""
        return f"{specification.title} {_ARROWS[specification.better]}{goal}"

    def to_markdown(self) -> str:
        """Table of means, verdict, notes and provenance as Markdown.

        The best of models and baselines is bold in each column; ceilings are in italics.
        """
        table = self.table
        shown = table.map(_number)
        rivals = [name for name, kind in self.kinds.items() if kind != "ceiling"]
        for measure in table:
            loss = _loss(table.loc[rivals, measure])
            best = loss.index[np.isclose(loss, loss.min(), rtol=0, atol=1e-9)]
            shown.loc[best, measure] = "**" + shown.loc[best, measure] + "**"
        names = [f"*{name}*" if kind == "ceiling" else name for name, kind in self.kinds.items()]
        measures = [f"{MEASURES[name].title}: {MEASURES[name].description}." for name in table]
        blocks = [
            _markdown(shown.set_axis(names), [self.heading(measure) for measure in table]),
            _bullets(self.verdict),
            *self._normalised_markdown(names),
            *(["Notes\n\n" + _bullets(self.notes)] if self.notes else []),
            "Columns\n\n" + _bullets(measures),
            "; ".join(f"{key} {value}" for key, value in self.provenance.items()),
        ]
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
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            staging = target / f".{name}.{os.getpid()}.partial"
            staging.write_text(text, encoding="utf-8")
            staging.replace(target / name)
        return [target / name for name in contents]

    def _normalised_markdown(self, names: Sequence[str]) -> list[str]:
        shown = self.normalised
        if shown.empty:
            return []
        titles = [MEASURES[name].title for name in shown]
        table = _markdown(shown.map(_number).set_axis(names), titles)
        return [f"0 at the mean response, 1 at a split-half replicate\n\n{table}"]

    def __str__(self) -> str:
        shown = self.table.rename(columns=self.heading).round(_DIGITS)
        with pd.option_context("display.width", 250, "display.max_columns", None):
            parts = [shown.to_string(na_rep="-"), *self.verdict]
        return "\n".join([*parts, *(f"Note: {note}" for note in self.notes)])

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _number(value: float) -> str:
    return f"{value:.{_DIGITS}f}" if np.isfinite(value) else "-"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _markdown(cells: pd.DataFrame, headings: Sequence[str]) -> str:
    """Table of strings, its first column the predictors."""
    lines = [["predictor", *headings], ["---"] + ["---:"] * len(headings)]
    lines += [[name, *row] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
