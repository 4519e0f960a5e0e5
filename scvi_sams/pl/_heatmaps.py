"""Heat maps of masks and of effects, rows and columns of a kind side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from scipy.cluster.hierarchy import linkage

from scvi_sams._exceptions import counted
from scvi_sams.data.tables import profile_frame
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    DIVERGING_COLORS,
    LABEL_SIZE,
    OTHER_COLOR,
    PROBABILITY_COLORS,
    axes_or_new,
    legend_beside,
    literal,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

_MIN_SHOWN = 12  # rows and columns; fewer would be stripes of colour without a scale
_ROW_INCHES = 0.14  # holds a label
_COLUMN_INCHES = 0.13  # holds a label that stands upright
_MIN_HEIGHT = 1.8  # inches; holds the legend of the colours
_MAX_HEIGHT = 12.0  # inches; more rows than fit are drawn thinner and labelled in part
_MAX_NAMED_GENES = 100
_SHOWN_SHARE = 0.995  # of the effects, within the range of the colours
_STRIP = 0.09  # inches; width of the strip of pathways
_BAR_LABEL_INCHES = 0.75  # holds the ticks and the label of the colour bar
_PATHWAY_INCHES = 1.3  # holds the legend of the pathways


def mask_heatmap(
    mask: pd.DataFrame,
    effect: pd.DataFrame | None = None,
    threshold: float = 0.5,
    pathways: Mapping[str, str] | pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot which perturbations move which latents.

    The latent that most perturbations move comes first, and the perturbations that move it are at
    the top; then those that move the second, and so on, so that perturbations with one mask stand
    together and the lower left is empty. Perturbations and latents without a mask above the
    threshold come last, and most of them are left out and counted in the title. Where rows are too
    thin for a label each, every second, third ... one is labelled.

    Parameters
    ----------
    mask
        Perturbations x latents: the probability that the perturbation moves the latent, from
        ``model.get_perturbation_mask``.
    effect
        Perturbations x latents: the expected shift in standard deviations of the basal state,
        from ``model.get_perturbation_effect``. If given, it is drawn in place of the mask.
    threshold
        A perturbation moves a latent if the probability is above this.
    pathways
        Pathway, or any other kind, of each perturbation by its name, drawn as a strip of colours
        beside the rows. The eight that most rows have are told apart, others are grey, and
        perturbations without one have no colour.
    ax
        Axes to draw into; a new figure, as tall as the rows need, by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with latents on x and perturbations on y.

    Raises
    ------
    ValueError
        If ``mask`` has no row or no column, or ``effect`` lacks one of them.
    ScreenError
        If a perturbation or a latent is in a table twice.

    Examples
    --------
    >>> import numpy as np, pandas as pd, scvi_sams
    >>> mask = pd.DataFrame(np.eye(3), index=["KLF1", "CEBPA", "JAK2"])
    >>> ax = scvi_sams.pl.mask_heatmap(mask, pathways={"KLF1": "erythroid", "JAK2": "MAPK"})
    """
    table = mask = profile_frame(mask, "mask")
    if mask.empty:
        raise ValueError("The mask has no perturbation or no latent.")
    if effect is not None:
        table = profile_frame(effect, "effect").reindex(mask.index, columns=mask.columns)
        if table.isna().any(axis=None):
            raise ValueError("`effect` lacks a perturbation or a latent of `mask`.")
    active = (mask > threshold).to_numpy()
    columns = np.lexsort((-mask.max(), -active.sum(axis=0)))
    # Keys of a sort, the last one first: by mask, from latent to latent, then by sign.
    shown = np.where(active, table, 0.0).T[columns[::-1]]
    rows = np.lexsort((-mask.max(axis=1), *-shown, *~active.T[columns[::-1]]))
    n_moving, n_moved = int(active.any(axis=1).sum()), int(active.any(axis=0).sum())
    rows, columns = rows[: max(n_moving, _MIN_SHOWN)], columns[: max(n_moved, _MIN_SHOWN)]
    table = table.iloc[rows, columns]
    table.columns = [str(name).removeprefix("latent_") for name in table.columns]

    title = (
        f"{n_moving:,} of {counted(len(mask), 'perturbation')} move{'s' * (n_moving == 1)} "
        f"{n_moved:,} of {counted(mask.shape[1], 'latent')}"
    )
    n_left_out = {"perturbation": len(mask) - len(rows), "latent": mask.shape[1] - len(columns)}
    left_out = [counted(number, noun) for noun, number in n_left_out.items() if number]
    if left_out:
        title += f"\nnot shown: {' and '.join(left_out)} without a mask"
    width = 2.8 + 0.22 * len(columns) + _PATHWAY_INCHES * (pathways is not None)
    ax = axes_or_new(ax, (max(width, 5.0), 1.1 + _height(len(table))), framed=True)
    if effect is None:
        colors, limits, legend = PROBABILITY_COLORS, (0.0, 1.0), "inclusion probability"
    else:
        limit = float(np.abs(table.to_numpy()).max()) or 1.0
        colors, limits, legend = DIVERGING_COLORS, (-limit, limit), "expected shift (basal s.d.)"
    _draw(ax, table, colors, limits, legend, "perturbation", "latent", pathways)
    ax.set_title(title, fontsize="medium")
    return ax


