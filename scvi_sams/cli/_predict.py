"""``scvi-sams predict``: cells under any condition, from a folder that ``fit`` wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import scvi

import scvi_sams
from scvi_sams._exceptions import counted
from scvi_sams.cli._console import CommandError
from scvi_sams.cli._output import staged_file

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from scvi_sams.model import CPAVAE, SAMSVAE


def predict(args: argparse.Namespace) -> None:
    """Simulate cells and write them to ``args.output``."""
    model = load(args.model / "model")
    with staged_file(args.output, args.overwrite) as path:
        scvi.settings.seed = args.seed
        cells = model.predict(
            args.conditions,
            n_samples=args.n_samples,
            batch=args.batch,
            library_size=args.library_size,
        )
        cells.write_h5ad(path)
    if args.json:
        summary = {
            "output": str(args.output),
            "conditions": args.conditions,
            "n_cells": cells.n_obs,
            "n_genes": cells.n_vars,
            "seed": args.seed,
        }
        print(json.dumps(summary, indent=2))
        return
    print(
        f"{counted(cells.n_obs, 'cell')} x {counted(cells.n_vars, 'gene')}, "
        f"{args.n_samples:,} of each of {counted(len(args.conditions), 'condition')}, are in "
        f"{args.output}"
    )


def load(folder: Path) -> SAMSVAE | CPAVAE:
    """Load a model that ``fit`` wrote, without its cells."""
    classes = {each.__name__: each for each in (scvi_sams.SAMSVAE, scvi_sams.CPAVAE)}
    name = scvi_sams.SAMSVAE.load_registry(folder).get("model_name")
    if name not in classes:
        raise CommandError(
            f"{folder / 'model.pt'} is no model that fit wrote: it is a {name}; "
            "name another folder"
        )
    return classes[name].load(folder, adata=False)
