"""Several h5ad files as one screen, whose counts stay where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from scvi_sams._exceptions import ScreenError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOURCES = "joined_files"  # attribute of a matrix: path, size and time of change of each file
_PARTS = ("data", "indices")  # of a CSR matrix, besides where rows start


def join_files(
    files: Iterable[str | os.PathLike[str]],
    joined: str | os.PathLike[str],
    *,
    layer: str | None = None,
    label: str | None = "file",
    overwrite: bool = False,
) -> ad.AnnData:
    """Join h5ad files to one AnnData, without a second copy of their counts.

    What is written has the annotation of all cells, and points to the counts in the files (HDF5's
    virtual datasets): a megabyte or so for ten thousand cells. It is an h5ad file like any other
    as long as the files stay where they are.

    Parameters
    ----------
    files
        Files of cells with the same genes in the same order, and counts by cell (CSR) or dense.
    joined
        The file to write.
    layer
        Layer with the counts in the files; ``X`` by default. It is ``X`` of what is joined, as
        anndata reads layers into memory.
    label
        Column of ``obs`` that says, by name without ending, which file a cell is of; ``None`` for
        no such column. Names of cells that repeat get it as an ending too.
    overwrite
        Whether `joined` may be there already.

    Returns
    -------
    anndata.AnnData
        All cells in the order of the files, backed by `joined`, with columns of ``obs`` and
        ``obsm`` that all files have; nothing else is taken over.

    Raises
    ------
    ScreenError
        If files cannot be joined; the message names the file and the mend.

    Examples
    --------
    >>> import tempfile
    >>> import scvi_sams
    >>> folder = Path(tempfile.mkdtemp())
    >>> for seed in (0, 1):
    ...     cells = scvi_sams.datasets.simulated_screen(n_cells=100, n_genes=30, seed=seed)
    ...     cells.write_h5ad(folder / f"plate_{seed}.h5ad")
    >>> files = sorted(folder.glob("plate_*.h5ad"))
    >>> adata = join_files(files, folder / "screen.h5ad", layer="counts")
    >>> adata.shape, adata.obs["file"].unique().tolist()
    ((200, 30), ['plate_0', 'plate_1'])
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    """
    if isinstance(files, str | os.PathLike) or not isinstance(files, Iterable):
        raise ScreenError(f"files={files!r} cannot be used: give a list of paths.")
    paths, joined = [_path(path) for path in files], _path(joined)
    if not paths:
        raise ScreenError("There is no file to join: the list is empty.")
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ScreenError(f"Files that are given more than once: {listed(map(str, twice))}.")
    if not (label is None or isinstance(label, str)):
        raise ScreenError(f"label={label!r} cannot be used: give the name of a column, or None.")
    if joined.is_dir() or not joined.parent.is_dir():
        raise ScreenError(f"{joined} cannot be written: name a file in a folder that is there.")
    if joined.exists() and (not overwrite or joined in paths):
        raise ScreenError(f"{joined} is there already: name another, or give overwrite=True.")
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):  # such as plate_1/cells.h5ad, plate_2/cells.h5ad
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        names = [str(path.with_suffix("")) for path in paths]
    with ExitStack() as stack:
        opened: list[h5py.File] = []
        for path in paths:
            if not path.is_file() or not h5py.is_hdf5(path):
                raise ScreenError(
                    f"{path} is no h5ad file: give files that adata.write_h5ad wrote."
                )
            with _damage_named(path):
                opened.append(stack.enter_context(h5py.File(path)))
        annotation = _annotation(opened, names, label)
        matrices = _matrices(opened, "X" if layer is None else f"layers/{layer}")
        unfinished = joined.with_name(f".{joined.name}.{os.getpid()}.partial")
        try:
            annotation.write_h5ad(unfinished)
            with h5py.File(unfinished, "a") as target:
                if "X" in target:
                    del target["X"]
                _link(target, opened, matrices, annotation.n_vars)
            unfinished.replace(joined)
        finally:
            unfinished.unlink(missing_ok=True)
    return ad.read_h5ad(joined, backed="r")


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ScreenError(f"{path!r} is no path of a file.")
    return Path(path).resolve()


@contextmanager
def _damage_named(path: object) -> Iterator[None]:
    """Name the file that HDF5 or anndata cannot read."""
    try:
        yield
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ScreenError(
            f"{path} cannot be read, it is damaged or cut off: {error}. Fetch or write it again."
        ) from error


def _annotation(files: list[h5py.File], names: list[str], label: str | None) -> ad.AnnData:
    """What all files say of their cells, and the genes."""
    parts = []
    for file in files:
        if missing := {"obs", "var"}.difference(file):
            raise ScreenError(f"{file.filename} holds no AnnData: {listed(missing)} missing.")
        with _damage_named(file.filename):
            obs, var = (read_elem(file[key]) for key in ("obs", "var"))
            obsm = {key: read_elem(value) for key, value in file.get("obsm", {}).items()}
            parts.append(ad.AnnData(obs=obs, var=var, obsm=obsm))
    genes = parts[0].var_names
    for file, part in zip(files, parts, strict=True):
        if part.var_names.equals(genes):
            continue
        apart = part.var_names.symmetric_difference(genes)
        how = f"other genes ({listed(apart)})" if len(apart) else "its genes in another order"
        raise ScreenError(
            f"{file.filename} has {how} than {files[0].filename}: write it again with the genes "
            "of the first, `adata[:, genes]`."
        )
    for column in set.intersection(*(set(part.obs) for part in parts)):
        dtypes = [_values_dtype(part.obs[column]) for part in parts]
        numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in dtypes]
        if any(numeric) and not all(numeric):
            raise ScreenError(
                f"obs[{column!r}] holds numbers in {files[numeric.index(True)].filename} and text "
                f"in {files[numeric.index(False)].filename}: write it alike."
            )
    if label is not None and label in parts[0].obs:
        raise ScreenError(f"obs has a column {label!r} already: give another `label`, or None.")
    cells = pd.Index(np.concatenate([part.obs_names for part in parts]))
    return ad.concat(
        parts,
        join="inner",
        label=label,
        keys=names,
        index_unique=None if cells.is_unique else "-",
        merge="same",
    )


def _values_dtype(column: pd.Series) -> Any:
    dtype = column.dtype
    return dtype.categories.dtype if isinstance(dtype, pd.CategoricalDtype) else dtype


def _matrices(files: list[h5py.File], key: str) -> list[Any]:
    """The matrix of each file, all of one layout."""
    for file in files:
        if key not in file or (layout := _layout(file[key])) == "null":
            raise ScreenError(
                f"{file.filename} has no {key}: say which layer holds the counts, `layer`."
            )
        if layout not in ("csr_matrix", "array"):
            raise ScreenError(
                f"{key} of {file.filename} is stored as {layout}: write it by cell, "
                "`adata.X = adata.X.tocsr()`."
            )
        if layout != (first := _layout(files[0][key])):
            raise ScreenError(
                f"{key} of {file.filename} is stored as {layout}, that of {files[0].filename} as "
                f"{first}: write all alike."
            )
    return [file[key] for file in files]


def _layout(matrix: h5py.Group | h5py.Dataset) -> str:
    return str(matrix.attrs.get("encoding-type", "of an old version of anndata"))


def _link(target: h5py.File, files: list[h5py.File], parts: list[Any], n_genes: int) -> None:
    """Make an X that points to the matrices of the files, one below the other."""
    sources = [
        (file.filename, (stat := os.stat(file.filename)).st_size, stat.st_mtime_ns)
        for file in files
    ]
    if isinstance(parts[0], h5py.Dataset):
        _stack(target, "X", parts)
        target["X"].attrs.update(dict(parts[0].attrs))
    else:
        starts = [np.asarray(part["indptr"][...], np.int64) for part in parts]
        lengths = np.concatenate([np.diff(start) for start in starts])
        group = target.create_group("X")
        group.attrs.update(dict(parts[0].attrs))
        group.attrs["shape"] = np.array([len(lengths), n_genes])
        group["indptr"] = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        for name in _PARTS:
            _stack(group, name, [part[name] for part in parts])
    target["X"].attrs[_SOURCES] = json.dumps(sources)


def _stack(target: h5py.Group, name: str, parts: list[h5py.Dataset]) -> None:
    """A dataset of the rows of others, which are read when they are asked for."""
    rows = [part.shape[0] for part in parts]
    dtype = np.result_type(*(part.dtype for part in parts))
    layout = h5py.VirtualLayout((sum(rows), *parts[0].shape[1:]), dtype)
    stops = np.cumsum(rows)
    for part, start, stop in zip(parts, stops - rows, stops, strict=True):
        if stop > start:
            layout[start:stop] = h5py.VirtualSource(part)
    target.create_virtual_dataset(name, layout)


def check_sources(matrix: Any) -> None:
    """Check that the files a joined matrix points to are there, as they were.

    HDF5 gives zeros in place of what is not there.
    """
    holder = getattr(matrix, "group", matrix)
    attrs = getattr(holder, "attrs", {})
    if not isinstance(holder, h5py.Group | h5py.Dataset) or _SOURCES not in attrs:
        return
    for path, size, changed in json.loads(attrs[_SOURCES]):
        try:
            stat = os.stat(path)
        except OSError as error:
            raise ScreenError(
                f"{holder.file.filename} points to the counts in {path}, which is not there: put "
                "it back, or join the files again."
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            raise ScreenError(
                f"{holder.file.filename} points to the counts in {path}, which was changed since: "
                "join the files again."
            )
