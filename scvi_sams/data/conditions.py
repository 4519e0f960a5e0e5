"""What cells received: labels, doses and matrices read into one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._exceptions import ScreenError, listed, nearest, unknown_perturbations

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = [
    "CellConditions",
    "ConditionDosage",
    "Conditions",
    "Dosage",
    "align_dosage",
    "as_labels",
    "cell_conditions",
    "checked_names",
    "dosage_from_conditions",
    "dosage_from_labels",
    "dosage_from_matrix",
    "find_conditions",
    "obs_column",
    "split_label",
    "stack_rows",
]


class Dosage(NamedTuple):
    """How much of each perturbation each cell received.

    Examples
    --------
    >>> matrix, names = dosage_from_matrix(pd.DataFrame({"KLF1": [1.0, 0.0], "JAK2": [0.5, 0.0]}))
    >>> names
    ['KLF1', 'JAK2']
    >>> matrix.toarray().tolist()
    [[1.0, 0.5], [0.0, 0.0]]
    """

    matrix: sparse.csr_matrix
    """Doses, cells x perturbations: float32, finite, 0 or more, sorted and without stored zeros.

    A control cell is an empty row. A `csr_matrix` and not a `csr_array`, which the sparse loaders
    of scvi-tools refuse.
    """
    names: list[str]
    """Name of each column."""


def dosage_from_matrix(
    matrix: np.ndarray | sparse.spmatrix | sparse.sparray | pd.DataFrame,
    names: Sequence[str] | None = None,
    *,
    cells: Sequence[str] | None = None,
    source: str = "the dosage matrix",
) -> Dosage:
    """Read the dosage matrix from an array, a SciPy sparse matrix or array, or a DataFrame.

    Parameters
    ----------
    matrix
        Doses, cells x perturbations. It is copied.
    names
        Name of each column; a DataFrame has its own.
    cells
        Name of each row, for error messages. The default is the index of a DataFrame, or numbers.
    source
        What to call `matrix` in error messages.

    Raises
    ------
    ScreenError
        If names are absent, repeated or of another number than the columns, there is no column, or
        a dose is not a number, negative, NaN or infinite.

    Examples
    --------
    >>> dosage_from_matrix(np.array([[0.0, 0.5], [0.0, 0.0]]), names=["A", "B"]).matrix.nnz
    1
    """
    if isinstance(matrix, pd.DataFrame):
        if names is None:
            names = list(matrix.columns)
        if cells is None:
            cells = matrix.index
        matrix = _frame_values(matrix, source)
    if names is None:
        raise ScreenError(
            f"The columns of {source} have no names. Store it as a DataFrame whose columns are "
            "the perturbations, or name them (`perturbation_names_uns_key` in setup_anndata)."
        )
    names = checked_names(names)
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
    with np.errstate(over="ignore"):  # an overflow is reported below, as infinite
        dosage = _canonical(sparse.csr_matrix(matrix, dtype=np.float32, copy=True))
    _check_doses(dosage, names, cells, source)
    return Dosage(dosage, names)


def align_dosage(dosage: Dosage, names: Sequence[str]) -> sparse.csr_matrix:
    """Bring the columns of a dosage matrix into the order of `names`.

    Parameters
    ----------
    dosage
        Doses and the names of their columns, a subset of `names` in any order.
    names
        Columns wanted; those absent from `dosage` become zero.

    Returns
    -------
    Doses, cells x `names`.

    Raises
    ------
    UnknownPerturbationError
        If a column of `dosage` is not in `names`.

    Examples
    --------
    >>> dosage = dosage_from_matrix(np.eye(2), ["A", "B"])
    >>> align_dosage(dosage, ["B", "C", "A"]).toarray().tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    column_of = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in dosage.names if name not in column_of]:
        raise unknown_perturbations(unknown, names)
    matrix = dosage.matrix
    new_column = np.array([column_of[name] for name in dosage.names], dtype=matrix.indices.dtype)
    return _canonical(
        sparse.csr_matrix(
            (matrix.data, new_column[matrix.indices], matrix.indptr),
            shape=(matrix.shape[0], len(names)),
            copy=True,
        )
    )


def stack_rows(rows: Sequence[Sequence[tuple[int, float]]], n_columns: int) -> sparse.csr_matrix:
    """Stack rows of (column, dose) pairs into a CSR matrix; the doses of a column add up."""
    indptr = np.cumsum([0, *(len(row) for row in rows)])
    indices = np.array([column for row in rows for column, _ in row], dtype=np.int32)
    doses = np.array([dose for row in rows for _, dose in row], dtype=np.float32)
    return _canonical(sparse.csr_matrix((doses, indices, indptr), shape=(len(rows), n_columns)))


