"""Observed effects of conditions, by groups of cells that received the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.data.tables import dense, log_expression_chunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "CellGroups",
    "ControlMeans",
    "batch_matched_treatment_effect",
    "observed_average_treatment_effect",
]


def observed_average_treatment_effect(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None = None,
    size_factor_key: str | None = None,
    conditions: Sequence[str] | None = None,
    scale: float = 1e4,
    min_cells: int = 1,
) -> ad.AnnData:
    r"""Mean difference in log expression between the cells of a condition and the controls.

    With :math:`C_c` the cells of condition :math:`c` and :math:`C_0` the control cells,

    .. math::

        \mathrm{ATE}_{cg} = \frac{1}{|C_c|} \sum_{i \in C_c} y_{ig}
            - \frac{1}{|C_0|} \sum_{i \in C_0} y_{ig}, \qquad
        y_{ig} = \log_2 \left( 1 + \mathrm{scale} \cdot x_{ig} / l_i \right).

    Parameters
    ----------
    adata
        Cells x genes, with counts. A matrix that is sparse stays so, and one that is backed by a
        file is read in pieces.
    perturbation_key
        Column of ``adata.obs`` with the condition of each cell. Cells without one are left out.
    control
        Label, or labels, of the control cells.
    layer
        Layer of the counts; ``X`` by default.
    size_factor_key
        Column of ``adata.obs`` with the library size :math:`l_i`, where the genes in ``adata``
        are a panel of those measured. By default the sum of the cell's counts.
    conditions
        Conditions, in the order wanted. By default all but the controls.
    scale
        Counts per cell to which libraries are scaled.
    min_cells
        Conditions with fewer cells are left out.

    Returns
    -------
    AnnData (conditions x genes; log2 units, float32):

    * ``X``: the effects
    * ``layers["standard_error"]``: :math:`\sqrt{s_{cg}^2 / |C_c| + s_{0g}^2 / |C_0|}`, with
      :math:`s^2` the variance over cells; NaN for a single cell
    * ``var["control_mean"]`` and ``var["control_standard_error"]``: mean :math:`y` of the
      controls, and their part of the error, which all conditions share
    * ``obs["n_cells"]`` and ``uns["n_control_cells"]``

    Raises
    ------
    ScreenError
        If a column, layer or label is not there, no cell is a control, a condition asked for by
        name has fewer than ``min_cells`` cells, or a library size is not a positive number.

    Notes
    -----
    The estimand is that of Bereket and Karaletsos (NeurIPS 2023), which they compare between
    model and data by Pearson correlation; see :func:`effect_correlation`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> observed = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> observed["P001"].shape
    (1, 500)
    """
    groups = _condition_groups(adata, perturbation_key, control, conditions, min_cells)
    mean, variance = _group_moments(adata, groups, layer, size_factor_key, scale)
    squared_error = variance / np.maximum(groups.n_cells, 1)[:, None]
    effects = slice(1, len(groups.conditions) + 1)
    return ad.AnnData(
        (mean[effects] - mean[0]).astype(np.float32),
        obs=pd.DataFrame({"n_cells": groups.n_cells[effects]}, index=groups.conditions),
        var=pd.DataFrame(
            {"control_mean": mean[0], "control_standard_error": np.sqrt(squared_error[0])},
            index=adata.var_names,
            dtype=np.float32,
        ),
        layers={
            "standard_error": np.sqrt(squared_error[effects] + squared_error[0]).astype(np.float32)
        },
        uns={"n_control_cells": int(groups.n_cells[0])},
    )


class _ConditionGroups(NamedTuple):
    """Cells by condition: row 0 the controls, row k the k-th condition, last all other labels."""

    conditions: pd.Index
    row: NDArray[np.int64]
    """Row of each cell, -1 for cells without a label."""
    n_cells: NDArray[np.int64]
    """Cells of each row."""


def _condition_groups(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    conditions: Sequence[str] | None,
    min_cells: int,
) -> _ConditionGroups:
    labels = _obs_column(adata, perturbation_key).astype("category")
    controls = [control] if isinstance(control, str) else list(control)
    n_cells = labels.value_counts()
    if not n_cells.reindex(controls, fill_value=0).sum():
        raise ScreenError(
            f"No cell of obs[{perturbation_key!r}] is a control: `control` is "
            f"{', '.join(map(repr, controls))}, the labels begin with "
            f"{', '.join(map(repr, labels.cat.categories[:5]))}."
        )
    min_cells = max(min_cells, 1)  # no cell, no mean
    if conditions is None:
        kept = labels.cat.categories.difference(controls, sort=False)
        kept = kept[n_cells[kept] >= min_cells]
    else:
        kept = pd.Index(conditions)
        if kept.has_duplicates or kept.isin(controls).any():
            raise ScreenError("`conditions` names one twice, or a control: leave that out.")
        n_kept = n_cells.reindex(kept, fill_value=0)
        if (few := n_kept[n_kept < min_cells]).size:
            raise ScreenError(
                f"{few.size} of `conditions` have fewer than {min_cells} cells, the first "
                f"{few.index[0]!r} with {few.iloc[0]}: leave them out or lower `min_cells`."
            )
    row_of = {label: row for row, label in enumerate(kept, start=1)} | dict.fromkeys(controls, 0)
    category_row = [row_of.get(label, kept.size + 1) for label in labels.cat.categories]
    row = np.array([*category_row, -1], dtype=np.int64)[labels.cat.codes]  # code -1: no label
    return _ConditionGroups(
        kept.astype(str), row, np.bincount(row[row >= 0], minlength=kept.size + 2)
    )


def _group_moments(
    adata: ad.AnnData,
    groups: _ConditionGroups,
    layer: str | None,
    size_factor_key: str | None,
    scale: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of log expression over the cells of each row, rows x genes."""
    cells = np.flatnonzero(groups.row >= 0)
    shape = (groups.n_cells.size, adata.n_obs)
    member = sp.csc_matrix((np.ones(cells.size), (groups.row[cells], cells)), shape=shape)
    library = None if size_factor_key is None else _obs_column(adata, size_factor_key)
    total, squares = np.zeros((2, groups.n_cells.size, adata.n_vars))
    for chunk, log_expression in log_expression_chunks(adata, layer, library, scale):
        total += dense(member[:, chunk] @ log_expression)
        squared = log_expression.power(2) if sp.issparse(log_expression) else log_expression**2
        squares += dense(member[:, chunk] @ squared)
    n_cells = groups.n_cells[:, None]
    mean = total / np.maximum(n_cells, 1)
    deviations = np.maximum(squares - n_cells * mean**2, 0)  # rounding can go below 0
    # What is left of equal values is rounding.
    deviations[deviations <= 1e-12 * squares] = 0
    variance = np.where(n_cells > 1, deviations / np.maximum(n_cells - 1, 1), np.nan)
    return mean, variance


