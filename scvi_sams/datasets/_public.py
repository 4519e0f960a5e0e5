"""Published screens, downloaded once and brought into one format."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from scvi_sams._exceptions import ScreenError, listed, nearest
from scvi_sams.datasets._cache import fetch, is_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

_CONTROL = "control"
_CONTROLS = frozenset({_CONTROL, "non-targeting", "NT", "Vehicle"})
_MISSING = frozenset({"", "nan", "None", "NA"})
_GUIDE = re.compile(r"p[_-](?:sg)?(?P<target>[^_-]+)")


def public_screen(
    name: str,
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Load a published screen, all in one format.

    Parameters
    ----------
    name
        One of the following:

        * ``"norman_2019"``: activation of 105 genes and of 131 pairs of them in 110,000 K562
          cells; batches in ``obs["gemgroup"]`` (Science 365, 786, doi:10.1126/science.aax4438).
        * ``"replogle_2022_k562_essential"``: interference with 2,000 essential genes in 310,000
          K562 cells; batches in ``obs["batch"]`` (Cell 185, 2559,
          doi:10.1016/j.cell.2022.05.013).
        * ``"replogle_2022_rpe1"``: the same of 2,400 genes in 248,000 RPE1 cells.
        * ``"replogle_2022_k562_gwps"``: the same of 9,900 genes in 2 million K562 cells. It takes
          9 GB of disk and over 100 GB of memory; on a smaller machine read the file of
          :func:`fetch_screen` with ``anndata.read_h5ad(path, backed="r")``, select cells, and
          give them to :func:`tidy_screen`.
        * ``"papalexi_2021"``: knock-outs of 25 genes in 20,700 stimulated THP-1 cells
          (ECCITE-seq, the RNA of it); batches in ``obs["replicate"]`` (Nature Genetics 53, 322,
          doi:10.1038/s41588-021-00778-2).
        * ``"dixit_2016"``: knock-outs of transcription factors in K562 cells, several in a cell;
          guides are collapsed to their targets, and intergenic guides are controls. Cells in
          which no guide was found are called ``"control"`` in the source (Cell 167, 1853,
          doi:10.1016/j.cell.2016.11.038).
        * ``"srivatsan_2020_sciplex3"``: 188 drugs at four doses in A549, K562 and MCF7 cells, with
          ``obs["dose"]`` (nM, 10 to 10,000, 0 for control) and ``obs["cell_line"]``; batches in
          ``obs["replicate"]``. A ``"+"`` in the name of a drug is spelt out. A model whose shift
          is linear in the dose wants it on a scale near 1, as
          ``np.log1p(adata.obs["dose"]) / np.log1p(1e4)`` (Science 367, 45,
          doi:10.1126/science.aax6234).
    path
        A file that is already on this machine; nothing is downloaded then.
    cache_dir
        Folder that keeps the download. By default the environment variable ``SCVI_SAMS_CACHE``,
        else the user's cache folder for ``scvi_sams``.
    progressbar
        Whether to show the progress of the download.

    Returns
    -------
    anndata.AnnData
        Cells x genes, as of :func:`tidy_screen`.

    Raises
    ------
    DatasetUnavailableError
        If the file cannot be downloaded. The message says what to do without a network.
    ScreenError
        If there is no such screen, or the file is not the one expected.

    Notes
    -----
    The files are those of scPerturb (Peidli et al., Nature Methods 2024) and, of Papalexi and
    Replogle's genome-wide screen, of pertpy. No checksum was published with them: size and SHA-256
    are recorded beside a file at its first use and checked from then on.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.public_screen("norman_2019")  # doctest: +SKIP
    """
    source = _source(name)
    if path is None:
        file = fetch(source.url, cache_dir, progressbar)
    elif (file := Path(path)).is_file():
        if not is_whole(file):
            raise ScreenError(f"{file} is not an HDF5 file, or is cut off.")
    else:
        raise ScreenError(f"`path` names no file: {path}. Without it, {source.url} is downloaded.")
    return tidy_screen(_read(file), name)


def fetch_screen(
    name: str, cache_dir: str | os.PathLike[str] | None = None, progressbar: bool = True
) -> Path:
    """Download the published file of a screen, unless it is in the cache.

    Parameters
    ----------
    name, cache_dir, progressbar
        As for :func:`public_screen`.

    Returns
    -------
    pathlib.Path
        The file, in the format of its source.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`public_screen`.

    Examples
    --------
    >>> import scvi_sams
    >>> path = scvi_sams.datasets.fetch_screen("papalexi_2021")  # doctest: +SKIP
    """
    return fetch(_source(name).url, cache_dir, progressbar)


