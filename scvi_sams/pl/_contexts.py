"""Effects of perturbations in each context, beside what contexts share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from scvi_sams._exceptions import ScreenError
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    LABEL_SIZE,
    axes_or_new,
    check_table,
    legend_above,
    literal,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_NEEDED = ["perturbation", "context", "latent", "shared_effect", "difference", "sd"]
_NEEDED += ["probability", "called", "measured"]
_ROW = ["perturbation", "latent"]
_WIDTH = 1.96  # of an interval of 95%, in standard deviations
_ROOM = 0.6  # of a row, for its contexts


def context_differences(
    differences: pd.DataFrame, n_rows: int = 15, ax: Axes | None = None
) -> Axes:
    """Plot what a perturbation does to a latent in each context, where contexts differ most.

    Parameters
    ----------
    differences
        From :func:`~scvi_sams.tl.context_differences`, with eight contexts or fewer.
    n_rows
        Perturbations and latents drawn, at most: those with a call first, then by the largest
        probability that a context deviates.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes: a row for each, with the effect in every context (95% intervals of the
        difference), filled where it was called, and a bar at the effect that contexts share.
        Contexts in which the perturbation was not measured are left out.

    Raises
    ------
    ScreenError
        If columns are missing, there are no rows, or more contexts than colours.

    Examples
    --------
    >>> import pandas as pd, scvi_sams
    >>> table = pd.DataFrame(
    ...     {"perturbation": "JAK2", "context": ["B cell", "T cell"], "latent": "latent_0"}
    ...     | {"shared_effect": 0.8, "difference": [0.0, -1.1], "sd": [0.1, 0.2]}
    ...     | {"probability": [0.1, 1.0], "called": [False, True], "measured": True}
    ... )
    >>> ax = scvi_sams.pl.context_differences(table)
    """
    check_table(differences, _NEEDED, "`differences` has no column", "tl.context_differences")
    if n_rows < 1 or differences.empty:
        raise ScreenError("There is no row to draw: give some, and n_rows=1 or more.")
    contexts = list(differences["context"].unique())
    if len(contexts) > len(CATEGORICAL_COLORS):
        raise ScreenError(
            f"{len(contexts)} contexts: choose {len(CATEGORICAL_COLORS)} at most, by "
            "differences[differences['context'].isin([...])]."
        )
    rank = differences.groupby(_ROW, sort=False)[["called", "probability"]].max()
    rank = rank.sort_values(["called", "probability"], ascending=False, kind="stable")
    place = {row: number for number, row in enumerate(rank.index[:n_rows])}
    rows = [place.get(row, -1) for row in zip(*(differences[c] for c in _ROW), strict=True)]
    table = differences.assign(row=rows).query("row >= 0 and measured")

    ax = axes_or_new(ax, (4.8, 1.0 + 0.26 * len(place)))
    shared = table.drop_duplicates("row")
    low, high = shared["row"] - _ROOM / 2 - 0.1, shared["row"] + _ROOM / 2 + 0.1
    ax.vlines(shared["shared_effect"], low, high, color="0.6", linewidth=3, zorder=1)
    handles = [Line2D([], [], color="0.6", linewidth=3, label="shared")]
    for number, (context, color) in enumerate(zip(contexts, CATEGORICAL_COLORS, strict=False)):
        part = table[table["context"] == context]
        y = part["row"] + _ROOM * ((number + 0.5) / len(contexts) - 0.5)
        x, called = part["shared_effect"] + part["difference"], part["called"].to_numpy(bool)
        width = _WIDTH * part["sd"]
        ax.hlines(y, x - width, x + width, color=color, linewidth=1, zorder=2)
        for which, face in ((called, color), (~called, "white")):
            ax.plot(x[which], y[which], "o", color=color, mfc=face, markersize=4, zorder=3)
        name = literal(context)
        handles.append(Line2D([], [], color=color, marker="o", markersize=4, label=name))
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    names = [f"{literal(perturbation)}, {literal(latent)}" for perturbation, latent in place]
    ax.set_yticks(np.arange(len(place)), names, fontsize=LABEL_SIZE)
    ax.set_ylim(len(place) - 0.4, -0.6)
    ax.set_xlabel("effect (s.d. of the basal state)")
    legend_above(ax, handles, handlelength=1.2)
    return ax
