"""Guides: which of them each cell has, what they target, and the doses that follow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scvi
from scipy import sparse
from scvi.data.fields import ObsmField

from scvi_sams._arguments import checked
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, counted, listed
from scvi_sams.data.conditions import Conditions, frame_values, is_missing, split_label
from scvi_sams.data.matrices import check_structure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

GuideTargets: TypeAlias = "Mapping[str, str] | pd.Series | pd.DataFrame | str"
"""Target of each guide: a dict, a Series, a DataFrame, or the key of ``adata.uns`` of one."""

TARGET = "target"
"""Column of the target in a table of guides."""


class Guides(NamedTuple):
    """The guides of a screen, and which of them brought each cell its perturbations.

    A guide that targets two perturbations is listed for each of them: names may repeat, names
    with targets do not. Where a cell has two guides of one target, both together are one more
    guide of that target, ``"KLF1_g1+KLF1_g2"``.

    Attributes
    ----------
    names
        Name of each guide.
    targets
        Position, among the perturbations, of what it targets, int32 of shape ``(n_guides,)``.
    codes
        Guide of each cell and perturbation, by its position in ``names``, ``-1`` where none is
        known: int32, cells x K, beside the padded columns of ``Conditions``.
    """

    names: list[str]
    targets: NDArray[np.int32]
    codes: NDArray[np.int32]


def guide_codes(manager: AnnDataManager) -> Guides | None:
    """Guides of the cells of a registered AnnData; None where it has no ``guide_key``.

    Examples
    --------
    >>> import anndata, scvi_sams
    >>> obs = pd.DataFrame({"gene": ["NT", "A", "A"], "guide": ["n1", "a1", "a2"]}, list("xyz"))
    >>> adata = anndata.AnnData(np.ones((3, 2), np.float32), obs)
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="gene", control="NT", guide_key="guide"
    ... )
    >>> guides = guide_codes(scvi_sams.SAMSVAE._get_most_recent_anndata_manager(adata))
    >>> guides.names, guides.targets.tolist(), guides.codes.tolist()
    (['a1', 'a2'], [0, 0], [[-1], [0], [1]])
    """
    if SAMS_REGISTRY_KEYS.GUIDE_KEY not in manager.data_registry:
        return None
    state = manager.get_state_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    numbers = padded_columns(manager, SAMS_REGISTRY_KEYS.GUIDE_KEY)
    return Guides(
        list(state[GuideField.KEYS[0]]),
        np.asarray(state[GuideField.KEYS[1]], dtype=np.int32),
        numbers.astype(np.int32) - 1,
    )


def padded_columns(manager: AnnDataManager, registry_key: str) -> NDArray[Any]:
    """What cells received, cells x K, however it is stored."""
    columns = manager.get_from_registry(registry_key)
    return columns.toarray() if sparse.issparse(columns) else np.asarray(columns)


class WrittenField(ObsmField):
    """Registers columns that ``PerturbationField``, which comes before, has written."""

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Nothing but the place is registered."""
        self.validate_field(adata)
        return {}

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any
    ) -> dict[str, Any]:
        """As :meth:`register_field`."""
        return self.register_field(adata_target)

    def get_summary_stats(self, state_registry: dict[str, Any]) -> dict[str, Any]:
        """There are none."""
        return {}


class GuideField(WrittenField):
    """Registers guides, which are numbered from 1 in `adata.obsm` and minibatches; 0 is none."""

    KEYS = ("guides", "guide_targets")
    """Of names and targets in the registry."""

    def __init__(self) -> None:
        super().__init__(SAMS_REGISTRY_KEYS.GUIDE_KEY, SAMS_REGISTRY_KEYS.GUIDE_OBSM_KEY)