def checked_names(names: Sequence[str]) -> list[str]:
    """Make a list of the names, none of which may be repeated."""
    names = [str(name) for name in names]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ScreenError(
            f"Perturbation names that occur more than once: {listed(repeated)}. Rename these "
            "columns, or add their doses up into one."
        )
    return names


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _frame_values(frame: pd.DataFrame, source: str) -> Any:
    """Take the numbers out of a DataFrame, staying sparse where it is."""
    if faulty := [
        name for name, dtype in frame.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)
    ]:
        raise ScreenError(
            f"Columns of {source} that are not numeric: {listed(faulty)}. Convert them with "
            "pandas.to_numeric, or drop them if they are no perturbations."
        )
    if frame.shape[1] and all(
        isinstance(dtype, pd.SparseDtype) and dtype.fill_value == 0 for dtype in frame.dtypes
    ):
        return frame.sparse.to_coo()
    return frame.to_numpy(dtype=np.float64, na_value=np.nan)


def _check_doses(
    dosage: sparse.csr_matrix, names: Sequence[str], cells: Sequence[str] | None, source: str
) -> None:
    faulty = np.flatnonzero(~((dosage.data >= 0) & (dosage.data < np.inf)))
    if faulty.size:
        rows = np.unique(np.searchsorted(dosage.indptr, faulty, side="right") - 1)
        columns = np.unique(dosage.indices[faulty])
        raise ScreenError(
            f"Doses must be finite numbers, 0 or more, but {source} holds "
            f"{listed(dosage.data[faulty])} in cells "
            f"{listed(rows if cells is None else np.asarray(cells)[rows])}, for "
            f"{listed(np.asarray(names)[columns])}. Correct them or drop the cells."
        )


# What a missing value has become once a column went through `astype(str)`.
_MISSING_TEXT = frozenset({"nan", "<NA>"})


def as_labels(labels: str | Iterable[str] | None) -> list[str]:
    """Make a list of one label, several or none.

    Examples
    --------
    >>> as_labels("control"), as_labels(["NT", "safe"]), as_labels(None)
    (['control'], ['NT', 'safe'], [])
    """
    if labels is None:
        return []
    return [str(label).strip() for label in ([labels] if isinstance(labels, str) else labels)]


