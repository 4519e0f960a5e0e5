"""``scvi-sams plan``: what screens of other sizes would recover, from what ``fit`` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from scvi_sams import pl, tl
from scvi_sams.cli._output import check_file, staged_file
from scvi_sams.cli._predict import load

if TYPE_CHECKING:
    import argparse

_DPI = 150


def plan(args: argparse.Namespace) -> None:
    """Write a table of designs to ``args.output``, and a plot beside it."""
    picture = args.output.with_suffix(".png")
    check_file(picture, args.overwrite)
    table = tl.plan_screen(
        load(args.model / "model"),
        args.cells,
        controls=args.controls,
        depth=args.depth,
        guides=args.guides,
        guide_variation=args.guide_variation,
        replicates=args.replicates,
        replicate_variation=args.replicate_variation,
        fdr=args.fdr,
        seed=args.seed,
    )
    with staged_file(args.output, args.overwrite) as path:
        table.to_csv(path, index=False)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    pl.plan_screen(table, "perturbations", ax=axes[0])
    pl.plan_screen(table, "mechanisms", ax=axes[1])
    with staged_file(picture, args.overwrite) as path:
        figure.savefig(path, dpi=_DPI, format="png")
    plt.close(figure)
    print(table.drop(columns=["guides", "replicates"]).round(2).to_string(index=False))
    print(f"{len(table):,} designs are in {args.output}, and a picture of them in {picture}")
