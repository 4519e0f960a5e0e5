"""The file of a screen, as far as it can be judged before a library is imported."""

from __future__ import annotations

__all__ = ["check_columns", "check_file_of_screen", "is_mudata"]

from typing import TYPE_CHECKING, Any

import h5py

from scvi_sams._exceptions import listed
from scvi_sams.cli._console import CommandError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from pathlib import Path


_COLUMNS = (
    *("perturbation_key", "dosage_key", "batch_key", "context_key", "donor_key"),
    "size_factor_key",
)


def check_file_of_screen(path: Path, args: argparse.Namespace) -> None:
    """Refuse a file that holds no AnnData, or not the columns that are named."""
    if not h5py.is_hdf5(path):
        raise CommandError(
            f"{path} is not an .h5ad file; read it in Python and write it with adata.write_h5ad"
        )
    try:
        if is_mudata(path):
            return  # whose columns are those of several tables
        with h5py.File(path) as file:
            if missing := {"X", "obs", "var"}.difference(file):
                raise CommandError(
                    f"{path} is HDF5 but holds no AnnData: {', '.join(sorted(missing))} missing; "
                    "write it with adata.write_h5ad"
                )
            columns = _columns(file["obs"])
    except OSError as error:
        raise CommandError(f"{path} cannot be read, and may be damaged: {error}") from error
    if columns is not None:
        check_columns(args, columns)


def is_mudata(path: Path) -> bool:
    """Whether a file holds modalities, as of a MuData, in place of one AnnData."""
    with h5py.File(path) as file:
        return "mod" in file


def _columns(obs: Any) -> list[str] | None:
    """Names of the columns of a table; None where an old file, say, does not list them."""
    order = obs.attrs.get("column-order")
    if order is None:
        return None
    return [name.decode() if isinstance(name, bytes) else str(name) for name in order]


def check_columns(args: argparse.Namespace, columns: Iterable[str]) -> None:
    """Refuse options that name a column of obs which is not there."""
    columns = list(columns)
    there_are = listed(columns, 20) or "none"
    if args.dosage_obsm is not None:
        if args.perturbation_key is not None or args.dosage_key is not None:
            raise CommandError(
                "--dosage-obsm is in place of labels: leave out --perturbation-key and "
                "--dosage-key"
            )
    elif args.perturbation_key is None and args.guide_key is None:
        raise CommandError(
            "--perturbation-key is needed, the obs column of labels, or --guide-key; there are "
            f"{there_are}"
        )
    for name in _COLUMNS:
        key = getattr(args, name)
        if key is not None and key not in columns:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"{option}: there is no obs column {key!r}; there are {there_are}")