def dosage_from_labels(
    labels: pd.Series | Sequence[str],
    control: str | Iterable[str] | None,
    delimiter: str | None = "+",
    doses: pd.Series | Sequence[float | str] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> Dosage:
    """Read the dosage matrix from one label a cell, such as ``"control"`` or ``"KLF1+CEBPA"``.

    Parameters
    ----------
    labels
        One label a cell: perturbations joined by `delimiter`, in any number and order. A part that
        is a control label counts as nothing, a repeated part counts twice. The name and index of a
        Series (an obs column) appear in error messages.
    control
        Label or labels of unperturbed cells, or None where no label means that.
    delimiter
        What joins the parts of a label; None takes every label as one perturbation.
    doses
        One dose a cell: a number, or text with one number for each part in the order of the label
        (``"1.0+0.5"``; control parts may be left out). The default is a dose of 1 for each part.
        Doses of control cells are not read.
    names
        Columns of the matrix, as known to a model. The default is every part that occurs, sorted.

    Returns
    -------
    The dosage matrix, one row a label, and its names.

    Raises
    ------
    ScreenError
        If a label is missing or has an empty part, no cell has a control label, every cell is a
        control (unless `names` are given), or a dose is negative, not finite, or does not match
        the parts of its label.
    UnknownPerturbationError
        If a part is not in `names`.

    Examples
    --------
    >>> dosage = dosage_from_labels(["NT", "A", "A+B"], "NT", doses=["", "2", "1.0+0.5"])
    >>> dosage.matrix.toarray().tolist()
    [[0.0, 0.0], [2.0, 0.0], [1.0, 0.5]]
    """
    labels = pd.Series(labels)
    controls = as_labels(control)
    column = "the labels" if labels.name is None else f"column {labels.name!r}"

    # Everything below works on the distinct labels (thousands), never on the cells (millions).
    categorical = labels.astype("category").cat.remove_unused_categories()
    codes = categorical.cat.codes.to_numpy()
    texts = [str(category).strip() for category in categorical.cat.categories]
    _check_present(labels.index, codes, texts, controls, column)

    whole = {*controls, *(names or ())}
    parts = [split_label(text, delimiter, whole) for text in texts]
    if faulty := [text for text, pieces in zip(texts, parts, strict=True) if "" in pieces]:
        raise ScreenError(
            f"Labels with an empty part in {column}: {listed(faulty)}. Correct them, or set the "
            f"delimiter, which is {delimiter!r}; None takes every label as one perturbation."
        )
    occurring = {part for pieces in parts for part in pieces}
    if names is None:
        _check_controls(controls, occurring, labels, column)
        names = sorted(occurring.difference(controls))
        if not names:
            raise ScreenError(
                f"No perturbation in {column}: the labels are all control ({listed(controls)})."
            )
    else:
        names = checked_names(names)
        if unknown := sorted(occurring.difference(controls, names)):
            raise unknown_perturbations(unknown, names)

    column_of: dict[str, int] = {name: index for index, name in enumerate(names)}
    if doses is None:
        row_of_cell = codes
        rows = [[(column_of[p], 1.0) for p in pieces if p in column_of] for pieces in parts]
    else:
        doses = pd.Series(doses)
        if len(doses) != len(labels):
            raise ScreenError(f"There are {len(labels)} labels but {len(doses)} doses.")
        row_of_cell, pairs = _distinct_pairs(codes, doses)
        rows = _dosed_rows(pairs, parts, column_of, delimiter, texts, labels.index, row_of_cell)
    return Dosage(stack_rows(rows, len(names))[row_of_cell], list(names))


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


def _distinct_pairs(
    codes: NDArray[Any], doses: pd.Series
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
    column_of: dict[str, int],
    delimiter: str | None,
    texts: Sequence[str],
    cells: pd.Index,
    pair_of_cell: NDArray[np.intp],
) -> list[list[tuple[int, float]]]:
    """Give each distinct (label, dose) pair its row of (column, dose)."""
    rows, uneven, invalid = [], [], []
    for index, (label, dose) in enumerate(pairs):
        columns = [column_of.get(part) for part in parts[label]]
        active = [column for column in columns if column is not None]
        values = _split_doses(dose, delimiter) if active else []
        if len(values) == len(columns):  # one dose for each part, control parts among them
            values = [v for v, column in zip(values, columns, strict=True) if column is not None]
        rows.append(list(zip(active, values, strict=False)))
        if len(values) != len(active):
            uneven.append(index)
        elif not all(0 <= value < np.inf for value in values):
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
            f"Doses must be finite numbers, 0 or more, but cells "
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _check_present(
    cells: pd.Index,
    codes: NDArray[Any],
    texts: Sequence[str],
    controls: Collection[str],
    column: str,
) -> None:
    text_missing = [t in _MISSING_TEXT and t not in controls for t in texts]
    missing = (codes == -1) | np.isin(codes, np.flatnonzero(text_missing))
    if missing.any():
        raise ScreenError(
            f"Cells without a label in {column} ({missing.sum()}): {listed(cells[missing])}. "
            "Drop them, or give them the control label if that is what they are."
        )


def _check_controls(
    controls: Sequence[str], occurring: Collection[str], labels: pd.Series, column: str
) -> None:
    for control in controls:
        if control not in occurring:
            counts = labels.value_counts().head(10).items()
            frequent = ", ".join(f"{str(label)!r} ({count})" for label, count in counts if count)
            close = nearest(control, occurring)
            hint = f" Did you mean {listed(close)}?" if close else ""
            raise ScreenError(
                f"No cell has the control label {control!r} in {column}. Its most "
                f"frequent labels (and their cells) are {frequent}.{hint} Pass the label of its "
                "control cells as `control`."
            )


Conditions: TypeAlias = (
    "str | Mapping[str, float] | Sequence[str | Mapping[str, float]] "
    "| np.ndarray | sparse.spmatrix | sparse.sparray | pd.DataFrame"
)
"""One condition or several: labels, ``{name: dose}`` dicts, or a dosage matrix."""


class ConditionDosage(NamedTuple):
    """Doses and labels of conditions."""

    matrix: sparse.csr_matrix
    """Doses, conditions x perturbations, float32."""
    labels: list[str]
    """Label of each condition."""


def dosage_from_conditions(
    conditions: Conditions,
    names: Sequence[str],
    control_labels: str | Iterable[str] | None = None,
    delimiter: str | None = "+",
) -> ConditionDosage:
    """Read conditions, whether or not any cell was measured under them.

    Parameters
    ----------
    conditions
        One condition or a sequence of them, each either a label as in `perturbation_key`
        (``"A"``, ``"A+B"``, a control label), or a dict of doses such as ``{"A": 1.0, "B": 0.5}``
        (an empty one is a control). Or a dosage matrix, conditions x `names`; a DataFrame may
        have fewer columns than `names`, in any order, and its index, unless it is only numbers,
        labels the conditions.
    names
        Perturbations of the model.
    control_labels
        Label or labels that mean no perturbation.
    delimiter
        What joins the parts of a label.

    Returns
    -------
    Doses, conditions x `names`, and a label for each condition: the one given, else one made from
    the doses, such as ``"A+B"``, or ``"A:1+B:0.5"`` where a dose is not 1.

    Raises
    ------
    UnknownPerturbationError
        If a condition names a perturbation that is not in `names`.
    ScreenError
        If there is no condition, one is of another type, a dose is negative or not finite, or a
        matrix does not have one column for each name.

    Examples
    --------
    >>> conditions = ["control", "A+B", {"A": 1.0, "B": 0.5}]
    >>> matrix, labels = dosage_from_conditions(conditions, ["A", "B"], "control")
    >>> labels
    ['control', 'A+B', 'A:1+B:0.5']
    >>> matrix.toarray().tolist()
    [[0.0, 0.0], [1.0, 1.0], [1.0, 0.5]]
    """
    names = list(names)
    controls = as_labels(control_labels)
    if _is_matrix(conditions):
        dosage = _read_matrix(conditions, names)
        labels = _index_labels(conditions)
        if labels is None:
            labels = [_label_doses(row, controls, delimiter) for row in _row_doses(dosage)]
        return ConditionDosage(dosage.matrix, labels)

    if isinstance(conditions, str | Mapping):
        conditions = [conditions]
    doses, labels = [], []
    for condition in conditions:
        if isinstance(condition, str):
            parts = split_label(condition.strip(), delimiter, {*controls, *names})
            doses.append([(part, 1.0) for part in parts if part not in controls])
            labels.append(condition)
        elif isinstance(condition, Mapping):
            row = {str(name): float(dose) for name, dose in condition.items()}
            row = {name: dose for name, dose in row.items() if name not in controls}
            _check_condition_doses(row)
            doses.append(list(row.items()))
            labels.append(_label_doses(row, controls, delimiter))
        else:
            raise ScreenError(
                f"{condition!r} is no condition. Write a label such as 'A+B', a dict such as "
                "{'A': 1.0}, or all conditions as one matrix (conditions x perturbations)."
            )
    if not labels:
        raise ScreenError("There is no condition: name at least one, such as 'A' or 'A+B'.")

    column_of = {name: index for index, name in enumerate(names)}
    if unknown := sorted({name for row in doses for name, _ in row}.difference(column_of)):
        raise unknown_perturbations(unknown, names)
    rows = [[(column_of[name], dose) for name, dose in row] for row in doses]
    return ConditionDosage(stack_rows(rows, len(names)), labels)


def _is_matrix(conditions: Conditions) -> bool:
    return (
        isinstance(conditions, pd.DataFrame)
        or sparse.issparse(conditions)
        or (isinstance(conditions, np.ndarray) and conditions.dtype.kind in "biuf")
    )


def _read_matrix(matrix: Conditions, names: list[str]) -> Dosage:
    source = "the matrix of conditions"
    if isinstance(matrix, pd.DataFrame):
        matrix = align_dosage(dosage_from_matrix(matrix, source=source), names)
    elif isinstance(matrix, np.ndarray):
        matrix = np.atleast_2d(matrix)
    return dosage_from_matrix(matrix, names, source=source)


def _index_labels(matrix: Conditions) -> list[str] | None:
    if isinstance(matrix, pd.DataFrame) and not pd.api.types.is_numeric_dtype(matrix.index):
        return [str(label) for label in matrix.index]
    return None


def _row_doses(dosage: Dosage) -> Iterator[dict[str, float]]:
    matrix, names = dosage
    for start, stop in pairwise(matrix.indptr):
        columns, doses = matrix.indices[start:stop], matrix.data[start:stop]
        yield {names[column]: float(dose) for column, dose in zip(columns, doses, strict=True)}


def _label_doses(doses: Mapping[str, float], controls: list[str], delimiter: str | None) -> str:
    """Write doses as a label; a dose is shown only where one of them is not 1."""
    given = {name: dose for name, dose in doses.items() if dose}
    if not given:
        return controls[0] if controls else "control"
    plain = all(dose == 1 for dose in given.values())
    return (delimiter or "+").join(
        name if plain else f"{name}:{dose:g}" for name, dose in given.items()
    )


def _check_condition_doses(doses: Mapping[str, float]) -> None:
    if faulty := [f"{name}: {dose:g}" for name, dose in doses.items() if not 0 <= dose < np.inf]:
        raise ScreenError(
            f"Doses must be finite numbers, 0 or more, but the condition has {listed(faulty)}."
        )


class CellConditions(NamedTuple):
    """Distinct conditions of a screen, and which of them each cell has."""

    codes: NDArray[np.intp]
    """One a cell: the row of the lists below."""
    doses: list[dict[str, float]]
    """Of each condition, its perturbations in alphabetical order with their doses; empty for
    control."""
    names: list[str]
    """Of each condition: ``"A+B"``, or ``"A:1+B:0.5"`` if there is a column of doses."""

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """One a cell: whether it is a control."""
        return np.array([not doses for doses in self.doses])[self.codes]


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Take a column of `adata.obs`.

    Raises
    ------
    ScreenError
        If there is none of that name.
    """
    if key not in adata.obs:
        close = nearest(key, map(str, adata.obs.columns))
        raise ScreenError(
            f"There is no column {key!r} in adata.obs. "
            + (f"Did you mean {listed(close)}?" if close else f"It has {listed(adata.obs)}.")
        )
    return adata.obs[key]


def cell_conditions(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None = "+",
    dosage_key: str | None = None,
) -> CellConditions:
    """Read the condition of each cell.

    Labels that mean the same are one condition: ``"A+B"``, ``"B+A"`` and ``"A+B+control"``.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    dosage_key
        Column of `adata.obs` with doses, which then tell conditions apart.

    Returns
    -------
    The conditions, sorted by name.

    Raises
    ------
    ScreenError
        If a column is absent, or labels or doses cannot be read.

    Examples
    --------
    >>> import anndata
    >>> obs = pd.DataFrame({"guide": ["NT", "B+A", "A+B", "A"]}, index=list("abcd"))
    >>> conditions = cell_conditions(anndata.AnnData(obs=obs), "guide", "NT")
    >>> [conditions.names[code] for code in conditions.codes]
    ['NT', 'A+B', 'A+B', 'A']
    """
    labels = obs_column(adata, perturbation_key)
    doses = None if dosage_key is None else obs_column(adata, dosage_key)
    matrix, names = dosage_from_labels(labels, control, combination_delimiter, doses)
    # From here on distinct labels only: a screen has thousands of them and millions of cells.
    columns = [labels.astype(str).rename("label")]
    if doses is not None:
        columns.append(doses.astype(str).rename("dose"))
    groups = pd.concat(columns, axis=1).groupby(
        [column.name for column in columns], sort=False, observed=True, dropna=False
    )
    group_of_cell = groups.ngroup().to_numpy()
    _, first_cells = np.unique(group_of_cell, return_index=True)
    control_name = next(iter(as_labels(control)), "control")
    delimiter = combination_delimiter or "+"
    found: dict[str, dict[str, float]] = {}
    name_of_group = []
    for cell in first_cells:
        row = matrix[[cell]]
        given = dict(sorted(zip((names[i] for i in row.indices), row.data.tolist(), strict=True)))
        parts = given if doses is None else [f"{name}:{dose:g}" for name, dose in given.items()]
        name = delimiter.join(parts) or control_name
        found.setdefault(name, given)
        name_of_group.append(name)
    ordered = sorted(found)
    code_of = {name: code for code, name in enumerate(ordered)}
    codes = np.array([code_of[name] for name in name_of_group], dtype=np.intp)[group_of_cell]
    return CellConditions(codes, [found[name] for name in ordered], ordered)


def find_conditions(
    wanted: Sequence[str],
    conditions: CellConditions,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None,
) -> list[int]:
    """Find the codes of conditions that a user names, in any order of their parts.

    Raises
    ------
    ScreenError
        If one has no cells, or is a control.
    """
    controls = as_labels(control)
    perturbations = {part for doses in conditions.doses for part in doses}
    code_of = {frozenset(doses): code for code, doses in enumerate(conditions.doses)}
    codes, unknown = [], []
    for label in map(str, wanted):
        parts = split_label(label.strip(), combination_delimiter, {*controls, *perturbations})
        key = frozenset(part for part in parts if part not in controls)
        if not key:
            raise ScreenError(
                f"{label!r} is the control, which is needed for training: name conditions with a "
                "perturbation."
            )
        if key in code_of:
            codes.append(code_of[key])
        else:
            unknown.append(label)
    if unknown:
        close = nearest(unknown[0], conditions.names)
        raise ScreenError(
            f"No cell has the conditions {listed(unknown)}."
            + (f" Did you mean {listed(close)}?" if close else "")
        )
    return sorted(set(codes))
