"""The genes that a latent moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.tables import profile_frame
from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    LABEL_SIZE,
    LINE_WIDTH,
    OTHER_COLOR,
    axes_or_new,
    check_table,
    literal,
    scale_of,
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
        has = ", ".join(programs.obs_names)
        raise ScreenError(f"latent={latent!r} is not in the table; it has {has}.")
    ends = ("lower", "upper")
    check_table(programs.layers, ends, "The table has no layer", "gene_programs")
    program = programs[[name]]
    top = top_genes(program, n_genes)
    genes = top.sort_values("effect", ascending=False, kind="stable")["gene"]
    effect, lower, upper = (
        profile_frame(program, "programs", layer=layer).loc[name, genes].to_numpy()
        for layer in (None, *ends)
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
    obs = program.obs.iloc[0]
    label = f"effect ({scale})" if (scale := scale_of(programs)) else "effect"
    ax.set_xlabel(f"{label} of moving it by {obs['move']:+.2g} s.d." if "move" in obs else label)
    said = {"variance_share": "{:.0%} of the variance", "n_perturbations": "{:.1f} perturbations"}
    parts = [text.format(obs[column]) for column, text in said.items() if column in obs]
    ax.set_title("\n".join(filter(None, [literal(name), ", ".join(parts)])), fontsize="medium")
    ax.spines["left"].set_visible(False)
    return ax
