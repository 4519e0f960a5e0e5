"""Splits of pairs by how many of their perturbations are seen in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError

from ._cell_conditions import cell_conditions, find_conditions
from ._split_column import SPLIT_LABELS, check_share, choose_names, split_column, write_split
from ._splits import divide_training, labels_by_condition, perturbation_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

__all__ = ["count_seen_perturbations", "split_pairs"]


def split_pairs(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    n_seen: Literal[0, 1, 2] = 2,
    held_out: float | Sequence[str] = 0.25,
    *,
    combination_delimiter: str | None = "+",
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out pairs of which no, one or both perturbations are seen in training.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    n_seen
        Perturbations of a test pair that are seen in training. With 2, pairs are held out of
        which both perturbations are measured alone. With 0 or 1, perturbations are held out: pairs
        of which that many are left are for testing, other cells with one of them are unused.
    held_out
        Names, or a share: with ``n_seen=2`` of those pairs, otherwise of the perturbations that
        occur in pairs.
    validation_size, seed, key_added
        As for :func:`split_conditions`.

    Returns
    -------
    The column: ``"train"``, ``"validation"``, ``"test"`` or ``"unused"`` for each cell.

    Raises
    ------
    ScreenError
        As :func:`split_conditions`, or if no pair qualifies.
    ValueError
        If a share is not between 0 and 1, or `n_seen` is not 0, 1 or 2.

    Notes
    -----
    The three strata of Roohani, Huang and Leskovec (GEARS, Nature Biotechnology 2024), who draw
    them together; here each is a split of its own. :func:`count_seen_perturbations` gives the
    stratum of every condition under any split.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_pairs(adata, "perturbation", "control", n_seen=2)
    >>> adata.obs.loc[column == "test", "perturbation"].nunique()
    2
    """
    check_share(validation_size, "validation_size")
    if n_seen not in {0, 1, 2}:
        raise ValueError(f"n_seen={n_seen}: a pair has 0, 1 or 2 perturbations that are seen.")
    choice_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    singles = {next(iter(doses)) for doses in conditions.doses if len(doses) == 1}
    pairs = {code: set(doses) for code, doses in enumerate(conditions.doses) if len(doses) == 2}
    if n_seen == 2:
        qualified = {
            conditions.names[code]: code for code, parts in pairs.items() if parts <= singles
        }
        if isinstance(held_out, int | float):
            names = choose_names(
                held_out,
                sorted(qualified),
                "pairs of single perturbations",
                "held_out",
                choice_rng,
            )
        else:
            wanted = [held_out] if isinstance(held_out, str) else list(held_out)
            codes = find_conditions(wanted, conditions, control, combination_delimiter)
            names = [conditions.names[code] for code in codes]
            if faulty := [name for name in names if name not in qualified]:
                raise ScreenError(
                    f"{faulty[0]!r} is no pair of which both perturbations are measured alone."
                )
        label_of_code = {qualified[name]: "test" for name in names}
    else:
        in_pairs = sorted(set().union(*pairs.values()))
        names = choose_names(held_out, in_pairs, "perturbations of pairs", "held_out", choice_rng)
        label_of_code = {}
        unseen = set(names)
        for code, doses in enumerate(conditions.doses):
            if unseen_here := doses.keys() & unseen:
                is_test = code in pairs and len(unseen_here) == 2 - n_seen
                label_of_code[code] = "test" if is_test else "unused"
    if "test" not in label_of_code.values():
        raise ScreenError(
            f"No pair has {n_seen} seen perturbations when {', '.join(names) or 'none'} are held "
            "out: hold out more, or name others."
        )
    labels = labels_by_condition(conditions, label_of_code)
    divide_training(labels, validation_size, validation_rng)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_pairs",
        seed=seed,
        arguments={
            "n_seen": n_seen,
            "held_out": held_out,
            "validation_size": validation_size,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="condition" if n_seen == 2 else "perturbation",
        held_out=names,
    )


def count_seen_perturbations(
    adata: AnnData,
    split_key: str,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None = "+",
) -> pd.DataFrame:
    """Count, for each condition, how many of its perturbations are seen in training.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.

    Returns
    -------
    Table of all conditions but the control: ``n_perturbations``, ``n_seen`` (those that occur in
    any cell for training, alone or in a combination) and the cells in each part, ``n_train``,
    ``n_validation``, ``n_test`` and ``n_unused``.

    Raises
    ------
    ScreenError
        If a column is absent or cannot be read.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_pairs(adata, "perturbation", "control", n_seen=1, seed=1)
    >>> table = scvi_sams.data.count_seen_perturbations(
    ...     adata, "split", "perturbation", "control"
    ... )
    >>> table.loc[table["n_test"] > 0, "n_seen"].unique().tolist()
    [1]
    """
    labels = split_column(adata, split_key)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    seen = {
        name
        for code in np.unique(conditions.codes[labels == "train"])
        for name in conditions.doses[code]
    }
    perturbed = [code for code, doses in enumerate(conditions.doses) if doses]
    columns = {
        "n_perturbations": [len(conditions.doses[code]) for code in perturbed],
        "n_seen": [len(conditions.doses[code].keys() & seen) for code in perturbed],
    }
    for label in SPLIT_LABELS:
        cells = np.bincount(conditions.codes[labels == label], minlength=len(conditions.names))
        columns[f"n_{label}"] = cells[perturbed].tolist()
    index = pd.Index([conditions.names[code] for code in perturbed], name="condition")
    return pd.DataFrame(columns, index=index)
