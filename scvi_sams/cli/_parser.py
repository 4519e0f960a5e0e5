"""Arguments of ``scvi-sams``."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from scvi_sams.cli._console import PROGRAM, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

SIMULATED = "simulated"
"""A screen that needs no file."""
_FIT = "train on a screen; write model, masks, effects, figures and a summary"
_PREDICT = "simulate cells under conditions, measured or not, from a trained model"
_PLAN = "say what screens of other sizes would recover, from a trained model"
_OF_DATA = {
    "--perturbation-key COLUMN": "obs column of labels, such as KLF1+CEBPA",
    "--control LABEL": "label or labels of unperturbed cells",
    "--combination-delimiter TEXT": "what joins the parts of a label; default: +",
    "--dosage-key COLUMN": "obs column of doses, beside --perturbation-key",
    "--dosage-obsm KEY": "obsm key of a matrix of doses, cells x perturbations, for labels",
    "--guide-key KEY": "obs column of guides, or obsm key of their calls, cells x guides; alone "
    "they say what cells received. Of an .h5mu file, its modality of guides is read",
    "--guide-targets FILE.csv": "columns guide and target: what each guide targets, the control "
    "label for those that do not; or a key of uns",
    "--guide-threshold N": "counts of a guide from which a cell has it, where --guide-key names "
    "counts",
    "--batch-key COLUMN": "obs column of batches",
    "--context-key COLUMN": "obs column of what effects may depend on, such as the cell type",
    "--donor-key COLUMN": "obs column of donors or replicates: calls hold across them",
    "--layer LAYER": "layer of the counts; default: X",
    "--size-factor-key COLUMN": "obs column of library sizes; default: the sum of the counts. "
    "Needed where the genes are a part of those measured",
}
_OF_TRAINING = {
    "--model NAME": "samsvae, or cpavae, which has no masks; default: samsvae",
    "--n-latent N": "latent dimensions",
    "--mask-evidence-cells N": "cells at which the evidence for a mask saturates; fewer give "
    "cleaner masks; default: 100",
    "--targets FILE.csv": "columns perturbation and gene: the gene that each changes directly; "
    "default: the gene of the same name",
    "--target-gene-key KEY": "the same from the file: an obs column that names the target of each "
    "cell, or a dict or Series in uns",
    "--max-epochs N": "default: by the number of cells",
    "--held-out-fraction F": "share of the cells kept for evaluation; default: 0.1, 0 for none",
    "--held-out-conditions CONDITION": "conditions kept from training altogether and scored "
    "beside simple baselines: labels such as KLF1+CEBPA, a file with one a line, or a share of "
    "them such as 0.2",
    "--threads N": "CPU threads",
    "--accelerator NAME": "auto, cpu, gpu or mps; default: auto",
}
_OF_PREDICTION = {
    "--n-samples N": "cells for each condition; default: 200",
    "--batch LABEL": "default: batches as among controls",
    "--library-size L": "of every cell; default: library sizes as among controls",
}
_OF_PLANS = {
    "--cells N": "mean numbers of cells a perturbation; default: a quarter to eight times as many",
    "--controls N": "numbers of control cells; default: in proportion",
    "--depth F": "counts a cell, as multiples of those of the screen; default: 1",
    "--guides N": "guides a gene, whose cells are its cells; default: 1",
    "--guide-variation F": "standard deviation of their effects, as a share of the mean effect",
    "--replicates N": "default: 1",
    "--replicate-variation F": "the same of replicates",
    "--fdr F": "false discovery rate of the calls; default: 0.1",
}
_OF_BOTH = {"--seed N": "default: 0"}


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(one_line("error", f"{message}; see {self.prog} --help"), file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands.

    Returns
    -------
    argparse.ArgumentParser
        A parser whose ``command`` is ``"fit"``, ``"predict"`` or ``"plan"``.

    Examples
    --------
    >>> from scvi_sams.cli import build_parser
    >>> build_parser().parse_args(["fit", "simulated", "-o", "results"]).command
    'fit'
    """
    about = "Sparse additive mechanism shift VAE for Perturb-seq screens."
    parser = _Parser(prog=PROGRAM, description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(PROGRAM)}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help=_FIT, allow_abbrev=False)
    fit.add_argument(
        "screen",
        metavar="SCREEN",
        help=f"an .h5ad or .h5mu file with counts, or '{SIMULATED}' for a small screen of known "
        "effects",
    )
    _add_output(fit, "OUT", "folder to write to")
    fit.add_argument("--json", action="store_true", help="print the summary alone, as JSON")
    fit.add_argument(
        "--resume",
        action="store_true",
        help="go on from a fit of the same arguments that was stopped, if there is one",
    )
    _add(fit.add_argument_group("what the file holds"), _OF_DATA)
    _add(fit.add_argument_group("training"), _OF_TRAINING | _OF_BOTH)

    predict = commands.add_parser("predict", help=_PREDICT, allow_abbrev=False)
    predict.add_argument("model", type=Path, metavar="OUT", help="the folder that fit wrote")
    _add_output(predict, "FILE", ".h5ad file to write")
    predict.add_argument("--json", action="store_true", help="print what was written, as JSON")
    _add(predict, {"--conditions CONDITION": "such as KLF1+CEBPA"}, required=True)
    _add(predict, _OF_PREDICTION | _OF_BOTH)

    plan = commands.add_parser("plan", help=_PLAN, allow_abbrev=False)
    plan.add_argument("model", type=Path, metavar="OUT", help="the folder that fit wrote")
    _add_output(plan, "FILE", ".csv file to write; a picture of the same name ends in .png")
    _add(plan, _OF_PLANS | _OF_BOTH)
    return parser


