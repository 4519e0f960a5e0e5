"""What held-out cells themselves let a prediction score: the top of every scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams.evaluation._observed import CellGroups

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["bootstrap_effects", "bootstrap_weights", "half_weights", "split_half_effects"]


def split_half_effects(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    seed: int = 0,
) -> tuple[ad.AnnData, ad.AnnData]:
    r"""Effects in two random halves of the cells: one predicts the other.

    Cells of every condition, and the controls, are split within batches, so that the halves share
    no cell. With cells of variance :math:`\sigma^2` and :math:`n` of them, half the cells differ
    from the other half by :math:`4 \sigma^2 / n` on average, four times as much as the true mean
    differs from all :math:`n`: the ceiling is that of an experiment of half the size, which a good
    model can pass.

    Parameters
    ----------
    adata
        Held-out cells x genes, with counts.
    perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
        As for :func:`batch_matched_treatment_effect`.
    seed
        Seed of the split.

    Returns
    -------
    Effects in the two halves, laid out as by :func:`batch_matched_treatment_effect`. The first
    half has the odd cell. Conditions with a single cell are left out.

    Raises
    ------
    ScreenError
        As :func:`batch_matched_treatment_effect`; also if there are fewer than two controls.

    Notes
    -----
    The "technical duplicate" of Mejia et al. (arXiv 2506.22641).

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000)
    >>> halves = scvi_sams.evaluation.split_half_effects(adata, "perturbation", "control")
    >>> scvi_sams.evaluation.effect_correlation(*halves) > 0.5
    True
    """
    cells = CellGroups.read(
        adata, perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
    )
    cells = cells.restricted(cells.n_cells[cells.n_cells >= 2].index)
    first = half_weights(cells, np.random.default_rng(seed))
    halves = [
        cells.effects(cells.control_means(weights), weights) for weights in (first, 1 - first)
    ]
    return halves[0], halves[1]


def bootstrap_effects(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    seed: int = 0,
) -> ad.AnnData:
    r"""Effects in cells drawn with replacement: as far from those observed as the truth is.

    Means of :math:`n` drawn cells differ from the mean of the cells by :math:`\sigma^2 / n` on
    average, as the observed mean differs from the true one. What they score against the observed
    effects is therefore about what a prediction of the exact truth would score. (For correlations
    it is a little more: observed effects, which play the truth, vary more than the truth does.)

    Parameters
    ----------
    adata
        Held-out cells x genes, with counts.
    perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
        As for :func:`batch_matched_treatment_effect`.
    seed
        Seed of the draws.

    Returns
    -------
    Effects in as many cells of every condition and of the controls, in every batch, as there are,
    laid out as by :func:`batch_matched_treatment_effect`.

    Raises
    ------
    ScreenError
        As :func:`batch_matched_treatment_effect`.

    Notes
    -----
    Efron, Annals of Statistics 7, 1 (1979).

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000)
    >>> drawn = scvi_sams.evaluation.bootstrap_effects(adata, "perturbation", "control")
    >>> drawn.shape
    (38, 500)
    """
    cells = CellGroups.read(
        adata, perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
    )
    weights = bootstrap_weights(cells, np.random.default_rng(seed))
    return cells.effects(cells.control_means(weights), weights)


def half_weights(cells: CellGroups, rng: Generator) -> NDArray[np.float64]:
    """1 for the cells of the first half and 0 for others; the first has the odd cells.

    Halves are of conditions (and controls); within a condition, batches are halved as evenly as
    they can be.
    """
    group = cells.condition + 2
    order = np.lexsort((rng.random(group.size), cells.batch, group))
    start = np.searchsorted(group[order], group[order])  # first place of each cell's group
    weights = np.zeros(group.size)
    weights[order[(np.arange(group.size) - start) % 2 == 0]] = 1.0
    return weights


def bootstrap_weights(cells: CellGroups, rng: Generator) -> NDArray[np.float64]:
    """How often each cell is drawn, with replacement, from its condition and batch."""
    group = (cells.condition + 2) * len(cells.batches) + cells.batch
    order = np.argsort(group, kind="stable")
    in_order = group[order]
    start = np.searchsorted(in_order, in_order)
    size = np.searchsorted(in_order, in_order, side="right") - start
    drawn = start + (rng.random(group.size) * size).astype(np.int64)
    return np.bincount(order[drawn], minlength=group.size).astype(np.float64)