def effect_heatmap(
    effects: ProfileTable,
    n_genes: int = 50,
    pathways: Mapping[str, str] | pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the effects of conditions on the genes that are changed most.

    Rows and columns are clustered by direction, so that conditions that change the same genes the
    same way stand together, however strong they are; the strongest group comes first.

    Parameters
    ----------
    effects
        Conditions x genes, as log2 fold changes or the like: from
        ``model.get_average_treatment_effect``, from
        :func:`~scvi_sams.evaluation.observed_effects`, or programmes from
        :func:`~scvi_sams.tl.gene_programs`.
    n_genes
        Genes drawn: those with the largest effect, of either sign, of any condition.
    pathways
        Pathway, or any other kind, of each condition by its name, drawn as in
        :func:`mask_heatmap`.
    ax
        Axes to draw into; a new figure, as large as the names need, by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with genes on x and conditions on y. The colours end at the effect that 99.5% of
        those drawn do not exceed.

    Raises
    ------
    ValueError
        If ``n_genes`` is less than 1, or there is no condition or no gene.
    ScreenError
        If a condition or a gene is in the table twice.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1000, n_genes=100)
    >>> effects = scvi_sams.evaluation.observed_effects(adata, "perturbation", "control")
    >>> ax = scvi_sams.pl.effect_heatmap(effects, n_genes=20)
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes}: at least one is needed.")
    table = profile_frame(effects, "effects")
    if table.empty:
        raise ValueError("The table of effects has no condition or no gene.")
    n_all = table.shape[1]
    largest = table.abs().max().sort_values(ascending=False, kind="stable").index[:n_genes]
    table = table.loc[:, table.columns.isin(largest)]
    values = table.to_numpy()
    table = table.iloc[
        _cluster_order(values, np.abs(values).sum(axis=1)),
        _cluster_order(values.T, np.abs(values).sum(axis=0)),
    ]
    limit = float(np.quantile(np.abs(values), _SHOWN_SHARE)) or 1.0

    width = 2.6 + 0.14 * np.clip(table.shape[1], 16, _MAX_NAMED_GENES)
    width += _PATHWAY_INCHES * (pathways is not None)
    ax = axes_or_new(ax, (width, 1.5 + _height(len(table))), framed=True)
    kind = str(table.index.name or "condition")
    _draw(ax, table, DIVERGING_COLORS, (-limit, limit), "effect (log2)", kind, "gene", pathways)
    title = f"{counted(len(table), kind)}, {counted(n_all, 'gene')}"
    if n_all > table.shape[1]:
        title = (
            f"{counted(len(table), kind)}, the {table.shape[1]:,} of {n_all:,} genes changed most"
        )
    ax.set_title(title, fontsize="medium")
    return ax


def _height(n_rows: int) -> float:
    """Inches that the rows need."""
    return min(max(_ROW_INCHES * n_rows, _MIN_HEIGHT), _MAX_HEIGHT)


