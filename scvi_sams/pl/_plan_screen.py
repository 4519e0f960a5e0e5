"""What screens of other sizes would recover."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from scvi_sams._exceptions import listed
from scvi_sams.pl._figure import (
    BAND_ALPHA,
    CATEGORICAL_COLORS,
    LINE_WIDTH,
    REFERENCE_LINE,
    axes_or_new,
    legend_beside,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LABELS = {
    "cells": "cells a perturbation",
    "controls": "control cells",
    "depth": "depth, times that of the pilot",
    "guides": "guides a gene",
    "replicates": "replicates",
}


def plan_screen(
    table: pd.DataFrame,
    what: Literal["perturbations", "mechanisms"] = "perturbations",
    x: Literal["cells", "controls", "depth"] = "cells",
    ax: Axes | None = None,
) -> Axes:
    """Plot how much screens of several sizes would recover, with intervals.

    Parameters
    ----------
    table
        What :func:`~scvi_sams.tl.plan_screen` returned.
    what
        Count perturbations of which a mechanism is recovered, or mechanisms.
    x
        What is on the horizontal axis, which is logarithmic. A line is drawn for each combination
        of the rest, eight at most.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes. A band is the interval in which one screen would fall. Where the table knows its
        pilot, a dashed line is at its size and a diamond at what it calls.

    Raises
    ------
    ValueError
        If there are more lines than colours, ``what`` or ``x`` is none of those, or columns are
        missing.

    Examples
    --------
    >>> import pandas as pd, scvi_sams
    >>> table = pd.DataFrame(
    ...     {"cells": [25, 50, 100], "controls": [200, 400, 800], "depth": 1.0}
    ...     | {"guides": 1, "replicates": 1, "perturbations": [8, 13, 17]}
    ...     | {"perturbations_lower": [5, 10, 14], "perturbations_upper": [11, 16, 20]}
    ... )
    >>> ax = scvi_sams.pl.plan_screen(table)
    """
    if what not in ("perturbations", "mechanisms"):
        raise ValueError(f"what={what!r} cannot be used: give 'perturbations' or 'mechanisms'.")
    if x not in ("cells", "controls", "depth"):
        raise ValueError(f"x={x!r} cannot be used: give 'cells', 'controls' or 'depth'.")
    needed = [*_LABELS, what, f"{what}_lower", f"{what}_upper"]
    if missing := [name for name in needed if name not in table]:
        raise ValueError(
            f"`table` has no column {listed(missing)}: give what plan_screen() returned."
        )
    others = [name for name in _LABELS if name != x]
    # Controls that follow the cells are no design of their own, nor the other way round.
    coupled = {"cells": "controls", "controls": "cells"}.get(x)
    rest = [name for name in others if name != coupled]
    keys = [name for name in rest if table[name].nunique() > 1]
    if coupled is not None and table.duplicated([x, *rest]).any():
        keys = [coupled, *keys]
    groups = list(table.groupby(keys, sort=True)) if keys else [((), table)]
    if not 1 <= len(groups) <= len(CATEGORICAL_COLORS):
        raise ValueError(
            f"{len(groups)} lines, one for each combination of {listed(keys)}: choose at most "
            f"{len(CATEGORICAL_COLORS)} with table.query(...)."
        )
    ax = axes_or_new(ax, (5.6, 3.6))
    band = min(BAND_ALPHA, 2 * BAND_ALPHA / len(groups))
    for color, (key, rows) in zip(CATEGORICAL_COLORS, groups, strict=False):
        rows = rows.sort_values(x)
        label = ", ".join(f"{name} {value:,.4g}" for name, value in zip(keys, key, strict=True))
        ends = rows[f"{what}_lower"], rows[f"{what}_upper"]
        ax.fill_between(rows[x], *ends, color=color, alpha=band, linewidth=0)
        ax.plot(rows[x], rows[what], "o-", color=color, linewidth=LINE_WIDTH, markersize=3.5)
        ax.lines[-1].set_label(label or "_")
    pilot = 1.0 if x == "depth" else table.attrs.get(x)
    if pilot is not None:
        ax.axvline(pilot, **REFERENCE_LINE, zorder=0)
    if pilot is not None and x == "cells":
        called = table.attrs[f"{what}_called"]
        ax.plot(pilot, called, "D", color="white", markeredgecolor="0.2", markersize=6, zorder=5)
        ax.annotate(
            "called in the pilot",
            (pilot, called),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize="small",
            color="0.3",
        )
    ax.set(xscale="log", xlabel=_LABELS[x])
    ax.set_ylabel("perturbations with a mechanism" if what == "perturbations" else "mechanisms")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if keys:
        legend_beside(ax, " x ".join(keys))
    return ax
