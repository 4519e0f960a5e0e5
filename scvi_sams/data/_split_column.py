"""What every split writes into an AnnData, and how training reads it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError

from ._cell_conditions import obs_column
from ._messages import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = [
    "SPLITS_UNS_KEY",
    "SPLIT_LABELS",
    "HeldOutBy",
    "check_names",
    "check_share",
    "choose_names",
    "random_share",
    "split_column",
    "split_indices",
    "write_split",
]

SPLIT_LABELS = ("train", "validation", "test", "unused")
"""Labels of a split: gradients, choices during training, the final figures, and cells left out."""

SPLITS_UNS_KEY = "scvi_sams_splits"
"""Where ``adata.uns`` keeps, for each split column, how it was made."""

HeldOutBy: TypeAlias = Literal["cell", "condition", "perturbation", "batch", "dose"]
"""What a split keeps out of training."""


def write_split(
    adata: AnnData,
    labels: NDArray[np.object_],
    key_added: str,
    *,
    kind: str,
    seed: int | None,
    arguments: Mapping[str, Any],
    held_out_by: HeldOutBy,
    held_out: Sequence[str] = (),
) -> pd.Series:
    """Write a split and its record, and return its column.

    ``adata.uns[SPLITS_UNS_KEY][key_added]`` has ``"kind"`` (the function), ``"seed"``,
    ``"arguments"`` (those that are not None), ``"package_version"``, ``"held_out_by"`` (one of
    :data:`HeldOutBy`) and ``"held_out"`` (the names of what is kept out).

    Raises
    ------
    ScreenError
        If `adata` is a view, or no cell is left for training.
    """
    if adata.is_view:
        raise ScreenError(
            "A split cannot be written into a view of an AnnData: make it one of its own first, "
            "with adata = adata.copy()."
        )
    if not (labels == "train").any():
        raise ScreenError(f"{kind} leaves no cell for training: hold out less.")
    column = pd.Series(
        pd.Categorical(labels, categories=list(SPLIT_LABELS)), index=adata.obs_names
    )
    adata.obs[key_added] = column
    record: dict[str, Any] = {
        "kind": kind,
        "arguments": {
            name: _storable(value) for name, value in arguments.items() if value is not None
        },
        "package_version": version("scvi-sams"),
        "held_out_by": held_out_by,
        "held_out": np.array(sorted(map(str, held_out)), dtype=object),
    }
    if seed is not None:
        record["seed"] = seed
    adata.uns[SPLITS_UNS_KEY] = {**adata.uns.get(SPLITS_UNS_KEY, {}), key_added: record}
    return adata.obs[key_added]


def split_column(adata: AnnData, split_key: str) -> NDArray[np.object_]:
    """Read the label of each cell.

    Raises
    ------
    ScreenError
        If the column is absent, or holds anything but :data:`SPLIT_LABELS`.
    """
    labels = obs_column(adata, split_key).astype(object)
    if faulty := sorted({str(label) for label in labels.unique()}.difference(SPLIT_LABELS)):
        raise ScreenError(
            f"obs[{split_key!r}] holds {listed(faulty)}, but a split has the labels "
            f"{', '.join(map(repr, SPLIT_LABELS))}: rename them, cells of no part to 'unused'."
        )
    return labels.to_numpy(dtype=object)


def split_indices(adata: AnnData, split_key: str = "split") -> list[NDArray[np.intp]]:
    """Positions of the cells of each part, as training wants them.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split.

    Returns
    -------
    Positions (int, increasing) of the cells to train on, to validate on and to test on.

    Raises
    ------
    ScreenError
        If the column is absent or holds other labels, or cells are unused: scvi-tools wants every
        cell of an AnnData to be in one of the three.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> column = scvi_sams.data.split_cells(adata)
    >>> parts = scvi_sams.data.split_indices(adata)
    >>> [len(part) for part in parts]
    [64, 16, 20]
    >>> model.train(datasplitter_kwargs={"external_indexing": parts})  # doctest: +SKIP
    """
    labels = split_column(adata, split_key)
    if n_unused := int((labels == "unused").sum()):
        raise ScreenError(
            f"{n_unused} cells of obs[{split_key!r}] are 'unused', and training wants every cell "
            f"in a part: leave them out with adata = adata[adata.obs[{split_key!r}] != 'unused']"
            ".copy(), before setup_anndata."
        )
    return [np.flatnonzero(labels == part) for part in SPLIT_LABELS[:3]]


def random_share(strata: NDArray[np.intp], share: float, rng: Generator) -> NDArray[np.bool_]:
    """Draw a share of the cells of each stratum.

    Each stratum gives its share rounded up or down at random, so that many small ones together
    give the share asked for. With the same generator a larger share contains a smaller one.

    Examples
    --------
    >>> drawn = random_share(np.repeat([0, 1], 10), 0.3, np.random.default_rng(0))
    >>> int(drawn[:10].sum()), int(drawn[10:].sum())
    (3, 3)
    """
    _, strata, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.lexsort((rng.random(len(strata)), strata))
    rank = np.empty(len(strata), dtype=np.intp)
    rank[order] = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Rounded, so that 0.3 of 10 is 3 and not 2.9999...
    wanted = np.floor(np.round(share * sizes, 9) + rng.random(len(sizes)))
    return rank < wanted[strata]


def choose_names(
    wanted: float | Sequence[str], among: Sequence[str], what: str, argument: str, rng: Generator
) -> list[str]:
    """Take the names given, or draw a share of those there are.

    Raises
    ------
    ScreenError
        If a name is not there, or there is nothing to draw from.
    ValueError
        If a share is not between 0 and 1.
    """
    if isinstance(wanted, int | float):
        check_share(wanted, argument)
        if not among:
            raise ScreenError(f"There are no {what} to hold out.")
        n = min(max(round(wanted * len(among)), 1), len(among)) if wanted else 0
        return sorted(str(among[i]) for i in rng.permutation(len(among))[:n])
    names = [str(name) for name in ([wanted] if isinstance(wanted, str) else wanted)]
    check_names(names, among, what, argument)
    return sorted(set(names))


def check_names(names: Sequence[str], among: Sequence[str], what: str, argument: str) -> None:
    """Refuse names of what is not there.

    Raises
    ------
    ScreenError
        If there is one.
    """
    if unknown := [name for name in names if name not in set(among)]:
        close = nearest(unknown[0], among)
        raise ScreenError(
            f"`{argument}` names {what} that no cell has: {listed(unknown)}. "
            + (f"Did you mean {listed(close)}?" if close else f"There are {listed(among)}.")
        )


def check_share(share: float, argument: str) -> None:
    """Refuse what is no share.

    Raises
    ------
    ValueError
        If it is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{argument}={share}: a share is between 0 and 1.")


def _storable(value: Any) -> Any:
    """Bring an argument into a form that an h5ad can hold."""
    if isinstance(value, str | int | float | bool | np.generic):
        return value
    return np.array([str(item) if isinstance(item, str) else item for item in value])
