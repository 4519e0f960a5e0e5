"""The two splits of the Norman screen in Bereket and Karaletsos (2023), and its genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scanpy as sc

from scvi_sams import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.evaluation._splits import divide_training, random_share, write_split

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["split_pairs_by_training_cells", "split_pairs_out_of_distribution", "training_genes"]

_HELD_OUT_SHARE = 0.25
_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.2


def split_pairs_out_of_distribution(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    training_fraction: float = 1.0,
    seed: int = 0,
) -> pd.Series:
    """Hold out pairs, and train on a fraction of the others: combinations that were never seen.

    The pairs are shuffled. A fifth of the cells of the last quarter of them is the test set; the
    other cells of that quarter are unused. Training takes the cells of controls, singles and the
    first `training_fraction` of the other pairs, four fifths for training and one for validation.
    The test set is the same whatever the fraction, and a larger fraction trains on the pairs of a
    smaller one too. That a fraction is of the pairs rather than of their cells, and that pairs too
    are divided into training and validation, is our reading of the paper.
    """
    _check_fraction(training_fraction)
    shuffle_rng, test_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    conditions = Conditions.from_obs(adata, perturbation_key, control)
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
        "split",
        kind="split_pairs_out_of_distribution",
        seed=seed,
        arguments=_arguments(perturbation_key, control, training_fraction),
        held_out_by="condition",
        held_out=[conditions.labels[code] for code in held_out],
    )


def split_pairs_by_training_cells(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    training_fraction: float = 1.0,
    seed: int = 0,
) -> pd.Series:
    """Train on a fraction of the cells of every pair: data efficiency.

    A fifth of the cells of every pair is the test set. Of the other cells of pairs a fraction is
    used, as are all cells of controls and singles, four fifths for training and one for
    validation. The test set is the same whatever the fraction, and a larger fraction uses the
    cells of a smaller one too.
    """
    _check_fraction(training_fraction)
    test_rng, fraction_rng, validation_rng = np.random.default_rng(seed).spawn(3)
    conditions = Conditions.from_obs(adata, perturbation_key, control)
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
        "split",
        kind="split_pairs_by_training_cells",
        seed=seed,
        arguments=_arguments(perturbation_key, control, training_fraction),
        held_out_by="cell",
    )


def training_genes(adata: ad.AnnData, n_top_genes: int) -> NDArray[np.bool_]:
    """Genes that vary most in the training cells of a split, which alone may choose them."""
    training = adata[(adata.obs["split"] == "train").to_numpy()]
    cells = ad.AnnData(training.X.astype(np.float32), var=adata.var[[]])
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    table = sc.pp.highly_variable_genes(cells, n_top_genes=n_top_genes, inplace=False)
    return table["highly_variable"].to_numpy(dtype=bool)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"training_fraction={fraction}: a share is between 0 and 1.")


def _arguments(
    perturbation_key: str, control: str | Iterable[str] | None, fraction: float
) -> dict[str, object]:
    return {
        "perturbation_key": perturbation_key,
        "control": control,
        "combination_delimiter": "+",
        "training_fraction": fraction,
    }


def _pair_codes(conditions: Conditions, at_least: int) -> NDArray[np.intp]:
    """Codes of the conditions of several perturbations."""
    codes = [code for code, parts in enumerate(conditions.parts) if len(parts) > 1]
    if len(codes) < at_least:
        raise ScreenError(
            f"There are {len(codes)} conditions of several perturbations, and the split needs at "
            f"least {at_least}."
        )
    return np.array(codes, dtype=np.intp)
