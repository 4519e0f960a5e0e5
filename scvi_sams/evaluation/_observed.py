"""Cells that received the same: means of their expression, and effects against the controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import Conditions, obs_column
from scvi_sams.data.tables import CELLS_PER_CHUNK, dense, log_expression_chunks, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray


CONTROL, LEFT_OUT = -1, -2
"""Conditions of cells that have none of those that are averaged."""


def observed_effects(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    *,
    conditions: Sequence[str] | None = None,
    min_cells: int = 1,
    scale: float = 1e4,
    resample: Literal["first half", "second half", "bootstrap"] | None = None,
    seed: int = 0,
) -> ad.AnnData:
    r"""Mean difference in log expression between the cells of a condition and the controls.

    Every cell :math:`i` of a condition :math:`C_c` is compared with the mean :math:`\bar y_{0b}`
    of the controls of its own batch :math:`b(i)`, so that what differs between batches is not
    taken for an effect:

    .. math::

        \Delta_{cg} = \frac{1}{|C_c|} \sum_{i \in C_c} (y_{ig} - \bar y_{0 b(i) g}), \qquad
        y_{ig} = \log_2 \left( 1 + \mathrm{scale} \cdot x_{ig} / l_i \right).

    The cells of a batch without controls are compared with the controls of all batches.

    Parameters
    ----------
    adata
        Cells x genes, with counts: sparse, dense, or backed by a file, which is read in pieces.
        Cells without a label are left out.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    batch_key
        Column of ``adata.obs`` with the batches; by default all cells are of one.
    layer
        Layer of the counts; ``X`` by default.
    size_factor_key
        Column of ``adata.obs`` with the library size :math:`l_i`, where the genes in ``adata``
        are a panel of those measured. By default the sum of the cell's counts.
    conditions
        Conditions, in the order and spelling wanted. By default all but the controls, by label.
    min_cells
        Conditions with fewer cells are left out.
    scale
        Counts per cell to which libraries are scaled.
    resample
        A ceiling for predictions, in the place of all cells: a random half of the cells of every
        condition and of the controls, within batches (the first has the odd cell; conditions of
        one cell are left out), or a draw with replacement from each condition and batch.
    seed
        Seed of ``resample``. Both halves of one seed share no cell.

    Returns
    -------
    anndata.AnnData
        Conditions x genes, in log2 units, float32:

        * ``X``: the effects
        * ``layers["standard_error"]``: of the effects, the controls' part included; NaN for a
          single cell
        * ``var["control_mean"]`` and ``var["control_standard_error"]``: mean :math:`y` of all
          controls, and its standard error
        * ``obs["n_cells"]`` and ``uns["n_control_cells"]``

    Raises
    ------
    ScreenError
        If a column, layer or label is not there, no cell is a control, a cell has no batch or a
        library size that is not positive, or a condition that is named has too few cells.
    ValueError
        If ``resample`` is unknown.

    Notes
    -----
    The estimand of Bereket and Karaletsos (NeurIPS 2023). Halves of :math:`n` cells of variance
    :math:`\sigma^2` differ by :math:`4 \sigma^2 / n` on average (the "technical duplicate" of
    Mejia et al., arXiv 2506.22641), which a good model can pass. A bootstrap mean (Efron) differs
    from the observed one by :math:`\sigma^2 / n`, as that does from the truth.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000)
    >>> observed = scvi_sams.evaluation.observed_effects(
    ...     adata, "perturbation", "control", batch_key="replicate"
    ... )
    >>> observed["P001"].shape
    (1, 500)
    """
    if resample not in {None, "first half", "second half", "bootstrap"}:
        raise ValueError(
            f"resample={resample!r} is unknown; use 'first half', 'second half' or 'bootstrap'."
        )
    keys = batch_key, layer, size_factor_key
    cells = _read(adata, perturbation_key, control, combination_delimiter, *keys, scale)
    halved = resample is not None and resample.endswith("half")
    cells, names = _chosen(cells, conditions, max(min_cells, 2 if halved else 1))
    weights, rng = None, np.random.default_rng(seed)
    if halved:
        first = cells.half_weights(rng)
        weights = first if resample == "first half" else 1 - first
    elif resample is not None:
        weights = cells.bootstrap_weights(rng)
    effects = cells.effects(cells.control_means(weights), weights)
    effects.obs_names = names
    return effects


def differential_expression_weights(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    *,
    against: Literal["rest", "control"] = "rest",
    conditions: Sequence[str] | None = None,
    min_cells: int = 2,
) -> pd.DataFrame:
    r"""Weights of genes from differential expression, for :func:`effect_agreement`.

    With :math:`t_{cg}` the t statistic of Welch between the cells of condition :math:`c` and all
    others (or the controls), in :math:`\log_2(1 + 10^4 x / l)`,

    .. math::

        w_{cg} = \left( \frac{|t_{cg}| - \min_h |t_{ch}|}{\max_h |t_{ch}| - \min_h |t_{ch}|}
            \right)^2

    so that the gene that responds most weighs 1 and the one that responds least 0.

    Parameters
    ----------
    adata
        Cells x genes, with counts. **Give other cells than those the prediction is compared
        with**: weights of the same cells single out the genes whose noise is largest.
    perturbation_key, control, layer, size_factor_key, combination_delimiter, conditions
        As for :func:`observed_effects`.
    against
        ``"rest"``: all other cells with a label, controls too. ``"control"``: the controls.
    min_cells
        Conditions with fewer cells are left out; a variance takes 2.

    Returns
    -------
    pandas.DataFrame
        Weights between 0 and 1, conditions x genes. All 1 where no gene differs from another.

    Raises
    ------
    ScreenError
        As :func:`observed_effects`.
    ValueError
        If ``against`` is unknown, or ``min_cells`` less than 2.

    Notes
    -----
    Mejia et al., *Diversity by Design* (arXiv 2506.22641), who take one half of the cells of a
    condition for the weights and score the other. That the statistic is Welch's is our choice.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> weights = scvi_sams.evaluation.differential_expression_weights(
    ...     adata[::2], perturbation_key="perturbation", control="control"
    ... )
    >>> float(weights.loc["P001"].max())
    1.0
    """
    if against not in {"rest", "control"}:
        raise ValueError(f"against={against!r} is unknown; use 'rest' or 'control'.")
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells}: a variance takes at least 2 cells.")
    keys = None, layer, size_factor_key
    cells = _read(adata, perturbation_key, control, combination_delimiter, *keys)
    kept, names = _chosen(cells, conditions, min_cells)
    weights = gene_weights(*cells.moments(), against_rest=against == "rest")
    rows = cells.conditions.get_indexer(kept.conditions)
    return pd.DataFrame(weights[rows], index=names, columns=adata.var_names)


def gene_weights(
    n_cells: NDArray[np.float64],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    against_rest: bool = True,
) -> NDArray[np.float64]:
    """Weights of genes, conditions x genes, from moments with the controls as the first row."""
    n_own, own = n_cells[1:, None], slice(1, None)
    if against_rest:
        n = n_cells[:, None]
        squares = np.nan_to_num(variance) * (n - 1) + n * mean**2
        squares[n_cells == 0] = 0
        n_other = n_cells.sum() - n_own
        other_mean = ((n * mean).sum(axis=0) - n_own * mean[own]) / n_other
        deviations = squares.sum(axis=0) - squares[own] - n_other * other_mean**2
        other_variance = np.maximum(deviations, 0) / np.maximum(n_other - 1, 1)
    else:
        n_other, other_mean, other_variance = n_cells[:1, None], mean[:1], variance[:1]
    error = np.sqrt(variance[own] / n_own + np.nan_to_num(other_variance) / n_other)
    score = np.nan_to_num(np.abs(ratio(mean[own] - other_mean, error)))
    lowest = score.min(axis=1, keepdims=True)
    spread = score.max(axis=1, keepdims=True) - lowest
    return np.where(spread > 0, (score - lowest) / np.where(spread > 0, spread, 1), 1.0) ** 2


def _read(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    delimiter: str | None,
    *settings: Any,
) -> CellGroups:
    """Cells by what they received; those without a label are in no group."""
    if adata.isbacked and adata.is_view:  # of which anndata makes no view
        adata = adata.to_memory()
    labels = obs_column(adata, perturbation_key)
    found = Conditions.from_labels(labels.dropna(), control, delimiter)
    codes = np.full(adata.n_obs, -1)
    codes[labels.notna().to_numpy()] = found.codes
    return CellGroups.of(adata, replace(found, codes=codes), *settings)


def _chosen(
    cells: CellGroups, conditions: Sequence[str] | None, min_cells: int
) -> tuple[CellGroups, list[str]]:
    """Conditions with enough cells, under the names asked for."""
    n_cells = cells.n_cells
    if conditions is None:
        kept = n_cells.index[n_cells >= min_cells]
        return cells.restricted(kept), list(kept)
    names = [str(name) for name in conditions]
    codes = [cells.found.find([name])[0] for name in names]
    if len(set(codes)) < len(codes):
        raise ScreenError("`conditions` names one twice: leave it out once.")
    kept = pd.Index([cells.found.labels[code] for code in codes])
    if (few := n_cells[kept][n_cells[kept] < min_cells]).size:
        raise ScreenError(
            f"{few.size} of `conditions` have fewer than {min_cells} cells, the first "
            f"{few.index[0]!r} with {few.iloc[0]}: leave them out or lower `min_cells`."
        )
    return cells.restricted(kept), names


class ControlMeans(NamedTuple):
    """Mean log expression of controls, and its squared standard error.

    The last row is that of all controls: theirs is the place of a batch without any, whose
    position in ``batches`` is -1.
    """

    batches: pd.Index
    mean: NDArray[np.float64]
    """Batches and all x genes."""
    squared_error: NDArray[np.float64]
    n_cells: int


@dataclass(frozen=True)
class CellGroups:
    """Cells of a screen with their conditions and batches, ready to be averaged.

    Every method takes ``weights``, one a cell, with which cells are counted: 0 and 1 for a part of
    the cells, whole numbers for a draw with replacement.
    """

    adata: ad.AnnData
    found: Conditions
    conditions: pd.Index
    """Labels of the conditions that have cells, without controls."""
    condition: NDArray[np.int64]
    """Condition of each cell: its position above, CONTROL or LEFT_OUT."""
    batches: pd.Index
    batch: NDArray[np.int64]
    """Batch of each cell."""
    layer: str | None = None
    library: pd.Series | None = None
    scale: float = 1e4

    @classmethod
    def of(
        cls,
        adata: ad.AnnData,
        found: Conditions,
        batch_key: str | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        scale: float = 1e4,
    ) -> CellGroups:
        """Group cells by their batches too; a code of -1 is that of a cell in no group."""
        has_cells = np.isin(np.arange(len(found.labels)), found.codes)
        kept = np.flatnonzero(~found.is_control & has_cells)
        code = np.append(np.full(len(found.labels), CONTROL), LEFT_OUT)  # which -1 indexes
        code[kept] = np.arange(kept.size)
        batch, batches = np.zeros(adata.n_obs, dtype=np.int64), pd.Index(["all"])
        if batch_key is not None:
            column = obs_column(adata, batch_key)
            if n_missing := column.isna().sum():
                raise ScreenError(
                    f"{n_missing} cells have no batch in obs[{batch_key!r}]: drop them."
                )
            batch, batches = pd.factorize(column.astype(str))
        library = None if size_factor_key is None else obs_column(adata, size_factor_key)
        labels = pd.Index([found.labels[row] for row in kept], dtype=object)
        return cls(
            adata,
            found,
            labels,
            code[found.codes],
            pd.Index(batches),
            batch,
            layer,
            library,
            scale,
        )

    @property
    def n_cells(self) -> pd.Series:
        """Cells of each condition."""
        counts = np.bincount(self.condition[self.condition >= 0], minlength=len(self.conditions))
        return pd.Series(counts, index=self.conditions)

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether each cell is a control."""
        return self.condition == CONTROL

    def restricted(self, conditions: Sequence[str] | pd.Index) -> CellGroups:
        """Keep some conditions, in the order given; cells of others are left out of all means."""
        wanted = pd.Index(conditions, dtype=object)
        new_code = wanted.get_indexer(self.conditions)
        new_code[new_code < 0] = LEFT_OUT
        codes = np.append(new_code, [LEFT_OUT, CONTROL])  # which -2 and -1 index
        return replace(self, conditions=wanted, condition=codes[self.condition])

    def moments(
        self, weights: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Cells, mean and variance (genes) of the controls and of each condition, in that order.

        A variance of a single cell is NaN.
        """
        total, squares, n_cells = self._sums(
            self.condition - CONTROL, len(self.conditions) + 1, weights
        )
        mean, squared_error = _mean_and_squared_error(total, squares, n_cells)
        return n_cells, mean, squared_error * n_cells[:, None]

    def control_means(self, weights: NDArray[np.float64] | None = None) -> ControlMeans:
        """Means of the controls of each batch that has some."""
        row = np.where(self.is_control, self.batch, -1)
        total, squares, n_cells = self._sums(row, len(self.batches), weights)
        if not (present := n_cells > 0).any():
            raise ScreenError("No cell is a control, so that there is nothing to compare with.")
        total, squares, n_cells = (
            np.concatenate([sums[present], sums.sum(axis=0, keepdims=True)])
            for sums in (total, squares, n_cells)
        )
        mean, squared_error = _mean_and_squared_error(total, squares, n_cells)
        # One control says nothing of its error; that of all controls together does.
        all_error = squared_error[-1] * n_cells[-1]
        squared_error = np.where(np.isnan(squared_error), all_error, squared_error)
        return ControlMeans(self.batches[present], mean, squared_error, int(n_cells[-1]))

    def effects(
        self, controls: ControlMeans, weights: NDArray[np.float64] | None = None
    ) -> ad.AnnData:
        """Effects against the controls of the same batch, conditions x genes."""
        n_conditions = len(self.conditions)
        total, squares = np.zeros((2, n_conditions, self.adata.n_vars))
        n_of_batch = np.zeros((n_conditions, len(self.batches)))
        rows = controls.batches.get_indexer(self.batches)
        control_mean, control_error = controls.mean[rows], controls.squared_error[rows]
        for batch in range(len(self.batches)):
            row = np.where(self.batch == batch, self.condition, -1)
            sums, raw_squares, n_inside = self._sums(row, n_conditions, weights)
            centre, n_of_batch[:, batch] = control_mean[batch], n_inside
            total += sums
            # About the controls of the cells' own batch.
            squares += raw_squares - 2 * centre * sums + n_inside[:, None] * centre**2
        n_cells = n_of_batch.sum(axis=1)
        share = n_of_batch / np.maximum(n_cells, 1)[:, None]
        with np.errstate(invalid="ignore"):
            effect = total / np.where(n_cells > 0, n_cells, np.nan)[:, None] - share @ control_mean
        _, squared_error = _mean_and_squared_error(effect * n_cells[:, None], squares, n_cells)
        # Taken as independent, which they are but for batches without controls.
        error = np.sqrt(squared_error + share**2 @ control_error)
        return ad.AnnData(
            effect.astype(np.float32),
            obs=pd.DataFrame({"n_cells": n_cells.astype(np.int64)}, index=self.conditions),
            var=pd.DataFrame(
                {
                    "control_mean": controls.mean[-1],
                    "control_standard_error": np.sqrt(controls.squared_error[-1]),
                },
                index=self.adata.var_names,
                dtype=np.float32,
            ),
            layers={"standard_error": error.astype(np.float32)},
            uns={"n_control_cells": controls.n_cells},
        )

    def log_expression(self, cells: NDArray[np.int64]) -> Iterator[tuple[slice, Any]]:
        """Chunks of the log expression of some cells, with their places among these."""
        for start in range(0, cells.size, CELLS_PER_CHUNK):  # a file is never read as a whole
            part = cells[start : start + CELLS_PER_CHUNK]
            library = None if self.library is None else self.library.iloc[part]
            for chunk, expression in log_expression_chunks(
                self.adata[part], self.layer, library, self.scale
            ):
                yield slice(start + chunk.start, start + chunk.stop), expression

    def half_weights(self, rng: Generator) -> NDArray[np.float64]:
        """1 for the cells of the first half of each condition (and batch, as far as may be)."""
        order = np.lexsort((rng.random(self.condition.size), self.batch, self.condition))
        place = pd.Series(self.condition[order]).groupby(self.condition[order]).cumcount()
        weights = np.zeros(order.size)
        weights[order[place % 2 == 0]] = 1.0
        return weights

    def bootstrap_weights(self, rng: Generator) -> NDArray[np.float64]:
        """How often each cell is drawn, with replacement, from its condition and batch."""
        group = self.condition * len(self.batches) + self.batch
        order = np.argsort(group, kind="stable")
        in_order = group[order]
        start = np.searchsorted(in_order, in_order)
        size = np.searchsorted(in_order, in_order, side="right") - start
        drawn = start + (rng.random(group.size) * size).astype(np.int64)
        return np.bincount(order[drawn], minlength=group.size).astype(np.float64)

    def _sums(
        self, row: NDArray[np.int64], n_rows: int, weights: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Sums of log expression and of its squares (rows x genes), and cells, of each row.

        ``row`` is that of each cell. Cells without one, below 0, are never normalised.
        """
        cells = np.flatnonzero((row >= 0) if weights is None else (row >= 0) & (weights > 0))
        weight = np.ones(cells.size) if weights is None else weights[cells]
        member = sp.csc_matrix((weight, (row[cells], np.arange(cells.size))), (n_rows, cells.size))
        total, squares = np.zeros((2, n_rows, self.adata.n_vars))
        for chunk, expression in self.log_expression(cells):
            total += dense(member[:, chunk] @ expression)
            squared = expression.power(2) if sp.issparse(expression) else expression**2
            squares += dense(member[:, chunk] @ squared)
        return total, squares, np.bincount(row[cells], weight, n_rows).astype(np.float64)


def _mean_and_squared_error(
    total: NDArray[np.float64], squares: NDArray[np.float64], n_cells: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean, and squared standard error of it (NaN for a single cell), rows x genes."""
    n = n_cells[:, None]
    mean = total / np.maximum(n, 1)
    deviations = np.maximum(squares - n * mean**2, 0)  # rounding can go below 0
    deviations[deviations <= 1e-12 * squares] = 0  # what is left of equal values is rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean, np.where(n > 1, deviations / (n - 1), np.nan) / n