def _obs_column(adata: ad.AnnData, key: str) -> pd.Series:
    if key not in adata.obs:
        raise ScreenError(
            f"There is no obs[{key!r}], only {', '.join(map(repr, adata.obs)) or 'no column'}."
        )
    return adata.obs[key]


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
        found = Conditions.from_obs(
            adata, perturbation_key, control, combination_delimiter, dosage_key
        )
        is_condition = ~found.is_control
        code = np.where(is_condition, np.cumsum(is_condition) - 1, -1)
        batch, batches = _batches(adata, batch_key)
        return cls(
            adata,
            pd.Index([found.labels[k] for k in np.flatnonzero(is_condition)], dtype=object),
            code[found.codes],
            batches,
            batch,
            [doses for doses in found.parts if doses],
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
            labels = Conditions.from_request(
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
        for chunk, expression in log_expression_chunks(subset, self.layer, library, self.scale):
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


def batch_matched_treatment_effect(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    min_cells: int = 1,
) -> ad.AnnData:
    r"""Mean difference in log expression between the cells of a condition and their controls.

    Every cell is compared with the mean :math:`\bar y_{0b}` of the controls of its own batch
    :math:`b(i)`, so that what differs between batches is not taken for an effect:

    .. math::

        \Delta_{cg} = \frac{1}{|C_c|} \sum_{i \in C_c} (y_{ig} - \bar y_{0 b(i) g})
            = \sum_b w_{cb} (\bar y_{cbg} - \bar y_{0bg}),
        \qquad y_{ig} = \log_2 (1 + 10^4 x_{ig} / l_i),

    where :math:`w_{cb}` is the share of the cells of the condition that are in batch :math:`b`.
    The cells of a batch without controls are compared with the controls of all batches.

    Parameters
    ----------
    adata
        Cells x genes, with counts.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``. Labels that mean the same (``"A+B"``, ``"B+A"``) are one
        condition.
    batch_key
        Column of ``adata.obs`` with the batches. Without it, this is
        :func:`observed_average_treatment_effect`.
    layer, size_factor_key
        As for :func:`observed_average_treatment_effect`.
    min_cells
        Conditions with fewer cells are left out.

    Returns
    -------
    AnnData laid out as by :func:`observed_average_treatment_effect`: effects in ``X``,
    ``layers["standard_error"]``, ``var["control_mean"]`` and ``var["control_standard_error"]``
    (mean of all controls), ``obs["n_cells"]`` and ``uns["n_control_cells"]``. Parts of a
    combination are in alphabetical order.

    Raises
    ------
    ScreenError
        If a column, layer or label is not there, or a library size is not a positive number.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.batch_matched_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control", batch_key="replicate"
    ... )
    >>> effect["P001"].shape
    (1, 500)
    """
    cells = CellGroups.read(
        adata,
        perturbation_key,
        control,
        batch_key,
        layer,
        size_factor_key,
        combination_delimiter,
    )
    kept = cells.n_cells[cells.n_cells >= max(min_cells, 1)].index
    return cells.restricted(kept).effects(cells.control_means())
