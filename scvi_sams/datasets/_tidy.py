"""From the formats in which public screens are published to the one this package reads.

Every function takes an AnnData as read from the published file and returns a new one: counts in
``X`` and ``layers["counts"]`` (CSR, float32), conditions in ``obs["perturbation"]`` as
``"control"``, ``"A"`` or ``"A+B"``, and the label of the source in ``obs["source_label"]``. No
cell and no column is dropped; what is missing in the source stays missing, with a warning.
"""

from __future__ import annotations

__all__ = ["tidy_dixit", "tidy_papalexi", "tidy_sciplex", "tidy_scperturb"]

import re
import warnings
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

CONTROL = "control"
_MISSING = frozenset({"", "nan", "None", "NA"})
_GUIDE = re.compile(r"p[_-](?:sg)?(?P<target>[^_-]+)")


def tidy_scperturb(
    adata: ad.AnnData,
    control: Iterable[str] = ("control", "non-targeting"),
    pair_delimiter: str | None = "_",
) -> ad.AnnData:
    """Tidy a CRISPR screen in scPerturb's format.

    Parameters
    ----------
    adata
        Cells x genes, raw counts in ``X``, labels in ``obs["perturbation"]``.
    control
        Labels of unperturbed cells.
    pair_delimiter
        What stands between the genes of a combination. ``None`` where every cell has one
        perturbation, so that symbols may hold any character.

    Returns
    -------
    AnnData (cells x genes), as described at the top of the module.

    Raises
    ------
    ScreenError
        If ``obs["perturbation"]`` is missing, no cell is a control, or ``X`` holds anything but
        counts.
    """
    controls = frozenset(control)

    def condition(label: str) -> str:
        parts = [label] if pair_delimiter is None else label.split(pair_delimiter)
        return _condition(parts, controls)

    return _tidy(adata, "perturbation", condition)


def tidy_dixit(adata: ad.AnnData) -> ad.AnnData:
    """Tidy the Dixit screen, whose labels name guides rather than genes.

    Guides such as ``p_sgELK1_2`` become their target (``ELK1``), several guides of one target
    become one, and intergenic guides (``p_INTERGENIC393453``) count as control. Guides of one
    cell are separated by ``" + "``, or by ``"_"`` where their own names were written with ``"-"``.

    Parameters
    ----------
    adata
        Cells x genes, raw counts in ``X``, labels in ``obs["perturbation"]``.

    Returns
    -------
    AnnData (cells x genes), as described at the top of the module.

    Raises
    ------
    ScreenError
        As :func:`tidy_scperturb`.
    """

    def target(guide: str) -> str:
        match = _GUIDE.match(guide)
        name = match["target"] if match else guide
        return CONTROL if name.startswith("INTERGENIC") else name

    def condition(label: str) -> str:
        guides = label.split(" + " if " + " in label or label.startswith("p_") else "_")
        return _condition(map(target, guides), {CONTROL})

    return _tidy(adata, "perturbation", condition)


def tidy_papalexi(adata: ad.AnnData) -> ad.AnnData:
    """Tidy the Papalexi screen: target genes in ``obs["gene_target"]``, ``"NT"`` the control.

    Parameters
    ----------
    adata
        Cells x genes, raw counts in ``X``.

    Returns
    -------
    AnnData (cells x genes), as described at the top of the module.

    Raises
    ------
    ScreenError
        As :func:`tidy_scperturb`, of ``obs["gene_target"]``.
    """
    return _tidy(adata, "gene_target", lambda label: _condition([label], {"NT", CONTROL}))


def tidy_sciplex(adata: ad.AnnData) -> ad.AnnData:
    """Tidy a drug screen in scPerturb's format.

    Parameters
    ----------
    adata
        Cells x genes, raw counts in ``X``, with ``obs["perturbation"]`` (one drug a cell),
        ``obs["dose_value"]`` and ``obs["cell_line"]``.

    Returns
    -------
    AnnData (cells x genes), as described at the top of the module, with ``obs["dose"]`` (float,
    in the unit of the source, 0 for control) and ``obs["cell_line"]`` (categorical).

    Raises
    ------
    ScreenError
        As :func:`tidy_scperturb`, or if a column is missing.
    """
    _require(adata, "dose_value", "cell_line")
    tidy = _tidy(adata, "perturbation", lambda label: _condition([label], {CONTROL, "Vehicle"}))
    dose = pd.to_numeric(tidy.obs["dose_value"].astype(object), errors="coerce").astype(float)
    dose[tidy.obs["perturbation"] == CONTROL] = 0.0
    if n_without := int((dose.isna() & tidy.obs["perturbation"].notna()).sum()):
        warnings.warn(
            f"{n_without} treated cells have no number in obs['dose_value']: leave them out with "
            f'adata[adata.obs["dose"].notna()].copy().',
            UserWarning,
            stacklevel=3,
        )
    tidy.obs["dose"] = dose
    tidy.obs["cell_line"] = tidy.obs["cell_line"].astype("category")
    return tidy


def _condition(parts: Iterable[str], controls: Container[str]) -> str:
    """Write a condition as this package does: control parts left out, the others sorted.

    Sorting gives a pair one name, whichever guide was read first. A ``"+"`` within a name (the
    drug ``(+)-JQ1``) would read as a combination and is spelt out.
    """
    names = sorted({part.replace("+", "plus") for part in parts if part not in controls})
    return "+".join(names) or CONTROL


def _tidy(adata: ad.AnnData, label_key: str, condition: Callable[[str], str]) -> ad.AnnData:
    """Translate the labels and bring the counts into place."""
    _require(adata, label_key)
    labels = adata.obs[label_key].astype("category")
    written = {
        label: np.nan if str(label) in _MISSING else condition(str(label))
        for label in labels.cat.categories
    }
    conditions = labels.astype(object).map(written).astype("category")
    if CONTROL not in conditions.cat.categories:
        raise ScreenError(
            f"No cell of obs[{label_key!r}] is a control; the labels begin with "
            f"{', '.join(map(repr, labels.cat.categories[:5]))}. Is this the right file?"
        )
    if n_missing := int(conditions.isna().sum()):
        warnings.warn(
            f"{n_missing} of {adata.n_obs} cells have no label in the source and are neither "
            f"control nor perturbed: leave them out with "
            f'adata[adata.obs["perturbation"].notna()].copy().',
            UserWarning,
            stacklevel=4,
        )
    counts = _counts(adata)
    obs = adata.obs.assign(source_label=labels, perturbation=conditions)
    return ad.AnnData(
        counts,
        obs=obs,
        var=adata.var.copy(),
        uns=dict(adata.uns),
        obsm=dict(adata.obsm),
        layers={"counts": counts.copy()},
    )


def _counts(adata: ad.AnnData) -> sp.csr_matrix:
    """Bring ``X`` into CSR, and refuse it unless it holds counts."""
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    wrong = ~((counts.data >= 0) & (counts.data == np.floor(counts.data)))  # NaN included
    if wrong.any():
        cell = np.searchsorted(counts.indptr, np.argmax(wrong), side="right") - 1
        raise ScreenError(
            f"X holds values that are no counts, the first {counts.data[np.argmax(wrong)]:g} in "
            f"cell {adata.obs_names[cell]!r}: use the file with the raw counts."
        )
    return counts


def _require(adata: ad.AnnData, *columns: str) -> None:
    """Refuse a file that lacks a column of obs."""
    for column in columns:
        if column not in adata.obs:
            raise ScreenError(
                f"The file has no obs[{column!r}], only {', '.join(map(repr, adata.obs))}: is "
                f"this the right file?"
            )
