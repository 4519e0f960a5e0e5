"""Checks of an AnnData before a model is set up on it, or reads it."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed, nearest
from scvi_sams.data.joined import check_sources
from scvi_sams.data.matrices import check_structure, is_on_disk, rows_of
from scvi_sams.data.tables import layer_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scvi_sams.data.conditions import Conditions

# Labels of cells that tools for demultiplexing could not assign.
_LEFTOVERS = frozenset({"unassigned", "multiplet", "doublet", "negative", "ambiguous"})
# Entries of a dense block: 64 MiB of float32, whatever the numbers of cells and genes.
_BLOCK_ENTRIES = 2**24


class ScreenManager(AnnDataManager):
    """Registers an AnnData once everything that a model reads of it was checked.

    scvi-tools makes one wherever an AnnData is set up, given to a method of a model, or read again
    after another model had it: no AnnData reaches a model by another way.
    """

    def register_fields(
        self,
        adata: AnnData,
        source_registry: dict[str, Any] | None = None,
        **transfer_kwargs: Any,
    ) -> None:
        """Check the AnnData, and register it as scvi-tools does."""
        asked = self.registry["setup_args"]
        check_adata(adata)
        check_genes(adata)
        if source_registry is not None:
            check_same_genes(adata.var_names, genes_of(source_registry))
        check = check_counts if asked.get("is_count_data", True) else check_features
        check(adata, asked.get("layer"))
        check_covariates(
            adata,
            asked.get("batch_key"),
            asked.get("labels_key"),
            asked.get("categorical_covariate_keys"),
            asked.get("continuous_covariate_keys"),
            asked.get("context_key"),
        )
        if asked.get("size_factor_key") is not None:
            check_size_factor(adata, asked["size_factor_key"])
        super().register_fields(adata, source_registry, **transfer_kwargs)
        if REGISTRY_KEYS.CONT_COVS_KEY in self.data_registry:  # of any numeric type in obs
            key = self.data_registry[REGISTRY_KEYS.CONT_COVS_KEY].attr_key
            adata.obsm[key] = adata.obsm[key].astype(np.float32)

    def get_from_registry(self, registry_key: str) -> Any:
        """What is registered under a key, tables as arrays.

        Of a table, scvi-tools' data set would give torch rows that pandas 3 lets nobody write to.
        """
        values = super().get_from_registry(registry_key)
        return values.to_numpy() if isinstance(values, pd.DataFrame) else values


def check_adata(adata: Any) -> None:
    """Raise for what is no AnnData, with what to pass instead."""
    if type(adata).__name__ == "MuData":
        names = listed(getattr(adata, "mod", ()))
        raise ScreenError(
            f"This is a MuData, of which a model takes one modality ({names}): pass that of the "
            "counts, as in `mdata['rna']`. SAMSVAE.setup_mudata takes the guides of another "
            "modality to it; scvi_sams.data.guides_from_mudata does that alone."
        )
    if isinstance(adata, ad.AnnData):
        return
    mend = "pass an AnnData, cells x genes."
    if isinstance(adata, str | os.PathLike):
        mend = f"read the file first, as with `anndata.read_h5ad({str(adata)!r})`."
    elif isinstance(adata, pd.DataFrame):
        mend = "make an AnnData of it, as with `anndata.AnnData(frame, obs=obs)`."
    elif hasattr(adata, "to_adata") or "Collection" in type(adata).__name__:
        mend = "bring its cells into one AnnData, as with `collection[:].to_adata()`."
    raise ScreenError(f"adata is a {type(adata).__name__}: {mend}")


def registered_modality(adata: Any) -> Any:
    """The modality of a MuData that was set up; what is no MuData as it is."""
    if type(adata).__name__ != "MuData":
        return adata
    written = SAMS_REGISTRY_KEYS.INDEX_OBSM_KEY
    found = [name for name, part in adata.mod.items() if written in part.obsm]
    if len(found) != 1:
        raise ScreenError(
            f"Of this MuData {'no modality is' if not found else 'several are'} set up: call "
            "`setup_mudata(mdata)` first, or give the modality, as in `mdata['rna']`."
        )
    return adata.mod[found[0]]


# What text stands for no value once it went through `astype(str)`.
_MISSING_TEXT = ("nan", "<na>", "none", "nat", "")
_NO_GENES = ("CRISPR Guide Capture", "Antibody Capture", "Multiplexing Capture", "Custom")


def check_genes(adata: AnnData) -> None:
    """Check that genes can be told by their names, and that they are genes.

    Examples
    --------
    >>> import anndata
    >>> check_genes(anndata.AnnData(var=pd.DataFrame(index=["KLF1", "CEBPA"])))
    """
    names = adata.var_names
    missing = np.flatnonzero(names.isna() | np.isin(names.astype(str).str.lower(), _MISSING_TEXT))
    if missing.size:
        raise ScreenError(
            f"Genes without a name ({missing.size}), at positions {listed(missing)} of "
            "adata.var_names. Name them, as by their identifiers, or drop them."
        )
    if not names.is_unique:
        raise ScreenError(
            "Names of genes that occur more than once: "
            f"{listed(names[names.duplicated()].unique())}. Models tell genes by name: call "
            "`adata.var_names_make_unique()`, or drop the copies."
        )
    for column in {"feature_types", "feature_type"} & set(adata.var):
        kinds = adata.var[column].astype(str)
        other = kinds[kinds.isin(_NO_GENES)]
        if len(other) and len(other) < len(kinds):
            raise ScreenError(
                f"Among the genes are features that are none ({listed(other.unique())} in "
                f"adata.var[{column!r}]): {listed(other.index)}. Keep the genes, "
                f"`adata = adata[:, adata.var[{column!r}] == 'Gene Expression'].copy()`. Guides "
                "are split off by `scvi_sams.data.guides_from_features(adata)`."
            )


def genes_of(registry: dict[str, Any]) -> list[str]:
    """Names of the genes of a model, in its order."""
    state = registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]
    return [str(name) for name in state["column_names"]]


def check_same_genes(names: Sequence[str], genes: Sequence[str]) -> None:
    """Check that genes are those of a model, in its order."""
    names = [str(name) for name in names]
    if names == list(genes):
        return
    if missing := sorted(set(genes) - set(names), key=list(genes).index):
        raise ScreenError(
            f"The model has {len(genes)} genes, of which this AnnData lacks {len(missing)}: "
            f"{listed(missing)}. Genes are told by name: rename adata.var_names to those of "
            "model.get_var_names(), or give the cells with all of them."
        )
    if added := sorted(set(names) - set(genes), key=names.index):
        raise ScreenError(
            f"This AnnData has genes that the model has not ({len(added)}): {listed(added)}. "
            "Keep those of the model: `adata = adata[:, model.get_var_names()].copy()`."
        )
    first = next(a for a, b in zip(names, genes, strict=True) if a != b)
    raise ScreenError(
        f"The genes are those of the model in another order, from {first!r} on: reorder them by "
        "`adata = adata[:, model.get_var_names()].copy()` (`.to_memory()` if they are on disk)."
    )


def in_order_of(adata: AnnData, genes: Sequence[str]) -> AnnData:
    """The AnnData itself if its genes are in an order, or a copy that has them so.

    Raises for other genes, and for what would have to be read from disk for the copy.
    """
    check_adata(adata)
    names = [str(name) for name in adata.var_names]
    if names == list(genes):
        return adata
    check_genes(adata)
    if adata.isbacked or sorted(names) != sorted(genes):
        check_same_genes(names, genes)
    copy = adata[:, list(genes)].copy()
    copy.uns = {key: value for key, value in copy.uns.items() if not key.startswith("_scvi")}
    return copy


# Cells, spread over the screen. What is done to counts in place is done to all; of those on disk
# each costs a chunk.
_N_LOOKED_AT, _N_LOOKED_AT_ON_DISK = 128, 16


def check_unchanged(manager: AnnDataManager) -> None:
    """Check in some cells that registered counts are counts still.

    They are not if the AnnData, or the file that it reads, was normalised since.
    """
    asked, adata = manager.registry["setup_args"], manager.adata
    if not asked.get("is_count_data", True):
        return
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    n_looked_at = _N_LOOKED_AT_ON_DISK if is_on_disk(counts) else _N_LOOKED_AT
    cells = np.arange(0, len(adata), max(1, len(adata) // n_looked_at))
    rows = rows_of(counts, cells)
    if not _are_counts(rows):
        _, source = _matrix(adata, asked.get("layer"))
        raise ScreenError(
            f"{source} held counts when it was set up, and does no longer: "
            f"{_first_fault(rows, adata.obs_names[cells], adata.var_names)}. It was changed in "
            "place, as by `sc.pp.normalize_total`: bring the counts back, and keep them in a "
            "layer of their own."
        )


def check_counts(adata: AnnData, layer: str | None = None) -> None:
    """Check that the matrix to be modelled holds counts, and that every cell has some.

    Every entry is read, in blocks, so that a backed AnnData stays on disk.
    """
    matrix, source = _matrix(adata, layer)
    totals = np.zeros(adata.n_obs)
    for cells, genes, block in _blocks(matrix, source):
        if not _are_counts(block):
            raise ScreenError(
                f"{source} must hold raw counts (whole numbers, 0 or more), but "
                f"{_first_fault(block, adata.obs_names[cells], adata.var_names[genes])}. "
                f"Pass the layer of the counts. {_other_layers(adata)}"
            )
        totals[cells] += np.asarray(block.sum(axis=1)).ravel()
    empty = np.flatnonzero(totals == 0)
    if empty.size:
        raise ScreenError(
            f"Cells without counts in {source} ({empty.size}): {listed(adata.obs_names[empty])}. "
            "Drop them, as with `sc.pp.filter_cells(adata, min_counts=1)`."
        )


def check_features(adata: AnnData, layer: str | None = None) -> None:
    """Check that the matrix to be modelled holds finite numbers."""
    matrix, source = _matrix(adata, layer)
    for cells, genes, block in _blocks(matrix, source):
        values = block.toarray() if sparse.issparse(block) else np.asarray(block)
        for row, column in np.argwhere(~np.isfinite(_as_float32(values))):
            raise ScreenError(
                f"{source} must hold finite numbers, but feature "
                f"{adata.var_names[genes][column]!r} of cell {adata.obs_names[cells][row]!r} has "
                f"{values[row, column]}. Fill in or drop what is missing."
            )


def check_size_factor(adata: AnnData, key: str) -> None:
    """Check that a column of size factors is there, and is positive in every cell."""
    convert = f"Convert it: `adata.obs[{key!r}] = pd.to_numeric(adata.obs[{key!r}])`."
    factors = _numbers(adata, key, "size factors", convert)
    faulty = np.flatnonzero(~((factors > 0) & (factors < np.inf)))
    if faulty.size:
        raise ScreenError(
            f"Size factors must be positive and finite, but adata.obs[{key!r}] holds "
            f"{listed(np.unique(factors[faulty]))} in cells {listed(adata.obs_names[faulty])}. "
            "Correct them or drop the cells."
        )


def check_conditions(
    conditions: Conditions, is_labelled: bool = True, has_doses: bool = False
) -> None:
    """Check what the cells of a screen received before a model is fitted to them."""
    names = np.asarray(conditions.perturbations)
    if conditions.is_control.all():
        raise ScreenError(
            f"Every cell is a control: all doses of {listed(names)} are 0. Nothing can be learned "
            "of perturbations."
        )
    if not conditions.is_control.any():
        remedy = (
            "If a label marks control cells, pass it as `control`."
            if is_labelled and not conditions.controls
            else "Effects are then told only from one another; of error rates, see "
            "scvi_sams.tl.add_permuted_null."
        )
        _warn(f"No cell is a control: every one has some dose. {remedy}")
    rare = names[conditions.n_cells @ (conditions.matrix > 0) < 2]
    if rare.size:
        _warn(
            f"Perturbations with fewer than two cells ({rare.size}): {listed(rare)}. What is "
            "learned of them is little more than the prior; consider dropping their cells."
        )
    separator = ""
    if is_labelled and conditions.delimiter:
        separator = (
            f" If {conditions.delimiter!r} is part of names, set combination_delimiter=None."
        )
    together = _never_apart(conditions)
    if together:
        _warn(
            f"Perturbations that no cell has apart from each other ({len(together)} groups): "
            f"{listed(' and '.join(group) for group in together)}. Their effects cannot be told "
            f"from each other; take them as one.{separator}"
        )
    if not is_labelled:
        return
    joined = [name for parts in conditions.parts if len(parts) > 1 for name in parts]
    if cut := sorted({name for name in joined if _looks_cut(name)}):
        _warn(f"Parts of labels that look like halves of a name: {listed(cut)}.{separator}")
    repeated = np.flatnonzero(conditions.dose.max(axis=1) > 1)
    if repeated.size and not has_doses:
        _warn(
            f"Labels that repeat a part ({conditions.n_cells[repeated].sum()} cells): a dose of "
            "as many was understood, as in "
            f"{listed(conditions.labels[code] for code in repeated)}. If one is meant, write it "
            "once."
        )
    if leftovers := [name for name in names if name.casefold() in _LEFTOVERS]:
        _warn(
            f"Taken for perturbations: {listed(leftovers)}. If these cells have no guide that is "
            "sure, drop them; if they are controls, pass the label as `control`."
        )


def _never_apart(conditions: Conditions) -> list[list[str]]:
    """Groups of perturbations that are in the same conditions, at doses of one ratio."""
    matrix = conditions.matrix.tocsc()
    groups: dict[tuple[bytes, bytes], list[str]] = {}
    for column, name in enumerate(conditions.perturbations):
        entries = slice(matrix.indptr[column], matrix.indptr[column + 1])
        doses = matrix.data[entries]
        if len(doses):
            key = matrix.indices[entries].tobytes(), (doses / doses[0]).tobytes()
            groups.setdefault(key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _looks_cut(name: str) -> bool:
    unbalanced = any(name.count(left) != name.count(right) for left, right in ("()", "[]", "{}"))
    return unbalanced or name[0] in "-_" or name[-1] in "-_"


def check_covariates(
    adata: AnnData,
    batch_key: str | None = None,
    labels_key: str | None = None,
    categorical: Sequence[str] | None = None,
    continuous: Sequence[str] | None = None,
    context_key: str | None = None,
) -> None:
    """Check that columns of `adata.obs` are there, and have a value in every cell.

    Examples
    --------
    >>> import anndata
    >>> adata = anndata.AnnData(obs=pd.DataFrame({"lane": ["1", "2"]}, index=["c1", "c2"]))
    >>> check_covariates(adata, batch_key="lane")
    """
    named = [("batch", batch_key), ("label", labels_key), ("context", context_key)]
    named += [("category", key) for key in categorical or ()]
    for kind, key in named:
        if key is None:
            continue
        column = _column(adata, key, kind)
        text = column.astype(str).str.strip().str.lower()
        without = np.flatnonzero(column.isna() | text.isin(_MISSING_TEXT[:2]))
        if without.size:
            raise ScreenError(
                f"{without.size} cells without a {kind} in adata.obs[{key!r}]: "
                f"{listed(adata.obs_names[without])}. Fill in what is missing, or drop the cells."
            )
        if len({isinstance(value, str) for value in column.unique()}) > 1:
            raise ScreenError(
                f"adata.obs[{key!r}] mixes text and other values, of which no {kind} is made: "
                f"make text of all, `adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)`."
            )
    for key in continuous or ():
        convert = "Convert it with pandas.to_numeric, or give it as categorical."
        values = _numbers(adata, key, "continuous covariate", convert)
        faulty = np.flatnonzero(~np.isfinite(values))
        if faulty.size:
            raise ScreenError(
                f"Continuous covariates must be finite, but adata.obs[{key!r}] holds "
                f"{listed(np.unique(values[faulty]))} in {faulty.size} cells: "
                f"{listed(adata.obs_names[faulty])}. Fill in what is missing, or drop the cells."
            )


def _column(adata: AnnData, key: str, kind: str) -> pd.Series:
    if key not in adata.obs:
        close = nearest(str(key), map(str, adata.obs))
        hint = f" The nearest is {listed(close)}." if close else ""
        raise ScreenError(
            f"adata.obs has no column {key!r} ({kind}); it holds "
            f"{listed(adata.obs.columns, limit=10)}.{hint}"
        )
    return adata.obs[key]


def _numbers(adata: AnnData, key: str, kind: str, convert: str) -> NDArray[Any]:
    column = _column(adata, key, kind)
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
        raise ScreenError(
            f"adata.obs[{key!r}] must be numeric to serve as {kind}, not {column.dtype}. {convert}"
        )
    return _as_float32(column.to_numpy(dtype=np.float64, na_value=np.nan))


def _as_float32(values: NDArray[Any]) -> NDArray[Any]:
    """Values as they reach the networks; what is too large there is infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


