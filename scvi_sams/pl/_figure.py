"""What the plots share: where they draw, and colours that a colour-blind reader can tell apart."""

from __future__ import annotations

__all__ = ["CATEGORICAL_COLORS", "OTHER_COLOR", "axes_or_new"]

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, without black and with its pale yellow last.
CATEGORICAL_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F4F24",
    "#F0E442",
)
OTHER_COLOR = "#D0D0D0"


def axes_or_new(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure that the caller closes; `figsize` is in inches.

    Only a new figure touches pyplot, so that a notebook shows it; drawing into given axes
    leaves pyplot's current figure alone.
    """
    if ax is not None:
        return ax
    _, new = plt.subplots(figsize=figsize, layout="constrained")
    return new
