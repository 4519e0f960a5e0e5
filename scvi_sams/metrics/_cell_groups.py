"""Cells by condition and batch, averaged all or in part."""

from __future__ import annotations

__all__ = ["CellGroups", "ControlMeans"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import dosage_from_conditions
from scvi_sams.data._cell_conditions import cell_conditions
from scvi_sams.metrics._effects import _log_expression, _obs_column
from scvi_sams.metrics._profiles import dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_ALL = "all"  # the one batch of cells without batches


@dataclass(frozen=True)
class ControlMeans:
    """Mean log expression of controls, and how sure it is, by batch and over all."""

    batches: pd.Index
    mean: NDArray[np.float64]
    """Batches x genes."""
    squared_error: NDArray[np.float64]
    """Batches x genes."""
    overall: NDArray[np.float64]
    """Genes: mean of all control cells."""
    overall_squared_error: NDArray[np.float64]
    """Genes."""
    n_cells: int

    def of(self, batches: pd.Index) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and squared error for the controls of batches, of all where a batch has none."""
        row = self.batches.get_indexer(batches)
        known = (row >= 0)[:, None]
        return (
            np.where(known, self.mean[row], self.overall),
            np.where(known, self.squared_error[row], self.overall_squared_error),
        )


@dataclass(frozen=True)
class CellGroups:
    """Cells of a screen with their conditions and batches, ready to be averaged.

    Every method takes ``weights``, one a cell, with which cells are counted: 0 and 1 for a part of
    the cells, whole numbers for a draw with replacement.
    """

    adata: ad.AnnData
    conditions: pd.Index
    """Names of the conditions, without controls."""
    condition: NDArray[np.int64]
    """Condition of each cell: -1 for controls, -2 for cells of no condition above."""
    batches: pd.Index
    batch: NDArray[np.int64]
    """Batch of each cell."""
    doses: list[dict[str, float]]
    """Perturbations of each condition, with their doses."""
    layer: str | None = None
    library: pd.Series | None = None
    scale: float = 1e4

    @classmethod
    def read(
        cls,
        adata: ad.AnnData,
        perturbation_key: str,
        control: str | Iterable[str] | None,
        batch_key: str | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        combination_delimiter: str | None = "+",
        dosage_key: str | None = None,
    ) -> CellGroups:
        """Read conditions and batches from ``adata.obs``."""
        found = cell_conditions(
            adata, perturbation_key, control, combination_delimiter, dosage_key
        )
        is_condition = np.array([bool(doses) for doses in found.doses])
        code = np.where(is_condition, np.cumsum(is_condition) - 1, -1)
        batch, batches = _batches(adata, batch_key)
        return cls(
            adata,
            pd.Index([found.names[k] for k in np.flatnonzero(is_condition)], dtype=object),
            code[found.codes],
            batches,
            batch,
            [doses for doses in found.doses if doses],
            layer,
            None if size_factor_key is None else _obs_column(adata, size_factor_key),
        )

    @classmethod
    def from_dosage(
        cls,
        adata: ad.AnnData,
        dosage: sp.csr_matrix,
        names: Sequence[str],
        control: str | Sequence[str] | None,
        batch_key: str | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        combination_delimiter: str | None = "+",
    ) -> CellGroups:
        """Take the doses (cells x perturbations) that a model has registered."""
        # Distinct rows, found by their bytes: thousands of conditions among millions of cells.
        bounds = zip(dosage.indptr[:-1], dosage.indptr[1:], strict=True)
        rows = [(dosage.indices[a:b].tobytes(), dosage.data[a:b].tobytes()) for a, b in bounds]
        codes, distinct = pd.factorize(pd.Series(rows, dtype=object))
        _, first = np.unique(codes, return_index=True)
        doses = sp.csr_matrix(dosage[first])
        is_condition = doses.getnnz(axis=1) > 0
        labels = []
        if is_condition.any():
            labels = dosage_from_conditions(
                doses[is_condition],
                names,
                control,
                combination_delimiter,
            ).labels
        order = np.argsort(labels) if labels else np.array([], dtype=np.int64)
        code = np.full(len(distinct), -1)
        code[np.flatnonzero(is_condition)[order]] = np.arange(len(order))
        kept = doses[is_condition][order] if labels else doses[:0]
        batch, batches = _batches(adata, batch_key)
        return cls(
            adata,
            pd.Index([labels[k] for k in order], dtype=object),
            code[codes],
            batches,
            batch,
            [
                {
                    names[column]: float(dose)
                    for column, dose in zip(row.indices, row.data, strict=True)
                }
                for row in kept
            ],
            layer,
            None if size_factor_key is None else _obs_column(adata, size_factor_key),
        )

    @property
    def n_cells(self) -> pd.Series:
        """Cells of each condition."""
        counts = np.bincount(self.condition[self.condition >= 0], minlength=len(self.conditions))
        return pd.Series(counts, index=self.conditions)

    @property
    def has_controls(self) -> bool:
        """Whether any cell is a control."""
        return bool((self.condition == -1).any())

    def restricted(self, conditions: Sequence[str] | pd.Index) -> CellGroups:
        """Keep some conditions, in the order given; cells of others are left out of all means."""
        wanted = pd.Index(conditions, dtype=object)
        new_code = wanted.get_indexer(self.conditions)
        new_code[new_code < 0] = -2
        # Controls index the last entry.
        return replace(
            self,
            conditions=wanted,
            condition=np.append(new_code, [-2, -1])[self.condition],
            doses=[self.doses[row] for row in self.conditions.get_indexer(wanted)],
        )

    def control_means(self, weights: NDArray[np.float64] | None = None) -> ControlMeans:
        """Means of the controls of each batch that has some."""
        own = np.flatnonzero(self.condition == -1)
        weight = np.ones(own.size) if weights is None else weights[own]
        own, weight = own[weight > 0], weight[weight > 0]
        if not own.size:
            raise ScreenError("No cell is a control, so that there is nothing to compare with.")
        present, row = np.unique(self.batch[own], return_inverse=True)
        total, squares = self._sums(own, row, weight, present.size, with_squares=True)
        n_cells = np.bincount(row, weight).astype(np.float64)
        mean, squared_error = _mean_and_squared_error(total, squares, n_cells)
        overall, overall_error = _mean_and_squared_error(
            total.sum(axis=0, keepdims=True),
            squares.sum(axis=0, keepdims=True),
            np.array([n_cells.sum()], dtype=np.float64),
        )
        return ControlMeans(
            self.batches[present],
            mean,
            # One control says nothing of its error; that of all controls together does.
            np.where(np.isnan(squared_error), overall_error * n_cells.sum(), squared_error),
            overall[0],
            overall_error[0],
            int(n_cells.sum()),
        )

    def effects(
        self,
        controls: ControlMeans,
        weights: NDArray[np.float64] | None = None,
        with_errors: bool = True,
    ) -> ad.AnnData:
        """Effects against the controls of the same batch, conditions x genes."""
        own = np.flatnonzero(self.condition >= 0)
        weight = np.ones(own.size) if weights is None else weights[own]
        own, weight = own[weight > 0], weight[weight > 0]
        row, n_conditions = self.condition[own], len(self.conditions)
        share = np.zeros((n_conditions, len(self.batches)))
        np.add.at(share, (row, self.batch[own]), weight)
        n_cells = share.sum(axis=1)
        share /= np.maximum(n_cells, 1)[:, None]
        control_mean, control_error = controls.of(self.batches)

        total, squares = np.zeros((2, n_conditions, self.adata.n_vars))
        if with_errors:  # squares about the controls of a cell's own batch
            for batch in np.unique(self.batch[own]):
                inside = self.batch[own] == batch
                sums, raw_squares = self._sums(
                    own[inside], row[inside], weight[inside], n_conditions, with_squares=True
                )
                centre = control_mean[batch]
                n_inside = np.bincount(row[inside], weight[inside], n_conditions)[:, None]
                total += sums
                squares += raw_squares - 2 * centre * sums + n_inside * centre**2
        else:
            total, _ = self._sums(own, row, weight, n_conditions, with_squares=False)
        with np.errstate(invalid="ignore"):
            effect = total / np.where(n_cells > 0, n_cells, np.nan)[:, None] - share @ control_mean
        layers = {}
        if with_errors:
            _, squared_error = _mean_and_squared_error(effect * n_cells[:, None], squares, n_cells)
            # Taken as independent, which they are but for batches without controls.
            error = np.sqrt(squared_error + share**2 @ control_error)
            layers["standard_error"] = error.astype(np.float32)
        return ad.AnnData(
            effect.astype(np.float32),
            obs=pd.DataFrame({"n_cells": n_cells.astype(np.int64)}, index=self.conditions),
            var=pd.DataFrame(
                {
                    "control_mean": controls.overall,
                    "control_standard_error": np.sqrt(controls.overall_squared_error),
                },
                index=self.adata.var_names,
                dtype=np.float32,
            ),
            layers=layers,
            uns={"n_control_cells": controls.n_cells},
        )

    def _sums(
        self,
        cells: NDArray[np.int64],
        row: NDArray[np.int64],
        weight: NDArray[np.float64],
        n_rows: int,
        with_squares: bool,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of log expression and of its squares over the cells of each row, rows x genes."""
        member = sp.csc_matrix((weight, (row, np.arange(cells.size))), (n_rows, cells.size))
        # Others than the cells asked for are never normalised.
        subset = self.adata if cells.size == self.adata.n_obs else self.adata[cells]
        library = None if self.library is None else self.library.iloc[cells]
        total, squares = np.zeros((2, n_rows, self.adata.n_vars))
        for chunk, expression in _log_expression(subset, self.layer, library, self.scale):
            total += dense(member[:, chunk] @ expression)
            if with_squares:
                squared = expression.power(2) if sp.issparse(expression) else expression**2
                squares += dense(member[:, chunk] @ squared)
        return total, squares


def _batches(adata: ad.AnnData, batch_key: str | None) -> tuple[NDArray[np.int64], pd.Index]:
    """Batch of each cell, and their names."""
    if batch_key is None:
        return np.zeros(adata.n_obs, dtype=np.int64), pd.Index([_ALL])
    column = _obs_column(adata, batch_key)
    if column.isna().any():
        raise ScreenError(
            f"{column.isna().sum()} cells have no batch in obs[{batch_key!r}]: drop them."
        )
    codes, names = pd.factorize(column.astype(str))
    return codes.astype(np.int64), pd.Index(names)


def _mean_and_squared_error(
    total: NDArray[np.float64], squares: NDArray[np.float64], n_cells: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean, and squared standard error of it (NaN for a single cell), rows x genes."""
    n = n_cells[:, None].astype(float)
    mean = total / np.maximum(n, 1)
    deviations = np.maximum(squares - n * mean**2, 0)  # rounding can go below 0
    deviations[deviations <= 1e-12 * squares] = 0  # what is left of equal values is rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(n > 1, deviations / (n - 1), np.nan)
        return mean, variance / n
