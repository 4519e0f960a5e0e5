"""Checks of an AnnData before a model is set up on it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
from anndata.abc import CSCDataset
from scipy import sparse

from scvi_sams._exceptions import ScreenError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

    from scvi_sams.data.conditions import Conditions

__all__ = [
    "check_conditions",
    "check_confounding",
    "check_counts",
    "check_features",
    "check_size_factor",
]


# Labels of cells that tools for demultiplexing could not assign.
_LEFTOVERS = frozenset({"unassigned", "multiplet", "doublet", "negative", "ambiguous"})
# Entries of a dense block: 64 MiB of float32, whatever the numbers of cells and genes.
_BLOCK_ENTRIES = 2**24


def check_counts(adata: AnnData, layer: str | None = None) -> None:
    """Check that the matrix to be modelled holds counts, and that every cell has some.

    Every entry is read, in blocks, so that a backed AnnData stays on disk.
    """
    matrix, source = _matrix(adata, layer)
    totals = np.zeros(adata.n_obs)
    for cells, genes, block in _blocks(matrix):
        values = block.data if sparse.issparse(block) else block
        if not _are_counts(values):
            row, column, value = _first_fault(block)
            raise ScreenError(
                f"{source} must hold raw counts (whole numbers, 0 or more), but gene "
                f"{adata.var_names[genes][column]!r} of cell {adata.obs_names[cells][row]!r} has "
                f"{value:g}. Pass the layer of the counts. {_other_layers(adata)}"
            )
        totals[cells] += np.asarray(block.sum(axis=1)).ravel()
    empty = np.flatnonzero(totals == 0)
    if empty.size:
        raise ScreenError(
            f"Cells without counts in {source} ({empty.size}): {listed(adata.obs_names[empty])}. "
            "Drop them, as with `sc.pp.filter_cells(adata, min_counts=1)`."
        )


def check_features(adata: AnnData, layer: str | None = None) -> None:
    """Check that the matrix to be modelled holds finite numbers."""
    matrix, source = _matrix(adata, layer)
    for cells, genes, block in _blocks(matrix):
        values = block.toarray() if sparse.issparse(block) else np.asarray(block)
        faulty = np.argwhere(~np.isfinite(values))
        if len(faulty):
            row, column = faulty[0]
            raise ScreenError(
                f"{source} must hold finite numbers, but feature "
                f"{adata.var_names[genes][column]!r} of cell {adata.obs_names[cells][row]!r} has "
                f"{values[row, column]}. Fill in or drop what is missing."
            )


def check_size_factor(adata: AnnData, key: str) -> None:
    """Check that a column of size factors is there, and is positive in every cell."""
    if key not in adata.obs:
        raise ScreenError(
            f"adata.obs has no column {key!r} for the size factors; it holds "
            f"{listed(adata.obs.columns, limit=10)}."
        )
    column = adata.obs[key]
    if not pd.api.types.is_numeric_dtype(column):
        raise ScreenError(
            f"adata.obs[{key!r}] must be numeric to serve as size factors, not {column.dtype}. "
            f"Convert it: `adata.obs[{key!r}] = pd.to_numeric(adata.obs[{key!r}])`."
        )
    factors = column.to_numpy(dtype=np.float64, na_value=np.nan)
    faulty = np.flatnonzero(~((factors > 0) & (factors < np.inf)))
    if faulty.size:
        raise ScreenError(
            f"Size factors must be positive and finite, but adata.obs[{key!r}] holds "
            f"{listed(np.unique(factors[faulty]))} in cells {listed(adata.obs_names[faulty])}. "
            "Correct them or drop the cells."
        )


def check_conditions(
    conditions: Conditions, is_labelled: bool = True, has_doses: bool = False
) -> None:
    """Check what the cells of a screen received before a model is fitted to them."""
    names = np.asarray(conditions.perturbations)
    if conditions.is_control.all():
        raise ScreenError(
            f"Every cell is a control: all doses of {listed(names)} are 0. Nothing can be learned "
            "of perturbations."
        )
    if not conditions.is_control.any():
        remedy = (
            "If a label marks control cells, pass it as `control`."
            if is_labelled and not conditions.controls
            else "Effects are then told only from one another."
        )
        _warn(f"No cell is a control: every one has some dose. {remedy}")
    rare = names[conditions.n_cells @ (conditions.matrix > 0) < 2]
    if rare.size:
        _warn(
            f"Perturbations with fewer than two cells ({rare.size}): {listed(rare)}. What is "
            "learned of them is little more than the prior; consider dropping their cells."
        )
    separator = ""
    if is_labelled and conditions.delimiter:
        separator = (
            f" If {conditions.delimiter!r} is part of names, set combination_delimiter=None."
        )
    together = _never_apart(conditions)
    if together:
        _warn(
            f"Perturbations that no cell has apart from each other ({len(together)} groups): "
            f"{listed(' and '.join(group) for group in together)}. Their effects cannot be told "
            f"from each other; take them as one.{separator}"
        )
    if not is_labelled:
        return
    joined = [name for parts in conditions.parts if len(parts) > 1 for name in parts]
    if cut := sorted({name for name in joined if _looks_cut(name)}):
        _warn(f"Parts of labels that look like halves of a name: {listed(cut)}.{separator}")
    repeated = np.flatnonzero(conditions.dose.max(axis=1) > 1)
    if repeated.size and not has_doses:
        _warn(
            f"Labels that repeat a part ({conditions.n_cells[repeated].sum()} cells): a dose of "
            "as many was understood, as in "
            f"{listed(conditions.labels[code] for code in repeated)}. If one is meant, write it "
            "once."
        )
    if leftovers := [name for name in names if name.casefold() in _LEFTOVERS]:
        _warn(
            f"Taken for perturbations: {listed(leftovers)}. If these cells have no guide that is "
            "sure, drop them; if they are controls, pass the label as `control`."
        )


def _never_apart(conditions: Conditions) -> list[list[str]]:
    """Groups of perturbations that are in the same conditions, at doses of one ratio."""
    matrix = conditions.matrix.tocsc()
    groups: dict[tuple[bytes, bytes], list[str]] = {}
    for column, name in enumerate(conditions.perturbations):
        entries = slice(matrix.indptr[column], matrix.indptr[column + 1])
        doses = matrix.data[entries]
        if len(doses):
            key = matrix.indices[entries].tobytes(), (doses / doses[0]).tobytes()
            groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _looks_cut(name: str) -> bool:
    unbalanced = any(name.count(left) != name.count(right) for left, right in ("()", "[]", "{}"))
    return unbalanced or name[0] in "-_" or name[-1] in "-_"


def check_confounding(
    adata: AnnData, conditions: Conditions, batch_key: str | None, *, min_cells: int = 10
) -> None:
    """Warn of perturbations whose cells are all in one batch.

    Their effects are told from the batch's only by the control cells of that batch; where it has
    none, not at all. Perturbations of few cells are passed over: these often share a batch by
    chance, 10 cells in two equal batches in 0.2 % of cases.
    """
    if batch_key is None:
        return
    batch, batches = pd.factorize(adata.obs[batch_key])
    if len(batches) < 2:
        return
    known = batch >= 0
    of_condition = np.zeros((len(batches), len(conditions.labels)), dtype=np.int64)
    np.add.at(of_condition, (batch[known], conditions.codes[known]), 1)
    n_cells = of_condition @ (conditions.matrix > 0)  # batches x perturbations, of any dose
    confounded = (n_cells.sum(axis=0) >= min_cells) & ((n_cells > 0).sum(axis=0) == 1)
    if not confounded.any():
        return
    n_controls = of_condition[:, conditions.is_control].sum(axis=1)
    alone = confounded & (n_controls[n_cells.argmax(axis=0)] == 0)
    names = np.asarray(conditions.perturbations)
    message = (
        f"Perturbations with all their cells in one batch of adata.obs[{batch_key!r}] "
        f"({confounded.sum()}): {listed(names[confounded])}. Their effects are told from the "
        "batch's only by its control cells."
    )
    if alone.any():
        message += (
            f" The batch of {listed(names[alone])} has no control cell: these effects cannot be "
            "told from the batch's. Leave out the batch key, or read them with care."
        )
    _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)


def _blocks(matrix: Any) -> Iterator[tuple[slice, slice, Any]]:
    """Cut a matrix, in memory or on disk, along the axis in which it is stored."""
    n_cells, n_genes = matrix.shape
    by_gene = isinstance(matrix, CSCDataset) or getattr(matrix, "format", None) == "csc"
    length, width = (n_genes, n_cells) if by_gene else (n_cells, n_genes)
    step = max(1, _BLOCK_ENTRIES // max(1, width))
    for start in range(0, length, step):
        along = slice(start, min(start + step, length))
        cells, genes = (slice(0, n_cells), along) if by_gene else (along, slice(0, n_genes))
        yield cells, genes, matrix[cells, genes]


def _are_counts(values: NDArray[Any]) -> bool:
    if values.size == 0 or values.dtype.kind in "bu":
        return True
    # NaN fails both comparisons.
    in_range = values.min() >= 0 and values.max() < np.inf
    return bool(in_range and (values.dtype.kind == "i" or (np.rint(values) == values).all()))


def _first_fault(block: Any) -> tuple[int, int, float]:
    """Find row, column and value of the first entry, in storage order, that is no count."""
    entries = sparse.coo_array(block)
    values = entries.data
    index = np.argmin((values >= 0) & (values < np.inf) & (np.rint(values) == values))
    return int(entries.row[index]), int(entries.col[index]), float(values[index])


def _other_layers(adata: AnnData) -> str:
    if adata.layers:
        return f"adata.layers holds {listed(adata.layers)}."
    if adata.raw is not None:
        return "adata.layers is empty, but adata.raw may hold them."
    return "adata.layers is empty: reload the counts from the original file."


def _matrix(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    """The matrix to be modelled, and what to call it."""
    if layer is not None and layer not in adata.layers:
        raise ScreenError(
            f"adata.layers has no {layer!r}; it holds {listed(adata.layers) or 'nothing'}."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ScreenError(f"There is no adata.X: pass the layer to model. {_other_layers(adata)}")
    return matrix, "adata.X" if layer is None else f"adata.layers[{layer!r}]"
