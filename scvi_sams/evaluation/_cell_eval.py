"""Predicted and real cells in the form that cell-eval and cell-eval2 take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.conditions import as_labels, obs_column
from scvi_sams.data.tables import log_expression_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


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
    *,
    version: Literal[1, 2] = 1,
) -> CellEvalExport:
    r"""Write the two files that ``cell-eval run``, or ``cell-eval2 run``, compares.

    Both hold the conditions and genes of ``predicted_cells``, for cell-eval as
    :math:`\ln(1 + 10^4 x_{ig} / l_i)` with :math:`l_i` the sum of the cell's counts of these
    genes, for cell-eval2 as counts. Both hold the same real control cells: an effect is a
    difference from controls, and one from predicted controls would be scored for those as well.

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
    version
        1 for cell-eval, 2 for cell-eval2 with its preset of the Virtual Cell Challenge of 2026.

    Returns
    -------
    CellEvalExport
        Paths of both files, ``predicted`` and ``real``, and the ``command`` that compares them.

    Raises
    ------
    ScreenError
        If a predicted condition or gene is not among the real ones, there are no controls, a
        column or layer is not there, a cell has no counts, or counts for cell-eval2 are not whole.
    ValueError
        If ``version`` is neither 1 nor 2.

    Notes
    -----
    `cell-eval <https://github.com/ArcInstitute/cell-eval>`_ is the scoring of the Virtual Cell
    Challenge (Roohani et al., Cell 2025); the extra ``eval`` installs it. `cell-eval2
    <https://github.com/ArcInstitute/cell-eval2>`_ is that of 2026, with the scale of
    :attr:`Scorecard.normalised`. Neither knows of baselines: export those likewise.

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
    if version not in {1, 2}:
        raise ValueError(f"version={version!r}: 1 for cell-eval, 2 for cell-eval2.")
    controls = as_labels(control)
    predicted_labels = _labels(predicted_cells, predicted_perturbation_key or perturbation_key)
    real_labels = _labels(real_cells, perturbation_key)
    is_control = np.isin(real_labels, controls)
    is_predicted = ~np.isin(predicted_labels, [*controls, ""])
    conditions = np.unique(predicted_labels[is_predicted])
    if not is_control.any():
        raise ScreenError(
            f"No cell of `real_cells` is a control: `control` is {listed(controls)}, the labels "
            f"begin with {listed(np.unique(real_labels)[:5].tolist())}."
        )
    if not conditions.size:
        raise ScreenError("`predicted_cells` has no cell of a condition other than the controls.")
    genes = predicted_cells.var_names
    for what, absent in (
        ("conditions", np.setdiff1d(conditions, real_labels)),
        ("genes", genes.difference(real_cells.var_names)),
    ):
        if len(absent):
            raise ScreenError(
                f"{len(absent)} {what} of `predicted_cells` are not in `real_cells`, the first "
                f"{str(absent[0])!r}: leave them out."
            )
    kept = np.isin(real_labels, conditions) | is_control
    labels = np.where(is_control, controls[0], real_labels)[kept]
    written = _normalised if version == 1 else _whole
    real = written(real_cells[kept, genes], layer, labels, perturbation_key)
    predicted = written(
        predicted_cells[is_predicted], None, predicted_labels[is_predicted], perturbation_key
    )
    shared = real[labels == controls[0]]
    obs = pd.concat([predicted.obs, shared.obs])
    obs.index = make_index_unique(obs.index)
    both = ad.AnnData(sp.vstack([predicted.X, shared.X], "csr"), obs=obs, var=real.var)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "predicted.h5ad", folder / "real.h5ad"]
    staged = [path.with_name(f".{path.stem}.{os.getpid()}.h5ad") for path in paths]
    try:
        for cells, partial in zip((both, real), staged, strict=True):
            cells.write_h5ad(partial, compression="gzip")
        for partial, path in zip(staged, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in staged:
            partial.unlink(missing_ok=True)
    files = ("-ap", str(paths[0]), "-ar", str(paths[1]))
    keys = ("--pert-col", perturbation_key, "--control-pert", controls[0])
    command: tuple[str, ...] = ("cell-eval", "run", *files, *keys)
    if version == 2:
        keys = ("--pert-col", perturbation_key, "--control", controls[0])
        command = ("cell-eval2", "run", "--preset", "vcc2026", *files, *keys)
    return CellEvalExport(paths[0], paths[1], command)


def _normalised(
    adata: ad.AnnData, layer: str | None, labels: NDArray[np.str_], perturbation_key: str
) -> ad.AnnData:
    """Natural logarithms, sparse and in single precision, with the label and nothing else."""
    chunks = [
        sp.csr_matrix(chunk * np.log(2), dtype=np.float32)
        for _, chunk in log_expression_chunks(adata, layer)
    ]
    return _cells(adata, sp.vstack(chunks, "csr"), labels, perturbation_key)


def _whole(
    adata: ad.AnnData, layer: str | None, labels: NDArray[np.str_], perturbation_key: str
) -> ad.AnnData:
    """Counts as they are, in single precision."""
    for _ in log_expression_chunks(adata, layer):  # for its checks of layer and counts
        pass
    counts = sp.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32)
    if faulty := np.flatnonzero(counts.data % 1).size:
        raise ScreenError(f"{faulty} counts are not whole numbers, which cell-eval2 takes alone.")
    return _cells(adata, counts, labels, perturbation_key)


def _cells(
    adata: ad.AnnData, matrix: sp.csr_matrix, labels: NDArray[np.str_], perturbation_key: str
) -> ad.AnnData:
    return ad.AnnData(
        matrix,
        obs=pd.DataFrame({perturbation_key: labels.astype(object)}, index=adata.obs_names),
        var=pd.DataFrame(index=adata.var_names),
    )


def _labels(adata: ad.AnnData, key: str) -> NDArray[np.str_]:
    """Conditions of cells, empty for those without one."""
    return obs_column(adata, key).astype(object).fillna("").to_numpy(dtype=str)
