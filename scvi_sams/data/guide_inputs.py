"""Guides where other tools leave them: long tables, feature matrices of Cell Ranger, MuData."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._exceptions import ScreenError, counted, listed
from scvi_sams.data.guides import TARGET, target_table
from scvi_sams.data.tables import layer_names

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import anndata as ad

    from scvi_sams.data.guides import GuideTargets

KEY = "guides"
"""Where the functions below leave calls, in ``obsm``, and their table, in ``uns``."""

_GENES, _CAPTURE = "Gene Expression", "CRISPR Guide Capture"
# Where targets stand: IGVF's pipelines, this package, Cell Ranger's feature reference.
_TARGET_COLUMNS = ("intended_target_name", TARGET, "target_gene_name", "target_gene")
_ASSIGNMENT = "guide_assignment"  # layer of IGVF's pipelines
_UNTARGETED = frozenset({"non-targeting", "safe-targeting", "negative control", "nontargeting"})


def guides_from_table(
    adata: ad.AnnData,
    table: pd.DataFrame | str | os.PathLike[str],
    targets: GuideTargets | None = None,
    *,
    cell_column: str = "cell",
    guide_column: str = "gRNA",
) -> ad.AnnData:
    """Take guides from a long table with a row for each guide of a cell, such as crispat's.

    Parameters
    ----------
    adata
        The screen, cells x genes. Calls are added to it.
    table
        Calls, or the path of a CSV file with them. The default columns are those of crispat's
        ``assignments.csv``; others are ignored.
    targets
        Perturbation that each guide targets, as ``guide_targets`` of ``setup_anndata``, which may
        be given there instead.
    cell_column, guide_column
        Columns with the name of the cell, as in ``adata.obs_names``, and of the guide.

    Returns
    -------
    anndata.AnnData
        ``adata`` itself with ``obsm["guides"]`` (calls, cells x guides) and ``uns["guides"]`` (a
        row a guide), for ``setup_anndata(adata, guide_key="guides", ...)``. Cells of the table
        that are not in ``adata`` are left out; those of ``adata`` that are not in the table have
        no guide.

    Raises
    ------
    ScreenError
        If the table cannot be read, lacks a column, or has none of the cells.

    Examples
    --------
    >>> import anndata
    >>> adata = anndata.AnnData(obs=pd.DataFrame(index=["c1", "c2"]))
    >>> calls = pd.DataFrame({"cell": ["c1", "c1", "c2"], "gRNA": ["KLF1_g1", "NT_3", "KLF1_g1"]})
    >>> guides_from_table(adata, calls, {"KLF1_g1": "KLF1", "NT_3": "NT"}).obsm["guides"].toarray()
    array([[1, 1],
           [1, 0]], dtype=int8)
    >>> adata.uns["guides"]["target"].tolist()
    ['KLF1', 'NT']
    """
    if not isinstance(table, pd.DataFrame):
        try:
            table = pd.read_csv(table)
        except (OSError, ValueError) as error:
            raise ScreenError(f"The table of guides cannot be read: {error}") from error
    for argument, column in (("cell_column", cell_column), ("guide_column", guide_column)):
        if column not in table:
            raise ScreenError(
                f"The table of guides has no column {column!r} (`{argument}`); it has "
                f"{listed(table.columns, limit=10)}."
            )
    _check_unique(adata.obs_names, "adata.obs_names")
    cell = adata.obs_names.get_indexer(table[cell_column].astype(str))
    known = (cell >= 0) & table[guide_column].notna().to_numpy()
    if not known.any():
        raise ScreenError(
            f"No cell of the table is in the AnnData: the table names "
            f"{listed(table[cell_column].unique(), limit=2)}, adata.obs_names has "
            f"{listed(adata.obs_names, limit=2)}. Name cells alike."
        )
    guide, names = pd.factorize(table[guide_column].astype(str)[known], sort=True)
    entries = (np.ones(len(guide), np.int8), (cell[known], guide))
    calls = sparse.csr_matrix(entries, shape=(adata.n_obs, len(names)))
    calls.data[:] = 1  # a row that is there twice
    return _annotated(adata, calls, pd.DataFrame(index=pd.Index(names, name="guide")), targets)


def guides_from_features(
    adata: ad.AnnData,
    targets: GuideTargets | None = None,
    *,
    layer: str | None = None,
    feature_types_column: str = "feature_types",
) -> ad.AnnData:
    """Take the guides out of a feature matrix that holds them among the genes, as Cell Ranger's.

    Parameters
    ----------
    adata
        Cells x features, as ``scanpy.read_10x_h5(path, gex_only=False)`` reads them: genes of the
        type ``"Gene Expression"``, guides of ``"CRISPR Guide Capture"``.
    targets
        Perturbation that each guide targets: a column of ``adata.var``, or a table as
        ``guide_targets`` of ``setup_anndata``. By default ``target_gene_name``, if it is there.
    layer
        Layer of the counts of the guides; ``adata.X`` by default.
    feature_types_column
        Column of ``adata.var`` with the types.

    Returns
    -------
    anndata.AnnData
        The cells with the genes alone, a copy, with ``obsm["guides"]`` (the guides' counts) and
        ``uns["guides"]`` (their rows of ``var``). Counts are no calls: call them, or give
        ``setup_anndata(adata, guide_key="guides", guide_threshold=5, ...)``.

    Raises
    ------
    ScreenError
        If there are no types of features, no guides or no genes.

    Examples
    --------
    >>> import anndata
    >>> kinds = ["Gene Expression", "Gene Expression", "CRISPR Guide Capture"]
    >>> var = pd.DataFrame({"feature_types": kinds}, index=["KLF1", "GATA1", "KLF1_g1"])
    >>> screen = guides_from_features(
    ...     anndata.AnnData(np.array([[3.0, 1, 0], [0, 2, 9]]), var=var), {"KLF1_g1": "KLF1"}
    ... )
    >>> screen.var_names.tolist(), screen.obsm["guides"].toarray().ravel().tolist()
    (['KLF1', 'GATA1'], [0.0, 9.0])
    """
    if feature_types_column not in adata.var:
        raise ScreenError(
            f"adata.var has no column {feature_types_column!r} (`feature_types_column`); it has "
            f"{listed(adata.var, limit=10) or 'none'}."
        )
    kinds = adata.var[feature_types_column].astype(str).to_numpy()
    for wanted in (_CAPTURE, _GENES):
        if wanted not in kinds:
            raise ScreenError(
                f"No feature is {wanted!r}: adata.var[{feature_types_column!r}] holds "
                f"{listed(np.unique(kinds))}. Read the matrix with all features, as by "
                "`scanpy.read_10x_h5(path, gex_only=False)`."
            )
    is_guide = kinds == _CAPTURE
    guides = adata[:, is_guide]
    counts = guides.X if layer is None else guides.layers[layer]
    table = guides.var.copy()
    table.index = table.index.astype(str)
    screen = adata[:, kinds == _GENES].copy()
    if isinstance(targets, str) and targets in table:
        targets = table[targets]
    return _annotated(screen, sparse.csr_matrix(counts), table, targets)


def guides_from_mudata(
    mdata: Any,
    *,
    modalities: Mapping[str, str] | None = None,
    guide_layer: str | None = None,
    guide_targets: GuideTargets | None = None,
    control: str = "non-targeting",
) -> ad.AnnData:
    """Take guides from the modality of a MuData that holds them, as IGVF's pipelines write it.

    A model reads one AnnData: that of the counts. Calls are added to it, where subsets of cells
    and files keep them; the counts are not copied. ``SAMSVAE.setup_mudata`` does this, and sets
    the model up.

    Parameters
    ----------
    mdata
        A MuData with a modality of counts and one of guides.
    modalities
        Their names, ``{"rna_layer": "rna", "guide_layer": "guide"}``. By default ``"rna"`` or
        ``"gene"``, and ``"guide"``.
    guide_layer
        Layer of the guides with calls. By default ``"guide_assignment"``, if it is there, or
        ``X``.
    guide_targets
        Perturbation that each guide targets: a column of the guides' ``var``, or a table as in
        ``setup_anndata``. By default the column ``intended_target_name``, ``target``,
        ``target_gene_name`` or ``target_gene``.
    control
        Label for guides that do not target: those of a ``var`` column ``targeting`` that is
        false, or ``type`` that says so (``"non-targeting"``, ``"safe-targeting"``, ``"negative
        control"``).

    Returns
    -------
    anndata.AnnData
        The modality of the counts itself, with ``obsm["guides"]`` and ``uns["guides"]``.

    Raises
    ------
    ScreenError
        If a modality, layer or column is missing, or cells with counts have no row of guides.

    Examples
    --------
    >>> import anndata, mudata
    >>> cells = pd.DataFrame(index=["c1", "c2"])
    >>> var = pd.DataFrame(
    ...     {"intended_target_name": ["KLF1", "none"], "targeting": [True, False]},
    ...     index=["KLF1_g1", "NT_3"],
    ... )
    >>> gene = anndata.AnnData(np.ones((2, 3)), cells.copy())
    >>> guide = anndata.AnnData(np.eye(2), cells.copy(), var)
    >>> mdata = mudata.MuData({"gene": gene, "guide": guide})
    >>> guides_from_mudata(mdata).uns["guides"]["target"].tolist()
    ['KLF1', 'non-targeting']
    """
    if not hasattr(mdata, "mod"):
        raise ScreenError(f"mdata is a {type(mdata).__name__}: give a MuData.")
    if not isinstance(control, str):
        raise ScreenError(f"control={control!r} cannot be used: give one label, as text.")
    if getattr(mdata, "is_view", False):
        raise ScreenError(
            "The MuData is a view, which cannot be added to: `mdata = mdata.copy()`."
        )
    screen = mdata.mod[_modality(mdata, modalities, "rna_layer", ("rna", "gene"))]
    guides = mdata.mod[_modality(mdata, modalities, "guide_layer", ("guide",))]
    if guide_layer is None and _ASSIGNMENT in guides.layers:
        guide_layer = _ASSIGNMENT
    if guide_layer is not None and guide_layer not in guides.layers:
        raise ScreenError(
            f"The guides have no layer {guide_layer!r} (`guide_layer`), only "
            f"{listed(layer_names(guides)) or 'X'}."
        )
    _check_unique(guides.obs_names, "the guides' obs_names")
    rows = guides.obs_names.get_indexer(screen.obs_names)
    if (missing := rows < 0).any():
        raise ScreenError(
            f"{counted(int(missing.sum()), 'cell')} with counts are not among the guides: "
            f"{listed(screen.obs_names[missing])}. Keep the cells of both, as by "
            "`muon.pp.intersect_obs(mdata)`."
        )
    values = guides.X if guide_layer is None else guides.layers[guide_layer]
    table = pd.DataFrame(index=guides.var_names.astype(str))
    if isinstance(guide_targets, str) and guide_targets in guides.var:
        targets: Any = guides.var[guide_targets]
    elif guide_targets is not None:
        targets = guide_targets
    else:
        column = next((name for name in _TARGET_COLUMNS if name in guides.var), None)
        if column is None:
            raise ScreenError(
                "What do guides target? Their var has none of the columns "
                f"{listed(_TARGET_COLUMNS)}, but {listed(guides.var, limit=10) or 'none'}: name "
                "it by `guide_targets`, or give a table."
            )
        targets = guides.var[column]
    return _annotated(
        screen, sparse.csr_matrix(values)[rows], table, targets, ~_targets_any(guides.var), control
    )


def _check_unique(cells: pd.Index, where: str) -> None:
    if not cells.is_unique:
        twice = cells[cells.duplicated()].unique()
        raise ScreenError(
            f"Cells that occur more than once in {where}: {listed(twice)}. Guides are found by "
            "the names of cells: make them unique."
        )


def _modality(
    mdata: Any, modalities: Mapping[str, str] | None, argument: str, usual: Sequence[str]
) -> str:
    if not (modalities is None or isinstance(modalities, Mapping)):
        raise ScreenError(
            f"modalities={modalities!r} cannot be used: give a dict, as {{'rna_layer': 'rna'}}."
        )
    asked = dict(modalities or {})
    if unknown := asked.keys() - {"rna_layer", "guide_layer"}:
        raise ScreenError(
            f"modalities names {listed(unknown)}: its keys are 'rna_layer' and 'guide_layer'."
        )
    names = [asked[argument]] if argument in asked else list(usual)
    found = [name for name in names if name in mdata.mod]
    if len(found) != 1:
        raise ScreenError(
            f"{'No' if not found else 'More than one'} modality is {listed(names)}; there are "
            f"{listed(mdata.mod)}. Name it: `modalities={{{argument!r}: ...}}`."
        )
    return found[0]


def _targets_any(var: pd.DataFrame) -> np.ndarray:
    """Whether guides target something, by the columns of IGVF's pipelines."""
    targets = np.ones(len(var), dtype=bool)
    if "targeting" in var:
        targets &= ~var["targeting"].astype(str).str.casefold().isin(["false", "0"]).to_numpy()
    if "type" in var:
        targets &= ~var["type"].astype(str).str.casefold().isin(_UNTARGETED).to_numpy()
    return targets


def _annotated(
    adata: ad.AnnData,
    calls: sparse.csr_matrix,
    table: pd.DataFrame,
    targets: GuideTargets | None,
    is_control: np.ndarray | None = None,
    control: str = "",
) -> ad.AnnData:
    """Leave calls and the table of guides where registration looks for them."""
    if isinstance(targets, str):
        if targets not in adata.uns:
            raise ScreenError(
                f"targets={targets!r} is neither a column nor a key of adata.uns: give the table."
            )
        targets = adata.uns[targets]
    if targets is None:
        column = next((name for name in _TARGET_COLUMNS if name in table), None)
        targets = None if column is None else table[column]
    if targets is not None:
        target_of = target_table(targets)
        values = [target_of.get(name, "") for name in table.index]
        if is_control is not None:
            values = [control if c else v for c, v in zip(is_control, values, strict=True)]
        table[TARGET] = np.array(values, dtype=object)
    adata.obsm[KEY], adata.uns[KEY] = calls, table
    return adata
