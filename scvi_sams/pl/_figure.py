"""Figure style: axes, sizes, text, legends, and colours that a colour-blind reader tells apart."""

from __future__ import annotations

__all__ = [
    "BAND_ALPHA",
    "CATEGORICAL_COLORS",
    "DIVERGING_COLORS",
    "LABEL_SIZE",
    "LINE_WIDTH",
    "MAX_POINTS",
    "OTHER_COLOR",
    "PROBABILITY_COLORS",
    "REFERENCE_LINE",
    "axes_or_new",
    "equal_axes",
    "legend_above",
    "legend_beside",
    "literal",
    "open_frame",
]

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from scvi_sams._exceptions import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

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


def axes_or_new(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure that the caller closes; `figsize` is in inches.

    Only a new figure touches pyplot, so that a notebook shows it; drawing into given axes
    leaves pyplot's current figure alone.
    """
    if ax is not None:
        return ax
    _, new = plt.subplots(figsize=figsize, layout="constrained")
    return new


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


def equal_axes(ax: Axes, limits: tuple[float, float]) -> None:
    """Give both axes these limits, one scale and the same numbers."""
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))


def open_frame(ax: Axes) -> None:
    """Leave the axes their lines at the left and at the bottom alone."""
    ax.spines[["top", "right"]].set_visible(False)


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
