"""The latent space on a plane."""

from __future__ import annotations

__all__ = ["latent_umap"]

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from scvi_sams.pl._figure import (
    CATEGORICAL_COLORS,
    NUMERIC_COLORS,
    OTHER_COLOR,
    axes_or_new,
    open_frame,
    others,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from scvi.model.base import BaseModelClass


def latent_umap(
    source: ad.AnnData | BaseModelClass,
    representation: str | None = None,
    color: str | None = None,
    n_cells: int = 5_000,
    n_neighbors: int = 15,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot a UMAP of latent representations, coloured by a column of ``obs``.

    At most eight categories are told apart by colour, since more cannot be: those whose mean
    stands out most from the mean of all cells, for their number of cells. The others are grey.

    Parameters
    ----------
    source
        A trained model, or an AnnData with a representation in ``obsm``.
    representation
        Of a model, which latent: ``"full"`` (default), ``"basal"`` or ``"perturbation"``. Of an
        AnnData, the key in ``obsm``, by default ``"X_sams"``.
    color
        Column of ``obs``, numeric or of categories. By default the column that the model was
        given as ``perturbation_key``, and none for an AnnData.
    n_cells
        Cells drawn at random, where there are more.
    n_neighbors
        Neighbours a cell in the graph that UMAP lays out.
    seed
        Seed of the draw and of the layout.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes. The embedding is not stored anywhere.

    Raises
    ------
    KeyError
        If the representation or the column is not there.

    Examples
    --------
    >>> import numpy as np, scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=300, n_genes=50)
    >>> ax = scvi_sams.pl.latent_umap(adata, "true_basal", color="replicate")
    """
    if isinstance(source, ad.AnnData):
        obs = source.obs
    else:
        obs = source.adata.obs
        if color is None:
            color = source.adata_manager.registry["setup_args"].get("perturbation_key")
    if color is not None and color not in obs:
        raise KeyError(f"There is no obs[{color!r}], only {', '.join(map(repr, obs))}.")

    drawn = np.random.default_rng(seed).permutation(len(obs))[:n_cells]
    latent = _representation(source, representation, drawn)
    x, y = _umap(latent, n_neighbors, seed).T
    ax = axes_or_new(ax, (6.0, 4.2) if color is not None else (4.4, 4.2))
    size = float(np.clip(15_000 / len(x), 2, 12))
    if color is None:
        ax.scatter(x, y, s=size, c=CATEGORICAL_COLORS[0], linewidths=0, rasterized=True)
    elif pd.api.types.is_numeric_dtype(obs[color]) and not pd.api.types.is_bool_dtype(obs[color]):
        values = obs[color].iloc[drawn].to_numpy(dtype=float, na_value=np.nan)
        # A few extreme cells would take the colours away from all others.
        low, high = np.nanquantile(values, [0.01, 0.99])
        points = ax.scatter(
            x,
            y,
            s=size,
            c=values,
            cmap=NUMERIC_COLORS,
            vmin=low,
            vmax=high,
            linewidths=0,
            rasterized=True,
        )
        ax.figure.colorbar(points, ax=ax, label=color, shrink=0.6, extend="both")
    else:
        _scatter_categories(ax, x, y, latent, obs[color].iloc[drawn], size)
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")
    open_frame(ax)
    return ax


def _representation(
    source: ad.AnnData | BaseModelClass, representation: str | None, drawn: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Latents (cells drawn x latents)."""
    if not isinstance(source, ad.AnnData):
        return np.asarray(
            source.get_latent_representation(
                indices=drawn, representation=representation or "full"
            )
        )
    key = representation or "X_sams"
    if key not in source.obsm:
        known = ", ".join(map(repr, source.obsm)) or "nothing"
        raise KeyError(f"There is no obsm[{key!r}], only {known}.")
    return np.asarray(source.obsm[key])[drawn]


def _umap(latent: NDArray[np.float32], n_neighbors: int, seed: int) -> NDArray[np.float32]:
    """Cells x 2."""
    cells = ad.AnnData(latent.astype(np.float32))
    # Ten neighbours of five cells do not exist.
    n_neighbors = max(2, min(n_neighbors, len(latent) - 1))
    sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="X", random_state=seed)
    # From principal components: the spectral start fails where many cells share one state.
    centred = latent - latent.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    start = centred @ components[:2].T
    start = np.pad(start, ((0, 0), (0, 2 - start.shape[1])))
    start = 10 * start / np.abs(start).max().clip(1e-12)
    sc.tl.umap(cells, init_pos=start.astype(np.float32), random_state=seed)
    return cells.obsm["X_umap"]


def _scatter_categories(
    ax: Axes,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    latent: NDArray[np.float32],
    labels: pd.Series,
    size: float,
) -> None:
    labels = labels.astype("category").cat.remove_unused_categories()
    shown = _standing_out(latent, labels, len(CATEGORICAL_COLORS))
    remaining = ~labels.isin(shown).to_numpy()
    if remaining.any():
        n_others = labels[remaining].nunique()
        ax.scatter(
            x[remaining],
            y[remaining],
            s=size,
            c=OTHER_COLOR,
            linewidths=0,
            rasterized=True,
            label=others(n_others) if n_others else "none",
        )
    counts = labels.value_counts()
    for name, color in zip(shown, CATEGORICAL_COLORS, strict=False):
        cells = (labels == name).to_numpy()
        ax.scatter(
            x[cells],
            y[cells],
            s=1.5 * size,
            c=color,
            linewidths=0,
            rasterized=True,
            label=str(name),
            # Many cells would hide few; all stay below lines and text.
            zorder=1 + 0.9 / (1 + counts[name] / len(x)),
        )
    legend = ax.legend(
        title=labels.name,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        markerscale=(60 / size) ** 0.5,
    )
    legend.set_in_layout(True)


def _standing_out(latent: NDArray[np.float32], labels: pd.Series, limit: int) -> list[str]:
    """Categories whose mean latent differs most from the mean of all cells, in their order."""
    categories = labels.cat.categories
    if len(categories) <= limit:
        return list(categories)
    scaled = pd.DataFrame((latent - latent.mean(axis=0)) / latent.std(axis=0).clip(1e-6))
    groups = scaled.groupby(labels.cat.codes.to_numpy())
    score = np.linalg.norm(groups.mean(), axis=1) * np.sqrt(groups.size())
    strongest = score[score.index >= 0].nlargest(limit).index
    return list(categories[sorted(strongest)])