def _cluster_order(table: NDArray[np.floating], weight: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows in the order of an average-linkage tree on their directions, heavy branches first."""
    n_rows = len(table)
    if n_rows < 2:
        return np.arange(n_rows)
    directions = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    leaves, weights = [[row] for row in range(n_rows)], list(weight)
    for left, right in linkage(directions, "average")[:, :2].astype(int):
        if weights[left] < weights[right]:
            left, right = right, left
        leaves.append(leaves[left] + leaves[right])
        weights.append(weights[left] + weights[right])
    return np.array(leaves[-1])


def _draw(
    ax: Axes,
    table: pd.DataFrame,
    colors: str,
    limits: tuple[float, float],
    legend: str,
    row_kind: str,
    column_kind: str,
    pathways: Mapping[str, str] | pd.Series | None,
) -> None:
    """Draw a table as it is ordered, with names, colour bar, and a strip of pathways."""
    values = table.to_numpy()
    low, high = limits
    # Nearest, or thin rows would be blended into values that no row has.
    image = ax.imshow(
        values, aspect="auto", interpolation="nearest", cmap=colors, vmin=low, vmax=high
    )
    ax.spines[:].set_visible(False)
    extent = ax.get_window_extent()
    width, height = extent.width / ax.figure.dpi, extent.height / ax.figure.dpi
    upright = table.shape[1] > 15 or max(len(str(name)) for name in table.columns) > 3
    room = width / _COLUMN_INCHES if upright else table.shape[1]
    step = _name_ticks(ax.xaxis, table.columns, room, rotation=90 if upright else 0)
    ax.set_xlabel(column_kind if step == 1 else f"{column_kind} (1 in {step} labelled)")
    step = _name_ticks(ax.yaxis, table.index, height / _ROW_INCHES)
    if step > 1:
        ax.set_ylabel(f"{row_kind} (1 in {step} labelled)")

    beyond = 2 * bool(values.max() > high) + bool(values.min() < low)
    extend = ("neither", "min", "max", "both")[beyond]
    bar = ax.figure.colorbar(
        image, ax=ax, shrink=min(1.0, 2.5 / height), aspect=18, extend=extend, extendfrac=0.04
    )
    bar.set_label(legend)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    if pathways is not None and (handles := _pathway_strip(ax, table, pathways, width)):
        # On the bar, and not on the axes, or the layout would put it between the two.
        aside = ScaledTranslation(_BAR_LABEL_INCHES, 0, ax.figure.dpi_scale_trans)
        legend_beside(
            bar.ax,
            "pathway",
            handles=handles,
            bbox_transform=bar.ax.transAxes + aside,
            borderaxespad=0,
            handlelength=1.0,
            handleheight=1.0,
        )


def _name_ticks(axis: Axis, names: pd.Index, room: float, **style: Any) -> int:
    """Name one in so many rows or columns that the names fit into room for this many."""
    step = math.ceil(len(names) / max(1, int(room / 0.85)))  # they may stand a little closer
    shown = [literal(name) for name in names[::step]]
    axis.set_ticks(range(0, len(names), step), shown, fontsize=LABEL_SIZE, **style)
    axis.set_tick_params(length=0 if step == 1 else 2)
    return step


def _pathway_strip(
    ax: Axes, table: pd.DataFrame, pathways: Mapping[str, str] | pd.Series, width: float
) -> list[Patch]:
    """Draw the strip at the left of axes this wide, and return what its colours mean."""
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
    column = table.shape[1] / width
    left, right = -0.5 - 1.8 * _STRIP * column, -0.5 - 0.8 * _STRIP * column
    ax.imshow(
        np.array(colors)[:, None],
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, len(table) - 0.5, -0.5),
    )
    ax.set_xlim(left, table.shape[1] - 0.5)
    handles = [Patch(color=color_of[name], label=literal(name)) for name in named]
    if n_others := len(counts) - len(named):
        handles.append(Patch(color=OTHER_COLOR, label=counted(n_others, "other")))
    return handles
