"""What a person sees of a fit: figures, and a table in the terminal."""

from __future__ import annotations

__all__ = ["CONDITION", "CONTROL", "print_report", "write_figures", "write_scorecard"]

import sys
from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scvi_sams import pl

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

    import scvi_sams
    from scvi_sams.evaluation import Scorecard

CONDITION = "condition"
"""Column of the latent's ``obs`` with what each cell received."""
CONTROL = "control"
"""Its label of cells that received nothing."""

_SHOWN_PERTURBATIONS = 20
_SHOWN_CONDITIONS = 5
_SHOWN_GENES = 3
_DRAWN_CELLS = 5_000
_LEAST_COLORED = 3  # cells of a condition in the UMAP
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F4F24", "#000000")
_DRAWN_MEASURES = ("pearson", "pearson_perturbed", "relative_squared_error")


def write_figures(
    folder: Path,
    model: scvi_sams.SAMSVAE,
    latent: ad.AnnData,
    ate: ad.AnnData,
    measured: dict[str, ad.AnnData | None],
) -> None:
    """Write the figures as PNG.

    Effects are held against those in held-out cells, or in training cells where none were held
    out; without controls there is no such figure.
    """
    plt.switch_backend("agg")  # a batch machine has no display
    strength = np.sqrt((model.get_perturbation_effect() ** 2).sum(axis=1))
    _save(pl.training_history(model.history), folder / "training.png")
    _save(_latent_umap(latent, strength), folder / "latent_umap.png")
    _save(pl.mask_heatmap(model.get_perturbation_mask()), folder / "masks.png")
    for cells in ("held out", "training"):
        if (observed := measured[cells]) is not None:
            ax = pl.model_vs_observed_effects(ate, observed)
            ax.set_xlabel(f"effect in {cells} cells (log2 expression)")
            _save(ax, folder / "effects.png")
            break


def _latent_umap(latent: ad.AnnData, strength: pd.Series) -> Axes:
    """UMAP of the latent, the strongest perturbations in colour and the controls in grey."""
    drawn = np.random.default_rng(0).permutation(latent.n_obs)[:_DRAWN_CELLS]
    cells = ad.AnnData(np.asarray(latent.X)[drawn], obs=latent.obs[[CONDITION]].iloc[drawn])
    sc.pp.neighbors(cells, n_neighbors=max(2, min(15, cells.n_obs - 1)), use_rep="X")
    # From principal components: the spectral start fails where many cells share one state.
    centred = cells.X - cells.X.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    start = np.pad(centred @ components[:2].T, ((0, 0), (0, max(0, 2 - len(components)))))
    cells.obsm["X_start"] = (10 * start / np.abs(start).max().clip(1e-12)).astype(np.float32)
    sc.tl.umap(cells, init_pos="X_start")
    counts = cells.obs[CONDITION].value_counts()
    alone = strength[strength.index.isin(counts.index[counts >= _LEAST_COLORED])]
    colors = {CONTROL: "#909090"} | dict(zip(alone.nlargest(8).index, _COLORS, strict=False))
    shown = cells.obs[CONDITION].cat.set_categories(list(colors))
    cells.obs[CONDITION] = shown.cat.remove_unused_categories()
    # Those without a colour lie below the others.
    cells = cells[np.argsort(shown.notna(), kind="stable")]
    ax = plt.figure(figsize=(6.0, 4.2), layout="constrained").subplots()
    sc.pl.umap(
        cells,
        color=CONDITION,
        palette=colors,
        na_color="#E4E4E4",
        na_in_legend=False,
        size=60_000 / cells.n_obs,
        sort_order=False,
        title="strongest perturbations",
        ax=ax,
        show=False,
    )
    return ax


def write_scorecard(folder: Path, card: Scorecard) -> None:
    """Write the tables of a scorecard, and its figure as PNG."""
    plt.switch_backend("agg")  # a batch machine has no display
    card.to_csv(folder)
    figure, axes = plt.subplots(1, len(_DRAWN_MEASURES), figsize=(13, 4), layout="constrained")
    for ax, measure in zip(axes, _DRAWN_MEASURES, strict=True):
        pl.scorecard(card, measure, ax=ax)
    figure.savefig(folder / "scorecard.png", dpi=150)
    plt.close(figure)


def _save(ax: Axes, path: Path) -> None:
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_report(
    model: scvi_sams.SAMSVAE, ate: ad.AnnData, summary: dict[str, Any], output: Path
) -> None:
    """Print what the strongest perturbations do, and the figures of the summary."""
    # A log has no width of its own; the default of 80 columns would break the lines of genes.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print()
    console.print(_perturbation_table(model, ate))
    n_hidden = len(model.perturbation_names) - _SHOWN_PERTURBATIONS
    if n_hidden > 0:
        console.print(f"  ... and {n_hidden:,} weaker ones, in {output / 'effects.csv'}")
    console.print("  latents: how many it moves; strength: how far, in s.d. of the basal state")
    console.print()
    console.print(_summary_table(summary))
    if summary["scorecard_verdict"]:
        names = ", ".join(summary["held_out_conditions"][:_SHOWN_CONDITIONS])
        more = len(summary["held_out_conditions"]) - _SHOWN_CONDITIONS
        console.print(
            f"\nHeld-out conditions: {names}" + (f" and {more:,} more" if more > 0 else "")
        )
        for sentence in summary["scorecard_verdict"]:
            console.print(f"  {sentence}", markup=False)
    console.print(f"\nResults are in {output}", soft_wrap=True)


def _perturbation_table(model: scvi_sams.SAMSVAE, ate: ad.AnnData) -> Table:
    mask, effect = model.get_perturbation_mask(), model.get_perturbation_effect()
    n_active = (mask > 0.5).sum(axis=1)
    strength = np.sqrt((effect**2).sum(axis=1))
    table = Table(title="What the perturbations do", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("perturbation")
    table.add_column("latents", justify="right")
    table.add_column("strength", justify="right")
    table.add_column("top genes, log2 change")
    for name in strength.nlargest(_SHOWN_PERTURBATIONS).index:
        genes = _top_genes(ate, name) if name in ate.obs_names else "only in combinations"
        table.add_row(name, str(n_active[name]), f"{strength[name]:.2f}", genes)
    return table


def _top_genes(ate: ad.AnnData, condition: str) -> str:
    effect = ate[condition].to_df().iloc[0]
    top = effect[effect.abs().nlargest(_SHOWN_GENES).index]
    return ", ".join(f"{gene} {change:+.2f}" for gene, change in top.items())


def _summary_table(summary: dict[str, Any]) -> Table:
    def number(value: float | None, digits: str) -> str:
        return "none held out" if value is None else format(value, digits)

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, text in (
        (
            "active",
            f"{summary['n_active_perturbations']:,} of {summary['n_perturbations']:,} "
            f"perturbations, {summary['n_active_latents']:,} latents",
        ),
        ("held-out IWELBO", f"{number(summary['held_out_iwelbo'], ',.2f')} nats a cell"),
        (
            "held-out effect correlation",
            f"{number(summary['held_out_ate_correlation'], '.3f')} (means of training cells: "
            f"{number(summary['held_out_ate_correlation_of_training_means'], '.3f')})",
        ),
        ("time", f"{summary['seconds']:,.0f} s, {summary['training_seconds']:,.0f} s of training"),
        ("peak memory", f"{number(summary['peak_memory_mb'], ',.0f')} MB"),
    ):
        table.add_row(label, text)
    return table