class GuideCalls(NamedTuple):
    """Which guides each cell has, and what they target.

    Examples
    --------
    >>> calls = GuideCalls(["a1", "a2", "n1"], [["A"], ["A"], []], sparse.csr_matrix(np.eye(3)))
    >>> calls.conditions(["NT"]).cell_labels
    ['A', 'A', 'NT']
    """

    names: list[str]
    """Name of each guide."""
    targets: list[list[str]]
    """Perturbations that each guide targets; none for one that does not target."""
    matrix: sparse.csr_matrix
    """Calls, cells x guides: one where the cell has the guide."""

    def of_targets(self, position: Mapping[str, int]) -> NDArray[np.int64]:
        """Positions of guides and of what they target, two columns; unknown targets left out."""
        pairs = [
            (guide, position[target])
            for guide, own in enumerate(self.targets)
            for target in own
            if target in position
        ]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @property
    def seen(self) -> list[str]:
        """Targets of guides that some cell has: others of a library are none of the screen."""
        n_cells = self.matrix.getnnz(axis=0)
        return sorted({t for own, n in zip(self.targets, n_cells, strict=True) if n for t in own})

    def conditions(self, control: Sequence[str] = (), delimiter: str | None = "+") -> Conditions:
        """What cells received: a dose of 1 of each target, of however many guides."""
        if not (seen := self.seen):
            called = np.array(self.names)[self.matrix.getnnz(axis=0) > 0]
            raise ScreenError(
                "No cell has a guide that targets anything: the calls are all of "
                f"{listed(called) or 'no guide'}. Correct the calls, or the targets of guides."
            )
        pairs = self.of_targets({name: k for k, name in enumerate(seen)})
        entries = (np.ones(len(pairs), np.float32), pairs.T)
        of_guide = sparse.csr_matrix(entries, (len(self.names), len(seen)))
        doses = self.matrix.astype(np.float32) @ of_guide
        doses.data[:] = 1
        return Conditions.from_matrix(doses, seen, control, delimiter)


