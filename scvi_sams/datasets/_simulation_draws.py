"""What simulated screens draw at random: masks, pairs, interactions, dose curves, conditions."""

from __future__ import annotations

__all__ = [
    "CONTROL",
    "draw_conditions",
    "draw_hill_curves",
    "draw_interactions",
    "draw_masks",
    "draw_pairs",
    "numbered_names",
]

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

CONTROL = "control"
"""Label of the cells without a perturbation."""


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


def draw_interactions(
    rng: Generator, n_pairs: int, n_latent: int, fraction: float, effect_size: float
) -> NDArray[np.float64]:
    """Shifts of some pairs beyond the sum of their parts (pairs x latents), on one latent each."""
    interaction = np.zeros((n_pairs, n_latent))
    chosen = rng.permutation(n_pairs)[: round(fraction * n_pairs)]
    sizes = effect_size * rng.choice([-1.0, 1.0], len(chosen))
    interaction[chosen, rng.integers(n_latent, size=len(chosen))] = sizes
    return interaction


def draw_hill_curves(
    rng: Generator, n_perturbations: int, doses: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """EC50 and Hill slope of each perturbation."""
    ec50 = np.exp(rng.uniform(np.log(min(doses)), np.log(max(doses)), n_perturbations))
    return ec50, 1.5 * np.exp(0.2 * rng.standard_normal(n_perturbations))


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


def numbered_names(prefix: str, n: int, min_width: int = 1) -> list[str]:
    """Names ``prefix1 ... prefixn``, padded with zeros so that they sort as numbers do."""
    width = max(min_width, len(str(n)))
    return [f"{prefix}{i:0{width}d}" for i in range(1, n + 1)]
