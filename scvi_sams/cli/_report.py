"""What a person sees of a fit: figures, tables for a spreadsheet, and a report in the terminal."""

from __future__ import annotations

import csv
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc

from scvi_sams import pl
from scvi_sams._exceptions import counted, printable
from scvi_sams.cli._screen import CONDITION, CONTROL
from scvi_sams.pl._figure import CATEGORICAL_COLORS, literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

    from scvi_sams.evaluation import Scorecard

_SHOWN_PERTURBATIONS, _SHOWN_CONDITIONS, _SHOWN_GENES = 20, 5, 3
_LOG_WIDTH = 100  # columns, where there is no terminal that has its own
_DRAWN_MEASURES = ("pearson", "pearson_perturbed", "relative_squared_error")
_DRAWN_CELLS = 5_000
_LEAST_COLORED = 3  # cells of a condition; fewer are no group in the UMAP
_CONTROL_COLOR, _OTHER_COLOR = "#909090", "#E4E4E4"


def write_figures(
    folder: Path,
    history: Mapping[str, pd.DataFrame],
    mask: pd.DataFrame,
    effect: pd.DataFrame,
    latent: ad.AnnData,
    ate: ad.AnnData,
    measured: dict[str, ad.AnnData | None],
) -> None:
    """Write the figures as PNG.

    Effects are held against those in held-out cells, or in training cells where none were held
    out; without controls there is no such figure.
    """
    plt.switch_backend("agg")  # a batch machine has no display
    _save(pl.training_history(history), folder / "training.png")
    _save(_latent_umap(latent, np.sqrt((effect**2).sum(axis=1))), folder / "latent_umap.png")
    if (folder / "masks.csv").exists():
        _save(pl.mask_heatmap(mask), folder / "masks.png")
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
    strongest = alone.nlargest(len(CATEGORICAL_COLORS)).index
    colors = {CONTROL: _CONTROL_COLOR} | dict(zip(strongest, CATEGORICAL_COLORS, strict=False))
    shown = cells.obs[CONDITION].cat.set_categories(list(colors)).cat.remove_unused_categories()
    cells.obs[CONDITION] = shown.cat.rename_categories(literal)
    # Those without a colour lie below the others.
    cells = cells[np.argsort(shown.notna(), kind="stable")].copy()
    ax = plt.figure(figsize=(6.0, 4.2), layout="constrained").subplots()
    sc.pl.umap(
        cells,
        color=CONDITION if shown.notna().any() else None,
        palette={literal(name): color for name, color in colors.items()},
        na_color=_OTHER_COLOR,
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
    _save(axes[0], folder / "scorecard.png")


def _save(ax: Axes, path: Path) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150)
    plt.close(figure)


def guard_tables(folder: Path) -> None:
    """Put an apostrophe before text of CSV files that a spreadsheet would take for a formula."""
    for path in folder.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        guarded = [[_guarded(cell) for cell in row] for row in rows]
        if guarded != rows:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(guarded)


def _guarded(cell: str) -> str:
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def print_report(
    mask: pd.DataFrame,
    effect: pd.DataFrame,
    ate: ad.AnnData,
    summary: dict[str, Any],
    output: Path,
) -> None:
    """Print what the strongest perturbations do, and the figures of the summary."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_WIDTH
    lines = ["", "What the perturbations do", ""]
    n_active = (mask > 0.5).sum(axis=1)
    strength = np.sqrt((effect**2).sum(axis=1))
    rows = [["perturbation", "latents", "strength", "top genes, log2 change"]]
    for name in strength.nlargest(_SHOWN_PERTURBATIONS).index:
        genes = _top_genes(ate, name) if name in ate.obs_names else "only in combinations"
        rows.append([name, f"{n_active[name]:,}", f"{strength[name]:.2f}", genes])
    lines += _aligned(rows)
    if (n_hidden := len(strength) - _SHOWN_PERTURBATIONS) > 0:
        lines.append(f"  ... and {n_hidden:,} weaker, in {output / 'effects.csv'}")
    lines += ["  latents: how many it moves; strength: how far, in s.d. of the basal state", ""]
    lines += [f"{label:27}  {text}" for label, text in _figures(summary).items()]
    if summary["scorecard_verdict"]:
        names = ", ".join(summary["held_out_conditions"][:_SHOWN_CONDITIONS])
        more = len(summary["held_out_conditions"]) - _SHOWN_CONDITIONS
        lines += ["", f"Held-out conditions: {names}" + (f" and {more:,} more" * (more > 0))]
        for sentence in summary["scorecard_verdict"]:
            wrapped = textwrap.fill(sentence, max(width, 40) - 2, break_on_hyphens=False)
            lines += textwrap.indent(wrapped, "  ").splitlines()
    lines += ["", f"Results are in {output}"]
    for line in lines:
        print(printable(line))


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table with a head; the two columns of numbers stand at the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {name:{widths[0]}}   {latents:>{widths[1]}}   {size:>{widths[2]}}   {genes}"
        for name, latents, size, genes in rows
    ]
    return [lines[0], "  " + "-" * (sum(widths) + 9), *lines[1:]]


def _top_genes(ate: ad.AnnData, condition: str) -> str:
    effect = ate[condition].to_df().iloc[0]
    top = effect[effect.abs().nlargest(_SHOWN_GENES).index]
    return ", ".join(f"{gene} {change:+.2f}" for gene, change in top.items())


def _figures(summary: dict[str, Any]) -> dict[str, str]:
    """What the summary says in numbers, by labels."""

    def number(name: str, digits: str) -> str:
        return "none held out" if summary[name] is None else format(summary[name], digits)

    score = "held_out_ate_correlation"
    of_means = number(f"{score}_of_training_means", ".3f")
    seconds, of_training = summary["seconds"], summary["training_seconds"]
    return {
        "active": f"{summary['n_active_perturbations']:,} of "
        f"{counted(summary['n_perturbations'], 'perturbation')}, "
        f"{counted(summary['n_active_latents'], 'latent')}",
        "held-out IWELBO": f"{number('held_out_iwelbo', ',.2f')} nats a cell",
        "held-out effect correlation": f"{number(score, '.3f')} "
        f"(means of training cells: {of_means})",
        "time": f"{seconds:,.0f} s, {of_training:,.0f} s of training",
        "peak memory": f"{summary['peak_memory_mb'] or float('nan'):,.0f} MB",
    }
