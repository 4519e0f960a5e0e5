"""Whether what a split holds out has been seen before it is tested on."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.checks import check_counts
from scvi_sams.data.conditions import Conditions, obs_column
from scvi_sams.evaluation._splits import (
    SPLIT_LABELS,
    SPLITS_UNS_KEY,
    HeldOutBy,
    check_names,
    split_column,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


__all__ = [
    "CELLS_USED_UNS_KEY",
    "check_leakage",
    "fingerprint",
    "record_cells_used",
    "row_digests",
    "select_genes",
]


CELLS_USED_UNS_KEY = "scvi_sams_cells_used"
"""Where ``adata.uns`` keeps, by name, what is known of the cells that something was made on."""


def select_genes(
    adata: ad.AnnData,
    split_key: str = "split",
    n_top_genes: int = 5_000,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    flavor: Literal["seurat", "cell_ranger", "seurat_v3"] = "seurat",
    key_added: str = "highly_variable",
) -> pd.Series:
    """Select highly variable genes on the training cells of a split alone.

    Which cells were used is recorded, so that :func:`check_leakage` can tell.

    Parameters
    ----------
    adata
        The screen, cells x genes, with counts and a split.
    split_key
        Column of `adata.obs` with the split.
    n_top_genes
        Number of genes. 5,000 for the Norman screen in Bereket and Karaletsos (NeurIPS 2023).
    layer
        Layer of the counts; ``X`` by default.
    batch_key
        Column of `adata.obs`: genes are ranked within each batch, and the ranks combined.
    flavor
        How :func:`scanpy.pp.highly_variable_genes` ranks genes; ``"seurat_v3"`` reads the counts
        and needs scikit-misc, the others log-normalised values, which are made here.
    key_added
        Column of `adata.var` to write, and name of the record.

    Returns
    -------
    The column: whether each gene is selected.

    Raises
    ------
    ScreenError
        If a column or layer is absent, there are fewer genes than wanted, no cell is for
        training, or `adata` is a view.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.evaluation.split_cells(adata)
    >>> selected = scvi_sams.evaluation.select_genes(adata, n_top_genes=100)
    >>> adata[:, selected].shape
    (500, 100)
    """
    cells = split_column(adata, split_key) == "train"
    if not cells.any():
        raise ScreenError(f"No cell of obs[{split_key!r}] is for training.")
    if n_top_genes > adata.n_vars:
        raise ScreenError(
            f"n_top_genes={n_top_genes}, but there are {adata.n_vars} genes: ask for fewer."
        )
    if batch_key is not None and batch_key not in adata.obs:
        raise ScreenError(f"There is no column {batch_key!r} in adata.obs.")
    if layer is not None and layer not in adata.layers:
        raise ScreenError(f"There is no layer {layer!r}, only {listed(adata.layers)}.")
    training = adata[cells]
    matrix = training.X if layer is None else training.layers[layer]
    obs = pd.DataFrame(index=training.obs_names)
    if batch_key is not None:
        obs[batch_key] = training.obs[batch_key].astype("category")
    training = ad.AnnData(matrix.copy(), obs=obs, var=pd.DataFrame(index=adata.var_names))
    check_counts(training)
    if flavor != "seurat_v3":
        training.X = training.X.astype(np.float32)
        sc.pp.normalize_total(training, target_sum=1e4)
        sc.pp.log1p(training)
    table = sc.pp.highly_variable_genes(
        training, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
    )
    selected = table["highly_variable"].to_numpy(dtype=bool)
    details = {
        "split_key": split_key,
        "n_top_genes": n_top_genes,
        "flavor": flavor,
        "genes": adata.var_names[selected].to_numpy(dtype=object),
    }
    record_cells_used(adata, key_added, cells, details)
    adata.var[key_added] = selected
    return adata.var[key_added]


def record_cells_used(
    adata: ad.AnnData,
    name: str,
    cells: NDArray[np.bool_] | Sequence[bool] | pd.Series,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Record which cells a gene selection, a test or a fit was computed on.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    name
        What was computed, for example the column of `adata.var` or key of `adata.uns` that it was
        written to: ``"rank_genes_groups"``.
    cells
        One a cell: whether it was used.
    details
        Anything else to keep in the record.

    Notes
    -----
    ``adata.obs["used_for_" + name]`` tells the cells, ``adata.uns["scvi_sams_cells_used"][name]``
    their number and a fingerprint of their names, from which a later change is noticed.

    Raises
    ------
    ScreenError
        If `adata` is a view, or `cells` is not one boolean a cell of which one at least is true.

    Examples
    --------
    >>> import scanpy as sc, scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> cells = scvi_sams.evaluation.split_cells(adata) == "train"
    >>> scvi_sams.evaluation.record_cells_used(adata, "rank_genes_groups", cells)
    >>> int(adata.obs["used_for_rank_genes_groups"].sum())
    64
    """
    if adata.is_view:
        raise ScreenError("A record cannot be written into a view: use adata = adata.copy().")
    used = np.asarray(cells)
    if used.shape != (adata.n_obs,) or used.dtype != bool or not used.any():
        raise ScreenError(
            f"`cells` must be {adata.n_obs} booleans, one a cell, of which one at least is true."
        )
    column = f"used_for_{name}"
    adata.obs[column] = used
    record = {
        "obs_column": column,
        "n_cells": int(used.sum()),
        "fingerprint": fingerprint(adata.obs_names[used]),
        "package_version": version("scvi-sams"),
        **(details or {}),
    }
    adata.uns[CELLS_USED_UNS_KEY] = {**adata.uns.get(CELLS_USED_UNS_KEY, {}), name: record}