@dataclass(frozen=True)
class GuideSource:
    """Where an AnnData keeps its guides.

    Parameters
    ----------
    key, targets, threshold
        ``guide_key``, ``guide_targets`` and ``guide_threshold`` of ``setup_anndata``.
    names_key
        Key of ``adata.uns`` with the names of the columns of a matrix that has none.
    control
        Labels that mean no perturbation.
    delimiter
        What joins the parts of a label, and guides in a column.
    """

    key: str
    targets: GuideTargets | None = None
    threshold: float | None = None
    names_key: str | None = None
    control: Sequence[str] = ()
    delimiter: str | None = "+"

    def validate(self, adata: AnnData) -> None:
        """Check that `adata` has what is read."""
        if self.threshold is not None and self.key in adata.obs:
            raise ScreenError(
                f"guide_threshold={self.threshold!r} is of counts, and guide_key={self.key!r} a "
                "column of adata.obs with names: leave it out."
            )
        in_obs = self.key in adata.obs
        if in_obs == (self.key in adata.obsm):
            where = "both a column of adata.obs and a key of adata.obsm: rename one of the two."
            if not in_obs:
                where = (
                    "neither a column of adata.obs nor a key of adata.obsm; there are "
                    f"{listed([*adata.obs, *adata.obsm], limit=10) or 'none'}."
                )
            raise ScreenError(f"guide_key={self.key!r} is {where}")
        if isinstance(self.targets, str) and self.targets not in adata.uns:
            raise ScreenError(
                f"guide_targets={self.targets!r} is no key of adata.uns; it holds "
                f"{listed(adata.uns, limit=10) or 'nothing'}."
            )

    # -- which guides cells have ---------------------------------------------------------------

    def read(self, adata: AnnData) -> GuideCalls:
        """Read the calls, and what guides target by the table."""
        self.validate(adata)
        if self.key in adata.obs:
            names, matrix = self._column(adata.obs[self.key])
        else:
            names, matrix = self._matrix(adata)
        return GuideCalls(names, self._targets_of(adata, names), matrix)

    def warn_of_cells_without(self, adata: AnnData) -> None:
        """Say how many cells have no guide, which then count as controls."""
        if without := int((self.read(adata).matrix.getnnz(axis=1) == 0).sum()):
            warnings.warn(
                f"{counted(without, 'cell')} of adata.obsm[{self.key!r}] without a guide: taken "
                "for controls. If their guides were missed, drop these cells.",
                UserWarning,
                stacklevel=scvi.settings.warnings_stacklevel,
            )

    def _column(self, column: pd.Series) -> tuple[list[str], sparse.csr_matrix]:
        codes, texts = _distinct(column)
        if (missing := np.isin(codes, [k for k, text in enumerate(texts) if not text])).any():
            raise ScreenError(
                f"Cells without a guide in adata.obs[{self.key!r}] ({missing.sum()}): "
                f"{listed(column.index[missing])}. Drop them, or give them a non-targeting guide "
                "or the control label if that is what they have."
            )
        parts = [split_label(text, self.delimiter) for text in texts]
        names = sorted({part for row in parts for part in row})
        column_of = {name: k for k, name in enumerate(names)}
        pairs = [(row, column_of[part]) for row, own in enumerate(parts) for part in own]
        rows, columns = np.array(pairs).T
        shape = (len(texts), len(names))
        matrix = sparse.csr_matrix((np.ones(len(pairs), np.int8), (rows, columns)), shape)
        matrix.data[:] = 1  # a guide that is written twice
        return names, matrix[codes]

    def _matrix(self, adata: AnnData) -> tuple[list[str], sparse.csr_matrix]:
        values, source = adata.obsm[self.key], f"adata.obsm[{self.key!r}]"
        names = self._names(adata, values, source)
        if isinstance(values, pd.DataFrame):
            values = frame_values(values, source, "guides")
        elif not sparse.issparse(values):
            values = np.asarray(values)
        if values.ndim != 2:
            raise ScreenError(
                f"{source} must be a matrix (cells x guides), not of shape {values.shape}."
            )
        check_structure(values, source)
        matrix = sparse.csr_matrix(values, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return names, called(matrix, self.threshold, source)

    def _names(self, adata: AnnData, values: Any, source: str) -> list[str]:
        if isinstance(values, pd.DataFrame):
            names = [str(name) for name in values.columns]
        else:
            key = self.key if self.names_key is None else self.names_key
            held = adata.uns.get(key)
            if held is None or (self.names_key is None and not isinstance(held, pd.DataFrame)):
                raise ScreenError(
                    f"The columns of {source} have no names. Store it as a DataFrame whose "
                    "columns are the guides, or name them: `perturbation_names_uns_key`, or a "
                    f"DataFrame adata.uns[{self.key!r}] with a row for each, in their order."
                )
            names = [str(n) for n in (held.index if isinstance(held, pd.DataFrame) else held)]
        if len(names) != values.shape[1] or not names:
            raise ScreenError(
                f"{source} has {values.shape[1]} columns but {len(names)} names: give one to each."
            )
        if len(set(names)) < len(names):
            twice = pd.Series(names)
            raise ScreenError(
                f"Guides of {source} that occur more than once: "
                f"{listed(twice[twice.duplicated()].unique())}. Rename them."
            )
        return names

    # -- what guides target --------------------------------------------------------------------

    def _targets_of(self, adata: AnnData, names: Sequence[str]) -> list[list[str]]:
        labels = {name: name for name in self.control} | self._table(adata)
        if unknown := [name for name in names if name not in labels]:
            raise ScreenError(
                f"Guides whose target is not known ({len(unknown)}): {listed(unknown)}. Name it "
                "in the table of targets (`guide_targets`), the control label for one that does "
                "not target."
            )
        if missing := [n for n in names if is_missing(labels[n], self.control)]:
            raise ScreenError(
                f"Guides without a target in the table ({len(missing)}): {listed(missing)}. Give "
                "them the control label if they do not target, or drop them."
            )
        whole = set(self.control)
        parts = [split_label(labels[name], self.delimiter, whole) for name in names]
        return [[part for part in own if part not in whole] for own in parts]

    def _table(self, adata: AnnData) -> dict[str, str]:
        table, source = self.targets, "guide_targets"
        if table is None:
            table = self.key if self.key in adata.uns else None
        if isinstance(table, str):
            table, source = adata.uns[table], f"adata.uns[{table!r}]"
        if table is None:
            raise ScreenError(
                "What do guides target? Give `guide_targets`: a dict or Series of the target of "
                "each guide, or the key of adata.uns that has one."
            )
        return target_table(table, source)

    # -- which guide brought which perturbation ------------------------------------------------

    def coded(
        self,
        adata: AnnData,
        conditions: Conditions,
        labels: pd.Series | None = None,
        has_doses: bool = False,
        known: Iterable[tuple[str, int]] = (),
        extend: bool = True,
    ) -> Guides:
        """Find the guide of each cell and perturbation.

        Parameters
        ----------
        adata, conditions
            The cells, and what they received.
        labels
            Their labels, whose parts the guides of a column follow where no table says what
            guides target.
        has_doses
            Whether doses beside the labels may be zero, so that a guide brought nothing.
        known
            Guides, and positions of their targets, that keep their positions.
        extend
            Whether others get positions after them, or count as not known.
        """
        is_beside = labels is not None and self.targets is None
        if is_beside:
            triples, names, row_of_cell = self._beside(adata, labels, conditions)
        else:
            calls = self.read(adata)
            triples, names = _triples(calls, conditions), calls.names
            row_of_cell = np.arange(len(adata))
        code_of_row = np.empty(row_of_cell.max(initial=-1) + 1, dtype=np.intp)
        code_of_row[row_of_cell] = conditions.codes
        index, dose = conditions.index[code_of_row], conditions.dose[code_of_row]
        row, perturbation, guide, names = _joined(triples, names, self.delimiter or "+")
        n_perturbations = len(conditions.perturbations)
        held = index.astype(np.int64) + np.arange(len(index))[:, None] * n_perturbations
        place = np.flatnonzero(dose.ravel() > 0)
        found = pd.Index(held.ravel()[place]).get_indexer(row * n_perturbations + perturbation)
        is_there = found >= 0
        if not (is_there.all() or is_beside or has_doses):
            odd = int(np.argmin(is_there))
            cells = adata.obs_names[np.isin(row_of_cell, row[~is_there])]
            raise ScreenError(
                f"Cells with a guide whose target their label does not name ({len(cells)}): "
                f"{listed(cells)}, as {names[guide[odd]]!r} of "
                f"{conditions.perturbations[perturbation[odd]]!r}. Correct the table of targets "
                "or the labels, or leave the labels out, so that guides say what cells received."
            )
        held_by = np.column_stack([perturbation, guide])[is_there]
        entries, entry = np.unique(held_by, axis=0, return_inverse=True)
        pairs = [(names[g], int(p)) for p, g in entries]
        code_of = {pair: code for code, pair in enumerate(known)}
        for pair in sorted(pairs, key=lambda pair: pair[::-1]):
            if pair not in code_of and extend:
                code_of[pair] = len(code_of)
        code = np.array([code_of.get(pair, -1) for pair in pairs], dtype=np.int32)
        codes = np.full(index.size, -1, dtype=np.int32)
        codes[place[found[is_there]]] = code[entry.ravel()]
        return Guides(
            [name for name, _ in code_of],
            np.array([target for _, target in code_of], dtype=np.int32),
            codes.reshape(index.shape)[row_of_cell],
        )

    def _beside(
        self, adata: AnnData, labels: pd.Series, conditions: Conditions
    ) -> tuple[NDArray[np.int64], list[str], NDArray[np.intp]]:
        """Guides of a column, in the order of the parts of the labels beside them."""
        if self.key not in adata.obs:
            raise ScreenError(
                f"adata.obsm[{self.key!r}] beside labels: say what its guides target, by "
                "`guide_targets`."
            )
        column = adata.obs[self.key]
        of_label, texts = _distinct(labels)
        of_guide, guides = _distinct(column)
        pair_of_cell, distinct = pd.factorize(of_label.astype(np.int64) * len(guides) + of_guide)
        # Of a label, doses may differ, and be zero.
        n_conditions = len(conditions.labels)
        row_of_cell, rows = pd.factorize(pair_of_cell * n_conditions + conditions.codes)
        position = {name: k for k, name in enumerate(conditions.perturbations)}
        whole = {*self.control, *position}
        numbers: dict[str, int] = {}
        triples: list[tuple[int, int, int]] = []
        for row, pair in enumerate(distinct[rows // n_conditions]):
            text, guide = texts[pair // len(guides)], guides[pair % len(guides)]
            if not guide:
                continue
            parts = split_label(text, self.delimiter, whole)
            # A part of a label may have its dose, "A:0.5", as conditions are written.
            parts = [p if p in whole else p.rpartition(":")[0].strip() for p in parts]
            own = split_label(guide, self.delimiter)
            if len({part for part in parts if part in position}) <= 1 or len(own) == 1:
                own = [guide] * len(parts)  # one construct, however many guides it holds
            if len(own) != len(parts):
                cells = column.index[row_of_cell == row]
                raise ScreenError(
                    f"Label {text!r} has {len(parts)} parts, and the guide {guide!r} of "
                    f"adata.obs[{self.key!r}] {len(own)}, in cells {listed(cells)}. Give one "
                    "guide for each part, in their order, or say what guides target "
                    "(`guide_targets`)."
                )
            for part, name in zip(parts, own, strict=True):
                if part in position and not is_missing(name):
                    number = numbers.setdefault(name, len(numbers))
                    triples.append((row, position[part], number))
        table = np.array(sorted(set(triples)), dtype=np.int64).reshape(-1, 3)
        return table, list(numbers), row_of_cell


def _triples(calls: GuideCalls, conditions: Conditions) -> NDArray[np.int64]:
    """Cell, perturbation and guide of each call, three columns."""
    position = {name: k for k, name in enumerate(conditions.perturbations)}
    if unknown := [target for target in calls.seen if target not in position]:
        raise ScreenError(
            f"Targets of guides that no label names: {listed(unknown)}. Give targets by the names "
            "of the labels, or leave the labels out."
        )
    entries = calls.matrix.tocoo()
    table = pd.DataFrame({"cell": entries.row, "guide": entries.col})
    targets = pd.DataFrame(calls.of_targets(position), columns=["guide", "perturbation"])
    return table.merge(targets)[["cell", "perturbation", "guide"]].to_numpy(np.int64)


def _joined(
    triples: NDArray[np.int64], names: Sequence[str], delimiter: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
    """One guide for each row and perturbation: several are one of their own."""
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(np.array(names, dtype=object))] = np.arange(len(names))
    order = np.lexsort((rank[triples[:, 2]], triples[:, 1], triples[:, 0]))
    row, perturbation, guide = triples[order].T
    is_first = np.ones(len(row), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (perturbation[1:] != perturbation[:-1])
    start = np.flatnonzero(is_first)
    length = np.diff(np.append(start, len(row)))
    of_group, names = guide[start], list(names)
    numbers: dict[tuple[int, ...], int] = {}
    for group in np.flatnonzero(length > 1):
        members = tuple(guide[start[group] : start[group] + length[group]].tolist())
        if members not in numbers:
            numbers[members] = len(names)
            names.append(delimiter.join(names[member] for member in members))
        of_group[group] = numbers[members]
    return row[start], perturbation[start], of_group, names


def called(matrix: sparse.csr_matrix, threshold: float | None, source: str) -> sparse.csr_matrix:
    """Calls as ones, of a matrix without stored zeros that holds calls, or counts to threshold."""
    values = matrix.data
    if matrix.dtype.kind not in "buif":
        raise ScreenError(f"{source} must hold calls, 0 and 1, not {matrix.dtype}: convert it.")
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values >= 0)).all():
        raise ScreenError(
            f"{source} holds values that are negative or not finite: give calls, 0 and 1."
        )
    if threshold is not None:
        threshold = checked("guide_threshold", threshold)
        matrix = matrix.copy()
        matrix.data = (values >= threshold).astype(np.int8)
        matrix.eliminate_zeros()
        if not matrix.nnz:
            largest = values.max(initial=0)
            raise ScreenError(
                f"guide_threshold={threshold:g} calls no guide: the largest value of {source} is "
                f"{largest:g}. Lower it, or leave it out if these are calls."
            )
    elif (values != 1).any():
        raise ScreenError(
            f"{source} holds values up to {values.max():g} where calls are 0 or 1: these look "
            "like counts of guides, of which ambient ones are no guide of the cell. Call guides, "
            "as with crispat, and give its calls (scvi_sams.data.guides_from_table), or give "
            "`guide_threshold`, such as guide_threshold=5: a cell has the guides of which it has "
            "as many counts."
        )
    return sparse.csr_matrix(
        (np.ones(matrix.nnz, np.int8), matrix.indices, matrix.indptr), matrix.shape
    )


def target_table(table: Any, source: str = "guide_targets") -> dict[str, str]:
    """Read a table of the target of each guide: a dict, a Series, or a DataFrame of such a column.

    Examples
    --------
    >>> target_table(pd.Series({"a1": "A", "n1": "NT"}))
    {'a1': 'A', 'n1': 'NT'}
    """
    if isinstance(table, pd.DataFrame):
        column = TARGET if TARGET in table else table.columns[0] if table.shape[1] == 1 else None
        if column is None:
            raise ScreenError(
                f"{source} is a table without a column {TARGET!r}, but with "
                f"{listed(table) or 'none'}: give the column of targets, as "
                "`guide_targets=table['gene']`, whose index are the guides."
            )
        table = table[column]
    if not isinstance(table, Mapping | pd.Series):
        raise ScreenError(
            f"{source} is a {type(table).__name__}: it must be a dict or a Series of the target "
            "of each guide, or the key of adata.uns that has one."
        )
    if isinstance(table, pd.Series) and table.index.has_duplicates:
        twice = table.index[table.index.duplicated()].unique()
        raise ScreenError(f"{source} has guides twice: {listed(twice)}. Keep one target of each.")
    if faulty := [guide for guide, target in table.items() if not pd.api.types.is_scalar(target)]:
        raise ScreenError(
            f"{source} has targets that are no single value, of {listed(faulty)}: give text, "
            "joined by the delimiter where a guide has several, as 'A+B'."
        )
    return {
        str(guide): "" if pd.isna(target) else str(target).strip()
        for guide, target in table.items()
    }


def _distinct(column: pd.Series) -> tuple[NDArray[np.intp], list[str]]:
    """Distinct texts of a column, empty for what is missing, and which of them each cell has."""
    codes, values = pd.factorize(column.astype(object), use_na_sentinel=False)
    texts = ["" if pd.isna(value) else str(value).strip() for value in values]
    return codes, ["" if is_missing(text) else text for text in texts]
