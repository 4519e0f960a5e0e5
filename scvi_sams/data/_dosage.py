"""The dosage matrix (cells x perturbations), and how to read it from any matrix."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._exceptions import ScreenError

from ._messages import listed, unknown_perturbations

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Dosage", "align_dosage", "checked_names", "dosage_from_matrix", "stack_rows"]


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