def fingerprint(names: Iterable[str]) -> str:
    """Digest of a set of names, whatever their order.

    Examples
    --------
    >>> fingerprint(["a", "b"]) == fingerprint(["b", "a"]) != fingerprint(["ab"])
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(map(str, names)):
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


_CELLS_PER_CHUNK = 20_000  # of the counts in memory at once; backed files work as well


def row_digests(
    adata: AnnData, layer: str | None, min_genes: int
) -> tuple[NDArray[np.uint64] | None, NDArray[np.bool_]]:
    """Digest the counts of each cell, whatever way they are stored.

    Parameters
    ----------
    adata
        The screen, cells x genes; dense or sparse, in memory or backed.
    layer
        Layer of the counts; ``X`` by default.
    min_genes
        Detected genes from which on counts tell cells apart.

    Returns
    -------
    A digest of each cell (None without counts), the same for the same counts, and whether the cell
    has enough genes.

    Raises
    ------
    ScreenError
        If the layer is absent.

    Examples
    --------
    >>> import anndata
    >>> adata = anndata.AnnData(np.array([[3.0, 1.0], [3.0, 1.0], [0.0, 1.0]]))
    >>> digests, enough = row_digests(adata, None, min_genes=2)
    >>> bool(digests[0] == digests[1]), bool(digests[0] == digests[2]), enough.tolist()
    (True, False, [True, True, False])
    """
    if layer is not None and layer not in adata.layers:
        raise ScreenError(f"There is no layer {layer!r}, only {listed(adata.layers)}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    enough = np.ones(adata.n_obs, dtype=bool)
    if matrix is None:
        return None, enough
    digests = np.empty(adata.n_obs, dtype=np.uint64)
    for start, rows in _chunks(matrix, adata.n_obs):
        for offset, (first, last) in enumerate(pairwise(rows.indptr)):
            digest = hashlib.blake2b(rows.indices[first:last].astype(np.int32).tobytes())
            digest.update(rows.data[first:last].astype(np.float64).tobytes())
            digests[start + offset] = int.from_bytes(digest.digest()[:8], "little")
            enough[start + offset] = last - first >= min_genes
    return digests, enough


def _chunks(matrix: Any, n_cells: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
    for start in range(0, n_cells, _CELLS_PER_CHUNK):
        rows = sparse.csr_matrix(matrix[start : start + _CELLS_PER_CHUNK], copy=True)
        rows.sum_duplicates()
        rows.eliminate_zeros()
        yield start, rows


_PARTS = SPLIT_LABELS[:3]


class _Finding(NamedTuple):
    """Outcome of one check; a leak is what is raised."""

    status: str
    detail: str
    leak: str = ""


def check_leakage(
    adata: AnnData,
    split_key: str = "split",
    *,
    held_out_by: HeldOutBy | None = None,
    held_out: Sequence[str] | None = None,
    perturbation_key: str | None = None,
    control: str | Iterable[str] | None = None,
    combination_delimiter: str | None = "+",
    dosage_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    selections: Sequence[str] | None = None,
    min_genes: int = 10,
) -> pd.DataFrame:
    """Refuse a split whose test set has been seen, in part or through a selection of genes.

    Cells for validation count as seen, as choices are made on them.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split. What it holds out is taken from its record in
        ``adata.uns["scvi_sams_splits"]``; the next seven arguments are for a column of one's own,
        and override the record.
    held_out_by
        What must not be seen: ``"cell"`` (only the cells themselves), ``"condition"``,
        ``"perturbation"``, ``"batch"`` or ``"dose"``.
    held_out
        Names of what must not be seen, all of which must occur; doses as ``"A:10"``. By default
        those of the record, and without one all that occur in the test set.
    perturbation_key, control, combination_delimiter, dosage_key
        As in ``setup_anndata``.
    batch_key
        Column of `adata.obs` with the batches.
    layer
        Layer of the counts that are compared; ``X`` by default.
    selections
        Names, such as ``"highly_variable"``, of what was computed by :func:`select_genes` or
        recorded by :func:`record_cells_used`. By default all that is recorded; one that is named
        here and not recorded is refused.
    min_genes
        Cells with fewer detected genes are not compared: they may be equal by chance.

    Returns
    -------
    Table with a row a check, ``held out``, ``duplicated cells``, ``cells used`` and ``controls``,
    with its ``status`` (``"passed"``, ``"reported"`` or ``"not checked"``) and ``detail``.

    Raises
    ------
    ScreenError
        If a held-out condition, perturbation, batch or dose has cells that are seen (control
        cells may be: their number is reported); if a cell occurs in two parts, by name or by
        identical counts; or if genes were selected, or anything else recorded was computed, on
        test cells, or its record no longer fits. The message names all culprits. Or if a name in
        `held_out` is one that no cell has, or a column or layer is absent.
    ValueError
        If `held_out_by` is none of the five, or `held_out` is given for a split by cell.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.evaluation.split_conditions(adata, "perturbation", "control", ["P001"])
    >>> scvi_sams.evaluation.check_leakage(adata)["status"].to_dict()["held out"]
    'passed'
    >>> adata.obs.loc[adata.obs["perturbation"] == "P001", "split"] = "train"
    >>> scvi_sams.evaluation.check_leakage(adata)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    scvi_sams._exceptions.ScreenError: obs['split'] leaks: conditions held out are seen ...
    """
    labels = split_column(adata, split_key)
    record = adata.uns.get(SPLITS_UNS_KEY, {}).get(split_key, {})
    recorded = dict(record.get("arguments", {}))
    if perturbation_key is None and "perturbation_key" in recorded:
        perturbation_key = str(recorded["perturbation_key"])
        control = recorded.get("control")
        combination_delimiter = recorded.get("combination_delimiter")
        dosage_key = dosage_key or recorded.get("dosage_key")
    batch_key = batch_key or recorded.get("batch_key")
    names = [str(name) for name in record.get("held_out", [])]
    if held_out_by is None:
        held_out_by = record.get("held_out_by", "cell")
    elif held_out_by not in get_args(HeldOutBy):
        raise ValueError(f"held_out_by={held_out_by!r}: one of {get_args(HeldOutBy)}.")
    elif held_out_by != record.get("held_out_by"):
        names = []
    if held_out is not None and held_out_by == "cell":
        raise ValueError("`held_out` has names: say of what, with `held_out_by`.")
    conditions = None
    if perturbation_key is not None:
        doses = dosage_key if held_out_by == "dose" else None
        conditions = Conditions.from_obs(
            adata, perturbation_key, control, combination_delimiter, doses
        )
    if held_out is not None:
        names = [held_out] if isinstance(held_out, str) else [str(name) for name in held_out]
        if held_out_by == "condition" and conditions is not None:
            codes = conditions.find(names)
            names = [conditions.labels[code] for code in codes]

    is_control = np.zeros(adata.n_obs, dtype=bool)
    if conditions is not None:
        is_control = conditions.is_control[conditions.codes]
    units, unit_codes = _units(adata, held_out_by, conditions, batch_key, dosage_key)
    if held_out is not None and held_out_by != "condition":
        check_names(names, sorted(set().union(*units)), _plural(held_out_by), "held_out")
    in_test = set().union(*(units[code] for code in np.unique(unit_codes[labels == "test"])))
    if held_out_by in {"condition", "batch"} or not names:
        names = sorted(in_test.union(names))
    hits = np.array([not unit.isdisjoint(names) for unit in units], dtype=bool)
    is_held_out = hits[unit_codes] & ~is_control
    findings = {
        "held out": _held_out(labels, is_held_out, units, unit_codes, names, held_out_by),
        "duplicated cells": _duplicates(adata, labels, layer, min_genes),
        "cells used": _cells_used(adata, labels, is_held_out, selections),
        "controls": _controls(labels, conditions, is_control),
    }
    if leaks := [finding.leak for finding in findings.values() if finding.leak]:
        raise ScreenError(f"obs[{split_key!r}] leaks: {' '.join(leaks)}")
    return pd.DataFrame(
        [finding[:2] for finding in findings.values()],
        index=pd.Index(list(findings), name="check"),
        columns=["status", "detail"],
    )


def _units(
    adata: AnnData,
    held_out_by: HeldOutBy,
    conditions: Conditions | None,
    batch_key: str | None,
    dosage_key: str | None,
) -> tuple[list[set[str]], NDArray[np.intp]]:
    """List what could be held out, as sets of names, and which of the sets each cell has."""
    if held_out_by == "cell":
        return [set()], np.zeros(adata.n_obs, dtype=np.intp)
    if held_out_by == "batch":
        if batch_key is None:
            raise ScreenError("Held-out batches cannot be checked without `batch_key`.")
        codes, batches = pd.factorize(obs_column(adata, batch_key).astype(str))
        return [{str(batch)} for batch in batches], codes
    if conditions is None:
        raise ScreenError(
            f"A {held_out_by} that is held out cannot be checked without `perturbation_key` and "
            "`control`."
        )
    if held_out_by == "dose" and dosage_key is None:
        raise ScreenError("Held-out doses cannot be checked without `dosage_key`.")
    rows = zip(conditions.labels, conditions.parts, strict=True)
    if held_out_by == "condition":
        return [{name} if doses else set() for name, doses in rows], conditions.codes
    if held_out_by == "perturbation":
        return [set(doses) for _, doses in rows], conditions.codes
    return [{f"{p}:{dose:g}" for p, dose in doses.items()} for _, doses in rows], conditions.codes


def _plural(held_out_by: HeldOutBy) -> str:
    return "batches" if held_out_by == "batch" else f"{held_out_by}s"


def _held_out(
    labels: NDArray[np.object_],
    is_held_out: NDArray[np.bool_],
    units: list[set[str]],
    unit_codes: NDArray[np.intp],
    names: list[str],
    held_out_by: HeldOutBy,
) -> _Finding:
    """Whether no cell that is seen has what is held out."""
    if held_out_by == "cell":
        return _Finding("not checked", "The split holds out cells, of conditions that are seen.")
    culprits: dict[str, int] = {}
    seen = is_held_out & np.isin(labels, ["train", "validation"])
    for code, n_cells in zip(*np.unique(unit_codes[seen], return_counts=True), strict=True):
        for name in units[code].intersection(names):
            culprits[name] = culprits.get(name, 0) + int(n_cells)
    plural = _plural(held_out_by)
    if not culprits:
        return _Finding("passed", f"No cell that is seen has any of {len(names)} {plural}.")
    most = sorted(culprits, key=lambda name: (-culprits[name], name))
    named = [f"{name} ({culprits[name]} cells)" for name in most]
    return _Finding(
        "failed",
        "",
        f"{plural} held out are seen in training or validation: {listed(named)}. Label these "
        "cells 'test' or 'unused'.",
    )


def _duplicates(
    adata: AnnData, labels: NDArray[np.object_], layer: str | None, min_genes: int
) -> _Finding:
    """Whether no cell is in two parts, by name or by counts."""
    in_a_part = labels != "unused"
    names = np.asarray(adata.obs_names, dtype=object)
    digests, enough = row_digests(adata, layer, min_genes)
    checks = [("names", pd.factorize(names)[0], in_a_part)]
    if digests is not None:
        checks.append(("counts", digests, in_a_part & enough))
    for what, keys, compared in checks:
        cells = np.flatnonzero(compared)
        frame = pd.DataFrame({"key": keys[cells], "label": labels[cells].astype(str)})
        crossing = frame.groupby("key")["label"].transform("nunique").to_numpy() > 1
        if crossing.any():
            shared = frame[crossing].assign(cell=names[cells[crossing]])
            group = shared[shared["key"] == shared["key"].iloc[0]].drop_duplicates("label")
            members = " and ".join(f"{c!r} ({x})" for c, x in group[["cell", "label"]].to_numpy())
            return _Finding(
                "failed",
                "",
                f"{int(crossing.sum())} cells have identical {what} in different parts, such as "
                f"{members}. Drop the copies.",
            )
    n_few = int((in_a_part & ~enough).sum())
    if digests is None:
        return _Finding("passed", "Names differ; there are no counts to compare.")
    return _Finding(
        "passed",
        f"Names and counts differ ({n_few} cells with fewer than {min_genes} genes not compared).",
    )


def _cells_used(
    adata: AnnData,
    labels: NDArray[np.object_],
    is_held_out: NDArray[np.bool_],
    selections: Sequence[str] | None,
) -> _Finding:
    """Whether nothing that was recorded was computed on cells that are held out."""
    records = adata.uns.get(CELLS_USED_UNS_KEY, {})
    if selections is None:
        unknown = [
            name
            for name, where in (("highly_variable", adata.var), ("rank_genes_groups", adata.uns))
            if name in where and name not in records
        ]
        selections = list(records)
        if not selections:
            detail = "Nothing is recorded."
            if unknown:
                detail = f"Not known on which cells {listed(unknown)} were computed."
            return _Finding("not checked", detail)
    forbidden = (labels == "test") | (is_held_out & (labels == "unused"))
    problems, n_validation, n_dropped = [], 0, 0
    for name in [selections] if isinstance(selections, str) else selections:
        if name not in records or records[name]["obs_column"] not in adata.obs:
            problems.append(
                f"it is not recorded on which cells {name!r} was computed; use select_genes, or "
                "record_cells_used after computing it on training cells."
            )
            continue
        record = records[name]
        used = adata.obs[record["obs_column"]].to_numpy(dtype=bool)
        if leaked := np.flatnonzero(used & forbidden).tolist():
            problems.append(
                f"{name!r} was computed on {len(leaked)} cells that are held out, such as "
                f"{listed(adata.obs_names[leaked], 3)}; compute it on the training cells."
            )
        elif (n_used := int(used.sum())) < record["n_cells"]:
            n_dropped += record["n_cells"] - n_used  # which, a fingerprint cannot tell
        elif fingerprint(adata.obs_names[used]) != record["fingerprint"]:
            problems.append(
                f"obs[{record['obs_column']!r}] does not tell the {record['n_cells']} cells that "
                f"{name!r} was computed on; compute it again."
            )
        if "genes" in record and name in adata.var:
            now = set(adata.var_names[adata.var[name].to_numpy(dtype=bool)])
            then = set(map(str, record["genes"]))
            if changed := sorted(now ^ (then & set(adata.var_names))):
                problems.append(
                    f"var[{name!r}] is not what was selected on the recorded cells: "
                    f"{len(changed)} genes differ, such as {listed(changed, 3)}; select again."
                )
        n_validation += int((used & (labels == "validation")).sum())
    if problems:
        return _Finding("failed", "", " ".join(p[0].upper() + p[1:] for p in problems))
    detail = f"{listed(selections)}: computed on no cell that is held out."
    if n_validation:
        detail += f" {n_validation} cells for validation were used."
    if n_dropped:
        detail += f" {n_dropped} cells that were used have been dropped since."
    return _Finding("passed", detail)


def _controls(
    labels: NDArray[np.object_], conditions: Conditions | None, is_control: NDArray[np.bool_]
) -> _Finding:
    """Count the controls of each part, which may be shared."""
    if conditions is None:
        return _Finding("not checked", "It is not known which cells are controls.")
    counts = [f"{int((is_control & (labels == part)).sum())} in {part}" for part in _PARTS]
    return _Finding("reported", f"Control cells: {', '.join(counts)}.")
