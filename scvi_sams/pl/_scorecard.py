"""One measure of a scorecard, predictor by predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    MAX_POINTS,
    axes_or_new,
    legend_above,
    literal,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scvi_sams.evaluation import Scorecard

_COLORS = {"model": CATEGORICAL_COLORS[1], "baseline": CATEGORICAL_COLORS[0], "ceiling": "0.45"}
_BEST: dict[str, Any] = {"color": _COLORS["baseline"], "linestyle": "--", "linewidth": 1}
_MARKERS = {"model": "D", "baseline": "o", "ceiling": "s"}


def scorecard(card: Scorecard, measure: str = "pearson_perturbed", ax: Axes | None = None) -> Axes:
    """Plot a measure of every predictor with its interval, and of each condition behind it.

    Parameters
    ----------
    card
        From :func:`~scvi_sams.evaluation.scorecard` or
        :func:`~scvi_sams.evaluation.score_predictions`.
    measure
        Measure, as in ``card.summary``.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes: predictors on y, models first; means over conditions with 95% intervals as large
        marks, the conditions as small dots (extreme ones lie outside), and a dashed line at the
        baseline that does best.

    Raises
    ------
    ValueError
        If the scorecard has no such measure.

    Examples
    --------
    >>> card = scvi_sams.evaluation.scorecard(model)  # doctest: +SKIP
    >>> ax = scvi_sams.pl.scorecard(card, "relative_squared_error")  # doctest: +SKIP
    """
    known = list(card.table.columns)
    if measure not in known:
        raise ValueError(f"measure={measure!r} is not on the card; it has {', '.join(known)}.")
    rows = card.summary.xs(measure, level="measure")
    rows = rows.loc[[name for name in card.kinds if name in rows.index]]
    rows = rows[np.isfinite(rows["mean"])]
    ax = axes_or_new(ax, (5.2, 1.2 + 0.32 * len(rows)))
    values = card.per_condition[card.per_condition["measure"] == measure]
    many = len(values) > MAX_POINTS

    shown: list[float] = []
    for position, (name, row) in enumerate(rows.iterrows()):
        kind = card.kinds[name]
        color = _COLORS[kind]
        own = values.loc[values["predictor"] == name, "value"].dropna().to_numpy()
        if own.size:
            # Spread by rank, so that the same card is always drawn alike.
            spread = 0.5 * ((np.argsort(np.argsort(own)) * 0.618 + 0.5) % 1 - 0.5)
            style: dict[str, Any] = {"s": 3, "alpha": 0.15} if many else {"s": 9, "alpha": 0.3}
            ax.scatter(own, position + spread, color=color, linewidths=0, rasterized=many, **style)
            shown += np.percentile(own, [2, 98]).tolist()
        ax.plot([row["lower"], row["upper"]], [position] * 2, color=color, linewidth=2.2, zorder=3)
        mark: dict[str, Any] = {
            "color": color,
            "mec": "white",
            "markersize": 7,
            "zorder": 4,
        }
        ax.plot(row["mean"], position, _MARKERS[kind], **mark)
        shown += [row["lower"], row["upper"], row["mean"]]
    if (best := card.best_baseline(measure)) is not None:
        ax.axvline(rows.loc[best, "mean"], **_BEST)
    if shown:
        low, high = np.nanmin(shown), np.nanmax(shown)
        margin = 0.05 * (high - low) or 0.05
        ax.set_xlim(low - margin, high + margin)
    ax.set_yticks(range(len(rows)), labels=[literal(name) for name in rows.index])
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(6))
    heading = card.heading(measure)
    ax.set_xlabel(heading if heading.startswith(measure) else f"{measure} ({heading})")
    kinds = [kind for kind in _COLORS if kind in {card.kinds[name] for name in rows.index}]
    handles = [
        Line2D([], [], color=_COLORS[kind], marker=_MARKERS[kind], linewidth=2, label=kind)
        for kind in kinds
    ]
    if best is not None:
        handles.append(Line2D([], [], label="best baseline", **_BEST))
    legend_above(ax, handles, handlelength=1.5)
    return ax
