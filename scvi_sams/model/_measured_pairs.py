"""What cells say of pairs that were measured beside their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from scvi_sams.tl._pair_calibration import PairResiduals

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from numpy.typing import NDArray

    from scvi_sams.tl._pair_calibration import ScoreGradient

__all__ = ["MeasuredPairs", "find_measured_pairs", "pair_residuals", "pairs_together"]

_LEAST_CELLS = 10  # of a pair, of either part and of controls; with fewer no standard error
_MOST_PAIRS = 100  # a variance gains little from more, and each is decoded

_Effects = tuple["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"]


class MeasuredPairs(NamedTuple):
    """Pairs measured at doses at which both parts were measured alone."""

    dosage: sparse.csr_matrix
    """Doses, pairs x perturbations."""
    groups: NDArray[np.int64]
    """Groups of cells of the pair and of its parts in the order of their columns, pairs x 3."""
    group: NDArray[np.int64]
    """Group of each cell, 0 for controls and -1 for none of these."""
    n_cells: NDArray[np.int64]
    """Cells of each group."""


def pairs_together(dosage: sparse.csr_matrix) -> list[tuple[int, int]]:
    """Pairs of perturbations that some cell has both of, by their positions, in order.

    Parameters
    ----------
    dosage
        Doses, cells x perturbations.
    """
    present = sparse.csr_matrix(dosage > 0).astype(np.float32)
    together = (present.T @ present).tocoo()
    return sorted(
        (int(a), int(b)) for a, b in zip(together.row, together.col, strict=True) if a < b
    )


def find_measured_pairs(
    dosage: sparse.csr_matrix, seed: int, without: Container[tuple[int, int]] = ()
) -> MeasuredPairs:
    """Pairs with enough cells of their own, of both parts alone and of controls.

    Parameters
    ----------
    dosage
        Doses, cells x perturbations.
    seed
        Seed of the choice among more pairs than are needed.
    without
        Pairs to leave out, by the positions of their perturbations.

    Returns
    -------
    The pairs, as few as there are.
    """
    dosage = sparse.csr_matrix(dosage, copy=True)
    dosage.eliminate_zeros()
    dosage.sort_indices()
    n_members, start = np.diff(dosage.indptr), dosage.indptr[:-1]
    group = np.full(dosage.shape[0], -1, dtype=np.int64)
    group[n_members == 0] = 0
    known: list[list[tuple[float, ...]]] = []
    for number in (1, 2):
        cells = np.flatnonzero(n_members == number)
        entries = start[cells, None] + np.arange(number)
        keys = np.column_stack([dosage.indices[entries], dosage.data[entries]])
        rows, inverse = np.unique(keys, axis=0, return_inverse=True)
        group[cells] = 1 + sum(map(len, known)) + inverse.ravel()
        known.append([tuple(row) for row in rows.tolist()])
    singles, pairs = known
    n_groups = 1 + len(singles) + len(pairs)
    n_cells = np.bincount(group[group >= 0], minlength=n_groups)
    place = {single: 1 + row for row, single in enumerate(singles)}
    found, groups = [], []
    for row, (first, second, first_dose, second_dose) in enumerate(pairs):
        parts = (first, first_dose), (second, second_dose)
        if not place.keys() >= set(parts) or (int(first), int(second)) in without:
            continue
        members = [1 + len(singles) + row, *(place[part] for part in parts)]
        if n_cells[[0, *members]].min() >= _LEAST_CELLS:
            found.append((first, second, first_dose, second_dose))
            groups.append(members)
    kept = np.arange(len(found))
    if len(kept) > _MOST_PAIRS:
        kept = np.sort(np.random.default_rng(seed).choice(kept, _MOST_PAIRS, replace=False))
    chosen = np.array(found, dtype=np.float64).reshape(-1, 4)[kept]
    rows = np.array(groups, dtype=np.int64).reshape(-1, 3)[kept]
    # Sums are kept of the groups that are used alone.
    used, rows = np.unique(np.append(0, rows), return_inverse=True)
    renamed = np.full(n_groups + 1, -1)
    renamed[used] = np.arange(len(used))
    return MeasuredPairs(
        sparse.csr_matrix(
            (
                chosen[:, 2:].ravel().astype(dosage.dtype),
                (np.repeat(np.arange(len(kept)), 2), chosen[:, :2].ravel().astype(np.int64)),
            ),
            shape=(len(kept), dosage.shape[1]),
        ),
        rows[1:].reshape(-1, 3),
        renamed[group],  # the last entry is that of -1
        n_cells[used],
    )


def pair_residuals(
    measured: MeasuredPairs,
    chunks: Iterable[tuple[slice, Any]],
    effects: Sequence[_Effects],
    gradients: Sequence[ScoreGradient],
) -> PairResiduals:
    r"""Observed deviations from additivity and interaction scores against those of a model.

    Scores are compared along the model's gradient, :math:`r = \sum_c \langle w_c, \hat\delta_c -
    \delta_c \rangle` over the pair and its parts: to first order the difference of the scores, and
    linear in the cells, so that its standard error follows from their variance along
    :math:`w_c`. Noise would bias the score of the observed effects themselves.

    Parameters
    ----------
    measured
        The pairs.
    chunks
        Expression of runs of cells, cells x genes, with the rows that they are.
    effects
        Modelled effects of the first part, the second part and the pair, each ``(n_genes,)``.
    gradients
        Derivatives of the modelled scores.
    """
    n_pairs, n_groups = len(effects), len(measured.n_cells)
    first, second, pair = (
        np.stack(side).astype(np.float64) for side in zip(*effects, strict=True)
    )
    of_pair, of_parts = (np.stack(side) for side in zip(*gradients, strict=True))
    # Weights of the cells of the pair, of its parts and of the controls, whose mean is in all.
    weights = np.concatenate([of_pair, of_parts, -of_pair - 2 * of_parts]).T
    n_genes = len(weights)
    sums = np.zeros((2, n_groups, n_genes + weights.shape[1]))
    for rows, expression in chunks:
        cells = np.flatnonzero(measured.group[rows] >= 0)
        group, expression = measured.group[rows][cells], expression[cells]
        member = sparse.csr_matrix(
            (np.ones(len(cells)), (group, np.arange(len(cells)))), shape=(n_groups, len(cells))
        )
        along = np.asarray(expression @ weights)
        squared = expression.power(2) if sparse.issparse(expression) else np.square(expression)
        for total, genes, scores in zip(
            sums, (expression, squared), (along, np.square(along)), strict=True
        ):
            by_gene = member @ genes
            total[:, :n_genes] += by_gene.toarray() if sparse.issparse(by_gene) else by_gene
            total[:, n_genes:] += member @ scores
    n_cells = np.maximum(measured.n_cells, 1)[:, None]
    mean = sums[0] / n_cells
    variance = np.maximum(sums[1] / n_cells - mean**2, 0) / np.maximum(n_cells - 1, 1)
    mean, by_gene, by_score = mean[:, :n_genes], variance[:, :n_genes], variance[:, n_genes:]
    g = measured.groups
    observed = [mean[g[:, side]] - mean[0] for side in range(3)]
    differences = [seen - said for seen, said in zip(observed, (pair, first, second), strict=True)]
    p = np.arange(n_pairs)
    return PairResiduals(
        deviation=differences[0] - differences[1] - differences[2],
        deviation_error=np.sqrt(by_gene[g].sum(1) + by_gene[0]),
        squared_parts=first**2 + second**2,
        score=(of_pair * differences[0] + of_parts * (differences[1] + differences[2])).sum(1),
        score_error=np.sqrt(
            by_score[g[:, 0], p]
            + by_score[g[:, 1], n_pairs + p]
            + by_score[g[:, 2], n_pairs + p]
            + by_score[0, 2 * n_pairs + p]
        ),
    )
