"""What cells, or the rows of a question, received: labels, doses and matrices in one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._exceptions import ScreenError, listed, nearest, unknown_perturbations
from scvi_sams.data.matrices import check_structure

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    DosageMatrix: TypeAlias = np.ndarray | sparse.spmatrix | sparse.sparray | pd.DataFrame

ConditionsLike: TypeAlias = (
    "str | int | Mapping[str, float] | Iterable[str | int | Mapping[str, float]] "
    "| np.ndarray | sparse.spmatrix | sparse.sparray | pd.DataFrame"
)
"""One condition or several: labels, ``{name: dose}`` dicts, or a dosage matrix."""

# How a missing value is written, whatever the case, once a column went through `astype(str)`.
_MISSING = frozenset({"", "nan", "<na>", "none", "na", "n/a", "nat", "null"})


@dataclass(frozen=True, eq=False)
class Conditions:
    """The distinct conditions of cells, or of the rows of a question, and who has which.

    Labels that mean the same are one condition: ``"A+B"``, ``"B+A"`` and ``"A+B+control"``.

    Parameters
    ----------
    perturbations
        Names of the perturbations.
    index
        Perturbations of each condition by their positions in ``perturbations``, increasing, then
        padded with 0: int32, shape ``(n_conditions, K)`` with the most of any condition as K.
    dose
        Their doses, positive, then padded with 0: float32, shape ``(n_conditions, K)``. All are 0
        for a control.
    labels
        Label of each condition, such as ``"A+B"``, or ``"A:1+B:0.5"`` where a dose is not 1.
    codes
        Condition of each cell or row, shape ``(n_rows,)``.
    controls
        Labels that mean no perturbation.
    delimiter
        What joins the parts of a label; None where a label is one perturbation.

    Examples
    --------
    >>> conditions = Conditions.from_labels(["NT", "B+A", "A+B", "A"], "NT")
    >>> [conditions.labels[code] for code in conditions.codes]
    ['NT', 'A+B', 'A+B', 'A']
    >>> conditions.cell_index.tolist(), conditions.cell_dose.tolist()
    ([[0, 0], [0, 1], [0, 1], [0, 0]], [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    """

    perturbations: list[str]
    index: NDArray[np.int32]
    dose: NDArray[np.float32]
    labels: list[str]
    codes: NDArray[np.intp]
    controls: tuple[str, ...] = ()
    delimiter: str | None = "+"

    # -- reading -------------------------------------------------------------------------------

    @classmethod
    def from_labels(
        cls,
        labels: pd.Series | Sequence[object] | np.ndarray,
        control: object = None,
        delimiter: str | None = "+",
        doses: pd.Series | Sequence[float | str] | np.ndarray | None = None,
        perturbations: Sequence[str] | None = None,
    ) -> Conditions:
        """Read one label a cell, such as ``"control"`` or ``"KLF1+CEBPA"``.

        Parameters
        ----------
        labels
            Perturbations joined by ``delimiter``, in any number and order. A part that is a
            control label counts as nothing, a repeated part counts twice. The name and index of a
            Series (an obs column) appear in error messages.
        control
            Label or labels of unperturbed cells, or None where no label means that.
        delimiter
            What joins the parts of a label; None takes every label as one perturbation.
        doses
            One dose a cell: a number, or text with one number for each part in the order of the
            label (``"1.0+0.5"``; control parts may be left out). By default each part has a dose
            of 1, or the one that follows a known name: ``"A:0.5"``, where ``perturbations`` are
            given. Doses of control cells are not read.
        perturbations
            Perturbations that are known. The default is every part that occurs, sorted.

        Returns
        -------
        Conditions
            Sorted by label, which has its parts in alphabetical order.

        Raises
        ------
        ScreenError
            If a label is missing or has an empty part, no cell has a control label, every cell is
            a control (unless ``perturbations`` are given), or a dose is negative, not finite, or
            does not match the parts of its label.
        UnknownPerturbationError
            If a part is not among ``perturbations``.

        Examples
        --------
        >>> read = Conditions.from_labels(["NT", "A", "A+B"], "NT", doses=["", "2", "1.0+0.5"])
        >>> read.cell_matrix.toarray().tolist()
        [[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]]
        """
        labels = pd.Series(labels)
        controls = as_labels(control)
        column = "the labels" if labels.name is None else f"column {labels.name!r}"
        # Everything below works on the distinct labels (thousands), never on cells (millions).
        categorical = labels.astype("category").cat.remove_unused_categories()
        codes = categorical.cat.codes.to_numpy()
        texts = [str(category).strip() for category in categorical.cat.categories]
        whole = {*controls, *(perturbations or ())}
        _check_present(labels.index, codes, texts, whole, column)
        parts = [split_label(text, delimiter, whole) for text in texts]
        has_empty = [any(is_missing(piece, whole) for piece in pieces) for pieces in parts]
        if faulty := [text for text, empty in zip(texts, has_empty, strict=True) if empty]:
            raise ScreenError(
                f"Labels with an empty part in {column}: {listed(faulty)}. Correct them, or set "
                f"the delimiter, which is {delimiter!r}; None takes every label as one "
                "perturbation."
            )
        written = [[(piece, 1.0) for piece in pieces] for pieces in parts]
        if perturbations is None:
            occurring = {piece for pieces in parts for piece in pieces}
            _check_controls(controls, occurring, labels, column)
            names = sorted(occurring.difference(controls))
            if not names:
                raise ScreenError(
                    f"No perturbation in {column}: the labels are all control "
                    f"({listed(controls)})."
                )
        else:
            names = _checked_names(perturbations)
            if doses is None:
                written = [[_read_part(piece, whole) for piece in pieces] for pieces in parts]
            if unknown := {name for row in written for name, _ in row}.difference(whole):
                raise unknown_perturbations(sorted(unknown), names)
        row_of_cell: NDArray[np.integer] = codes
        if doses is not None:
            doses = pd.Series(doses)
            if len(doses) != len(labels):
                raise ScreenError(f"There are {len(labels)} labels but {len(doses)} doses.")
            row_of_cell, pairs = _distinct_pairs(codes, doses)
            written = _dosed_rows(pairs, parts, names, delimiter, texts, labels.index, row_of_cell)
        read = cls._distinct(names, *_read_rows(written, names), controls, delimiter)
        return replace(read, codes=read.codes[row_of_cell])

    @classmethod
    def from_obs(
        cls,
        adata: AnnData,
        perturbation_key: str,
        control: object = None,
        delimiter: str | None = "+",
        dosage_key: str | None = None,
    ) -> Conditions:
        """Read the columns of an AnnData.

        Arguments are those of ``setup_anndata``, with the name of a column of doses, which then
        tell conditions apart; errors and conditions are those of :meth:`from_labels`.

        Examples
        --------
        >>> import anndata
        >>> obs = pd.DataFrame({"guide": ["NT", "B+A"]}, index=["c1", "c2"])
        >>> Conditions.from_obs(anndata.AnnData(obs=obs), "guide", "NT").labels
        ['A+B', 'NT']
        """
        labels = obs_column(adata, perturbation_key)
        doses = None if dosage_key is None else obs_column(adata, dosage_key)
        return cls.from_labels(labels, control, delimiter, doses)

    @classmethod
    def from_matrix(
        cls,
        matrix: DosageMatrix,
        perturbations: Sequence[str] | None = None,
        control: object = None,
        delimiter: str | None = "+",
        *,
        cells: Sequence[str] | None = None,
        source: str = "the dosage matrix",
    ) -> Conditions:
        """Read a dosage matrix: an array, a SciPy sparse matrix or array, or a DataFrame.

        Parameters
        ----------
        matrix
            Doses, cells x perturbations.
        perturbations
            Name of each column; a DataFrame has its own.
        control, delimiter
            For the labels of conditions.
        cells
            Name of each row, for error messages. The default is the index of a DataFrame, or
            numbers.
        source
            What to call ``matrix`` in error messages.

        Returns
        -------
        Conditions
            As of :meth:`from_labels`.

        Raises
        ------
        ScreenError
            If names are absent, repeated or of another number than the columns, there is no
            column, or a dose is not a number, negative, NaN or infinite.

        Examples
        --------
        >>> matrix = pd.DataFrame({"KLF1": [1.0, 0.0], "JAK2": [0.5, 0.0]})
        >>> Conditions.from_matrix(matrix, control="NT").labels
        ['JAK2:0.5+KLF1:1', 'NT']
        """
        dosage, names = _read_matrix(matrix, perturbations, cells, source)
        return cls.from_columns(*_padded(dosage), names, control, delimiter)

    @classmethod
    def from_columns(
        cls,
        index: NDArray[np.int32],
        dose: NDArray[np.float32],
        perturbations: Sequence[str],
        control: object = None,
        delimiter: str | None = "+",
    ) -> Conditions:
        """Read padded columns, cells x K, as a screen has them registered."""
        return cls._distinct(list(perturbations), index, dose, as_labels(control), delimiter)

    @classmethod
    def from_request(
        cls,
        conditions: ConditionsLike,
        perturbations: Sequence[str],
        control: object = None,
        delimiter: str | None = "+",
    ) -> Conditions:
        """Read what a user asks for, whether or not any cell was measured under it.

        Parameters
        ----------
        conditions
            One condition or several, each a label (``"A"``, ``"A+B"``, ``"A:1+B:0.5"``, a control
            label) or a dict of doses such as ``{"A": 1.0, "B": 0.5}`` (an empty one is a control).
            Or a dosage matrix, conditions x ``perturbations``; a DataFrame may have fewer columns,
            in any order, and its index, unless it is only numbers, labels the conditions.
        perturbations
            Perturbations of the model.
        control
            Label or labels that mean no perturbation.
        delimiter
            What joins the parts of a label.

        Returns
        -------
        Conditions
            Conditions in the order in which they were first asked for, under the label given or
            one made from the doses. What is asked twice, as ``"A+B"`` and ``"B+A"``, is one
            condition of two rows.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that is not in ``perturbations``.
        ScreenError
            If there is no condition, one is of another type, a dose is negative or not finite, or
            a matrix does not have one column for each name.

        Examples
        --------
        >>> asked = Conditions.from_request(["NT", "B+A", {"A": 1, "B": 0.5}], ["A", "B"], "NT")
        >>> asked.labels
        ['NT', 'B+A', 'A:1+B:0.5']
        >>> asked.matrix.toarray().tolist()
        [[0.0, 0.0], [1.0, 1.0], [1.0, 0.5]]
        """
        names, controls = list(perturbations), as_labels(control)
        labels: list[str | None]
        is_frame = isinstance(conditions, pd.DataFrame)
        is_array = isinstance(conditions, np.ndarray) and conditions.dtype.kind in "biuf"
        if is_frame or is_array or sparse.issparse(conditions):
            rows: Any = conditions
            rows = np.atleast_2d(rows) if is_array else rows
            own_names = None if is_frame else names
            read = cls.from_matrix(rows, own_names, source="the matrix of conditions").align(names)
            index, dose = read.cell_index, read.cell_dose
            labels = [None] * len(index)
            if is_frame and not pd.api.types.is_numeric_dtype(rows.index):
                labels = [str(label) for label in rows.index]
        else:
            one = isinstance(conditions, str | Mapping | Integral | np.bool_)
            several: Any = [conditions] if one else conditions
            if not isinstance(several, Iterable):
                raise ScreenError(
                    f"conditions={conditions!r} cannot be used: give labels, as 'A'."
                )
            known = {*controls, *names}
            asked = [_read_condition(c, known, controls, delimiter) for c in several]
            if not asked:
                raise ScreenError("There is no condition: name at least one, such as 'A'.")
            labels = [label for label, _ in asked]
            doses = [[(n, dose) for n, dose in row if n not in controls] for _, row in asked]
            if unknown := {name for row in doses for name, _ in row}.difference(names):
                raise unknown_perturbations(sorted(unknown), names)
            index, dose = _read_rows(doses, names)
        return cls._distinct(names, index, dose, controls, delimiter, labels)

    # -- reading out ---------------------------------------------------------------------------

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether each condition is a control; ``is_control[codes]`` says it of the cells."""
        return (self.dose == 0).all(axis=1)

    @property
    def n_cells(self) -> NDArray[np.intp]:
        """Cells (rows) of each condition."""
        return np.bincount(self.codes, minlength=len(self.labels))

    @cached_property
    def parts(self) -> list[dict[str, float]]:
        """Perturbations of each condition in alphabetical order, with their doses."""
        return _parts(self.perturbations, self.index, self.dose)

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """Doses, conditions x perturbations: sorted, without stored zeros."""
        return padded_to_csr(self.index, self.dose, len(self.perturbations))

    @property
    def cell_matrix(self) -> sparse.csr_matrix:
        """Doses, cells x perturbations."""
        return self.matrix[self.codes]

    @property
    def cell_index(self) -> NDArray[np.int32]:
        """Positions of the perturbations of each cell, padded with 0, cells x K."""
        return self.index[self.codes]

    @property
    def cell_dose(self) -> NDArray[np.float32]:
        """Doses of each cell, padded with 0, cells x K."""
        return self.dose[self.codes]

    @property
    def cell_labels(self) -> list[str]:
        """Label of each cell (row)."""
        return [self.labels[code] for code in self.codes]

    def align(self, perturbations: Sequence[str]) -> Conditions:
        """The same conditions among other perturbations, of which those here are some.

        Raises
        ------
        UnknownPerturbationError
            If a perturbation here is not among ``perturbations``.

        Examples
        --------
        >>> Conditions.from_labels(["A", "B"]).align(["B", "C", "A"]).matrix.toarray().tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        """
        names = list(perturbations)
        position = pd.Index(names).get_indexer(self.perturbations).astype(np.int32)
        if (position < 0).any():
            unknown = [name for name, k in zip(self.perturbations, position, strict=True) if k < 0]
            raise unknown_perturbations(unknown, names)
        index = np.where(self.dose > 0, position[self.index], np.int32(len(names)))
        order = np.argsort(index, axis=1)
        index, dose = (np.take_along_axis(a, order, axis=1) for a in (index, self.dose))
        return replace(self, perturbations=names, index=np.where(dose > 0, index, 0), dose=dose)

    def find(self, wanted: Iterable[object]) -> list[int]:
        """Find the codes of conditions that a user names, in any order of their parts.

        Labels are such as ``"B+A"`` or ``"A:0.5"``; codes are increasing, each once.

        Raises
        ------
        ScreenError
            If one has no cells, or is a control.

        Examples
        --------
        >>> Conditions.from_labels(["A", "A+B", "B"]).find(["B + A"])
        [1]
        """
        code_of = {frozenset(parts.items()): code for code, parts in enumerate(self.parts)}
        known = {*self.controls, *self.perturbations}
        codes, unknown = set(), []
        for label in as_labels(wanted):
            doses: Counter[str] = Counter()
            for name, dose in _read_label(label, known, self.delimiter):
                if name not in self.controls:
                    doses[name] += dose  # type: ignore[assignment]
            if not doses:
                raise ScreenError(
                    f"{label!r} is the control, which is needed for training: name conditions "
                    "with a perturbation."
                )
            key = frozenset((name, float(np.float32(dose))) for name, dose in doses.items())
            if key in code_of:
                codes.add(code_of[key])
            else:
                unknown.append(label)
        if unknown:
            close = nearest(unknown[0], self.labels)
            raise ScreenError(
                f"No cell has the conditions {listed(unknown)}."
                + (f" Did you mean {listed(close)}?" if close else "")
            )
        return sorted(codes)

    # -- shared steps --------------------------------------------------------------------------

    @classmethod
    def _distinct(
        cls,
        names: list[str],
        index: NDArray[np.int32],
        dose: NDArray[np.float32],
        controls: list[str],
        delimiter: str | None,
        labels: Sequence[str | None] | None = None,
    ) -> Conditions:
        """Take the distinct rows: sorted by label, or as they come where labels are given."""
        first, codes = _distinct_rows(index, dose)
        index, dose = index[first], dose[first]
        taken = set(names)
        found = [
            _written_label(parts, controls, delimiter, taken)
            for parts in _parts(names, index, dose)
        ]
        order = np.arange(len(found))
        if labels is None:
            order = np.array(sorted(order, key=found.__getitem__), dtype=np.intp)
        else:
            found = [labels[row] or made for row, made in zip(first, found, strict=True)]
        code_of = np.empty(len(order), dtype=np.intp)
        code_of[order] = np.arange(len(order))
        return cls(
            names,
            index[order],
            dose[order],
            [found[row] for row in order],
            code_of[codes],
            tuple(controls),
            delimiter,
        )


def as_labels(labels: object) -> list[str]:
    """Make a list of one label, several or none; numbers are written out.

    Examples
    --------
    >>> as_labels("control"), as_labels(["NT", 0]), as_labels(False), as_labels(None)
    (['control'], ['NT', '0'], ['False'], [])
    """
    if labels is None:
        return []
    several = labels if isinstance(labels, Iterable) and not isinstance(labels, str) else [labels]
    return [str(label).strip() for label in several]


def split_label(label: str, delimiter: str | None, whole: Collection[str] = ()) -> list[str]:
    """Split a label into its parts, unless it is, as it stands, one of the names in `whole`.

    Examples
    --------
    >>> split_label("KLF1 + CEBPA", "+"), split_label("HLA+B", "+", whole={"HLA+B"})
    (['KLF1', 'CEBPA'], ['HLA+B'])
    """
    if not delimiter or label in whole:
        return [label]
    return [part.strip() for part in label.split(delimiter)]


def unknown_parts(labels: pd.Series, known: Collection[str], delimiter: str | None) -> list[str]:
    """List the parts of labels that are not among known names, but for those that are missing."""
    parts = {
        _read_part(part, known)[0]
        for label in labels.dropna().unique()
        for part in split_label(str(label).strip(), delimiter, known)
    }
    return sorted(part for part in parts.difference(known) if not is_missing(part, known))


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Take a column of `adata.obs`, or say what there is."""
    if key not in adata.obs:
        close = nearest(key, map(str, adata.obs.columns))
        raise ScreenError(
            f"There is no column {key!r} in adata.obs. "
            + (f"Did you mean {listed(close)}?" if close else f"It has {listed(adata.obs)}.")
        )
    return adata.obs[key]


def padded_to_csr(
    index: NDArray[np.integer], dose: NDArray[np.floating], n_perturbations: int
) -> sparse.csr_matrix:
    """Doses, rows x perturbations, from padded columns of increasing positions."""
    given = dose > 0
    starts = np.concatenate([[0], np.cumsum(given.sum(axis=1))])
    return sparse.csr_matrix(
        (dose[given].astype(np.float32), index[given].astype(np.int32), starts.astype(np.int32)),
        shape=(len(index), n_perturbations),
    )


# -- doses ---------------------------------------------------------------------------------------


def _padded(dosage: sparse.csr_matrix) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Positions and doses of each row of a canonical matrix, as padded columns."""
    length = np.diff(dosage.indptr)
    width = max(1, int(length.max(initial=0)))
    given = np.arange(width) < length[:, None]
    index, dose = np.zeros(given.shape, np.int32), np.zeros(given.shape, np.float32)
    index[given], dose[given] = dosage.indices, dosage.data
    return index, dose


def _distinct_rows(
    index: NDArray[np.int32], dose: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Find the first of equal rows, as they come, and which of them each row is."""
    codes = np.zeros(len(index), dtype=np.int64)
    for column in (*index.T, *dose.T):  # by hashing, one column after another: no row is sorted
        of_column, values = pd.factorize(column)
        codes = pd.factorize(codes * max(1, len(values)) + of_column)[0]
    first = np.empty(codes.max(initial=-1) + 1, dtype=np.intp)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last one written stays
    return first, codes


def _parts(
    names: Sequence[str], index: NDArray[np.int32], dose: NDArray[np.float32]
) -> list[dict[str, float]]:
    return [
        dict(sorted((names[i], d) for i, d in zip(positions, doses, strict=True) if d))
        for positions, doses in zip(index.tolist(), dose.tolist(), strict=True)
    ]


def _written_label(
    parts: Mapping[str, float],
    controls: Sequence[str],
    delimiter: str | None,
    names: Collection[str],
) -> str:
    """Write doses as a label; a dose is shown only where one of them is not 1."""
    if not parts:
        return controls[0] if controls else "control"
    joined = (delimiter or "+").join(parts)
    is_another = len(parts) > 1 and joined in names
    if all(dose == 1 for dose in parts.values()) and not is_another:
        return joined
    # The shortest digits that are read back as the same dose, without the sign of an exponent.
    return (delimiter or "+").join(
        f"{name}:{np.format_float_positional(np.float32(dose), trim='-')}"
        for name, dose in parts.items()
    )


def _read_part(part: str, known: Collection[str]) -> tuple[str, float]:
    """Read a part of a label: a name, or a known one with its dose (``"A:0.5"``)."""
    name, _, text = part.rpartition(":")
    if part not in known and name.strip() in known and _is_dose(dose := _number(text)):
        return name.strip(), dose
    return part, 1.0


def _read_label(
    label: str, known: Collection[str], delimiter: str | None
) -> list[tuple[str, float]]:
    """Read a label among known names, also one that was written here without a delimiter."""
    parts = [_read_part(part, known) for part in split_label(label, delimiter or "+", known)]
    if delimiter is None and not all(name in known for name, _ in parts):
        return [(label, 1.0)]
    return parts


_LEAST_DOSE = float(np.finfo(np.float32).tiny)
_LARGEST_DOSE = float(np.finfo(np.float32).max)
_A_DOSE = "finite numbers, 0 or more, within single precision (1e-38 to 1e38)"


def _is_dose(value: float) -> bool:
    """Whether a number stays a dose as a float32: neither infinite nor, if it is not, zero."""
    return value == 0 or _LEAST_DOSE <= value <= _LARGEST_DOSE


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _read_rows(
    rows: Sequence[Sequence[tuple[str, float]]], names: Sequence[str]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Padded columns of rows of names with doses, which add up; other names are nothing."""
    column_of = {name: position for position, name in enumerate(names)}
    known = [[(column_of[name], d) for name, d in row if name in column_of] for row in rows]
    starts = np.cumsum([0, *map(len, known)])
    indices = np.array([column for row in known for column, _ in row], dtype=np.int32)
    doses = np.array([dose for row in known for _, dose in row], dtype=np.float32)
    shape = (len(rows), len(names))
    return _padded(_canonical(sparse.csr_matrix((doses, indices, starts), shape=shape)))


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


# -- matrices ------------------------------------------------------------------------------------


def _read_matrix(
    matrix: DosageMatrix, names: Sequence[str] | None, cells: Sequence[str] | None, source: str
) -> tuple[sparse.csr_matrix, list[str]]:
    """Check a dosage matrix, and bring it into canonical form."""
    if isinstance(matrix, pd.DataFrame):
        names = list(matrix.columns) if names is None else names
        cells = matrix.index if cells is None else cells
        matrix = frame_values(matrix, source)
    if names is None:
        raise ScreenError(
            f"The columns of {source} have no names. Store it as a DataFrame whose columns are "
            "the perturbations, or name them (`perturbation_names_uns_key` in setup_anndata)."
        )
    names = _checked_names(names)
    if not sparse.issparse(matrix):
        matrix = np.asarray(matrix)
        if matrix.ndim != 2 or not np.can_cast(matrix.dtype, np.float64, "same_kind"):
            raise ScreenError(
                f"{source} must be a numeric matrix (cells x perturbations), not an array of "
                f"shape {matrix.shape} and dtype {matrix.dtype}."
            )
    if len(names) != matrix.shape[1] or not names:
        raise ScreenError(
            f"{source} has shape {matrix.shape} but {len(names)} names were given: give one name "
            "to each of its columns, of which there must be at least one."
        )
    check_structure(matrix, source)
    dosage = _canonical(sparse.csr_matrix(matrix, dtype=np.float64, copy=True))
    faulty = np.flatnonzero(~((dosage.data >= _LEAST_DOSE) & (dosage.data <= _LARGEST_DOSE)))
    if faulty.size:
        rows = np.unique(np.searchsorted(dosage.indptr, faulty, side="right") - 1)
        columns = np.unique(dosage.indices[faulty])
        raise ScreenError(
            f"Doses must be {_A_DOSE}, but {source} holds "
            f"{listed(dosage.data[faulty])} in cells "
            f"{listed(rows if cells is None else np.asarray(cells)[rows])}, for "
            f"{listed(np.asarray(names)[columns])}. Correct them or drop the cells."
        )
    return dosage.astype(np.float32), names


def frame_values(frame: pd.DataFrame, source: str, things: str = "perturbations") -> Any:
    """Take the numbers out of a DataFrame, staying sparse where it is."""
    numeric = [pd.api.types.is_numeric_dtype(getattr(t, "subtype", t)) for t in frame.dtypes]
    if not all(numeric):
        raise ScreenError(
            f"Columns of {source} that are not numeric: "
            f"{listed(frame.columns[~np.array(numeric)])}. Convert them with pandas.to_numeric, "
            f"or drop them if they are no {things}."
        )
    if frame.shape[1] and all(
        isinstance(dtype, pd.SparseDtype) and dtype.fill_value == 0 for dtype in frame.dtypes
    ):
        return frame.sparse.to_coo()
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _checked_names(names: Sequence[str]) -> list[str]:
    """Make a list of the names, none of which may be repeated."""
    series = pd.Series(list(map(str, names)), dtype=object)
    if (again := series.duplicated()).any():
        raise ScreenError(
            f"Perturbation names that occur more than once: {listed(series[again].unique())}. "
            "Rename these columns, or add their doses up into one."
        )
    return series.tolist()


# -- labels of cells -----------------------------------------------------------------------------


def is_missing(text: str, known: Collection[str] = ()) -> bool:
    """Whether text stands for no value, and is not a known name."""
    return text.casefold() in _MISSING and text not in known


def _check_present(
    cells: pd.Index,
    codes: NDArray[np.integer],
    texts: Sequence[str],
    known: Collection[str],
    column: str,
) -> None:
    faulty = [code for code, text in enumerate(texts) if is_missing(text, known)]
    missing = np.isin(codes, [-1, *faulty])
    if missing.any():
        spelt = f", written {listed(texts[code] for code in faulty)}" if faulty else ""
        raise ScreenError(
            f"Cells without a label in {column} ({missing.sum()}): {listed(cells[missing])}"
            f"{spelt}. Drop them, or give them the control label if that is what they are."
        )


def _check_controls(
    controls: Sequence[str], occurring: Collection[str], labels: pd.Series, column: str
) -> None:
    for control in (each for each in controls if each not in occurring):
        counts = labels.value_counts().head(10).items()
        frequent = ", ".join(f"{str(label)!r} ({count})" for label, count in counts if count)
        close = nearest(control, occurring)
        hint = f" Did you mean {listed(close)}?" if close else ""
        raise ScreenError(
            f"No cell has the control label {control!r} in {column}. Its most "
            f"frequent labels (and their cells) are {frequent}.{hint} Pass the label of its "
            "control cells as `control`."
        )


def _distinct_pairs(
    codes: NDArray[np.integer], doses: pd.Series
) -> tuple[NDArray[np.intp], list[tuple[int, Any]]]:
    """Find the distinct (label code, dose) pairs, and which of them each cell has."""
    dose_codes, values = pd.factorize(doses)
    dose_of = [*values, np.nan]  # factorize codes a missing dose as -1
    pair_codes = codes.astype(np.int64) * len(dose_of) + dose_codes % len(dose_of)
    distinct, pair_of_cell = np.unique(pair_codes, return_inverse=True)
    labels, dose_codes = np.divmod(distinct, len(dose_of))
    return pair_of_cell, [
        (int(label), dose_of[dose]) for label, dose in zip(labels, dose_codes, strict=True)
    ]


def _dosed_rows(
    pairs: Sequence[tuple[int, Any]],
    parts: Sequence[Sequence[str]],
    names: Sequence[str],
    delimiter: str | None,
    texts: Sequence[str],
    cells: pd.Index,
    pair_of_cell: NDArray[np.intp],
) -> list[list[tuple[str, float]]]:
    """Give each distinct (label, dose) pair its names with doses."""
    rows, uneven, invalid, known = [], [], [], set(names)
    for index, (label, dose) in enumerate(pairs):
        is_active = [part in known for part in parts[label]]
        values = _split_doses(dose, delimiter) if any(is_active) else []
        if len(values) == len(is_active):  # one dose for each part, control parts among them
            values = list(compress(values, is_active))
        active = list(compress(parts[label], is_active))
        rows.append(list(zip(active, values, strict=False)))
        if len(values) != len(active):
            uneven.append(index)
        elif not all(map(_is_dose, values)):
            invalid.append(index)
    if uneven:
        label, dose = pairs[uneven[0]]
        raise ScreenError(
            f"The number of doses is not the number of parts in cells "
            f"{listed(cells[np.isin(pair_of_cell, uneven)])}: label {texts[label]!r} has "
            f"{len(parts[label])} part(s), but its dose is {str(dose)!r}. Give one dose for each "
            f"part, as in {(delimiter or '+').join(['1.0'] * len(parts[label]))!r}."
        )
    if invalid:
        faulty = [f"{pairs[i][1]} of {texts[pairs[i][0]]}" for i in invalid]
        raise ScreenError(
            f"Doses must be {_A_DOSE}, but cells "
            f"{listed(cells[np.isin(pair_of_cell, invalid)])} have {listed(faulty)}. Correct "
            "them or drop the cells."
        )
    return rows


def _split_doses(dose: object, delimiter: str | None) -> list[float]:
    """Read the doses of a label; what is no number becomes NaN."""
    whole = _number(str(dose))  # first, so that "1e+3" is one number
    if delimiter and np.isnan(whole):
        return [_number(piece) for piece in str(dose).split(delimiter)]
    return [whole]


# -- what a user asks for ------------------------------------------------------------------------


def _read_condition(
    condition: object, known: Collection[str], controls: Collection[str], delimiter: str | None
) -> tuple[str | None, list[tuple[str, float]]]:
    """Read one condition: its label, if it has one, and its names with doses."""
    if isinstance(condition, str | Integral | np.bool_):
        label = str(condition).strip()
        return label, _read_label(label, known, delimiter)
    if isinstance(condition, Mapping):
        row = [(str(name), float(dose)) for name, dose in condition.items()]
        if faulty := [f"{n}: {d:g}" for n, d in row if not _is_dose(d) and n not in controls]:
            raise ScreenError(f"Doses must be {_A_DOSE}, but the condition has {listed(faulty)}.")
        return None, row
    raise ScreenError(
        f"{condition!r} is no condition. Write a label such as 'A+B', a dict such as "
        "{'A': 1.0}, or all conditions as one matrix (conditions x perturbations)."
    )
