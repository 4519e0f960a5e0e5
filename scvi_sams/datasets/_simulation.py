"""Parts of every simulation: checks, masks, pairs, conditions, names and the AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

CONTROL = "control"
"""Label of the cells without a perturbation."""
CELLS_PER_CHUNK = 4096  # bounds the dense memory at this x genes, whatever the screen's size

_AT_LEAST_ONE = {"n_cells", "n_genes", "n_features", "n_perturbations", "n_latent", "n_batches"}
_AT_LEAST_ONE |= {"n_hidden", "max_targets", "n_contexts"}
_ABOVE_ZERO = {"library_size", "inverse_dispersion"}
_SHARES = {"mask_probability", "inactive_fraction", "interaction_fraction", "noise_share"}
_SHARES |= {"control_fraction", "pair_fraction", "context_fraction"}


def check_parameters(arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a simulation but the seed; numbers out of their range are refused."""
    parameters = {name: value for name, value in arguments.items() if name != "seed"}
    for name, value in parameters.items():
        if name in _AT_LEAST_ONE:
            fits, wanted = value >= 1, "at least 1"
        elif name in _ABOVE_ZERO:
            fits, wanted = value > 0, "above 0"
        elif name in _SHARES:
            fits, wanted = 0 <= value <= 1, "between 0 and 1"
        else:
            fits, wanted = value >= 0, "0 or more"
        if not fits:
            raise ScreenError(f"`{name}` must be {wanted}, not {value}.")
    if parameters["control_fraction"] + parameters.get("pair_fraction", 0.0) > 1:
        raise ScreenError(
            "`control_fraction` and `pair_fraction` add up to more than 1: lower one of them."
        )
    n_perturbations, n_pairs = parameters["n_perturbations"], parameters.get("n_pairs", 0)
    if n_pairs > (n_possible := n_perturbations * (n_perturbations - 1) // 2):
        raise ScreenError(
            f"`n_pairs` is {n_pairs}, but {n_perturbations} perturbations make only "
            f"{n_possible} pairs: lower `n_pairs` or raise `n_perturbations`."
        )
    return parameters


def draw_masks(
    rng: Generator, n_perturbations: int, n_latent: int, probability: float, inactive: float
) -> NDArray[np.bool_]:
    """Masks (perturbations x latents), of which only the inactive perturbations' are empty."""
    mask = rng.random((n_perturbations, n_latent)) < probability
    fallback = rng.integers(n_latent, size=n_perturbations)
    empty = np.flatnonzero(~mask.any(axis=1))
    mask[empty, fallback[empty]] = True
    mask[rng.permutation(n_perturbations)[: round(inactive * n_perturbations)]] = False
    return mask


def draw_pairs(
    rng: Generator, n_perturbations: int, n_pairs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and second members of distinct pairs, uniform over all pairs, in sorted order."""
    # Pairs are numbered (0,1), (0,2), ..., (1,2), ...: pair (a, b) is below ends[a].
    ends = np.cumsum(np.arange(n_perturbations - 1, 0, -1))
    n_possible = n_perturbations * (n_perturbations - 1) // 2
    number = np.sort(rng.choice(n_possible, n_pairs, replace=False)) if n_pairs else np.arange(0)
    first = np.searchsorted(ends, number, side="right")
    return first, n_perturbations - (ends[first] - number)


def draw_conditions(
    rng: Generator,
    n_cells: int,
    n_perturbations: int,
    n_pairs: int,
    control_fraction: float,
    pair_fraction: float,
) -> NDArray[np.int64]:
    """Condition of each cell: 0 for control, then the perturbations, then the pairs."""
    n_control = int(control_fraction * n_cells)
    n_paired = int(pair_fraction * n_cells) if n_pairs else 0
    single = 1 + rng.integers(n_perturbations, size=n_cells - n_control - n_paired)
    pair = 1 + n_perturbations + rng.integers(max(n_pairs, 1), size=n_paired)
    return rng.permutation(np.concatenate([np.zeros(n_control, np.int64), single, pair]))


def scaled_rates(
    logits: NDArray[np.float64], library: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Expected counts (cells x genes) of softmax proportions and library sizes."""
    rate = np.exp(logits - logits.max(axis=1, keepdims=True))
    rate *= library / rate.sum(axis=1, keepdims=True)
    return rate


def numbered_names(prefix: str, n: int, min_width: int = 1) -> list[str]:
    """Names ``prefix1 ... prefixn``, padded with zeros so that they sort as numbers do."""
    width = max(min_width, len(str(n)))
    return [f"{prefix}{i:0{width}d}" for i in range(1, n + 1)]


def annotated(
    matrix: Any,
    names: Sequence[str],
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
    condition: NDArray[np.int64],
    obsm: dict[str, NDArray[np.float64]],
    truth: dict[str, Any],
) -> ad.AnnData:
    """AnnData with the label of each cell; a sparse matrix is counts and has a layer of its own.

    ``names`` are those of the perturbations; conditions are numbered as by `draw_conditions`.
    """
    both = (f"{names[a]}+{names[b]}" for a, b in zip(*pairs, strict=True))
    labels = pd.Categorical.from_codes(condition, [CONTROL, *names, *both])
    is_counts = sp.issparse(matrix)
    return ad.AnnData(
        matrix,
        obs=pd.DataFrame(
            {"perturbation": labels.remove_unused_categories()},
            index=numbered_names("cell_", matrix.shape[0]),
        ),
        var=pd.DataFrame(
            index=numbered_names("gene_" if is_counts else "feature_", matrix.shape[1])
        ),
        layers={"counts": matrix.copy()} if is_counts else {},
        obsm=obsm,
        uns={"truth": {"perturbation_names": np.array(names, dtype=object)} | truth},
    )
