"""How often guides work, and what probabilities say beside the transcript of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from scvi_sams._exceptions import ScreenError
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    LABEL_SIZE,
    MAX_POINTS,
    OTHER_COLOR,
    axes_or_new,
    check_table,
    legend_above,
    literal,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_MAX_GUIDES = 120  # rows that can be read
_NEEDED = ["target", "efficacy", "efficacy_lower", "efficacy_upper", "can_be_told"]


def guide_efficacy(guides: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the efficacies of guides with their intervals, by target.

    Parameters
    ----------
    guides
        Rows of :func:`~scvi_sams.tl.guides`, in the order in which they are drawn.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, a row for each guide. Those whose efficacy cannot be told are grey, those that
        disagree with the other guides of their target have a ring.

    Raises
    ------
    ScreenError
        If columns are missing, or there are more than 120 guides or none.

    Examples
    --------
    >>> import pandas as pd, scvi_sams
    >>> guides = pd.DataFrame(
    ...     {"target": ["JAK2", "JAK2"], "efficacy": [0.9, 0.5], "can_be_told": [True, False]}
    ...     | {"efficacy_lower": [0.8, 0.1], "efficacy_upper": [0.95, 1.0]},
    ...     index=["JAK2g1", "JAK2g2"],
    ... )
    >>> ax = scvi_sams.pl.guide_efficacy(guides)
    """
    check_table(guides, _NEEDED, "`guides` has no column", "tl.guides")
    if not 1 <= len(guides) <= _MAX_GUIDES:
        raise ScreenError(
            f"{len(guides)} guides: choose 1 to {_MAX_GUIDES} with guides.loc[[...]]."
        )
    ax = axes_or_new(ax, (4.8, 0.9 + 0.16 * len(guides)))
    target = guides["target"].astype(str).to_numpy()
    is_new = np.concatenate([[True], target[1:] != target[:-1]])
    row = np.arange(len(guides)) + 0.7 * (np.cumsum(is_new) - 1)  # targets apart
    told = guides["can_be_told"].to_numpy(bool)
    known_color = CATEGORICAL_COLORS[0]
    for which, color in ((told, known_color), (~told, "0.6")):
        part = guides[which]
        ax.hlines(
            row[which], part["efficacy_lower"], part["efficacy_upper"], color=color, linewidth=1.5
        )
        ax.plot(part["efficacy"], row[which], "o", color=color, markersize=4)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, label=label)
        for color, label in ((known_color, "can be told"), ("0.6", "cannot"))
    ]
    if "off_target" in guides and (off := guides["off_target"].to_numpy(bool)).any():
        ring: dict[str, Any] = {"marker": "o", "mfc": "none", "markersize": 9}
        ring["color"] = CATEGORICAL_COLORS[1]
        ax.plot(guides["efficacy"][off], row[off], linestyle="", **ring)
        handles.append(Line2D([], [], linestyle="", label="another direction", **ring))
    ax.set_yticks(row, [literal(name) for name in guides.index], fontsize=LABEL_SIZE)
    ax.set(xlim=(-0.02, 1.02), ylim=(row[-1] + 0.8, -0.8))
    ax.set_xlabel("efficacy: share of cells in which it took")
    legend_above(ax, handles, handlelength=1.2)
    return ax


def perturbed_probability(
    probability: ArrayLike,
    expression: ArrayLike,
    control: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the probability that a perturbation took against the transcript of its target.

    Parameters
    ----------
    probability
        Of the cells of one perturbation: rows of ``model.get_perturbed_probability()``.
    expression
        Of the target in the same cells, on any scale.
    control
        Expression of the target in control cells, whose mean is a line.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes: a dot a cell (at most 2,000 of them), and the mean and its standard error in ten
        equal groups of probability, those of fewer than five cells left out. Where the own count
        is part of the evidence (``own_gene=True``) the two go together by construction.

    Raises
    ------
    ScreenError
        If the two are not of one length, or empty.

    Examples
    --------
    >>> import scvi_sams
    >>> ax = scvi_sams.pl.perturbed_probability([0.1, 0.9, 0.95], [2.0, 0.0, 0.3], [1.8, 2.2])
    """
    r, y = np.asarray(probability, dtype=float), np.asarray(expression, dtype=float)
    if r.ndim != 1 or r.shape != y.shape or len(r) == 0:
        raise ScreenError(
            f"probability has the shape {r.shape} and expression {y.shape}: give one number of "
            "each for every cell."
        )
    ax = axes_or_new(ax, (4.6, 3.4))
    shown = np.unique(np.linspace(0, len(r) - 1, min(len(r), MAX_POINTS)).astype(int))
    ax.plot(r[shown], y[shown], ".", color=OTHER_COLOR, markersize=3, zorder=1)
    dot: dict[str, Any] = {"color": CATEGORICAL_COLORS[0], "marker": "o", "markersize": 5}
    group = np.minimum((r * 10).astype(int), 9)
    for here in (group == number for number in range(10)):
        if here.sum() >= 5:
            error = y[here].std(ddof=1) / np.sqrt(here.sum())
            ax.errorbar(r[here].mean(), y[here].mean(), error, linestyle="", zorder=3, **dot)
    handles = [Line2D([], [], label="mean", **dot)]
    if control is not None:
        level = float(np.mean(np.asarray(control, dtype=float)))
        line = ax.axhline(level, color=CATEGORICAL_COLORS[1], linewidth=1, zorder=2)
        line.set_label("mean of controls")
        handles.append(line)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("probability that it took")
    ax.set_ylabel("expression of the target")
    legend_above(ax, handles, handlelength=1.2)
    return ax
