"""Whether what a split holds out has been seen before it is tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.conditions import Conditions, as_labels, obs_column
from scvi_sams.evaluation._splits import (
    SPLIT_LABELS,
    SPLITS_UNS_KEY,
    HeldOutBy,
    check_names,
    split_column,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


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
) -> pd.DataFrame:
    """Refuse a split whose test set has been seen in part.

    Cells for validation count as seen, as choices are made on them.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split. What it holds out is taken from its record in
        ``adata.uns["scvi_sams_splits"]``; the other arguments are for a column of one's own, and
        override the record.
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

    Returns
    -------
    pandas.DataFrame
        A row a check, ``held out``, ``duplicate names`` and ``controls``, with its ``status``
        (``"passed"``, ``"reported"`` or ``"not checked"``) and ``detail``.

    Raises
    ------
    ScreenError
        If a held-out condition, perturbation, batch or dose has cells that are seen (control
        cells may be: their number is reported), or a name of a cell occurs in two parts. The
        message names all culprits. Or if a name in `held_out` is one that no cell has, or a column
        is absent.
    ValueError
        If `held_out_by` is none of the five, or `held_out` is given for a split by cell.

    Notes
    -----
    Anything else that was computed on the test cells has seen them as well: select genes, for
    instance, on ``adata[adata.obs["split"] == "train"]``.

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
    units, unit_codes = _units(adata, held_out_by, conditions, batch_key, dosage_key)
    plural = "batches" if held_out_by == "batch" else f"{held_out_by}s"
    if held_out is not None:
        names = as_labels(held_out)
        if held_out_by == "condition" and conditions is not None:
            names = [conditions.labels[code] for code in conditions.find(names)]
        else:
            check_names(names, sorted(set().union(*units)), plural, "held_out")
    in_test = set().union(*(units[code] for code in np.unique(unit_codes[labels == "test"])))
    if held_out_by in {"condition", "batch"} or not names:
        names = sorted(in_test.union(names))

    is_control = np.zeros(adata.n_obs, dtype=bool)
    controls = _Finding("not checked", "It is not known which cells are controls.")
    if conditions is not None:
        is_control = conditions.is_control[conditions.codes]
        counts = [
            f"{int((is_control & (labels == part)).sum())} in {part}" for part in SPLIT_LABELS[:3]
        ]
        controls = _Finding("reported", f"Control cells: {', '.join(counts)}.")
    seen = np.isin(labels, ["train", "validation"]) & ~is_control
    findings = {
        "held out": _Finding("not checked", "The split holds out cells, of conditions seen.")
        if held_out_by == "cell"
        else _held_out(seen, units, unit_codes, names, plural),
        "duplicate names": _duplicates(adata.obs_names, labels),
        "controls": controls,
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
    units = [
        {
            "condition": {label} if parts else set(),
            "perturbation": set(parts),
            "dose": {f"{name}:{dose:g}" for name, dose in parts.items()},
        }[held_out_by]
        for label, parts in zip(conditions.labels, conditions.parts, strict=True)
    ]
    return units, conditions.codes


def _held_out(
    seen: NDArray[np.bool_],
    units: list[set[str]],
    unit_codes: NDArray[np.intp],
    names: list[str],
    plural: str,
) -> _Finding:
    """Whether no cell that is seen has what is held out."""
    culprits: dict[str, int] = {}
    for code, n_cells in zip(*np.unique(unit_codes[seen], return_counts=True), strict=True):
        for name in units[code].intersection(names):
            culprits[name] = culprits.get(name, 0) + int(n_cells)
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


def _duplicates(cells: pd.Index, labels: NDArray[np.object_]) -> _Finding:
    """Whether no name of a cell is in two parts."""
    frame = pd.DataFrame({"cell": cells, "part": labels.astype(str)})[labels != "unused"]
    crossing = frame.groupby("cell")["part"].transform("nunique") > 1
    if not crossing.any():
        return _Finding("passed", "No name of a cell is in two parts.")
    shared = frame[crossing]
    first = shared["cell"].iloc[0]
    parts = sorted(set(shared.loc[shared["cell"] == first, "part"]))
    return _Finding(
        "failed",
        "",
        f"{len(shared)} cells have identical names in different parts, such as {first!r} in "
        f"{' and '.join(parts)}. Drop the copies.",
    )
