"""Published screens, downloaded once and brought into one format."""

from __future__ import annotations

__all__ = [
    "dixit_2016",
    "norman_2019",
    "papalexi_2021",
    "replogle_2022_k562_essential",
    "replogle_2022_k562_gwps",
    "replogle_2022_rpe1",
    "srivatsan_2020_sciplex3",
]

from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
from anndata.io import read_elem

from scvi_sams._exceptions import ScreenError
from scvi_sams.datasets._cache import fetch
from scvi_sams.datasets._tidy import tidy_dixit, tidy_papalexi, tidy_sciplex, tidy_scperturb

if TYPE_CHECKING:
    import os

_SCPERTURB = "https://zenodo.org/records/7041849/files"
_PERTPY = "https://exampledata.scverse.org/pertpy"


def norman_2019(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Norman et al. 2019: activation of 105 genes and of 131 pairs of them in K562 cells.

    Parameters
    ----------
    path
        A file that is already on this machine; nothing is downloaded then.
    cache_dir
        Folder that keeps the download. By default the environment variable ``SCVI_SAMS_CACHE``,
        else the user's cache folder for ``scvi_sams``.
    progressbar
        Whether to show the progress of the download.

    Returns
    -------
    AnnData of about 110,000 cells x 33,694 genes:

    * ``X`` and ``layers["counts"]``: counts (CSR, float32)
    * ``obs["perturbation"]``: ``"control"``, ``"A"`` or ``"A+B"``, the parts sorted
    * ``obs["source_label"]``: the label as published
    * ``obs["gemgroup"]``: the 10x lane, a batch
    * every other column of the published file

    Raises
    ------
    DatasetUnavailableError
        If the file cannot be downloaded. The message says what to do without a network.
    ScreenError
        If the file differs from the one recorded at its first use, or is not the expected one.

    Notes
    -----
    Published in Science 365, 786 (2019), doi:10.1126/science.aax4438; the file is that of
    scPerturb (Peidli et al., Nature Methods 2024). No checksum was published with it: size and
    SHA-256 are recorded beside the file at its first use and checked from then on.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.norman_2019()  # doctest: +SKIP
    """
    file = _locate(f"{_SCPERTURB}/NormanWeissman2019_filtered.h5ad", path, cache_dir, progressbar)
    return tidy_scperturb(_read_h5ad(file))


def replogle_2022_k562_essential(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Replogle et al. 2022: interference with about 2,000 essential genes in K562 cells.

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`.

    Returns
    -------
    AnnData of about 310,000 cells, laid out as by :func:`norman_2019`; every cell has one
    perturbation and ``obs["batch"]`` is the 10x lane.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    Published in Cell 185, 2559 (2022), doi:10.1016/j.cell.2022.05.013; the file is scPerturb's.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.replogle_2022_k562_essential()  # doctest: +SKIP
    """
    url = f"{_SCPERTURB}/ReplogleWeissman2022_K562_essential.h5ad"
    file = _locate(url, path, cache_dir, progressbar)
    return tidy_scperturb(_read_h5ad(file), pair_delimiter=None)


def replogle_2022_rpe1(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Replogle et al. 2022: interference with about 2,400 essential genes in RPE1 cells.

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`.

    Returns
    -------
    AnnData of about 248,000 cells, laid out as by :func:`replogle_2022_k562_essential`.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    Published in Cell 185, 2559 (2022), doi:10.1016/j.cell.2022.05.013; the file is scPerturb's.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.replogle_2022_rpe1()  # doctest: +SKIP
    """
    url = f"{_SCPERTURB}/ReplogleWeissman2022_rpe1.h5ad"
    file = _locate(url, path, cache_dir, progressbar)
    return tidy_scperturb(_read_h5ad(file), pair_delimiter=None)


def replogle_2022_k562_gwps(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Replogle et al. 2022: interference with about 9,900 genes in K562 cells, genome-wide.

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`.

    Returns
    -------
    AnnData of about 2 million cells x 8,248 genes, laid out as by
    :func:`replogle_2022_k562_essential`.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    A download of about 9 GB, and well over 100 GB of memory once read, for ``X`` and the layer
    are two matrices. On a smaller machine read the file with ``anndata.read_h5ad(path,
    backed="r")`` and select cells before tidying.

    Published in Cell 185, 2559 (2022), doi:10.1016/j.cell.2022.05.013; the file is scPerturb's,
    as hosted by scverse for pertpy.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.replogle_2022_k562_gwps()  # doctest: +SKIP
    """
    url = f"{_PERTPY}/replogle_2022_k562_gwps.h5ad"
    file = _locate(url, path, cache_dir, progressbar)
    return tidy_scperturb(_read_h5ad(file), pair_delimiter=None)


def papalexi_2021(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Papalexi et al. 2021: knock-outs of 25 genes in stimulated THP-1 cells (ECCITE-seq).

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`; the file is an ``.h5mu``, of which the ``rna`` modality is
        read.

    Returns
    -------
    AnnData of about 20,700 cells, laid out as by :func:`norman_2019`; ``obs["replicate"]`` is
    the batch. Columns that the file keeps for all modalities together, the target gene among
    them, are joined to those of the RNA.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    Published in Nature Genetics 53, 322 (2021), doi:10.1038/s41588-021-00778-2; the file is that
    of pertpy.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.papalexi_2021()  # doctest: +SKIP
    """
    file = _locate(f"{_PERTPY}/papalexi_2021.h5mu", path, cache_dir, progressbar)
    with h5py.File(file) as handle:
        if "mod/rna" not in handle:
            raise ScreenError(f"{file} has no modality 'rna': is this the right file?")
        adata, shared = read_elem(handle["mod/rna"]), read_elem(handle["obs"])
    if isinstance(adata, dict):  # files of early mudata do not say that a modality is an AnnData
        adata = ad.AnnData(**adata)
    adata.obs = adata.obs.join(shared[shared.columns.difference(adata.obs.columns)])
    return tidy_papalexi(adata)


def dixit_2016(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Dixit et al. 2016: knock-outs of transcription factors in K562 cells, several in a cell.

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`.

    Returns
    -------
    AnnData laid out as by :func:`norman_2019`, without a batch column. Guides are collapsed to
    their targets, and intergenic guides count as control; ``obs["source_label"]`` has the guides.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    scPerturb's file holds the experiment at high multiplicity of infection, and names cells in
    which no guide was found ``"control"``; to be strict about controls, select on
    ``obs["source_label"]``.

    Published in Cell 167, 1853 (2016), doi:10.1016/j.cell.2016.11.038; the file is scPerturb's.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.dixit_2016()  # doctest: +SKIP
    """
    file = _locate(f"{_SCPERTURB}/DixitRegev2016.h5ad", path, cache_dir, progressbar)
    return tidy_dixit(_read_h5ad(file))


def srivatsan_2020_sciplex3(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progressbar: bool = True,
) -> ad.AnnData:
    """Srivatsan et al. 2020: 188 drugs at four doses in A549, K562 and MCF7 cells (sci-Plex 3).

    Parameters
    ----------
    path, cache_dir, progressbar
        As for :func:`norman_2019`.

    Returns
    -------
    AnnData laid out as by :func:`norman_2019`, with ``obs["dose"]`` (nM, 0 for control),
    ``obs["cell_line"]`` and, as batch, ``obs["replicate"]``.

    Raises
    ------
    DatasetUnavailableError, ScreenError
        As :func:`norman_2019`.

    Notes
    -----
    Doses run from 10 to 10,000 nM. A model whose shift is linear in the dose wants them on a
    scale near 1, for example ``np.log1p(adata.obs["dose"]) / np.log1p(1e4)``. Cells that were
    assigned to no well have a missing label, and are kept with a warning. A ``"+"`` in the name
    of a drug is spelt out: ``"(+)-JQ1"`` reads ``"(plus)-JQ1"``.

    Published in Science 367, 45 (2020), doi:10.1126/science.aax6234; the file is scPerturb's.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.srivatsan_2020_sciplex3()  # doctest: +SKIP
    """
    url = f"{_SCPERTURB}/SrivatsanTrapnell2020_sciplex3.h5ad"
    file = _locate(url, path, cache_dir, progressbar)
    return tidy_sciplex(_read_h5ad(file))


def _locate(
    url: str,
    path: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    progressbar: bool,
) -> Path:
    """Path of the file: the user's own, or the one in the cache."""
    if path is None:
        return fetch(url, cache_dir, progressbar)
    if not Path(path).is_file():
        raise ScreenError(f"`path` names no file: {path}. Without it, {url} is downloaded.")
    return Path(path)


def _read_h5ad(path: Path) -> ad.AnnData:
    """Read an h5ad; a dense matrix is read in pieces, for Replogle's would not fit in memory."""
    with h5py.File(path) as handle:
        dense = isinstance(handle["X"], h5py.Dataset)
    return ad.read_h5ad(path, as_sparse=["X"] if dense else [])