def tidy_screen(adata: ad.AnnData, name: str) -> ad.AnnData:
    """Bring cells of a published file into the format of this package.

    No cell and no column is dropped; what is missing in the source stays missing, with a warning.

    Parameters
    ----------
    adata
        Cells x genes as read from the published file, raw counts in ``X``.
    name
        Screen, as for :func:`public_screen`.

    Returns
    -------
    anndata.AnnData
        A copy (cells x genes):

        * ``X`` and ``layers["counts"]``: counts (CSR, float32)
        * ``obs["perturbation"]``: ``"control"``, ``"A"`` or ``"A+B"``, the parts sorted
        * ``obs["source_label"]``: the label as published
        * every other column of the published file

    Raises
    ------
    ScreenError
        If a column is missing, no cell is a control, or ``X`` holds anything but counts.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import scvi_sams
    >>> adata = ad.AnnData(np.ones((2, 3), np.float32))
    >>> adata.obs["perturbation"] = ["KLF1_CEBPA", "control"]
    >>> list(scvi_sams.datasets.tidy_screen(adata, "norman_2019").obs["perturbation"])
    ['CEBPA+KLF1', 'control']
    """
    source = _source(name)
    for column in (source.label_key, *source.needed):
        if column not in adata.obs:
            raise ScreenError(
                f"The file has no obs[{column!r}], only {', '.join(map(repr, adata.obs))}: is "
                f"this the right file?"
            )
    labels = adata.obs[source.label_key].astype("category")
    written = {
        label: np.nan if str(label) in _MISSING else _condition(source.parts(str(label)))
        for label in labels.cat.categories
    }
    conditions = labels.astype(object).map(written).astype("category")
    if _CONTROL not in conditions.cat.categories:
        raise ScreenError(
            f"No cell of obs[{source.label_key!r}] is a control; the labels are "
            f"{listed(labels.cat.categories)}. Is this the right file?"
        )
    if n_missing := int(conditions.isna().sum()):
        warnings.warn(
            f"{n_missing} of {adata.n_obs} cells have no label in the source and are neither "
            f"control nor perturbed: leave them out with "
            f'adata[adata.obs["perturbation"].notna()].copy().',
            UserWarning,
            stacklevel=2,
        )
    counts = _counts(adata)
    obs = adata.obs.assign(source_label=labels, perturbation=conditions)
    if "dose_value" in source.needed:
        dose = pd.to_numeric(obs["dose_value"].astype(object), errors="coerce").astype(float)
        obs["dose"] = dose.mask(obs["perturbation"] == _CONTROL, 0.0)
        if n_without := int((obs["dose"].isna() & conditions.notna()).sum()):
            warnings.warn(
                f"{n_without} treated cells have no number in obs['dose_value']: leave them out "
                f'with adata[adata.obs["dose"].notna()].copy().',
                UserWarning,
                stacklevel=2,
            )
        obs["cell_line"] = obs["cell_line"].astype("category")
    return ad.AnnData(
        counts,
        obs=obs,
        var=adata.var.copy(),
        uns=dict(adata.uns),
        obsm=dict(adata.obsm),
        layers={"counts": counts.copy()},
    )


def _pair(label: str) -> list[str]:
    return label.split("_")


def _guides(label: str) -> list[str]:
    """Targets of Dixit's guides: of ``p_sgELK1_2`` it is ``ELK1``."""
    # Guides of a cell are separated by " + ", or by "_" where their own names have "-".
    guides = label.split(" + " if " + " in label or label.startswith("p_") else "_")
    matches = ((guide, _GUIDE.match(guide)) for guide in guides)
    targets = (match["target"] if match else guide for guide, match in matches)
    return [_CONTROL if target.startswith("INTERGENIC") else target for target in targets]


class _Source(NamedTuple):
    """Where a screen is, and how its cells are labelled."""

    url: str
    parts: Callable[[str], list[str]] = lambda label: [label]  # perturbations in a label
    label_key: str = "perturbation"
    needed: tuple[str, ...] = ()  # further columns of obs


_SCPERTURB = "https://zenodo.org/records/7041849/files"
_REPLOGLE = "ReplogleWeissman2022"
_PERTPY = "https://exampledata.scverse.org/pertpy"
_SOURCES = {
    "norman_2019": _Source(
        f"{_SCPERTURB}/NormanWeissman2019_filtered.h5ad", lambda x: x.split("_")
    ),
    "replogle_2022_k562_essential": _Source(
        f"{_SCPERTURB}/ReplogleWeissman2022_K562_essential.h5ad"
    ),
    "replogle_2022_rpe1": _Source(f"{_SCPERTURB}/{_REPLOGLE}_rpe1.h5ad"),
    "replogle_2022_k562_gwps": _Source(f"{_PERTPY}/replogle_2022_k562_gwps.h5ad"),
    "papalexi_2021": _Source(f"{_PERTPY}/papalexi_2021.h5mu", label_key="gene_target"),
    "dixit_2016": _Source(f"{_SCPERTURB}/DixitRegev2016.h5ad", _guides),
    "srivatsan_2020_sciplex3": _Source(
        f"{_SCPERTURB}/SrivatsanTrapnell2020_sciplex3.h5ad",
        needed=("dose_value", "cell_line"),
    ),
}


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        close = nearest(name, _SOURCES) or list(_SOURCES)
        raise ScreenError(f"There is no public screen {name!r}; there is {listed(close, 7)}.")
    return _SOURCES[name]


def _condition(parts: Iterable[str]) -> str:
    """Write a condition as this package does: control parts left out, the others sorted.

    A ``"+"`` within a name (the drug ``(+)-JQ1``) would read as a combination and is spelt out.
    """
    names = sorted({part.replace("+", "plus") for part in parts if part not in _CONTROLS})
    return "+".join(names) or _CONTROL


def _read(path: Path) -> ad.AnnData:
    """Read an h5ad, or the RNA of an h5mu."""
    with h5py.File(path) as handle:
        if path.suffix != ".h5mu":
            # Dense counts in pieces, as Replogle's would not fit in memory.
            as_sparse = ["X"] if isinstance(handle.get("X"), h5py.Dataset) else []
            return ad.read_h5ad(path, as_sparse=as_sparse)
        if "mod/rna" not in handle:
            raise ScreenError(f"{path} has no modality 'rna': is this the right file?")
        adata, shared = read_elem(handle["mod/rna"]), read_elem(handle["obs"])
    if isinstance(adata, dict):  # files of early mudata do not say that a modality is an AnnData
        adata = ad.AnnData(**adata)
    # The target genes are in the table that all modalities share.
    adata.obs = adata.obs.join(shared[shared.columns.difference(adata.obs.columns)])
    return adata


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