_MANY_UNITS = 5  # doses of which the median is a whole number above are counts, not units


def check_doses(conditions: Conditions) -> None:
    """Warn of doses that are on another scale than labels are read with, where "A" is dose 1."""
    dosage, names = conditions.cell_matrix, conditions.perturbations
    doses = dosage.data
    if not doses.size:
        return
    if np.median(doses) > _MANY_UNITS and (doses == np.rint(doses)).all():
        _warn(
            f"Doses look like counts: whole numbers with a median of {np.median(doses):g}. Of "
            "guides, threshold them, so that a cell that received one has dose 1 and ambient "
            'counts have 0. As they are, a condition "A" means one count.'
        )
        return
    ranges = pd.Series(doses).groupby(dosage.indices).agg(["min", "max"])
    outside = [
        f"{names[number]}: {least:g} to {most:g}"
        for number, least, most in ranges.itertuples()
        if not least <= 1 <= most
    ]
    if 2 * len(outside) > len(names):
        _warn(
            f"Dose 1 lies outside the doses of most perturbations ({listed(outside)}), and it is "
            'what a label without a dose means: name doses, as in "A:10" or {"A": 10.0}, '
            "or rescale them so that 1 is a usual dose."
        )


def check_confounding(
    adata: AnnData,
    conditions: Conditions,
    batch_key: str | None,
    *,
    min_cells: int = 10,
    kind: str = "batch",
) -> None:
    """Warn of batches that are short of controls, and perturbations whose cells are all in one.

    Contexts are batches of another `kind`, in which a perturbation need not be everywhere.

    Effects are told from the batch's only by the control cells of that batch; where it has none,
    not at all. Batches count as short below 20 controls, if that is not half of their share.
    Perturbations of few cells are passed over: these often share a batch by chance, 10 cells in
    two equal batches in 0.2 % of cases.
    """
    if batch_key is None:
        return
    batch, batches = pd.factorize(adata.obs[batch_key])
    if len(batches) < 2:
        return
    known = batch >= 0
    of_condition = np.zeros((len(batches), len(conditions.labels)), dtype=np.int64)
    np.add.at(of_condition, (batch[known], conditions.codes[known]), 1)
    n_cells = of_condition @ (conditions.matrix > 0)  # batches x perturbations, of any dose
    n_controls = of_condition[:, conditions.is_control].sum(axis=1)
    expected = of_condition.sum(axis=1) * n_controls.sum() / max(1, known.sum())
    few = (n_controls < np.minimum(_FEW_CONTROLS, expected / 2)) & (n_cells.sum(axis=1) > 0)
    confounded = (n_cells.sum(axis=0) >= min_cells) & ((n_cells > 0).sum(axis=0) == 1)
    confounded &= kind == "batch"
    names, messages = np.asarray(conditions.perturbations), []
    if few.any():
        shown = [f"{batches[k]}: {n_controls[k]}" for k in np.flatnonzero(few)]
        messages.append(
            f"{'Batches' if kind == 'batch' else 'Contexts'} of adata.obs[{batch_key!r}] that "
            "hold perturbed cells and fewer than "
            f"{_FEW_CONTROLS} controls ({len(shown)}): {listed(shown)}. Effects of the {kind} and "
            "of perturbations are hard to tell apart there."
        )
    if confounded.any():
        messages.append(
            f"Perturbations with all their cells in one batch of adata.obs[{batch_key!r}] "
            f"({confounded.sum()}): {listed(names[confounded])}. Their effects are told from the "
            "batch's only by its control cells."
        )
    alone = (n_cells.sum(axis=0) >= min_cells) & ((n_controls > 0) @ n_cells == 0)
    if not n_controls.any():  # of which there is a warning of its own
        alone &= confounded
    if alone.any():
        messages.append(
            f"The {kind} of {listed(names[alone])} has no control cell: these effects cannot be "
            f"told from the {kind}'s. Leave out the {kind} key, or read them with care."
        )
    if messages:
        _warn(" ".join(messages))


