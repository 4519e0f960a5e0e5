"""The four simulated screens on which the recovery of masks is reported."""

from __future__ import annotations

__all__ = ["BENCHMARK_SCREENS", "benchmark_screen"]

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from scvi_sams._exceptions import ScreenError
from scvi_sams.datasets._simulated import simulated_screen

if TYPE_CHECKING:
    from collections.abc import Mapping

    import anndata as ad

_DEFAULT: dict[str, Any] = {
    "n_cells": 20_000,
    "n_genes": 1_000,
    "n_perturbations": 200,
    "n_pairs": 60,
    "n_latent": 20,
    "mask_probability": 0.1,
    "effect_size": 2.0,
    "library_size": 8_000.0,
    "n_batches": 1,
}
_SMALL: dict[str, Any] = {
    "n_cells": 6_000,
    "n_genes": 500,
    "n_perturbations": 60,
    "n_pairs": 20,
    "n_latent": 10,
    "mask_probability": 0.2,
}

BENCHMARK_SCREENS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": _DEFAULT,
        "weak": _DEFAULT | {"effect_size": 1.0},
        "shallow": _DEFAULT | {"effect_size": 1.5, "library_size": 1_500.0},
        "small": _DEFAULT | _SMALL,
    }
)
"""Arguments of :func:`simulated_screen` that make each screen of :func:`benchmark_screen`."""


def benchmark_screen(
    variant: Literal["default", "weak", "shallow", "small"] = "default", seed: int = 0
) -> ad.AnnData:
    """Simulate one of the four screens on which the recovery of masks is reported.

    Parameters
    ----------
    variant
        One of the following:

        * ``"default"``: 20,000 cells, 1,000 genes, 200 perturbations and 60 pairs of them,
          20 latents, masks of density 0.1, effects of 2 standard deviations of the basal state,
          about 8,000 counts a cell, one batch.
        * ``"weak"``: effects half as large.
        * ``"shallow"``: about 1,500 counts a cell, effects of 1.5.
        * ``"small"``: 6,000 cells, 500 genes, 60 perturbations and 20 pairs, 10 latents, masks
          of density 0.2.
    seed
        Seed of all randomness.

    Returns
    -------
    The screen, laid out as by :func:`simulated_screen`.

    Raises
    ------
    ScreenError
        If ``variant`` is none of the four.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.benchmark_screen("small", seed=1)
    >>> adata.shape
    (6000, 500)
    """
    if variant not in BENCHMARK_SCREENS:
        raise ScreenError(
            f"There is no benchmark screen {variant!r}: `variant` is one of "
            f"{', '.join(map(repr, BENCHMARK_SCREENS))}."
        )
    return simulated_screen(**BENCHMARK_SCREENS[variant], seed=seed)
