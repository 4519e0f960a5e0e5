"""The screen that a command line names: read, checked, split."""

from __future__ import annotations

__all__ = ["condition_labels", "held_out_cells", "read_screen", "setup_arguments"]

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

import scvi_sams
from scvi_sams.cli._errors import CommandError
from scvi_sams.data import Conditions
from scvi_sams.data.field import registered_dosage

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

SIMULATED = "simulated"


def read_screen(args: argparse.Namespace) -> ad.AnnData:
    """Read, or simulate, the screen.

    Raises
    ------
    CommandError
        If there is no such file, or it holds no AnnData.
    """
    if args.screen == SIMULATED:
        return scvi_sams.datasets.simulated_screen(seed=args.seed)
    path = Path(args.screen)
    if not path.is_file():
        raise CommandError(f"there is no file {path}; give an .h5ad file or '{SIMULATED}'")
    if not h5py.is_hdf5(path):
        raise CommandError(
            f"{path} is not an .h5ad file; read it in Python and write it with adata.write_h5ad"
        )
    with h5py.File(path) as file:
        if missing := {"X", "obs", "var"}.difference(file):
            raise CommandError(
                f"{path} is HDF5 but holds no AnnData: {', '.join(sorted(missing))} missing; "
                "write it with adata.write_h5ad"
            )
    try:
        return ad.read_h5ad(path)
    except (KeyError, TypeError, ValueError) as error:  # what a damaged element raises
        raise CommandError(f"{path} cannot be read as an AnnData: {error}") from error


def setup_arguments(args: argparse.Namespace, adata: ad.AnnData) -> dict[str, Any]:
    """Arguments of ``setup_anndata``, those of the simulated screen filled in.

    Raises
    ------
    CommandError
        If one that is needed is not given, or names a column that is not there.
    """
    if args.screen == SIMULATED:
        defaults = {"perturbation_key": "perturbation", "control": ["control"]}
        defaults |= {"batch_key": "replicate", "layer": "counts"}
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    columns = ", ".join(map(repr, adata.obs)) or "none"
    if args.perturbation_key is None and args.dosage_key is None:
        raise CommandError(
            f"--perturbation-key is needed: the obs column of labels; there are {columns}"
        )
    for name in ("perturbation_key", "batch_key", "size_factor_key"):
        key = getattr(args, name)
        if key is not None and key not in adata.obs:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"{option}: there is no obs column {key!r}; there are {columns}")
    if args.perturbation_key is not None and args.control is None:
        frequent = ", ".join(map(repr, adata.obs[args.perturbation_key].value_counts().index[:5]))
        raise CommandError(
            f"--control is needed: the label of the unperturbed cells in obs column "
            f"{args.perturbation_key!r}; the most frequent are {frequent}"
        )
    return {
        "layer": args.layer,
        "perturbation_key": args.perturbation_key,
        "dosage_key": args.dosage_key,
        "control": args.control,
        "combination_delimiter": args.combination_delimiter,
        "batch_key": args.batch_key,
        "size_factor_key": args.size_factor_key,
    }


def condition_labels(
    model: scvi_sams.SAMSVAE, args: argparse.Namespace
) -> tuple[pd.Categorical, sparse.csr_matrix]:
    """Label of every cell by what it received, and the doses of every label.

    Labels follow from the registered doses, so that ``A+B`` and ``B+A`` are one condition and
    the same perturbation at two doses is two. Controls have none (NaN).

    Returns
    -------
    Labels of the cells, and doses (categories x perturbations).
    """
    dosage = registered_dosage(model.adata_manager)
    bounds = zip(dosage.indptr[:-1], dosage.indptr[1:], strict=True)
    rows = [(dosage.indices[a:b].tobytes(), dosage.data[a:b].tobytes()) for a, b in bounds]
    codes, distinct = pd.factorize(pd.Series(rows, dtype=object))
    first = np.full(len(distinct), len(rows))
    np.minimum.at(first, codes, np.arange(len(rows)))
    first = first[dosage[first].getnnz(axis=1) > 0]
    doses = sparse.csr_matrix(dosage[first])
    labels = Conditions.from_request(
        doses, model.perturbation_names, args.control, args.combination_delimiter
    ).labels

    order = np.argsort(labels)
    category_of = np.full(len(distinct), -1)
    category_of[codes[first[order]]] = np.arange(len(order))
    categories = [labels[index] for index in order]
    return pd.Categorical.from_codes(category_of[codes], categories), doses[order]


def held_out_cells(
    labels: pd.Categorical, fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw cells to keep from training, the same share of every condition and of the controls.

    Where the share is not a whole number of cells it is rounded up or down at random; the last
    cell of a condition is never taken.
    """
    group = labels.codes + 1  # controls have the code -1
    size = np.bincount(group)
    taken = np.minimum(np.floor(size * fraction + rng.random(size.size)), size - 1)
    shuffled = np.lexsort((rng.random(group.size), group))
    rank = np.arange(group.size) - (np.cumsum(size) - size)[group[shuffled]]
    held_out = np.zeros(group.size, dtype=bool)
    held_out[shuffled] = rank < taken[group[shuffled]]
    return held_out