_FEW_CONTROLS = 20  # in a batch: their mean has a standard error of a quarter of their spread


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=scvi.settings.warnings_stacklevel)


def _check_duplicates(matrix: Any, source: str) -> None:
    """Check that a sparse matrix in memory has one entry for a gene of a cell."""
    if getattr(matrix, "format", None) not in ("csr", "csc") or is_on_disk(matrix):
        return
    if _has_duplicates(matrix.indptr, matrix.indices[: matrix.indptr[-1]]):
        raise ScreenError(
            f"{source} has several entries for one gene of a cell: add them up, as with "
            f"`{source}.sum_duplicates()`."
        )


def _has_duplicates(starts: NDArray[Any], indices: NDArray[Any]) -> bool:
    """Whether a row holds an index twice; a sorted one shows it at once."""
    rises = np.diff(indices) > 0
    rises[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(indices))] - 1] = True
    if rises.all():
        return False
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort((indices, rows))
    return bool(((np.diff(indices[order]) == 0) & (np.diff(rows[order]) == 0)).any())


def _blocks(matrix: Any, source: str) -> Iterator[tuple[slice, slice, Any]]:
    """Check a matrix, in memory or on disk, and cut it along the axis in which it is stored."""
    check_structure(matrix, source)
    _check_duplicates(matrix, source)
    by_gene = getattr(matrix, "format", None) == "csc"
    length, width = matrix.shape[::-1] if by_gene else matrix.shape
    step = max(1, _BLOCK_ENTRIES // max(1, width))
    for start in range(0, length, step):
        along, whole = slice(start, min(start + step, length)), slice(0, width)
        cells, genes = (whole, along) if by_gene else (along, whole)
        block = matrix[cells, genes]
        if block.dtype.kind not in "buif":
            raise ScreenError(f"{source} must hold numbers, not {block.dtype}: convert it.")
        yield cells, genes, block


_LARGEST = np.finfo(np.float32).max


def _are_counts(block: Any) -> bool:
    values = block.data if sparse.issparse(block) else np.asarray(block)
    if values.size == 0 or values.dtype.kind in "bu":
        return True
    # NaN fails both comparisons; what is larger is infinite to the networks.
    in_range = values.min() >= 0 and values.max() <= _LARGEST
    return bool(in_range and (values.dtype.kind == "i" or (np.rint(values) == values).all()))


def _first_fault(block: Any, cells: pd.Index, genes: pd.Index) -> str:
    """Name the first entry, in storage order, that is no count."""
    entries = sparse.coo_array(block)
    values = entries.data
    at = np.argmin((values >= 0) & (values <= _LARGEST) & (np.rint(values) == values))
    gene, cell = genes[entries.col[at]], cells[entries.row[at]]
    return f"gene {gene!r} of cell {cell!r} has {float(values[at]):g}"


def _other_layers(adata: AnnData) -> str:
    if names := layer_names(adata):
        return f"adata.layers holds {listed(names)}."
    if adata.raw is not None:
        return "adata.layers is empty, but adata.raw may hold them."
    return "adata.layers is empty: reload the counts from the original file."


def _matrix(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    """The matrix to be modelled, and what to call it."""
    if layer is not None and layer not in adata.layers:
        raise ScreenError(
            f"adata.layers has no {layer!r}; it holds {listed(layer_names(adata)) or 'nothing'}."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ScreenError(f"There is no adata.X: pass the layer to model. {_other_layers(adata)}")
    check_sources(matrix)
    return matrix, "adata.X" if layer is None else f"adata.layers[{layer!r}]"
