"""Which conditions change which genes, conditions and genes of a kind side by side."""

from __future__ import annotations

__all__ = ["effect_heatmap"]

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams.data.tables import profile_frame
from scvi_sams.pl._figure import DIVERGING_COLORS, axes_or_new
from scvi_sams.pl._heatmap import cluster_order, draw_heatmap, heatmap_height

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes

    from scvi_sams.data.tables import ProfileTable

_MAX_NAMED_GENES = 100
_SHOWN_SHARE = 0.995  # of the effects, within the range of the colours


def effect_heatmap(
    effects: ProfileTable,
    n_genes: int = 50,
    pathways: Mapping[str, str] | pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the effects of conditions on the genes that are changed most.

    Rows and columns are clustered by direction, so that conditions that change the same genes the
    same way stand together, however strong they are.

    Parameters
    ----------
    effects
        Conditions x genes, as log2 fold changes or the like: from
        ``model.get_average_treatment_effect``, from
        :func:`~scvi_sams.evaluation.observed_average_treatment_effect`, or programmes from
        ``model.get_gene_programs``.
    n_genes
        Genes drawn: those with the largest effect, of either sign, of any condition.
    pathways
        Pathway, or any other kind, of each condition by its name, drawn as in
        :func:`mask_heatmap`.
    ax
        Axes to draw into; a new figure, as large as the names need, by default.

    Returns
    -------
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
    >>> effects = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, "perturbation", "control"
    ... )
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
    table = table.iloc[cluster_order(values), cluster_order(values.T)]
    limit = float(np.quantile(np.abs(values), _SHOWN_SHARE)) or 1.0

    width = 2.6 + 0.14 * np.clip(table.shape[1], 16, _MAX_NAMED_GENES)
    ax = axes_or_new(
        ax,
        (width + (1.3 if pathways is not None else 0.0), 1.5 + heatmap_height(len(table))),
    )
    kind = str(table.index.name or "condition")
    draw_heatmap(
        ax, table, DIVERGING_COLORS, (-limit, limit), "effect (log2)", kind, "gene", pathways
    )
    ax.set_title(
        f"{len(table):,} {kind}s, the {table.shape[1]:,} of {n_all:,} genes changed most",
        fontsize="medium",
    )
    return ax
