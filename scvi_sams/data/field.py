"""The registry fields of what cells received, by position, and of their contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import rich.table
from scipy import sparse
from scvi.data.fields import CategoricalObsField, ObsmField

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError, listed, nearest
from scvi_sams.data.checks import check_conditions
from scvi_sams.data.conditions import Conditions, as_labels, padded_to_csr, unknown_parts
from scvi_sams.data.guides import GuideField, GuideSource, WrittenField, padded_columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scvi_sams.data.guides import GuideTargets


class PerturbationField(ObsmField):
    """Registers what each cell received, by the positions of perturbations among their names.

    Wherever the doses come from, two dense matrices of cells x K are written into `adata.obsm`,
    with K the most perturbations of a cell: positions, registered here, and doses, registered by
    :class:`DoseField`, which comes after. The names go into the registry and so into saved models:
    on another AnnData the doses are read again and brought into the order of the model's names.

    The arguments are those of ``setup_anndata``, which describes them.

    Examples
    --------
    >>> import anndata
    >>> from scvi.data import AnnDataManager
    >>> obs = pd.DataFrame({"guide": ["NT", "A", "A", "A+B", "B"]}, index=list("abcde"))
    >>> adata = anndata.AnnData(obs=obs)
    >>> manager = AnnDataManager([PerturbationField("guide", control="NT"), DoseField()])
    >>> manager.register_fields(adata)
    >>> manager.get_state_registry("perturbation").column_names
    ('A', 'B')
    >>> registered_conditions(manager).labels
    ['A', 'A+B', 'B', 'NT']
    """

    CONTROL_KEY = "control"
    DELIMITER_KEY = "combination_delimiter"

    def __init__(
        self,
        perturbation_key: str | None = None,
        dosage_key: str | None = None,
        perturbation_names_uns_key: str | None = None,
        control: object = None,
        combination_delimiter: str | None = "+",
        guide_key: str | None = None,
        guide_targets: GuideTargets | None = None,
        guide_threshold: float | None = None,
    ) -> None:
        super().__init__(SAMS_REGISTRY_KEYS.PERTURBATION_KEY, SAMS_REGISTRY_KEYS.INDEX_OBSM_KEY)
        if perturbation_key is None and dosage_key is None and guide_key is None:
            raise ScreenError(
                "Say what each cell received: `perturbation_key` names a column of adata.obs with "
                "labels, `dosage_key` a dosage matrix in adata.obsm, `guide_key` its guides."
            )
        if guide_key is None and not (guide_targets is None and guide_threshold is None):
            raise ScreenError(
                "`guide_targets` and `guide_threshold` are of guides: name them by `guide_key`."
            )
        if perturbation_key is not None and perturbation_names_uns_key is not None:
            raise ScreenError(
                "`perturbation_names_uns_key` names the columns of a dosage matrix, but with "
                "`perturbation_key` the names come from the labels: leave one of the two out."
            )
        written = {
            SAMS_REGISTRY_KEYS.INDEX_OBSM_KEY,
            SAMS_REGISTRY_KEYS.DOSE_OBSM_KEY,
            SAMS_REGISTRY_KEYS.GUIDE_OBSM_KEY,
        }
        of_obsm = guide_key if perturbation_key is not None else dosage_key
        if of_obsm in written or guide_key in written:
            raise ScreenError(
                f"adata.obsm[{of_obsm!r}] is where the registered doses are written: store "
                "yours under another key."
            )
        self.perturbation_key = perturbation_key
        self.dosage_key = dosage_key
        self.perturbation_names_uns_key = perturbation_names_uns_key
        self.control = as_labels(control)
        self.combination_delimiter = combination_delimiter
        self.guides: GuideSource | None = None
        if guide_key is not None:
            self.guides = GuideSource(
                guide_key,
                guide_targets,
                guide_threshold,
                perturbation_names_uns_key if dosage_key is None else None,
                self.control,
                combination_delimiter,
            )
        is_by_guides = perturbation_key is None and dosage_key is None
        self._read_guides = self.guides if is_by_guides else None

    def validate_field(self, adata: AnnData) -> None:
        """Check that `adata` has the columns or matrices that the field reads."""
        if self.guides is not None:
            self.guides.validate(adata)
        for argument, attribute in (
            ("perturbation_key", "obs"),
            ("dosage_key", "obsm" if self.perturbation_key is None else "obs"),
            ("perturbation_names_uns_key", "uns"),
        ):
            key, holder = getattr(self, argument), getattr(adata, attribute)
            if key is None or key in holder:
                continue
            hint = ""
            if attribute == "obsm" and key in adata.obs:
                hint = " It is a column of adata.obs: give its labels too, as `perturbation_key`."
            elif argument == "dosage_key" and key in adata.obsm:
                hint = " It is in adata.obsm: leave `perturbation_key` out to use it."
            raise ScreenError(
                f"adata.{attribute} has no {key!r} (`{argument}`); it holds "
                f"{listed(holder.keys(), limit=10) or 'nothing'}.{hint}"
            )

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Write positions and doses into `adata.obsm`, and return names for the registry."""
        self.validate_field(adata)
        conditions = self.read(adata)
        if self._read_guides is not None:
            self._read_guides.warn_of_cells_without(adata)
        is_labelled = self.perturbation_key is not None
        check_conditions(conditions, is_labelled, self.dosage_key is not None)
        return self._write(conditions, adata)

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any
    ) -> dict[str, Any]:
        """Write what the cells of another AnnData received, by the model's names.

        It may lack perturbations, and every cell may be a control.
        With `extend_categories=True` in `kwargs`, which scvi-tools passes for a query, names that
        the model has not seen follow those that it has.
        """
        self.validate_field(adata_target)
        names = list(state_registry[self.COLUMN_NAMES_KEY])
        extend = kwargs.get("extend_categories", False)
        if extend:
            names += self.unknown_names(adata_target, names)
        conditions = self.read(adata_target, names).align(names)
        of_model = (state_registry.get(key, ()) for key in GuideField.KEYS)
        return self._write(conditions, adata_target, zip(*of_model, strict=True), extend)

    def unknown_names(self, adata: AnnData, names: Sequence[str]) -> list[str]:
        """List perturbations of `adata` that are not among `names`."""
        self.validate_field(adata)
        if self.perturbation_key is None:
            return [name for name in self.read(adata).perturbations if name not in set(names)]
        labels = adata.obs[self.perturbation_key]
        return unknown_parts(labels, {*self.control, *names}, self.combination_delimiter)

    def view_state_registry(self, state_registry: dict[str, Any]) -> rich.table.Table:
        """Tabulate the names of the perturbations."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        table.add_column("Source Location", justify="center", style="dodger_blue1")
        table.add_column("Perturbation", justify="center", style="green")
        table.add_column("Dosage Column", justify="center", style="dark_violet")
        source = (
            f"adata.obsm[{self.dosage_key!r}]"
            if self.perturbation_key is None
            else f"adata.obs[{self.perturbation_key!r}]"
        )
        if self._read_guides is not None:
            source = f"guides of {self._read_guides.key!r}"
        for index, name in enumerate(state_registry[self.COLUMN_NAMES_KEY]):
            table.add_row("" if index else source, name, str(index))
        return table

    def read(self, adata: AnnData, names: Sequence[str] | None = None) -> Conditions:
        """Read the doses; `names` are those of the model, if there is one."""
        if self._read_guides is not None:
            calls = self._read_guides.read(adata)
            return calls.conditions(self.control, self.combination_delimiter)
        if self.perturbation_key is None:
            matrix = adata.obsm[self.dosage_key]
            key, names = self.perturbation_names_uns_key, None
            # A query may store as a DataFrame what the model was given as an array.
            if key is not None and not isinstance(matrix, pd.DataFrame):
                names = list(adata.uns[key])
            return Conditions.from_matrix(
                *self._without_controls(matrix, names),
                self.control,
                self.combination_delimiter,
                cells=adata.obs_names,
                source=f"adata.obsm[{self.dosage_key!r}]",
            )
        return Conditions.from_labels(
            adata.obs[self.perturbation_key],
            self.control,
            self.combination_delimiter,
            None if self.dosage_key is None else adata.obs[self.dosage_key],
            names,
        )

    def _without_controls(
        self, matrix: Any, names: list[Any] | None
    ) -> tuple[Any, list[Any] | None]:
        """A dosage matrix without columns of controls, as dummies of labels have them."""
        columns = matrix.columns if isinstance(matrix, pd.DataFrame) else names or ()
        kept = [k for k, name in enumerate(columns) if str(name) not in self.control]
        if len(kept) == len(columns) or len(columns) != matrix.shape[1]:
            return matrix, names
        if isinstance(matrix, pd.DataFrame):
            return matrix.iloc[:, kept], names
        rows = matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)
        return rows[:, kept], [columns[k] for k in kept]

    def _write(
        self,
        conditions: Conditions,
        adata: AnnData,
        known: Iterable[tuple[str, int]] = (),
        extend: bool = True,
    ) -> dict[str, Any]:
        adata.obsm[SAMS_REGISTRY_KEYS.INDEX_OBSM_KEY] = _stored(conditions.cell_index)
        adata.obsm[SAMS_REGISTRY_KEYS.DOSE_OBSM_KEY] = _stored(conditions.cell_dose)
        of_guides: dict[str, Any] = {}
        if self.guides is not None:
            labels = None if self.perturbation_key is None else adata.obs[self.perturbation_key]
            has_doses = self.dosage_key is not None
            guides = self.guides.coded(adata, conditions, labels, has_doses, known, extend)
            adata.obsm[SAMS_REGISTRY_KEYS.GUIDE_OBSM_KEY] = _stored(guides.codes + 1)
            listed_guides = guides.names, guides.targets.tolist()
            of_guides = dict(zip(GuideField.KEYS, listed_guides, strict=True))
        return of_guides | {
            self.COLUMN_NAMES_KEY: conditions.perturbations,
            self.CONTROL_KEY: list(self.control),
            self.DELIMITER_KEY: self.combination_delimiter,
            "perturbation_key": self.perturbation_key,
            "dosage_key": self.dosage_key,
            "perturbation_names_uns_key": self.perturbation_names_uns_key,
        }


class DoseField(WrittenField):
    """Registers the doses that :class:`PerturbationField`, which comes before, has written."""

    def __init__(self) -> None:
        super().__init__(SAMS_REGISTRY_KEYS.DOSE_KEY, SAMS_REGISTRY_KEYS.DOSE_OBSM_KEY)


_USUAL_COLUMNS = 8


def _stored(columns: NDArray[Any]) -> NDArray[Any] | sparse.csr_matrix:
    """Padded columns, sparse where one cell of many perturbations would widen those of all."""
    if columns.shape[1] <= _USUAL_COLUMNS:
        return columns
    as_sparse = sparse.csr_matrix(columns)
    size = as_sparse.data.nbytes + as_sparse.indices.nbytes + as_sparse.indptr.nbytes
    return as_sparse if 2 * size < columns.nbytes else columns


def registered_conditions(manager: AnnDataManager) -> Conditions:
    """What the cells of a registered AnnData received."""
    state = manager.get_state_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    return Conditions.from_columns(
        padded_columns(manager, SAMS_REGISTRY_KEYS.PERTURBATION_KEY),
        padded_columns(manager, SAMS_REGISTRY_KEYS.DOSE_KEY),
        list(state[PerturbationField.COLUMN_NAMES_KEY]),
        state[PerturbationField.CONTROL_KEY],
        state[PerturbationField.DELIMITER_KEY],
    )


def registered_dosage(manager: AnnDataManager) -> sparse.csr_matrix:
    """Doses of the cells of a registered AnnData, cells x perturbations."""
    state = manager.get_state_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    return padded_to_csr(
        padded_columns(manager, SAMS_REGISTRY_KEYS.PERTURBATION_KEY),
        padded_columns(manager, SAMS_REGISTRY_KEYS.DOSE_KEY),
        len(state[PerturbationField.COLUMN_NAMES_KEY]),
    )


def add_dose_registry(registry: dict[str, Any]) -> None:
    """Let the registry of a model saved when doses were one sparse matrix name the doses too."""
    field = DoseField()
    registry["field_registries"].setdefault(
        field.registry_key,
        {"data_registry": field.get_data_registry(), "state_registry": {}, "summary_stats": {}},
    )


class ContextField(CategoricalObsField):
    """Registers the context of each cell, such as its type, by its position among the levels.

    The levels go into the registry and so into saved models. Unlike a batch, a level that the
    model has not seen is refused, in a query too: what perturbations do there is not known.

    Examples
    --------
    >>> import anndata
    >>> from scvi.data import AnnDataManager
    >>> obs = pd.DataFrame({"cell_type": 3 * ["T", "B"]}, index=list("abcdef"))
    >>> manager = AnnDataManager([ContextField("cell_type")])
    >>> manager.register_fields(anndata.AnnData(obs=obs))
    >>> manager.get_state_registry("context").categorical_mapping.tolist()
    ['B', 'T']
    """

    def __init__(self, context_key: str) -> None:
        super().__init__(SAMS_REGISTRY_KEYS.CONTEXT_KEY, context_key)

    def transfer_field(
        self, state_registry: dict[str, Any], adata_target: AnnData, **kwargs: Any
    ) -> dict[str, Any]:
        """Write the contexts of another AnnData, by the model's levels; it may lack some."""
        self.validate_field(adata_target)
        key = self._original_attr_key
        levels = list(map(str, state_registry[self.CATEGORICAL_MAPPING_KEY]))
        column = adata_target.obs[key].astype(str)
        if unknown := sorted(set(column.unique()).difference(levels)):
            close = nearest(unknown[0], levels)
            hint = f"did you mean {listed(close)}?" if close else f"it has {listed(levels)}."
            raise ScreenError(
                f"adata.obs[{key!r}] holds contexts that the model has not seen: "
                f"{listed(unknown)}; {hint} Correct them, drop the cells, or fit all together."
            )
        return super().transfer_field(
            state_registry, adata_target, **(kwargs | {"extend_categories": False})
        )
