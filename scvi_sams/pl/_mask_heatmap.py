"""Which perturbations move which latents, perturbations of a kind side by side."""

from __future__ import annotations

__all__ = ["mask_heatmap"]

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from scvi_sams.pl._figure import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from scvi.model.base import BaseModelClass

_ROW_INCHES = 0.14  # holds a label of 7 points
_MIN_HEIGHT = 1.8  # inches; holds the legend of the colours
_MAX_HEIGHT = 12.0  # inches; more rows than fit are drawn thinner and labelled in part


def mask_heatmap(
    model: BaseModelClass,
    values: Literal["mask", "effect"] = "mask",
    threshold: float = 0.5,
    ax: Axes | None = None,
) -> Axes:
    """Plot the masks, or the effects, of the perturbations that do something.

    Rows are clustered, so that perturbations that share a mechanism stand together (with
    ``values="effect"`` those that move it the same way); columns are ordered by how many
    perturbations move the latent.
    Perturbations and latents without a mask above the threshold are left out and counted in the
    title. Where rows are too thin for a label each, every second, third ... one is labelled.

    Parameters
    ----------
    model
        A trained model.
    values
        ``"mask"`` for the probability that the perturbation moves the latent, ``"effect"`` for
        the expected shift, in standard deviations of the basal state.
    threshold
        A perturbation moves a latent if the probability is above this.
    ax
        Axes to draw into; a new figure, as tall as the rows need, by default.

    Returns
    -------
    The axes, with latents on x and perturbations on y.

    Raises
    ------
    ValueError
        If ``values`` is neither of the two.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500, n_genes=100)
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=8)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> ax = scvi_sams.pl.mask_heatmap(model)
    """
    if values not in ("mask", "effect"):
        raise ValueError(f"`values` is 'mask' or 'effect', not {values!r}.")
    mask, effect = model.get_perturbation_mask(), model.get_perturbation_effect()
    active = mask > threshold
    rows, columns = active.any(axis=1), active.any(axis=0)
    title = (
        f"{rows.sum()} of {len(rows)} perturbations move {columns.sum()} of {len(columns)} latents"
    )
    if not rows.any():
        ax = axes_or_new(ax, (5.0, 1.5))
        ax.set_axis_off()
        ax.set_title(title, fontsize="medium")
        return ax

    by_use = active.sum(axis=0)[columns].sort_values(ascending=False, kind="stable").index
    table = (mask if values == "mask" else effect).loc[rows, by_use]
    table = table.iloc[_cluster_order(table.to_numpy())]

    height = min(max(_ROW_INCHES * len(table), _MIN_HEIGHT), _MAX_HEIGHT)
    ax = axes_or_new(ax, (2.8 + 0.22 * max(len(by_use), 10), 1.0 + height))
    style: dict[str, Any]
    if values == "mask":
        style = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}
        legend = "inclusion probability"
    else:
        limit = float(np.abs(table.to_numpy()).max())
        style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        legend = "expected shift (basal s.d.)"
    # Nearest, or thin rows would be blended into values that no perturbation has.
    image = ax.imshow(table, aspect="auto", interpolation="nearest", **style)

    _label_columns(ax, [str(name).removeprefix("latent_") for name in by_use])
    _label_rows(ax, [str(name) for name in table.index])
    ax.set_xlabel("latent")
    ax.set_title(title, fontsize="medium")
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=min(1.0, 2.5 / height), aspect=18)
    bar.set_label(legend)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    return ax


def _cluster_order(table: NDArray[np.floating]) -> NDArray[np.intp]:
    """Rows in the order of an average-linkage tree on their directions."""
    if len(table) < 3:
        return np.arange(len(table))
    directions = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    # The optimal order of the leaves costs the cube of their number.
    tree = linkage(directions, "average", optimal_ordering=len(directions) <= 1_000)
    return leaves_list(tree)


def _label_rows(ax: Axes, names: list[str]) -> None:
    height = ax.get_window_extent().height / ax.figure.dpi
    fitting = max(1, int(height / (0.85 * _ROW_INCHES)))
    step = math.ceil(len(names) / fitting)
    ax.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    ax.tick_params(axis="y", length=0 if step == 1 else 2)
    if step > 1:
        ax.set_ylabel(f"perturbation (1 in {step} labelled)")


def _label_columns(ax: Axes, names: list[str]) -> None:
    ax.set_xticks(range(len(names)), names, fontsize=7, rotation=90 if len(names) > 15 else 0)
    ax.tick_params(axis="x", length=0)