def _add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=text)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this program wrote there"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add(parser: Any, options: dict[str, str], **rest: Any) -> None:
    """Add options to a parser or a group of one, with what `_KINDS` says of their values."""
    for option, text in options.items():
        flag, metavar = option.split()
        parser.add_argument(flag, metavar=metavar, help=text, **{**rest, **_KINDS.get(flag, {})})


def _between(
    kind: type[int] | type[float], low: float, high: float, text: str
) -> Callable[[str], float]:
    """Type of a number from `low` to below `high`, whose range is called `text`."""

    def parse(word: str) -> float:
        value = kind(word)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{word} is not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


_NOT_NEGATIVE = {"type": _between(float, 0, float("inf"), "at least 0")}
_INTEGER = {"type": _between(int, 1, float("inf"), "above 0")}
_REAL = {"type": _between(float, sys.float_info.min, float("inf"), "above 0")}
_KINDS: dict[str, dict[str, Any]] = {
    "--control": {"nargs": "+"},
    "--combination-delimiter": {"default": "+"},
    "--guide-threshold": _REAL,
    "--model": {"default": "samsvae", "choices": ("samsvae", "cpavae")},
    "--n-latent": _INTEGER,
    "--mask-evidence-cells": _REAL,
    "--max-epochs": _INTEGER,
    "--held-out-fraction": {
        "type": _between(float, 0, 1, "at least 0 and below 1"),
        "default": 0.1,
    },
    "--held-out-conditions": {"nargs": "+"},
    "--threads": _INTEGER,
    "--accelerator": {"default": "auto", "choices": ("auto", "cpu", "gpu", "mps")},
    "--conditions": {"nargs": "+"},
    "--n-samples": _INTEGER | {"default": 200},
    "--library-size": _REAL,
    "--cells": _REAL | {"nargs": "+"},
    "--controls": _REAL | {"nargs": "+"},
    "--depth": _REAL | {"nargs": "+", "default": [1.0]},
    "--guides": _INTEGER | {"nargs": "+", "default": [1]},
    "--guide-variation": _NOT_NEGATIVE | {"default": 0.0},
    "--replicates": _INTEGER | {"nargs": "+", "default": [1]},
    "--replicate-variation": _NOT_NEGATIVE | {"default": 0.0},
    "--fdr": {
        "type": _between(float, sys.float_info.min, 1, "above 0 and below 1"),
        "default": 0.1,
    },
    # What numpy takes.
    "--seed": {"type": _between(int, 0, 2**32, "at least 0 and below 2**32"), "default": 0},
}
