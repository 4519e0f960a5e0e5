"""Splits of a screen that hold out conditions or perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams._exceptions import ScreenError

from ._cell_conditions import cell_conditions, find_conditions
from ._split_column import check_share, choose_names, write_split
from ._splits import divide_training, labels_by_condition, perturbation_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from anndata import AnnData


__all__ = ["split_conditions", "split_perturbations"]


def split_conditions(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    test_conditions: float | Sequence[str] = 0.2,
    validation_conditions: float | Sequence[str] | None = None,
    *,
    combination_delimiter: str | None = "+",
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out conditions: all cells of each are for testing.

    A single perturbation that is held out may still be seen in pairs, and its pairs in training;
    :func:`split_perturbations` holds out those too. Controls are for training.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    test_conditions
        Conditions to hold out (``"A"``, ``"A+B"``, in any order of the parts), or their share.
    validation_conditions
        Conditions to validate on, or their share of all. By default validation takes
        `validation_size` of the cells of the conditions that are trained on.
    validation_size
        Share of the cells not held out that is for validation; unused with
        `validation_conditions`.
    seed
        Seed of the draw.
    key_added
        Column of `adata.obs` to write; the record goes to ``adata.uns["scvi_sams_splits"]``.

    Returns
    -------
    The column: ``"train"``, ``"validation"`` or ``"test"`` for each cell.

    Raises
    ------
    ScreenError
        If labels cannot be read, a condition has no cells, is a control or is named for both
        parts, `adata` is a view, or no cell is left for training.
    ValueError
        If a share is not between 0 and 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_conditions(adata, "perturbation", "control", ["P001"])
    >>> adata.obs.loc[column == "test", "perturbation"].unique().tolist()
    ['P001']
    """
    check_share(validation_size, "validation_size")
    test_rng, validation_choice_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    code_of = {name: code for code, name in enumerate(conditions.names)}
    perturbed = [
        name for name, doses in zip(conditions.names, conditions.doses, strict=True) if doses
    ]

    def codes(
        wanted: float | Sequence[str], among: list[str], argument: str, rng: np.random.Generator
    ) -> list[int]:
        if isinstance(wanted, int | float):
            names = choose_names(wanted, among, "conditions", argument, rng)
            return [code_of[name] for name in names]
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        return find_conditions(names, conditions, control, combination_delimiter)

    test = codes(test_conditions, perturbed, "test_conditions", test_rng)
    label_of_code = dict.fromkeys(test, "test")
    if validation_conditions is not None:
        left = [name for name in perturbed if code_of[name] not in label_of_code]
        validation = codes(
            validation_conditions, left, "validation_conditions", validation_choice_rng
        )
        if both := sorted(set(test).intersection(validation)):
            raise ScreenError(
                f"{conditions.names[both[0]]!r} is named in `test_conditions` and in "
                "`validation_conditions`: leave it out of one."
            )
        label_of_code |= dict.fromkeys(validation, "validation")
    labels = labels_by_condition(conditions, label_of_code)
    if validation_conditions is None:
        divide_training(labels, validation_size, validation_rng)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_conditions",
        seed=seed,
        arguments={
            "test_conditions": test_conditions,
            "validation_conditions": validation_conditions,
            "validation_size": validation_size,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="condition",
        held_out=[conditions.names[code] for code in test],
    )


def split_perturbations(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    test_perturbations: float | Sequence[str] = 0.2,
    *,
    combination_delimiter: str | None = "+",
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out perturbations, alone and in every combination: unseen in training.

    A model without features of perturbations cannot predict these; see ``load_query_data`` for
    what it can learn of them later.

    Parameters
    ----------
    adata, perturbation_key, control, combination_delimiter
        As for :func:`split_conditions`.
    test_perturbations
        Names of the perturbations to hold out, or their share.
    validation_size, seed, key_added
        As for :func:`split_conditions`.

    Returns
    -------
    The column, as of :func:`split_conditions`; cells with one of the perturbations are ``"test"``.

    Raises
    ------
    ScreenError, ValueError
        As :func:`split_conditions`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_perturbations(adata, "perturbation", "control", ["P001"])
    >>> adata.obs.loc[column != "test", "perturbation"].str.contains("P001").any()
    np.False_
    """
    check_share(validation_size, "validation_size")
    choice_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    names = sorted({name for doses in conditions.doses for name in doses})
    held_out = choose_names(
        test_perturbations, names, "perturbations", "test_perturbations", choice_rng
    )
    unseen = set(held_out)
    label_of_code = {
        code: "test" for code, doses in enumerate(conditions.doses) if doses.keys() & unseen
    }
    labels = labels_by_condition(conditions, label_of_code)
    divide_training(labels, validation_size, validation_rng)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_perturbations",
        seed=seed,
        arguments={
            "test_perturbations": test_perturbations,
            "validation_size": validation_size,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="perturbation",
        held_out=held_out,
    )
