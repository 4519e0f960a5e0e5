"""Effects on every gene in a plane: the model against the cells, a pair against its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap

from scvi_sams._exceptions import counted
from scvi_sams.data.tables import dense
from scvi_sams.evaluation import effect_correlation
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    MAX_POINTS,
    OTHER_COLOR,
    REFERENCE_LINE,
    axes_or_new,
    check_table,
    chosen,
    equal_axes,
    literal,
    scale_of,
)
from scvi_sams.pl._point_labels import PointLabels

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes

# Without the yellow end of viridis, of which single hexagons do not show on a white page.
_COUNT_COLORS = ListedColormap(colormaps["viridis"](np.linspace(0.82, 0, 256)), "counts")
_LEAST_DEVIATION = 0.05  # of the largest effect; below, a gene does not stand out
_LAYERS_OF_PAIRS = ("effect", "additive", "lower", "upper")


def model_vs_observed_effects(
    effects: ad.AnnData, observed: ad.AnnData, ax: Axes | None = None
) -> Axes:
    """Plot every effect of a condition on a gene, as observed and as the model has it.

    Parameters
    ----------
    effects
        Conditions x genes, from ``model.get_average_treatment_effect``.
    observed
        Conditions x genes, from
        :func:`~scvi_sams.evaluation.observed_effects`, best of cells that the
        model was not trained on. Conditions and genes that only one of the two has are left out.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with observed effects on x, the model's on y, the line of equality, and the
        Pearson correlation over all points in the title.

    Raises
    ------
    ValueError
        If no condition, or no gene, is in both.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1000, n_genes=100)
    >>> halves = [
    ...     scvi_sams.evaluation.observed_effects(half, "perturbation", "control")
    ...     for half in (adata[::2], adata[1::2])
    ... ]
    >>> ax = scvi_sams.pl.model_vs_observed_effects(*halves)
    """
    conditions = effects.obs_names.intersection(observed.obs_names)
    genes = effects.var_names.intersection(observed.var_names)
    if not (len(conditions) and len(genes)):
        raise ValueError("The two have no condition, or no gene, in common.")
    effects, observed = effects[conditions, genes], observed[conditions, genes]
    x, y = dense(observed.X).ravel(), dense(effects.X).ravel()

    ax = axes_or_new(ax, (4.8, 4.2))
    limits = equal_axes(ax, x, y, 0.05)
    if x.size > MAX_POINTS:  # counted in hexagons
        style: dict[str, Any] = {"gridsize": 70, "bins": "log", "mincnt": 1, "linewidths": 0.1}
        style |= {"extent": (*limits, *limits), "cmap": _COUNT_COLORS}
        hexagons = ax.hexbin(x, y, **style)
        ax.figure.colorbar(hexagons, ax=ax, label="effects in a hexagon", shrink=0.6)
    else:
        ax.scatter(x, y, s=8, c=CATEGORICAL_COLORS[0], alpha=0.5, linewidths=0)
    ax.axline((0, 0), slope=1, **REFERENCE_LINE)
    ax.set_xlabel("observed effect (log2 expression)")
    ax.set_ylabel("model's effect (log2 expression)")
    ax.set_title(
        f"Pearson {effect_correlation(effects, observed):.3f}: "
        f"{counted(len(conditions), 'condition')} x {counted(len(genes), 'gene')}",
        fontsize="medium",
    )
    return ax


def pair_vs_additive_effects(
    pairs: ad.AnnData, pair: str | None = None, n_labels: int = 10, ax: Axes | None = None
) -> Axes:
    """Plot the effect of a pair on every gene against the sum of the effects of its parts.

    Parameters
    ----------
    pairs
        From :func:`~scvi_sams.tl.pair_interactions`.
    pair
        Pair, as in ``obs_names``; needed if there are several.
    n_labels
        Genes that stand out, at most: those that deviate most from the sum, by a twentieth of the
        largest effect or more. They are coloured and drawn with the interval of the deviation,
        and named where there is room. The interval holds the decoder's errors where it is
        calibrated, see :func:`~scvi_sams.tl.pair_interactions`.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with the sum of the parts on x, the pair on y, and the line on which pairs are
        additive. The title has the kind of interaction with its probability, and the interaction
        score with its interval.

    Raises
    ------
    ValueError
        If a layer is missing, there is no such pair, or there are several and none is given.

    Examples
    --------
    >>> found = scvi_sams.tl.pair_interactions(model, ["KLF1+CEBPA"])  # doctest: +SKIP
    >>> ax = scvi_sams.pl.pair_vs_additive_effects(found)  # doctest: +SKIP
    """
    has_none = "The table has no layer"
    check_table(pairs.layers, _LAYERS_OF_PAIRS, has_none, "pair_interactions")
    pair = chosen("pair", pair, pairs.obs_names)
    row = pairs[pair]
    y, x, lower, upper = (dense(row.layers[name]).ravel() for name in _LAYERS_OF_PAIRS)
    deviation = dense(row.X).ravel()
    least = _LEAST_DEVIATION * max(float(np.abs([x, y]).max()), 1e-3)
    named = np.argsort(-np.abs(deviation), kind="stable")[: max(n_labels, 0)]
    named = named[np.abs(deviation[named]) >= least]

    ax = axes_or_new(ax, (4.6, 4.6))
    many = len(x) > MAX_POINTS
    for line in (ax.axhline, ax.axvline):
        line(0, color=OTHER_COLOR, linewidth=0.6, zorder=0)
    ax.axline((0, 0), slope=1, zorder=0, **REFERENCE_LINE)
    style: dict[str, Any] = {"s": 6 if many else 12, "alpha": 0.4, "rasterized": many}
    plain, marked = CATEGORICAL_COLORS[:2]
    ax.scatter(np.delete(x, named), np.delete(y, named), c=plain, linewidths=0, **style)
    low, high = ((y - deviation + end)[named] for end in (lower, upper))
    ax.vlines(x[named], low, high, color=marked, linewidth=1.2)
    ax.scatter(x[named], y[named], s=18, c=marked, linewidths=0, zorder=3)
    limits = equal_axes(ax, x, y, 0.1)
    scale = scale_of(pairs) or "effect"
    ax.set_xlabel(f"sum of the single effects ({scale})")
    ax.set_ylabel(f"effect of the pair ({scale})")
    ax.set_title("\n".join([literal(pair), *_kind(row.obs.iloc[0].to_dict())]), fontsize="medium")
    diagonal = np.linspace(*limits, 200)
    avoid = np.column_stack([np.append(x, diagonal), np.append(y, diagonal)])
    ax.add_artist(PointLabels(x[named], y[named], row.var_names[named], avoid))
    return ax


def _kind(obs: dict[str, float | str]) -> list[str]:
    """One line on the kind of interaction; none if the table does not say."""
    if not {"class", "class_probability", "interaction_score"} <= obs.keys():
        return []
    line = f"{obs['class']} ({float(obs['class_probability']):.2f}), "
    line += f"score {float(obs['interaction_score']):.2f}"
    if {"interaction_score_lower", "interaction_score_upper"} <= obs.keys():
        low, high = (float(obs[f"interaction_score_{end}"]) for end in ("lower", "upper"))
        line += f" [{low:.2f}, {high:.2f}]"
    return [line]
