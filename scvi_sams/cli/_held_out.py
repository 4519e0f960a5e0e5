"""Conditions that a command line keeps from training."""

from __future__ import annotations

__all__ = ["held_out_conditions"]

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_sams._exceptions import listed, nearest
from scvi_sams.cli._errors import CommandError
from scvi_sams.data import Conditions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import pandas as pd
    from scipy import sparse

MIN_CELLS = 4
"""Fewest cells of a held-out condition: its scores take two halves with variances."""
_OPTION = "--held-out-conditions"


def held_out_conditions(
    labels: pd.Categorical,
    doses: sparse.csr_matrix,
    perturbations: Sequence[str],
    args: argparse.Namespace,
) -> list[str]:
    """Conditions that ``args.held_out_conditions`` names, lists in a file or draws a share of.

    A share is drawn at random among conditions with enough cells whose every perturbation stays in
    another condition that is trained on, so that there is something to predict from.

    Parameters
    ----------
    labels
        Condition of each cell; controls have none.
    doses
        Doses of each category of the labels, conditions x perturbations.
    perturbations
        Names of the columns of the doses.
    args
        Arguments of the command.

    Returns
    -------
    Labels, in the order of the categories.

    Raises
    ------
    CommandError
        If a condition is unknown or has too few cells, a share is not between 0 and 1 or none can
        be drawn, or no cell is left to train on.
    UnknownPerturbationError
        If a condition names a perturbation that is not in the screen.
    """
    words = args.held_out_conditions
    if not words:
        return []
    n_cells = np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.categories))
    categories = list(labels.categories)
    if len(words) == 1 and words[0] not in categories:
        if (share := _share(words[0])) is not None:
            return _drawn(share, categories, doses, n_cells, np.random.default_rng(args.seed))
        path = Path(words[0])
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            words = [line.strip() for line in lines if line.strip()]
            if not words:
                raise CommandError(f"{_OPTION}: {path} names no condition")
    chosen = set()
    for word in words:
        label = word
        if word not in categories:  # written otherwise, such as B+A
            matrix = Conditions.from_request(
                [word], perturbations, args.control, args.combination_delimiter
            ).matrix
            if matrix.nnz == 0:
                raise CommandError(f"{_OPTION}: {word!r} is a control, which training needs")
            (label,) = Conditions.from_request(
                matrix, perturbations, args.control, args.combination_delimiter
            ).labels
        if label not in categories:
            close = nearest(word, categories)
            hint = f"; nearest: {listed(close)}" if close else ""
            raise CommandError(f"{_OPTION}: no cell of the screen received {word!r}{hint}")
        if n_cells[categories.index(label)] < MIN_CELLS:
            raise CommandError(
                f"{_OPTION}: {label!r} has {n_cells[categories.index(label)]} cells, and a score "
                f"takes {MIN_CELLS}; leave it out"
            )
        chosen.add(label)
    if len(chosen) == len(categories):
        raise CommandError(f"{_OPTION} names every condition; leave some to train on")
    return [label for label in categories if label in chosen]


def _share(word: str) -> float | None:
    """A share of the conditions; None for a word that is no number."""
    try:
        share = float(word)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise CommandError(f"{_OPTION} {word}: a share of the conditions is above 0 and below 1")
    return share


def _drawn(
    share: float,
    categories: Sequence[str],
    doses: sparse.csr_matrix,
    n_cells: np.ndarray,
    rng: np.random.Generator,
) -> list[str]:
    """Draw conditions, leaving every perturbation in one that is trained on."""
    wanted = max(1, round(share * len(categories)))
    received = (doses > 0).toarray()
    n_left = received.sum(axis=0)
    chosen: list[int] = []
    for row in rng.permutation(len(categories)):
        if len(chosen) == wanted:
            break
        if n_cells[row] >= MIN_CELLS and (n_left[received[row]] > 1).all():
            n_left -= received[row]
            chosen.append(row)
    if not chosen:
        raise CommandError(
            f"{_OPTION} {share:g}: every perturbation is in one condition only, so that nothing "
            "would be known of those held out; name conditions, or hold out cells alone"
        )
    return [categories[row] for row in sorted(chosen)]
