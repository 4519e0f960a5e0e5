"""The screen that a command line names: read, checked, divided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

import scvi_sams
from scvi_sams._exceptions import counted, listed
from scvi_sams.cli._console import CommandError
from scvi_sams.cli._file import check_columns, is_mudata
from scvi_sams.cli._parser import SIMULATED
from scvi_sams.data import guides_from_mudata
from scvi_sams.data.field import registered_conditions
from scvi_sams.evaluation._splits import random_share

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray
    from scipy import sparse

    from scvi_sams.data import Conditions
    from scvi_sams.model import CPAVAE, SAMSVAE

CONDITION = "condition"
"""Column of ``obs`` with what each cell received."""
CONTROL = "control"
"""Its label of cells that received nothing."""
MIN_CELLS = 4
"""Fewest cells of a held-out condition: its scores take two halves with variances."""
_HELD_OUT = "--held-out-conditions"


def read_screen(args: argparse.Namespace) -> ad.AnnData:
    """Read, or simulate, the screen."""
    if args.screen == SIMULATED:
        return scvi_sams.datasets.simulated_screen(seed=args.seed)
    path = Path(args.screen)
    try:
        if is_mudata(path):
            return _of_mudata(path, args)
        adata = ad.read_h5ad(path)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(
            f"{path} cannot be read as an AnnData, and may be damaged: {error}"
        ) from error
    if adata.var_names.has_duplicates:
        twice = adata.var_names[adata.var_names.duplicated()].unique()
        raise CommandError(
            f"{path} has genes of one name: {listed(twice)}; give them names of their own with "
            "adata.var_names_make_unique() in Python"
        )
    return adata


def _of_mudata(path: Path, args: argparse.Namespace) -> ad.AnnData:
    """The modality of the counts of a MuData, with the guides of the other."""
    import mudata  # of scvi-tools; slow to import, and of few files

    mdata = mudata.read_h5mu(path)
    if args.perturbation_key is not None or args.dosage_obsm is not None:
        return mdata.mod["rna" if "rna" in mdata.mod else "gene"]
    control = (args.control or ["non-targeting"])[0]
    adata = guides_from_mudata(mdata, guide_targets=_guide_targets(args), control=control)
    for key in (args.batch_key, args.context_key, args.donor_key, args.size_factor_key):
        if key in mdata.obs and key not in adata.obs:
            adata.obs[key] = mdata.obs[key].reindex(adata.obs_names)
    args.guide_key, args.guide_targets, args.control = "guides", None, args.control or [control]
    return adata


def _guide_targets(args: argparse.Namespace) -> dict[str, str] | str | None:
    """What guides target, by the table of ``--guide-targets``, or the key of uns that it names."""
    if args.guide_targets is None or not Path(args.guide_targets).suffix:
        return args.guide_targets
    return _two_columns("--guide-targets", args.guide_targets, ("guide", "target"))


def make_model(adata: ad.AnnData, args: argparse.Namespace) -> SAMSVAE | CPAVAE:
    """Register the screen, with the columns of the simulated one filled in, and make the model."""
    if args.screen == SIMULATED:
        defaults = {"perturbation_key": "perturbation", "control": ["control"]}
        defaults |= {"batch_key": "replicate", "layer": "counts"}
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    check_columns(args, adata.obs)
    if args.perturbation_key is not None and args.control is None:
        frequent = listed(adata.obs[args.perturbation_key].value_counts().index)
        raise CommandError(
            f"--control is needed: the label of the unperturbed cells in obs column "
            f"{args.perturbation_key!r}; the most frequent are {frequent}"
        )
    options: dict[str, Any] = {"n_latent": args.n_latent}
    options["direct_effects"] = _targets(args) or args.target_gene_key
    if args.model == "samsvae":
        options["mask_evidence_cells"] = args.mask_evidence_cells
    elif args.mask_evidence_cells is not None:
        raise CommandError("--mask-evidence-cells: cpavae has no masks; leave it out")
    elif args.donor_key is not None and args.context_key is None:
        raise CommandError("--donor-key: cpavae has no masks to call; leave it out")
    model_class = scvi_sams.CPAVAE if args.model == "cpavae" else scvi_sams.SAMSVAE
    model_class.setup_anndata(
        adata,
        layer=args.layer,
        perturbation_key=args.perturbation_key,
        dosage_key=args.dosage_obsm or args.dosage_key,
        control=args.control,
        combination_delimiter=args.combination_delimiter,
        batch_key=args.batch_key,
        context_key=args.context_key,
        size_factor_key=args.size_factor_key,
        guide_key=args.guide_key,
        guide_targets=_guide_targets(args),
        guide_threshold=args.guide_threshold,
    )
    given = {name: value for name, value in options.items() if value is not None}
    try:
        model = model_class(adata, **given)
    except scvi_sams.ScreenError as error:
        if args.target_gene_key is None:
            raise
        message = str(error).replace("direct_effects=", "--target-gene-key ")
        raise CommandError(message) from error
    conditions = registered_conditions(model.adata_manager)
    labels = np.where(conditions.is_control, CONTROL, np.array(conditions.labels, object))
    adata.obs[CONDITION] = pd.Categorical(labels[conditions.codes])
    return model


def _targets(args: argparse.Namespace) -> dict[str, str] | None:
    """Gene that each perturbation changes directly, by the table of ``--targets``."""
    if args.targets is None:
        return None
    if args.target_gene_key is not None:
        raise CommandError("--target-gene-key is in place of --targets: leave out one of them")
    return _two_columns("--targets", args.targets, ("perturbation", "gene"))


def _two_columns(option: str, path: str, columns: tuple[str, str]) -> dict[str, str]:
    """A table of two columns, of which the first has each name once."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # also what pandas raises of a file that is no table
        raise CommandError(f"{option}: {path} cannot be read: {error}") from error
    first, second = columns
    if missing := set(columns).difference(table.columns):
        raise CommandError(
            f"{option}: {path} has no column {' or '.join(sorted(missing))}; its first line is to "
            f"be {first},{second}"
        )
    if (again := table[first].duplicated()).any():
        raise CommandError(
            f"{option}: {path} has {listed(table[first][again].unique())} twice; a {first} has "
            "one target"
        )
    return dict(zip(table[first], table[second], strict=True))


