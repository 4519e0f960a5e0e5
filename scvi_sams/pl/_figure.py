"""Figure style: axes, sizes, text, legends, and colours that a colour-blind reader tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from scvi_sams._exceptions import ScreenError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import anndata as ad
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Okabe and Ito's palette, with a brown for its yellow, which is too pale for a white page.
CATEGORICAL_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F4F24",
    "#000000",
)
OTHER_COLOR = "#D0D0D0"
DIVERGING_COLORS = "RdBu_r"
PROBABILITY_COLORS = "Blues"

LABEL_SIZE = 7  # points; names of genes, perturbations and latents
LINE_WIDTH = 1.5  # points
BAND_ALPHA = 0.18  # of intervals behind a curve
MAX_POINTS = 2_000  # beyond these, points hide each other
REFERENCE_LINE: dict[str, Any] = {"color": "0.3", "linewidth": 1, "linestyle": "--"}


def axes_or_new(ax: Axes | None, figsize: tuple[float, float], *, framed: bool = False) -> Axes:
    """Return `ax`, or the axes of a new figure that the caller closes; `figsize` is in inches.

    Unless `framed`, the axes have lines at the left and at the bottom alone. Only a new figure
    touches pyplot, so that a notebook shows it; given axes leave its current figure alone.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    if not framed:
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def check_table(held: Any, needed: Iterable[str], what: str, source: str) -> None:
    """Refuse a table without the columns or layers of what `source` returns."""
    if missing := [name for name in needed if name not in held]:
        raise ScreenError(f"{what} {', '.join(missing)}: give what {source}() returned.")


def chosen(argument: str, name: str | None, known: Iterable[str]) -> str:
    """The name that is asked for, or the only one that a table has."""
    known = list(known)
    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        has = ", ".join(map(str, known))
        raise ScreenError(f"{argument}={name!r} is not in the table; it has {has}.")
    return name


def scale_of(table: ad.AnnData) -> str:
    """What effects are measured in; empty where a table does not say."""
    units = str(table.uns.get("scvi_sams", {}).get("units", ""))
    return "log2 expression" if units.startswith("log2") else literal(units)


def literal(name: object) -> str:
    r"""Text from data as matplotlib shows it character by character.

    A pair of ``$`` would be read as mathematics, a control character has no glyph, and a legend
    leaves out what begins with an underscore.

    Examples
    --------
    >>> print(literal("$alpha$"), literal("tab\there"))
    \$alpha\$ tab\there
    """
    text = printable(name)
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def equal_axes(
    ax: Axes, x: NDArray[np.floating], y: NDArray[np.floating], margin: float
) -> tuple[float, float]:
    """Give both axes limits about the points and 0, one scale and the same numbers."""
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    margin *= max(high - low, 1e-3)
    limits = (low - margin, high + margin)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    return limits


def legend_above(ax: Axes, handles: Sequence[Artist], **options: Any) -> None:
    """Draw a legend in one row between the axes and their title."""
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        columnspacing=1.0,
        frameon=False,
        fontsize="small",
        **options,
    )


def legend_beside(ax: Axes, title: str, **options: Any) -> None:
    """Draw a legend to the right of the axes."""
    ax.legend(
        title=title,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        **options,
    )
