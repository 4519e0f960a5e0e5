"""Which cells a selection or test was computed on, so that it can be audited."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from scvi_sams._exceptions import ScreenError

from ._checks import check_counts
from ._messages import listed
from ._split_column import split_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["CELLS_USED_UNS_KEY", "fingerprint", "record_cells_used", "select_genes"]

CELLS_USED_UNS_KEY = "scvi_sams_cells_used"
"""Where ``adata.uns`` keeps, by name, what is known of the cells that something was made on."""


def select_genes(
    adata: ad.AnnData,
    split_key: str = "split",
    n_top_genes: int = 5_000,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    flavor: Literal["seurat", "cell_ranger", "seurat_v3"] = "seurat",
    key_added: str = "highly_variable",
) -> pd.Series:
    """Select highly variable genes on the training cells of a split alone.

    Which cells were used is recorded, so that :func:`check_leakage` can tell.

    Parameters
    ----------
    adata
        The screen, cells x genes, with counts and a split.
    split_key
        Column of `adata.obs` with the split.
    n_top_genes
        Number of genes. 5,000 for the Norman screen in Bereket and Karaletsos (NeurIPS 2023).
    layer
        Layer of the counts; ``X`` by default.
    batch_key
        Column of `adata.obs`: genes are ranked within each batch, and the ranks combined.
    flavor
        How :func:`scanpy.pp.highly_variable_genes` ranks genes; ``"seurat_v3"`` reads the counts
        and needs scikit-misc, the others log-normalised values, which are made here.
    key_added
        Column of `adata.var` to write, and name of the record.

    Returns
    -------
    The column: whether each gene is selected.

    Raises
    ------
    ScreenError
        If a column or layer is absent, there are fewer genes than wanted, no cell is for
        training, or `adata` is a view.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_cells(adata)
    >>> selected = scvi_sams.data.select_genes(adata, n_top_genes=100)
    >>> adata[:, selected].shape
    (500, 100)
    """
    cells = split_column(adata, split_key) == "train"
    if not cells.any():
        raise ScreenError(f"No cell of obs[{split_key!r}] is for training.")
    if n_top_genes > adata.n_vars:
        raise ScreenError(
            f"n_top_genes={n_top_genes}, but there are {adata.n_vars} genes: ask for fewer."
        )
    if batch_key is not None and batch_key not in adata.obs:
        raise ScreenError(f"There is no column {batch_key!r} in adata.obs.")
    if layer is not None and layer not in adata.layers:
        raise ScreenError(f"There is no layer {layer!r}, only {listed(adata.layers)}.")
    training = adata[cells]
    matrix = training.X if layer is None else training.layers[layer]
    obs = pd.DataFrame(index=training.obs_names)
    if batch_key is not None:
        obs[batch_key] = training.obs[batch_key].astype("category")
    training = ad.AnnData(matrix.copy(), obs=obs, var=pd.DataFrame(index=adata.var_names))
    check_counts(training)
    if flavor != "seurat_v3":
        training.X = training.X.astype(np.float32)
        sc.pp.normalize_total(training, target_sum=1e4)
        sc.pp.log1p(training)
    table = sc.pp.highly_variable_genes(
        training, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
    )
    selected = table["highly_variable"].to_numpy(dtype=bool)
    details = {
        "split_key": split_key,
        "n_top_genes": n_top_genes,
        "flavor": flavor,
        "genes": adata.var_names[selected].to_numpy(dtype=object),
    }
    record_cells_used(adata, key_added, cells, details)
    adata.var[key_added] = selected
    return adata.var[key_added]


def record_cells_used(
    adata: ad.AnnData,
    name: str,
    cells: NDArray[np.bool_] | Sequence[bool] | pd.Series,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Record which cells a gene selection, a test or a fit was computed on.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    name
        What was computed, for example the column of `adata.var` or key of `adata.uns` that it was
        written to: ``"rank_genes_groups"``.
    cells
        One a cell: whether it was used.
    details
        Anything else to keep in the record.

    Notes
    -----
    ``adata.obs["used_for_" + name]`` tells the cells, ``adata.uns["scvi_sams_cells_used"][name]``
    their number and a fingerprint of their names, from which a later change is noticed.

    Raises
    ------
    ScreenError
        If `adata` is a view, or `cells` is not one boolean a cell of which one at least is true.

    Examples
    --------
    >>> import scanpy as sc, scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> cells = scvi_sams.data.split_cells(adata) == "train"
    >>> scvi_sams.data.record_cells_used(adata, "rank_genes_groups", cells)
    >>> int(adata.obs["used_for_rank_genes_groups"].sum())
    64
    """
    if adata.is_view:
        raise ScreenError("A record cannot be written into a view: use adata = adata.copy().")
    used = np.asarray(cells)
    if used.shape != (adata.n_obs,) or used.dtype != bool or not used.any():
        raise ScreenError(
            f"`cells` must be {adata.n_obs} booleans, one a cell, of which one at least is true."
        )
    column = f"used_for_{name}"
    adata.obs[column] = used
    record = {
        "obs_column": column,
        "n_cells": int(used.sum()),
        "fingerprint": fingerprint(adata.obs_names[used]),
        "package_version": version("scvi-sams"),
        **(details or {}),
    }
    adata.uns[CELLS_USED_UNS_KEY] = {**adata.uns.get(CELLS_USED_UNS_KEY, {}), name: record}


def fingerprint(names: Iterable[str]) -> str:
    """Digest of a set of names, whatever their order.

    Examples
    --------
    >>> fingerprint(["a", "b"]) == fingerprint(["b", "a"]) != fingerprint(["ab"])
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(map(str, names)):
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()
