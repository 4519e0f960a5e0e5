"""The genes that a latent moves."""

from __future__ import annotations

__all__ = ["gene_program"]

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams.data.tables import profile_frame
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    LABEL_SIZE,
    LINE_WIDTH,
    OTHER_COLOR,
    axes_or_new,
    literal,
    open_frame,
)
from scvi_sams.tl import top_genes

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes

_ROW_INCHES = 0.16


def gene_program(
    programs: ad.AnnData, latent: str | int, n_genes: int = 10, ax: Axes | None = None
) -> Axes:
    """Plot the genes that a latent raises and lowers most, with intervals.

    Parameters
    ----------
    programs
        From :func:`~scvi_sams.tl.gene_programs`. Its intervals say how the effect varies over
        cells, not how well the decoder is known.
    latent
        Name (``"latent_3"``) or number of the latent.
    n_genes
        Genes of each direction, at most.
    ax
        Axes to draw into; a new figure, as tall as the genes need, by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with the effect on x and genes on y, the most raised at the top. The title says
        what the latent does in all, as far as ``obs`` has it.

    Raises
    ------
    ValueError
        If there is no such latent, a layer is missing, or ``n_genes`` is less than 1.

    Examples
    --------
    >>> programs = scvi_sams.tl.gene_programs(model, "typical")  # doctest: +SKIP
    >>> ax = scvi_sams.pl.gene_program(programs, "latent_3")  # doctest: +SKIP
    """
    name = f"latent_{latent}" if isinstance(latent, int) else latent
    if name not in programs.obs_names:
        raise ValueError(
            f"latent={latent!r} is not in the table; it has {', '.join(programs.obs_names)}."
        )
    if missing := [layer for layer in ("lower", "upper") if layer not in programs.layers]:
        raise ValueError(
            f"The table has no layer {', '.join(missing)}: give what gene_programs() returned."
        )
    program = programs[[name]]
    top = top_genes(program, n_genes)
    genes = top.sort_values("effect", ascending=False, kind="stable")["gene"]
    effect, lower, upper = (
        profile_frame(program, "programs", layer=layer).loc[name, genes].to_numpy()
        for layer in (None, "lower", "upper")
    )
    ax = axes_or_new(ax, (4.0, 1.3 + _ROW_INCHES * max(len(genes), 5)))
    rows = np.arange(len(genes))
    colors = np.where(effect > 0, CATEGORICAL_COLORS[1], CATEGORICAL_COLORS[0])
    ax.axvline(0, color=OTHER_COLOR, linewidth=0.8, zorder=0)
    ax.hlines(rows, lower, upper, color=colors, linewidth=LINE_WIDTH)
    ax.scatter(effect, rows, s=20, c=colors, linewidths=0, zorder=3)
    ax.set_yticks(rows, list(map(literal, genes)), fontsize=LABEL_SIZE)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(genes) - 0.4, -0.6)
    ax.set_xlabel(_effect_label(programs, name))
    ax.set_title("\n".join([literal(name), *_summary(program)]), fontsize="medium")
    open_frame(ax)
    ax.spines["left"].set_visible(False)
    return ax


def _effect_label(programs: ad.AnnData, name: str) -> str:
    units = str(programs.uns.get("scvi_sams", {}).get("units", ""))
    scale = (
        " (log2 expression)"
        if units.startswith("log2")
        else f" ({literal(units)})"
        if units
        else ""
    )
    if "move" not in programs.obs:
        return f"effect{scale}"
    return f"effect{scale} of moving it by {programs.obs.loc[name, 'move']:+.2g} s.d."


def _summary(program: ad.AnnData) -> list[str]:
    parts = []
    obs = program.obs.iloc[0]
    if "variance_share" in obs:
        parts.append(f"{obs['variance_share']:.0%} of the variance")
    if "n_perturbations" in obs:
        parts.append(f"{obs['n_perturbations']:.1f} perturbations")
    return [", ".join(parts)] if parts else []
