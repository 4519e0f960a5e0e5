"""Predicted and real cells in the form that cell-eval takes, and its overlap of changed genes."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.tables import log_expression_chunks
from scvi_sams.evaluation._observed import _obs_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["CellEvalExport", "differential_expression_overlap", "export_cell_eval"]


_LARGEST_LOGARITHM = 15.0  # cell-eval takes anything above for counts


class CellEvalExport(NamedTuple):
    """Files for cell-eval, from :func:`export_cell_eval`."""

    predicted: Path
    """Predicted cells and real controls, an h5ad."""
    real: Path
    """Real cells and the same controls, an h5ad."""
    command: tuple[str, ...]
    """The program and its arguments, for :func:`subprocess.run`; more can be added."""


def export_cell_eval(
    predicted_cells: ad.AnnData,
    real_cells: ad.AnnData,
    folder: str | os.PathLike[str],
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None = None,
    predicted_perturbation_key: str | None = None,
    scale: float = 1e4,
) -> CellEvalExport:
    r"""Write the two files that ``cell-eval run`` compares.

    Both hold the conditions and genes of ``predicted_cells``, as
    :math:`\ln(1 + \mathrm{scale} \cdot x_{ig} / l_i)` with :math:`l_i` the sum of the cell's
    counts of these genes, and both hold the same real control cells: an effect is a difference
    from controls, and one from predicted controls would be scored for those as well.

    Parameters
    ----------
    predicted_cells
        Cells x genes with counts in ``X``, as from ``model.predict``. Predicted controls are left
        out.
    real_cells
        Cells x genes with counts, those of the same conditions and controls; all genes of
        ``predicted_cells``, in any order. Cells of other conditions are left out.
    folder
        Where to write ``predicted.h5ad`` and ``real.h5ad``; made if it is not there. Files of
        these names are replaced, once the new ones are whole.
    perturbation_key
        Column of ``obs`` with the condition of each cell. Cells without one are left out.
    control
        Label, or labels, of the control cells. Several become the first, as cell-eval takes one.
    layer
        Layer of ``real_cells`` with the counts; ``X`` by default.
    predicted_perturbation_key
        Column of ``predicted_cells.obs`` with the conditions, ``"condition"`` as from
        ``model.predict``. By default ``perturbation_key``.
    scale
        Counts per cell to which libraries are scaled.

    Returns
    -------
    Paths of both files, and the command that compares them.

    Raises
    ------
    ScreenError
        If a predicted condition or gene is not among the real ones, there are no controls, a
        column or layer is not there, or a cell has no counts.
    ValueError
        If ``scale`` is not positive, or so large (over 3 million) that cell-eval would take
        logarithms for counts.

    Notes
    -----
    `cell-eval <https://github.com/ArcInstitute/cell-eval>`_ is the scoring of the Virtual Cell
    Challenge (Roohani et al., Cell 2025); the extra ``eval`` installs it. Its scores do not clip
    and do not know of baselines: export those likewise.

    Examples
    --------
    >>> import tempfile
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000, n_genes=100)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export = scvi_sams.evaluation.export_cell_eval(
    ...         adata[::2], adata[1::2], folder, "perturbation", "control"
    ...     )
    ...     sorted(path.name for path in export.real.parent.iterdir())
    ['predicted.h5ad', 'real.h5ad']
    >>> export.command[:3]
    ('cell-eval', 'run', '-ap')
    """
    pair = _normalised_pair(
        predicted_cells,
        real_cells,
        perturbation_key,
        control,
        layer,
        predicted_perturbation_key,
        scale,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "predicted.h5ad", folder / "real.h5ad"]
    staged = [path.with_name(f".{path.stem}.{os.getpid()}.h5ad") for path in paths]
    try:
        for cells, partial in zip(pair, staged, strict=True):
            cells.write_h5ad(partial, compression="gzip")
        for partial, path in zip(staged, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in staged:
            partial.unlink(missing_ok=True)
    predicted, real = paths
    command = ("cell-eval", "run", "-ap", str(predicted), "-ar", str(real))
    keys = ("--pert-col", perturbation_key, "--control-pert", _control_labels(control)[0])
    return CellEvalExport(predicted, real, command + keys)


def differential_expression_overlap(
    predicted_cells: ad.AnnData,
    real_cells: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    fdr: float = 0.05,
    layer: str | None = None,
    predicted_perturbation_key: str | None = None,
    scale: float = 1e4,
    n_threads: int = 1,
) -> pd.DataFrame:
    r"""Overlap of the genes that change in predicted and in real cells (DES).

    With :math:`D_c` the :math:`k` genes that are differential between the real cells of condition
    :math:`c` and the controls, and :math:`\hat D_c^{(k)}` the :math:`k` genes of largest fold
    change (or as many as there are) among those that are so for the predicted cells,

    .. math:: \mathrm{DES}_c = |D_c \cap \hat D_c^{(k)}| / k.

    Parameters
    ----------
    predicted_cells, real_cells, perturbation_key, control
        As for :func:`export_cell_eval`. Real controls stand in for the predicted ones.
    fdr
        False discovery rate of a differential gene.
    layer, predicted_perturbation_key, scale
        As for :func:`export_cell_eval`.
    n_threads
        Threads of pdex.

    Returns
    -------
    Table of the predicted conditions with ``overlap``, between 0 and 1 (NaN where no real gene is
    differential), ``n_differential`` and ``n_predicted_differential``.

    Raises
    ------
    ImportError
        If cell-eval and pdex are not installed.
    ScreenError
        As :func:`export_cell_eval`.
    ValueError
        If ``fdr`` is not between 0 and 1, or as :func:`export_cell_eval`.

    Notes
    -----
    Differential expression score of the Virtual Cell Challenge (Roohani et al., Cell 2025): the
    tests are those of `pdex <https://github.com/ArcInstitute/pdex>`_ (Mann-Whitney), the overlap
    ``overlap_at_N`` of `cell-eval <https://github.com/ArcInstitute/cell-eval>`_, which says 0
    where this function says NaN. It depends on how many cells are predicted, and on their spread:
    predict as many as there are real ones.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000, n_genes=100)
    >>> scvi_sams.evaluation.differential_expression_overlap(
    ...     adata[::2], adata[1::2], "perturbation", "control"
    ... )  # doctest: +SKIP
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr!r} must be between 0 and 1.")
    cell_eval, pdex = _of_extra("cell_eval"), _of_extra("pdex")
    predicted, real = _normalised_pair(
        predicted_cells,
        real_cells,
        perturbation_key,
        control,
        layer,
        predicted_perturbation_key,
        scale,
    )
    tables = {
        name: pdex.pdex(
            cells,
            groupby=perturbation_key,
            reference=_control_labels(control)[0],
            is_log1p=True,
            epsilon=0.0,  # as cell-eval has it
            threads=n_threads,
        )
        for name, cells in (("real", real), ("pred", predicted))
    }
    with warnings.catch_warnings():
        # cell-eval 0.8 uses the string cache of polars, which polars 2 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        comparison = cell_eval.initialize_de_comparison(**tables)
        overlap = pd.Series(comparison.compute_overlap(k=None, fdr_threshold=fdr), dtype=float)
    conditions = pd.Index(sorted(set(real.obs[perturbation_key]) - set(_control_labels(control))))
    n_real, n_predicted = (
        pd.Series(table.filter(table["fdr"] < fdr)["target"].to_list(), dtype=object)
        .value_counts()
        .reindex(conditions, fill_value=0)
        for table in tables.values()
    )
    return pd.DataFrame(
        {
            "overlap": overlap.reindex(conditions).where(n_real > 0),
            "n_differential": n_real,
            "n_predicted_differential": n_predicted,
        },
        index=conditions.rename(perturbation_key),
    )


