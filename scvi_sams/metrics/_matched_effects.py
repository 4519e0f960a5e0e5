"""Effects against the controls of the same batch."""

from __future__ import annotations

__all__ = ["batch_matched_treatment_effect"]

from typing import TYPE_CHECKING

from scvi_sams.metrics._cell_groups import CellGroups

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad


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
    >>> effect = scvi_sams.metrics.batch_matched_treatment_effect(
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
