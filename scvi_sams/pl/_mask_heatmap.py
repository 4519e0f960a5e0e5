"""Which perturbations move which latents, perturbations of a kind side by side."""

from __future__ import annotations

__all__ = ["mask_heatmap"]

from typing import TYPE_CHECKING, Literal

import numpy as np

from scvi_sams.pl._figure import DIVERGING_COLORS, PROBABILITY_COLORS, axes_or_new
from scvi_sams.pl._heatmap import cluster_order, draw_heatmap, heatmap_height

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from scvi.model.base import BaseModelClass


def mask_heatmap(
    model: BaseModelClass,
    values: Literal["mask", "effect"] = "mask",
    threshold: float = 0.5,
    pathways: Mapping[str, str] | pd.Series | None = None,
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
    pathways
        Pathway, or any other kind, of each perturbation by its name, drawn as a strip of colours
        beside the rows. The eight that most rows have are told apart, others are grey, and
        perturbations without one have no colour.
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
    >>> ax = scvi_sams.pl.mask_heatmap(model, pathways={"P001": "MAPK", "P002": "WNT"})
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
    table = table.iloc[cluster_order(table.to_numpy())]

    ax = axes_or_new(
        ax,
        (
            2.8 + 0.22 * max(len(by_use), 10) + (1.3 if pathways is not None else 0.0),
            1.0 + heatmap_height(len(table)),
        ),
    )
    if values == "mask":
        colors, limits, legend = PROBABILITY_COLORS, (0.0, 1.0), "inclusion probability"
    else:
        limit = float(np.abs(table.to_numpy()).max())
        colors, limits, legend = DIVERGING_COLORS, (-limit, limit), "expected shift (basal s.d.)"
    table.columns = [str(name).removeprefix("latent_") for name in table.columns]
    draw_heatmap(ax, table, colors, limits, legend, "perturbation", "latent", pathways)
    ax.set_title(title, fontsize="medium")
    return ax
