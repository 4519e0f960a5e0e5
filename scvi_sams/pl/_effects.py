"""Effects that the model gives against those that were observed."""

from __future__ import annotations

__all__ = ["model_vs_observed_effects"]

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams.evaluation import effect_correlation
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    MAX_POINTS,
    NUMERIC_COLORS,
    REFERENCE_LINE,
    axes_or_new,
    open_frame,
    square_axes,
)

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes


def model_vs_observed_effects(
    model_ate: ad.AnnData, observed_ate: ad.AnnData, ax: Axes | None = None
) -> Axes:
    """Plot every effect of a condition on a gene, as observed and as the model has it.

    Parameters
    ----------
    model_ate
        Conditions x genes, from ``model.get_average_treatment_effect``.
    observed_ate
        Conditions x genes, from
        :func:`~scvi_sams.evaluation.observed_average_treatment_effect`, best of cells that the
        model was not trained on. Conditions and genes that only one of the two has are left out.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, with observed effects on x, the model's on y, the line of equality, and the Pearson
    correlation over all points in the title.

    Raises
    ------
    ValueError
        If no condition, or no gene, is in both.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1000, n_genes=100)
    >>> halves = [
    ...     scvi_sams.evaluation.observed_average_treatment_effect(half, "perturbation", "control")
    ...     for half in (adata[::2], adata[1::2])
    ... ]
    >>> ax = scvi_sams.pl.model_vs_observed_effects(*halves)
    """
    conditions = model_ate.obs_names.intersection(observed_ate.obs_names)
    genes = model_ate.var_names.intersection(observed_ate.var_names)
    if not (len(conditions) and len(genes)):
        raise ValueError("The two have no condition, or no gene, in common.")
    model_ate, observed_ate = model_ate[conditions, genes], observed_ate[conditions, genes]
    model, observed = np.ravel(model_ate.X), np.ravel(observed_ate.X)

    ax = axes_or_new(ax, (4.8, 4.2))
    low = min(float(model.min()), float(observed.min()), 0.0)
    high = max(float(model.max()), float(observed.max()), 0.0)
    margin = 0.05 * max(high - low, 1e-3)
    limits = (low - margin, high + margin)
    if model.size > MAX_POINTS:  # counted in hexagons
        hexagons = ax.hexbin(
            observed,
            model,
            gridsize=70,
            bins="log",
            mincnt=1,
            extent=(*limits, *limits),
            cmap=NUMERIC_COLORS.reversed(),
            linewidths=0.1,
        )
        ax.figure.colorbar(hexagons, ax=ax, label="effects", shrink=0.6)
    else:
        ax.scatter(observed, model, s=8, c=CATEGORICAL_COLORS[0], alpha=0.5, linewidths=0)
    ax.axline((0, 0), slope=1, **REFERENCE_LINE)
    square_axes(ax, limits)
    ax.set_xlabel("observed effect (log2 expression)")
    ax.set_ylabel("model's effect (log2 expression)")
    ax.set_title(
        f"Pearson {effect_correlation(model_ate, observed_ate):.3f}: "
        f"{len(conditions):,} conditions x {len(genes):,} genes",
        fontsize="medium",
    )
    open_frame(ax)
    return ax
