"""The splits of pairs of Bereket and Karaletsos (NeurIPS 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_sams._exceptions import ScreenError

from ._cell_conditions import cell_conditions
from ._split_column import check_share, random_share, write_split
from ._splits import divide_training, perturbation_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from ._cell_conditions import CellConditions

__all__ = ["split_pairs_by_training_cells", "split_pairs_out_of_distribution"]

_HELD_OUT_SHARE = 0.25
_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.2


def split_pairs_out_of_distribution(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    training_fraction: float = 1.0,
    *,
    combination_delimiter: str | None = "+",
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out pairs, and train on a fraction of the others.

    The paper's split of the Norman screen for combinations that were never seen. The pairs are
    shuffled. A fifth of the cells of the last quarter of them is the test set; the other cells of
    that quarter are unused. Training takes the cells of controls, singles and the first
    `training_fraction` of the other pairs, four fifths for training and one for validation.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``. A condition of two or more perturbations counts as a pair.
    training_fraction
        Share of the pairs not held out that are trained on; 0, 0.25, 0.5, 0.75 and 1 in the paper.
    seed
        Seed of the draw. The test set is the same whatever the fraction, and a larger fraction
        trains on the pairs of a smaller one too. The paper uses five seeds.
    key_added
        Column of `adata.obs` to write; the record goes to ``adata.uns["scvi_sams_splits"]``.

    Returns
    -------
    The column: ``"train"``, ``"validation"``, ``"test"`` or ``"unused"`` for each cell.

    Raises
    ------
    ScreenError
        If labels cannot be read, there are fewer than two pairs, or `adata` is a view.
    ValueError
        If the fraction is not between 0 and 1.

    Notes
    -----
    That a fraction is of the pairs rather than of their cells, and that pairs too are divided
    into training and validation, is our reading of the paper.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_pairs_out_of_distribution(
    ...     adata, "perturbation", "control", training_fraction=0.5
    ... )
    >>> adata.obs.loc[column == "test", "perturbation"].nunique()
    2
    """
    check_share(training_fraction, "training_fraction")
    shuffle_rng, test_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    pairs = shuffle_rng.permutation(_pair_codes(conditions, at_least=2))
    n_held_out = max(1, round(_HELD_OUT_SHARE * len(pairs)))
    seen, held_out = pairs[:-n_held_out], pairs[-n_held_out:]
    trained = seen[: round(training_fraction * len(seen))]
    codes = conditions.codes
    labels = np.where(np.isin(codes, pairs), "unused", "train").astype(object)
    labels[np.isin(codes, trained)] = "train"
    is_held_out = np.isin(codes, held_out)
    labels[is_held_out & random_share(codes, _TEST_SHARE, test_rng)] = "test"
    divide_training(labels, _VALIDATION_SHARE, validation_rng, codes)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_pairs_out_of_distribution",
        seed=seed,
        arguments={
            "training_fraction": training_fraction,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="condition",
        held_out=[conditions.names[code] for code in held_out],
    )


def split_pairs_by_training_cells(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    training_fraction: float = 1.0,
    *,
    combination_delimiter: str | None = "+",
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Train on a fraction of the cells of every pair.

    The paper's split of the Norman screen for data efficiency. A fifth of the cells of every pair
    is the test set. Of the other cells of pairs a fraction is used, as are all cells of controls
    and singles, four fifths for training and one for validation.

    Parameters
    ----------
    adata, perturbation_key, control, combination_delimiter
        As for :func:`split_pairs_out_of_distribution`.
    training_fraction
        Share of the cells of pairs outside the test set that is used; 0, 0.25, 0.5, 0.75 and 1 in
        the paper.
    seed
        Seed of the draw. The test set is the same whatever the fraction, and a larger fraction
        uses the cells of a smaller one too. The paper uses five seeds.
    key_added
        Column of `adata.obs` to write; the record goes to ``adata.uns["scvi_sams_splits"]``.

    Returns
    -------
    The column, as of :func:`split_pairs_out_of_distribution`.

    Raises
    ------
    ScreenError
        If labels cannot be read, there is no pair, or `adata` is a view.
    ValueError
        If the fraction is not between 0 and 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.data.split_pairs_by_training_cells(
    ...     adata, "perturbation", "control", training_fraction=0
    ... )
    >>> sorted(column[adata.obs["perturbation"].str.contains("+", regex=False)].unique())
    ['test', 'unused']
    """
    check_share(training_fraction, "training_fraction")
    test_rng, fraction_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
    codes = conditions.codes
    is_pair = np.isin(codes, _pair_codes(conditions, at_least=1))
    is_test = is_pair & random_share(codes, _TEST_SHARE, test_rng)
    left = is_pair & ~is_test
    used = np.zeros(adata.n_obs, dtype=bool)
    used[left] = random_share(codes[left], training_fraction, fraction_rng)
    labels = np.full(adata.n_obs, "train", dtype=object)
    labels[is_test] = "test"
    labels[left & ~used] = "unused"
    divide_training(labels, _VALIDATION_SHARE, validation_rng, codes)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_pairs_by_training_cells",
        seed=seed,
        arguments={
            "training_fraction": training_fraction,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="cell",
    )


def _pair_codes(conditions: CellConditions, at_least: int) -> NDArray[np.intp]:
    """Codes of the conditions of several perturbations."""
    codes = [code for code, doses in enumerate(conditions.doses) if len(doses) > 1]
    if len(codes) < at_least:
        raise ScreenError(
            f"There are {len(codes)} conditions of several perturbations, and the split needs at "
            f"least {at_least}: are the labels read with the right `combination_delimiter`?"
        )
    return np.array(codes, dtype=np.intp)
