"""What the plots share: where they draw, sizes, and colours that a colour-blind reader knows."""

from __future__ import annotations

__all__ = [
    "BAND_ALPHA",
    "CATEGORICAL_COLORS",
    "DIVERGING_COLORS",
    "LABEL_SIZE",
    "LINE_WIDTH",
    "MAX_POINTS",
    "NUMERIC_COLORS",
    "OTHER_COLOR",
    "PROBABILITY_COLORS",
    "REFERENCE_LINE",
    "axes_or_new",
    "open_frame",
    "others",
    "square_axes",
]

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
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
# Of what is above or below zero, of shares, of any other number.
DIVERGING_COLORS = "RdBu_r"
PROBABILITY_COLORS = "Blues"
# Without its yellow end, of which single points do not show on a white page.
NUMERIC_COLORS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.82, 256)), "numeric")

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


def others(number: int) -> str:
    """Label of those that have no colour of their own."""
    return f"{number} other" if number == 1 else f"{number} others"


def square_axes(ax: Axes, limits: tuple[float, float]) -> None:
    """Give both axes these limits, one scale and the same numbers."""
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))


def open_frame(ax: Axes) -> None:
    """Leave the axes their lines at the left and at the bottom alone."""
    ax.spines[["top", "right"]].set_visible(False)
