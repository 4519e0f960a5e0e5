"""Heat maps with a legible name for every row that has room for one."""

from __future__ import annotations

__all__ = ["cluster_order", "draw_heatmap", "heatmap_height"]

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from scipy.cluster.hierarchy import leaves_list, linkage

from scvi_sams.pl._figure import CATEGORICAL_COLORS, LABEL_SIZE, OTHER_COLOR, others

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_ROW_INCHES = 0.14  # holds a label
_COLUMN_INCHES = 0.13  # holds a label that stands upright
_MIN_HEIGHT = 1.8  # inches; holds the legend of the colours
_MAX_HEIGHT = 12.0  # inches; more rows than fit are drawn thinner and labelled in part
_STRIP = 0.09  # inches; width of the strip of pathways
_BAR_LABEL_INCHES = 0.75  # holds the ticks and the label of the colour bar


def heatmap_height(n_rows: int) -> float:
    """Height in inches that the rows need."""
    return min(max(_ROW_INCHES * n_rows, _MIN_HEIGHT), _MAX_HEIGHT)


def cluster_order(table: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows in the order of an average-linkage tree on their directions."""
    if len(table) < 3:
        return np.arange(len(table))
    directions = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    # The optimal order of the leaves costs the cube of their number.
    tree = linkage(directions, "average", optimal_ordering=len(directions) <= 1_000)
    return leaves_list(tree)


def draw_heatmap(
    ax: Axes,
    table: pd.DataFrame,
    colors: str,
    limits: tuple[float, float],
    legend: str,
    row_kind: str,
    column_kind: str,
    pathways: Mapping[str, str] | pd.Series | None = None,
) -> None:
    """Draw a table as it is ordered, with names, colour bar, and a strip of pathways.

    Parameters
    ----------
    ax
        Axes to draw into.
    table
        Rows x columns.
    colors
        Name of the colour map.
    limits
        Values at the ends of the colour map; its bar is pointed where a value lies beyond.
    legend
        Label of the colour bar.
    row_kind, column_kind
        What a row and a column is, in the singular.
    pathways
        Pathway of each row, by its name; rows without one have no colour in the strip.
    """
    values = table.to_numpy(dtype=float)
    # Nearest, or thin rows would be blended into values that no row has.
    image = ax.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        vmin=limits[0],
        vmax=limits[1],
    )
    ax.spines[:].set_visible(False)
    _name_rows(ax, [str(name) for name in table.index], row_kind)
    _name_columns(ax, [str(name) for name in table.columns], column_kind)
    handles = [] if pathways is None else _draw_pathways(ax, table, pathways)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
        (bool(values.min() < limits[0]), bool(values.max() > limits[1])), "both"
    )
    height = ax.get_window_extent().height / ax.figure.dpi
    bar = ax.figure.colorbar(
        image, ax=ax, shrink=min(1.0, 2.5 / height), aspect=18, extend=extend, extendfrac=0.04
    )
    bar.set_label(legend)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    if handles:
        # On the bar, and not on the axes, or the layout would put it between the two.
        beyond = ScaledTranslation(_BAR_LABEL_INCHES, 0, ax.figure.dpi_scale_trans)
        bar.ax.legend(
            handles=handles,
            title="pathway",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            bbox_transform=bar.ax.transAxes + beyond,
            borderaxespad=0,
            frameon=False,
            fontsize="small",
            title_fontsize="small",
            handlelength=1.0,
            handleheight=1.0,
            alignment="left",
        )


def _name_rows(ax: Axes, names: list[str], kind: str) -> None:
    height = ax.get_window_extent().height / ax.figure.dpi
    fitting = max(1, int(height / (0.85 * _ROW_INCHES)))
    step = math.ceil(len(names) / fitting)
    ax.set_yticks(range(0, len(names), step), names[::step], fontsize=LABEL_SIZE)
    ax.tick_params(axis="y", length=0 if step == 1 else 2)
    if step > 1:
        ax.set_ylabel(f"{kind} (1 in {step} labelled)")


def _name_columns(ax: Axes, names: list[str], kind: str) -> None:
    upright = len(names) > 15 or max(map(len, names)) > 3
    width = ax.get_window_extent().width / ax.figure.dpi
    fitting = max(1, int(width / (0.85 * _COLUMN_INCHES))) if upright else len(names)
    step = math.ceil(len(names) / fitting)
    ax.set_xticks(
        range(0, len(names), step),
        names[::step],
        fontsize=LABEL_SIZE,
        rotation=90 if upright else 0,
    )
    ax.tick_params(axis="x", length=0 if step == 1 else 2)
    ax.set_xlabel(kind if step == 1 else f"{kind} (1 in {step} labelled)")


def _draw_pathways(
    ax: Axes, table: pd.DataFrame, pathways: Mapping[str, str] | pd.Series
) -> list[Patch]:
    """Draw the strip and return what its colours mean."""
    of_row = pd.Series(dict(pathways), dtype=object).reindex(table.index)
    counts = of_row.value_counts()
    # In the order in which they were given, so that two figures have the same colours.
    given = [name for name in dict.fromkeys(dict(pathways).values()) if name in counts.index]
    named = sorted(given, key=lambda name: -counts[name])[: len(CATEGORICAL_COLORS)]
    named = [name for name in given if name in named]
    color_of = dict(zip(named, CATEGORICAL_COLORS, strict=False))
    colors = [
        (1.0, 1.0, 1.0) if pd.isna(each) else to_rgb(color_of.get(each, OTHER_COLOR))
        for each in of_row
    ]
    # In the axes' own coordinates, so that rows and strip cannot part company.
    width = ax.get_window_extent().width / ax.figure.dpi
    column = table.shape[1] / width
    left, right = -0.5 - 1.8 * _STRIP * column, -0.5 - 0.8 * _STRIP * column
    ax.imshow(
        np.array(colors)[:, None],
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, len(table) - 0.5, -0.5),
    )
    ax.set_xlim(left, table.shape[1] - 0.5)
    handles = [Patch(color=color_of[name], label=str(name)) for name in named]
    if len(counts) > len(named):
        handles.append(Patch(color=OTHER_COLOR, label=others(len(counts) - len(named))))
    return handles
