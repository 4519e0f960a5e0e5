"""What a scorecard holds, and how it is shown and written."""

from __future__ import annotations

__all__ = ["Scorecard"]

import json
import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from scvi_sams.metrics._scorecard_measures import MEASURES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PredictorKind: TypeAlias = Literal["model", "baseline", "ceiling"]

_ARROWS = {"higher": "↑", "lower": "↓", "target": "→"}
_DIGITS = 3


@dataclass(frozen=True)
class Scorecard:
    """Models, baselines and ceilings side by side, from :func:`scorecard`.

    Shown as text, or in a notebook, it is the table of means, the verdict, and the notes.

    Examples
    --------
    >>> card = scvi_sams.metrics.scorecard(model)  # doctest: +SKIP
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
        Its name; None if no baseline has the measure.
        """
        baselines = [name for name, kind in self.kinds.items() if kind == "baseline"]
        loss = _loss(self.table.loc[baselines, measure]).dropna()
        return str(loss.idxmin()) if len(loss) else None

    @staticmethod
    def heading(measure: str) -> str:
        """Title of a measure, with an arrow that says which way is better.

        Examples
        --------
        >>> from scvi_sams.metrics import Scorecard
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
        Text. The best of models and baselines is bold in each column; ceilings are in italics.
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
        The files: ``scorecard.csv`` (summary), ``scorecard_per_condition.csv``,
        ``scorecard_comparison.csv``, ``scorecard.md`` and ``scorecard.json`` (provenance, kinds,
        verdict and notes).
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

    def _repr_html_(self) -> str:
        best, table = self._best(), self.table
        rows = []
        for predictor, row in table.iterrows():
            cells = "".join(
                f"<td><b>{_number(value)}</b></td>"
                if predictor in best[measure]
                else f"<td>{_number(value)}</td>"
                for measure, value in row.items()
            )
            rows.append(f"<tr><th>{escape(str(predictor))}</th>{cells}</tr>")
        heads = "".join(
            f'<th title="{escape(MEASURES[name].description)}">{escape(self.heading(name))}</th>'
            for name in table
        )
        sentences = "".join(f"<li>{escape(each)}</li>" for each in (*self.verdict, *self.notes))
        return (
            f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
            f"</table><ul>{sentences}</ul>"
        )

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
