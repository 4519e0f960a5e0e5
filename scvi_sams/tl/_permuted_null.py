"""Guides that are dealt out anew, to learn how often nothing is called where no cell is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import as_labels, obs_column
from scvi_sams.data.guides import TARGET, GuideSource
from scvi_sams.tl._control_null import PERMUTED_PREFIX, null_perturbations

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

    from scvi_sams.data.guides import GuideTargets


_MOST = 100  # null perturbations by default: their calls are then known to a hundredth


def add_permuted_null(
    adata: AnnData,
    guide_key: str = "guides",
    *,
    guide_targets: GuideTargets | None = None,
    guide_threshold: float | None = None,
    names_uns_key: str | None = None,
    control: str | Iterable[str] | None = None,
    batch_key: str | None = None,
    combination_delimiter: str | None = "+",
    n_null: int | None = None,
    key_added: str = "guides_with_null",
    seed: int = 0,
) -> pd.DataFrame:
    """Give cells further guides that do nothing, for screens where no cell is free of guides.

    A null perturbation is a real one whose cells are dealt out anew: in each batch as many cells
    have it, drawn with a chance in proportion to the number of guides that a cell has (deep cells
    show more guides; a guide that does nothing is in them as often). Cells keep their own guides,
    and no control is needed; where there are controls, :func:`add_control_null` is the stricter
    null. What is called among the null perturbations is false, and calibrates calls among the
    others (:func:`mechanisms`, :func:`active_perturbations`).

    Parameters
    ----------
    adata
        The screen. ``obsm`` and ``uns`` get an entry each.
    guide_key, guide_targets, guide_threshold, control, combination_delimiter
        As in ``setup_anndata``.
    names_uns_key
        ``perturbation_names_uns_key`` of ``setup_anndata``: names of the guides of a matrix that
        has none.
    batch_key
        Column of ``obs`` with batches.
    n_null
        Number of null perturbations. By default as many as there are perturbations, at most 100.
        They raise the number of guides of a cell, and so what a step costs.
    key_added
        Key of ``obsm`` and ``uns`` with the guides and these, for
        ``setup_anndata(guide_key=...)``.
    seed
        Seed of the draw.

    Returns
    -------
    pandas.DataFrame
        A row a null perturbation: ``n_cells``, and ``like``, the perturbation whose numbers of
        cells it has. Names begin with ``"permuted_null_"``.

    Raises
    ------
    ScreenError
        If guides or batches cannot be read, null perturbations were added before, or ``n_null`` is
        below 1.

    Examples
    --------
    >>> import anndata, scvi_sams
    >>> calls = pd.DataFrame(np.eye(3).repeat(20, 0), columns=["A_1", "A_2", "B_1"])
    >>> adata = anndata.AnnData(np.ones((60, 5), np.float32), obsm={"guides": calls.to_numpy()})
    >>> adata.uns["guides"] = pd.DataFrame({"target": ["A", "A", "B"]}, index=calls.columns)
    >>> scvi_sams.tl.add_permuted_null(adata)["n_cells"].tolist()
    [20, 40]
    >>> adata.obsm["guides_with_null"].shape
    (60, 5)
    """
    n_null, seed = checked("n_null", n_null), checked("seed", seed)
    controls = as_labels(control)
    source = GuideSource(
        guide_key, guide_targets, guide_threshold, names_uns_key, controls, combination_delimiter
    )
    calls = source.read(adata)
    conditions = calls.conditions(controls, combination_delimiter)
    if already := null_perturbations(conditions.perturbations):
        raise ScreenError(
            f"{guide_key!r} holds {already[0]!r} already: give the key of the original guides."
        )
    batch = np.zeros(adata.n_obs, dtype=np.int64)
    if batch_key is not None:
        batch = pd.factorize(obs_column(adata, batch_key), use_na_sentinel=False)[0]
    received = conditions.cell_matrix.tocsc()
    n_guides = np.asarray(calls.matrix.sum(axis=1), dtype=float).ravel()
    rng = np.random.default_rng(seed)
    # Chances of a draw without replacement: the least of exponential times of these rates.
    rate = np.maximum(n_guides, np.finfo(float).tiny)

    sizes = received.getnnz(axis=0)
    n_null = min(len(sizes), _MOST) if n_null is None else n_null
    levels = (np.arange(n_null) + 0.5) / n_null * len(sizes)
    like = np.argsort(sizes, kind="stable")[levels.astype(int)]
    columns = []
    for perturbation in like:
        own = received.indices[received.indptr[perturbation] : received.indptr[perturbation + 1]]
        wanted = np.bincount(batch[own], minlength=batch.max() + 1)
        time = rng.exponential(size=len(batch)) / rate
        order = np.lexsort((time, batch))
        place = np.arange(len(batch)) - np.searchsorted(batch[order], batch[order])
        columns.append(order[place < wanted[batch[order]]])
    width = max(3, len(str(n_null)))
    names = [f"{PERMUTED_PREFIX}{number:0{width}d}" for number in range(1, n_null + 1)]
    table = pd.DataFrame(
        {
            "n_cells": [len(cells) for cells in columns],
            "like": np.asarray(conditions.perturbations, dtype=object)[like],
        },
        index=pd.Index(names, name="perturbation"),
    )
    starts = np.concatenate([[0], np.cumsum(table["n_cells"])])
    entries = (np.ones(starts[-1], np.int8), np.concatenate(columns), starts)
    null = sparse.csc_matrix(entries, shape=(adata.n_obs, n_null))
    delimiter = combination_delimiter or "+"
    targets = [delimiter.join(own) or (controls or ["control"])[0] for own in calls.targets]
    adata.obsm[key_added] = sparse.hstack([calls.matrix, null]).tocsr()
    adata.uns[key_added] = pd.DataFrame({TARGET: [*targets, *names]}, index=[*calls.names, *names])
    return table
