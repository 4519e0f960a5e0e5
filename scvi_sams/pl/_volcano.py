"""Size of changes of expression against how sure they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    MAX_POINTS,
    OTHER_COLOR,
    REFERENCE_LINE,
    axes_or_new,
    chosen,
    legend_above,
    literal,
)
from scvi_sams.pl._point_labels import PointLabels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEEDED = ("group1", "group2", "lfc_mean", "lfc_std", "delta")
_CALLED = "is_de_fdr_"


def volcano(
    table: pd.DataFrame,
    condition: str | None = None,
    n_labels: int = 10,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the change of every gene under a condition against how sure it is.

    The probability of a change comes from draws, so that it is exactly one for many genes; the
    height is therefore the mean change in posterior standard deviations,
    :math:`|\mathrm E\,\mathrm{lfc}| / \mathrm{sd}(\mathrm{lfc})`, which still tells them apart.
    The posterior takes the decoder as known: heights rank genes, they are no test statistics.

    Parameters
    ----------
    table
        From :func:`~scvi_sams.tl.differential_expression`: genes in the index.
    condition
        Condition, as in the column ``group1``; needed if the table has several.
    n_labels
        Genes named, at most: of those called, the ones that change most, up and down in turn. One
        without room for its name has none.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with the mean log2 fold change on x; genes called up and down are coloured, and
        dashed lines stand at the change that is worth calling (``delta``). Genes that are not
        called and are surer than all that are, being surely unchanged, are triangles at the top.

    Raises
    ------
    ValueError
        If the table has not the columns it needs, no such condition, or several and none is
        given.

    Examples
    --------
    >>> import numpy as np
    >>> import scvi_sams
    >>> from scvi_sams.tl.summaries import differential_expression_table
    >>> draws = np.random.default_rng(0).normal([[2.0, 0.0, -1.0]], 0.2, size=(100, 3))
    >>> table = differential_expression_table(draws, ["A", "B", "C"])
    >>> table = table.assign(group1="KLF1", group2="control", delta=0.25)
    >>> ax = scvi_sams.pl.volcano(table, "KLF1")
    """
    missing = [name for name in _NEEDED if name not in table]
    calls = [name for name in table if str(name).startswith(_CALLED)]
    if missing or len(calls) != 1:
        raise ValueError(
            f"The table has no column {', '.join(missing) or _CALLED + '...'}: give what "
            "differential_expression() returned."
        )
    condition = chosen("condition", condition, table["group1"].unique())
    table = table[table["group1"] == condition]
    change = table["lfc_mean"].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        height = np.abs(change) / table["lfc_std"].to_numpy(float)
    called = table[calls[0]].to_numpy(bool)
    # A change next to nothing may be next to certain, and would squeeze all others.
    height[change == 0] = 0.0
    ranked = height[(called if called.any() else np.full(len(height), True)) & np.isfinite(height)]
    top = float(ranked.max()) if ranked.size and ranked.max() > 0 else 1.0
    beyond = height > top
    height = np.minimum(height, top)

    ax = axes_or_new(ax, (4.8, 4.2))
    many = len(table) > MAX_POINTS
    groups = (
        ("not called", ~called, OTHER_COLOR),
        ("down", called & (change < 0), CATEGORICAL_COLORS[0]),
        ("up", called & (change > 0), CATEGORICAL_COLORS[1]),
    )
    for name, genes, color in groups:
        for marker, drawn in (("o", genes & ~beyond), ("^", genes & beyond)):
            style: dict[str, Any] = {"c": color, "marker": marker, "rasterized": many}
            style |= {"s": 6 if many else 12, "linewidths": 0}
            label = f"{genes.sum():,} {name}"
            ax.scatter(change[drawn], height[drawn], label=label, **style)
    delta = float(table["delta"].iloc[0])
    low, high = min(change.min(), -1.5 * delta), max(change.max(), 1.5 * delta)
    margin = 0.06 * max(high - low, 1e-3)
    for side in (-delta, delta):
        if delta > 0:
            ax.axvline(side, zorder=0, **REFERENCE_LINE)
    ax.set(xlim=(low - margin, high + margin), ylim=(-0.03 * top, 1.08 * top))
    ax.set_xlabel("log2 fold change, posterior mean")
    ax.set_ylabel("mean / s.d. of the posterior")
    versus = f"{literal(condition)} vs {literal(table['group2'].iloc[0])}"
    ax.set_title(versus, fontsize="medium", pad=20)
    legend_above(ax, ax.collections[-6::2], handletextpad=0.1, borderaxespad=0.1, markerscale=1.5)
    # From both sides in turn, as one alone would crowd its names.
    size = np.where(called, np.abs(change), -1.0)
    rank = pd.Series(-size).groupby(change > 0).rank(method="first")
    strongest = np.lexsort((-size, rank))
    strongest = strongest[called[strongest]][: max(n_labels, 0)]
    sides, line = np.repeat([-delta, delta], 100), np.tile(np.linspace(0, top, 100), 2)
    avoid = np.column_stack([np.append(change, sides), np.append(height, line)])
    names = table.index[strongest]
    ax.add_artist(PointLabels(change[strongest], height[strongest], names, avoid))
    return ax
