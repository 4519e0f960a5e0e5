"""Effects of a pair against the sum of the effects of its parts."""

from __future__ import annotations

__all__ = ["pair_vs_additive_effects"]

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams.data.tables import dense
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    MAX_POINTS,
    OTHER_COLOR,
    REFERENCE_LINE,
    axes_or_new,
    open_frame,
    square_axes,
)
from scvi_sams.pl._point_labels import PointLabels

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes

_LEAST_DEVIATION = 0.05  # of the largest effect; below, a gene does not stand out
_NEEDED = ("effect", "additive", "lower", "upper")


def pair_vs_additive_effects(
    interactions: ad.AnnData,
    pair: str | None = None,
    n_labels: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Plot the effect of a pair on every gene against the sum of the effects of its parts.

    Parameters
    ----------
    interactions
        From ``model.get_pair_interactions``.
    pair
        Pair, as in ``obs_names``; needed if there are several.
    n_labels
        Genes that stand out, at most: those that deviate most from the sum, by a twentieth of the
        largest effect or more. They are coloured and drawn with the interval of the deviation,
        and named where there is room. The interval holds the decoder's errors where it is
        calibrated, see ``model.get_pair_interactions``.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, with the sum of the parts on x, the pair on y, and the line on which pairs are
    additive. The title has the kind of interaction with its probability, and the interaction
    score with its interval.

    Raises
    ------
    ValueError
        If a layer is missing, there is no such pair, or there are several and none is given.

    Examples
    --------
    >>> found = model.get_pair_interactions(["KLF1+CEBPA"])  # doctest: +SKIP
    >>> ax = scvi_sams.pl.pair_vs_additive_effects(found)  # doctest: +SKIP
    """
    if missing := [name for name in _NEEDED if name not in interactions.layers]:
        raise ValueError(
            f"The table has no layer {', '.join(missing)}: give what get_pair_interactions() "
            "returned."
        )
    known = list(interactions.obs_names)
    if pair is None and len(known) == 1:
        pair = known[0]
    if pair is None or pair not in known:
        raise ValueError(f"pair={pair!r} is not in the table; it has {', '.join(known)}.")
    row = interactions[pair]
    effect, additive, lower, upper = (dense(row.layers[name]).ravel() for name in _NEEDED)
    deviation = dense(row.X).ravel()

    ax = axes_or_new(ax, (4.6, 4.6))
    largest = max(float(np.abs([effect, additive]).max()), 1e-3)
    named = np.argsort(-np.abs(deviation), kind="stable")[: max(n_labels, 0)]
    named = named[np.abs(deviation[named]) >= _LEAST_DEVIATION * largest]
    many = len(effect) > MAX_POINTS
    ax.axline((0, 0), slope=1, zorder=0, **REFERENCE_LINE)
    ax.scatter(
        np.delete(additive, named),
        np.delete(effect, named),
        s=6 if many else 12,
        c=CATEGORICAL_COLORS[0],
        alpha=0.4,
        linewidths=0,
        rasterized=many,
    )
    ax.vlines(
        additive[named],
        (effect - deviation + lower)[named],
        (effect - deviation + upper)[named],
        color=CATEGORICAL_COLORS[1],
        linewidth=1.2,
    )
    ax.scatter(
        additive[named], effect[named], s=18, c=CATEGORICAL_COLORS[1], linewidths=0, zorder=3
    )
    low, high = min(effect.min(), additive.min(), 0.0), max(effect.max(), additive.max(), 0.0)
    margin = 0.1 * max(high - low, 1e-3)
    limits = (low - margin, high + margin)
    ax.axhline(0, color=OTHER_COLOR, linewidth=0.6, zorder=0)
    ax.axvline(0, color=OTHER_COLOR, linewidth=0.6, zorder=0)
    square_axes(ax, limits)
    units = interactions.uns.get("scvi_sams", {}).get("units", "")
    scale = "log2 expression" if units.startswith("log2") else units or "effect"
    ax.set_xlabel(f"sum of the single effects ({scale})")
    ax.set_ylabel(f"effect of the pair ({scale})")
    ax.set_title("\n".join([pair, *_summary(row.obs.iloc[0].to_dict())]), fontsize="medium")
    open_frame(ax)
    diagonal = np.linspace(*limits, 200)
    avoid = np.column_stack(
        [np.concatenate([additive, diagonal]), np.concatenate([effect, diagonal])]
    )
    names = [str(name) for name in row.var_names[named]]
    ax.add_artist(PointLabels(additive[named], effect[named], names, avoid))
    return ax


def _summary(obs: dict[str, float | str]) -> list[str]:
    """One line on the kind of interaction; none if the table does not say."""
    if not {"class", "class_probability", "interaction_score"} <= obs.keys():
        return []
    line = f"{obs['class']} ({float(obs['class_probability']):.2f}), "
    line += f"score {float(obs['interaction_score']):.2f}"
    if {"interaction_score_lower", "interaction_score_upper"} <= obs.keys():
        low, high = (float(obs[f"interaction_score_{end}"]) for end in ("lower", "upper"))
        line += f" [{low:.2f}, {high:.2f}]"
    return [line]
