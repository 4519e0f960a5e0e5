"""``scvi-sams predict``: cells under any condition, from a folder that ``fit`` wrote."""

from __future__ import annotations

__all__ = ["predict"]

from typing import TYPE_CHECKING

import scvi
from rich.console import Console

import scvi_sams
from scvi_sams.cli._errors import CommandError
from scvi_sams.cli._output import staged_file

if TYPE_CHECKING:
    import argparse


def predict(args: argparse.Namespace) -> None:
    """Simulate cells and write them to ``args.output``.

    Raises
    ------
    CommandError
        If there is no model in the folder.
    UnknownPerturbationError
        If a condition names a perturbation that the model has not seen.
    """
    folder = args.model / "model"
    if not (folder / "model.pt").is_file():
        raise CommandError(f"there is no model in {args.model}; give a folder that fit wrote")
    with staged_file(args.output, args.overwrite) as path:
        model = scvi_sams.SAMSVAE.load(str(folder), adata=False)
        scvi.settings.seed = args.seed
        cells = model.predict(
            args.conditions,
            n_samples=args.n_samples,
            batch=args.batch,
            library_size=args.library_size,
        )
        cells.write_h5ad(path)
    Console(highlight=False).print(
        f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {args.n_samples:,} of each of "
        f"{len(args.conditions):,} conditions, are in {args.output}",
        soft_wrap=True,
    )