def _normalised_pair(
    predicted_cells: ad.AnnData,
    real_cells: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None,
    predicted_perturbation_key: str | None,
    scale: float,
) -> tuple[ad.AnnData, ad.AnnData]:
    """Predicted and real cells of the same conditions and genes, both with the real controls."""
    if not 0 < scale < np.expm1(_LARGEST_LOGARITHM):
        raise ValueError(f"scale={scale!r} must be positive and less than 3 million.")
    controls = _control_labels(control)
    predicted_labels = _labels(predicted_cells, predicted_perturbation_key or perturbation_key)
    real_labels = _labels(real_cells, perturbation_key)
    is_control = np.isin(real_labels, controls)
    is_predicted = ~np.isin(predicted_labels, [*controls, ""])
    conditions = np.unique(predicted_labels[is_predicted])
    if not is_control.any():
        raise ScreenError(
            f"No cell of `real_cells` is a control: `control` is "
            f"{', '.join(map(repr, controls))}, the labels begin with "
            f"{', '.join(map(repr, np.unique(real_labels)[:5].tolist()))}."
        )
    if not conditions.size:
        raise ScreenError("`predicted_cells` has no cell of a condition other than the controls.")
    if (unseen := np.setdiff1d(conditions, real_labels)).size:
        raise ScreenError(
            f"{unseen.size} conditions of `predicted_cells` have no cell in `real_cells`, the "
            f"first {str(unseen[0])!r}: leave them out."
        )
    genes = predicted_cells.var_names
    if (missing := genes.difference(real_cells.var_names)).size:
        raise ScreenError(
            f"{missing.size} genes of `predicted_cells` are not in `real_cells`, the first "
            f"{missing[0]!r}: leave them out."
        )
    is_kept = np.isin(real_labels, conditions) | is_control
    kept_labels = np.where(is_control, controls[0], real_labels)[is_kept]
    real = _normalised(real_cells[is_kept, genes], layer, kept_labels, perturbation_key, scale)
    predicted = _normalised(
        predicted_cells[is_predicted],
        None,
        predicted_labels[is_predicted],
        perturbation_key,
        scale,
    )
    shared = real[kept_labels == controls[0]]
    obs = pd.concat([predicted.obs, shared.obs])
    obs.index = make_index_unique(obs.index)
    both = ad.AnnData(sp.vstack([predicted.X, shared.X], "csr"), obs=obs, var=real.var)
    return both, real


def _normalised(
    adata: ad.AnnData,
    layer: str | None,
    labels: NDArray[np.str_],
    perturbation_key: str,
    scale: float,
) -> ad.AnnData:
    """Natural logarithms, sparse and in single precision, with the label and nothing else."""
    chunks = [
        sp.csr_matrix(chunk * np.log(2), dtype=np.float32)
        for _, chunk in log_expression_chunks(adata, layer, None, scale)
    ]
    return ad.AnnData(
        sp.vstack(chunks, "csr"),
        obs=pd.DataFrame({perturbation_key: labels.astype(object)}, index=adata.obs_names),
        var=pd.DataFrame(index=adata.var_names),
    )


def _labels(adata: ad.AnnData, key: str) -> NDArray[np.str_]:
    """Conditions of cells, empty for those without one."""
    return _obs_column(adata, key).astype(object).fillna("").to_numpy(dtype=str)


def _control_labels(control: str | Sequence[str]) -> list[str]:
    return [control] if isinstance(control, str) else list(control)


def _of_extra(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed: pip install 'scvi-sams[eval]'.", name=name
        ) from error