def reported(conditions: Conditions) -> sparse.csr_matrix | None:
    """Conditions whose effects are written; None for each perturbation alone.

    That is where most cells have a condition of their own, as with many guides a cell.
    """
    perturbed = ~conditions.is_control
    if 2 * perturbed.sum() > conditions.n_cells[perturbed].sum():
        return None
    return conditions.matrix[perturbed]


def held_out_cells(
    conditions: Conditions, args: argparse.Namespace
) -> tuple[NDArray[np.bool_], list[int]]:
    """Cells to keep from training, and the codes of conditions that are kept whole.

    Of every condition, and of the controls, the same share is drawn, but for the last cell.
    """
    rng = np.random.default_rng(args.seed)
    held_out = random_share(conditions.codes, args.held_out_fraction, rng)
    _, first = np.unique(conditions.codes, return_index=True)
    lost = np.bincount(conditions.codes[~held_out], minlength=len(first)) == 0
    held_out[first[lost]] = False
    if args.held_out_fraction > 0 and not held_out.any():
        raise CommandError(
            f"--held-out-fraction {args.held_out_fraction:g} of "
            f"{counted(len(held_out), 'cell')} is none; raise it, or set it to 0"
        )
    whole = _held_out_conditions(conditions, args)
    held_out |= np.isin(conditions.codes, whole)
    if whole and not conditions.is_control[conditions.codes[~held_out]].any():
        raise CommandError(f"{_HELD_OUT}: scores need control cells to train on")
    return held_out, whole


def _held_out_conditions(conditions: Conditions, args: argparse.Namespace) -> list[int]:
    """Codes of conditions that are named, listed in a file, or a share to be drawn."""
    words = args.held_out_conditions
    if not words:
        return []
    if len(words) == 1 and words[0] not in conditions.labels:
        if (share := _share(words[0])) is not None:
            return _drawn(share, conditions, np.random.default_rng(args.seed))
        path = Path(words[0])
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            words = [line.strip() for line in lines if line.strip()]
            if not words:
                raise CommandError(f"{_HELD_OUT}: {path} names no condition")
    try:
        chosen = conditions.find(words)
    except scvi_sams.ScreenError as error:
        raise CommandError(f"{_HELD_OUT}: {error}") from error
    for code in chosen:
        if conditions.n_cells[code] < MIN_CELLS:
            raise CommandError(
                f"{_HELD_OUT}: {conditions.labels[code]!r} has "
                f"{counted(conditions.n_cells[code], 'cell')}, and a score takes {MIN_CELLS}; "
                "leave it out"
            )
    if len(chosen) == (~conditions.is_control).sum():
        raise CommandError(f"{_HELD_OUT} names every condition; leave some to train on")
    return chosen


def _share(word: str) -> float | None:
    """A share of the conditions; None for a word that is no number."""
    try:
        share = float(word)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise CommandError(f"{_HELD_OUT} {word}: a share of the conditions is above 0 and below 1")
    return share


def _drawn(share: float, conditions: Conditions, rng: np.random.Generator) -> list[int]:
    """Draw conditions, leaving every perturbation in one that is trained on."""
    perturbed = np.flatnonzero(~conditions.is_control)
    wanted = max(1, round(share * len(perturbed)))
    received = (conditions.matrix > 0).toarray()
    n_left = received.sum(axis=0)
    chosen: list[int] = []
    for code in rng.permutation(perturbed):
        if len(chosen) == wanted:
            break
        if conditions.n_cells[code] >= MIN_CELLS and (n_left[received[code]] > 1).all():
            n_left -= received[code]
            chosen.append(int(code))
    if not chosen:
        raise CommandError(
            f"{_HELD_OUT} {share:g}: every perturbation is in one condition only, so that nothing "
            "would be known of those held out; name conditions, or hold out cells alone"
        )
    return sorted(chosen)
