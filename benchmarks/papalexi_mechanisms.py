"""Masks of the Papalexi screen against what is known of it: the IFN-gamma pathway and SMAD4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import scvi

from benchmarks._common import parser, prepare, print_table, read_screen, train
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WITHOUT_EFFECT", "main"]

_PATHWAY = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
# Targets for which no gene changes at a false discovery rate of 0.05 (Mann-Whitney).
WITHOUT_EFFECT = (
    "ATF2 CAV1 CD86 ETV7 IRF7 MARCH8 MYC PDCD1LG2 SPI1 STAT5A"  # alphabetical
).split()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    rows = []
    for seed in arguments.seeds:
        scvi.settings.seed = seed
        SAMSVAE.setup_anndata(
            screen,
            perturbation_key="perturbation",
            control="control",
            batch_key="bio_rep",
            size_factor_key="total_umi_all_genes",
        )
        model = SAMSVAE(screen)
        watch = train(model, None)
        on = model.get_perturbation_mask() > 0.5
        shared = on.loc[_PATHWAY].all() & ~on.loc["SMAD4"]
        empty = ~on.loc[WITHOUT_EFFECT].any(axis=1)
        others = on.drop(index=_PATHWAY + WITHOUT_EFFECT)
        rows.append(
            {
                "seed": seed,
                "latents of the pathway without SMAD4": int(shared.sum()),
                "empty masks of ten": int(empty.sum()),
                "not empty": ", ".join(empty.index[~empty]) or "none",
                "other masks": ", ".join(others.index[others.any(axis=1)]),
                "active latents": int(on.any().sum()),
                "core seconds": watch.cpu,
            }
        )
    print_table("Papalexi, known mechanisms", rows, arguments)
