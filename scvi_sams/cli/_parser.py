"""Arguments of ``scvi-sams``."""

from __future__ import annotations

__all__ = ["SIMULATED", "build_parser"]

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from scvi_sams.cli._console import PROGRAM, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

SIMULATED = "simulated"
"""A screen that needs no file."""


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
        A parser whose ``command`` is ``"fit"`` or ``"predict"``.

    Examples
    --------
    >>> from scvi_sams.cli import build_parser
    >>> build_parser().parse_args(["fit", "simulated", "-o", "results"]).command
    'fit'
    """
    parser = _Parser(
        prog=PROGRAM,
        description="Sparse additive mechanism shift VAE for Perturb-seq screens.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(PROGRAM)}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fit(
        commands.add_parser(
            "fit",
            help="train on a screen; write model, masks, effects, figures and a summary",
            allow_abbrev=False,
        )
    )
    _add_predict(
        commands.add_parser(
            "predict",
            help="simulate cells under conditions, measured or not, from a trained model",
            allow_abbrev=False,
        )
    )
    return parser


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "screen",
        metavar="SCREEN",
        help="an .h5ad file with counts, or 'simulated' for a small screen with known effects",
    )
    _add_output(parser, "folder to write to", "OUT")
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON in place of the report"
    )

    screen = parser.add_argument_group("what the file holds")
    screen.add_argument(
        "--perturbation-key", metavar="COLUMN", help="obs column of labels, such as KLF1+CEBPA"
    )
    screen.add_argument(
        "--control", nargs="+", metavar="LABEL", help="label or labels of unperturbed cells"
    )
    screen.add_argument("--combination-delimiter", default="+", metavar="TEXT", help="default: +")
    screen.add_argument(
        "--dosage-key", metavar="COLUMN", help="obs column of doses, beside --perturbation-key"
    )
    screen.add_argument(
        "--dosage-obsm",
        metavar="KEY",
        help="obsm key of a matrix of doses, cells x perturbations, in place of labels",
    )
    screen.add_argument("--batch-key", metavar="COLUMN", help="obs column of batches")
    screen.add_argument("--layer", metavar="LAYER", help="layer of the counts; default: X")
    screen.add_argument(
        "--size-factor-key",
        metavar="COLUMN",
        help="obs column of library sizes; default: the sum of the counts. Needed where the "
        "genes are a part of those measured",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--model",
        default="samsvae",
        choices=("samsvae", "cpavae"),
        help="with masks or without; default: samsvae",
    )
    training.add_argument("--n-latent", type=_positive(int), metavar="N", help="latent dimensions")
    training.add_argument(
        "--mask-evidence-cells",
        type=_positive(float),
        metavar="N",
        help="cells at which the evidence for a mask saturates; fewer give cleaner masks; "
        "default: 30",
    )
    training.add_argument(
        "--targets",
        metavar="FILE.csv",
        help="columns perturbation and gene: the gene that each changes directly; default: the "
        "gene of the same name",
    )
    training.add_argument(
        "--max-epochs", type=_positive(int), metavar="N", help="default: by the number of cells"
    )
    training.add_argument("--seed", type=_seed, default=0, help="default: 0")
    training.add_argument(
        "--held-out-fraction",
        type=_fraction,
        default=0.1,
        metavar="F",
        help="share of the cells kept for evaluation; default: 0.1, 0 for none",
    )
    training.add_argument(
        "--held-out-conditions",
        nargs="+",
        metavar="CONDITION",
        help="conditions kept from training altogether and scored beside simple baselines: "
        "labels such as KLF1+CEBPA, a file with one a line, or a share of them such as 0.2",
    )
    training.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads")
    training.add_argument(
        "--accelerator",
        default="auto",
        choices=("auto", "cpu", "gpu", "mps"),
        help="default: auto",
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="OUT", help="the folder that fit wrote")
    _add_output(parser, ".h5ad file to write", "FILE")
    parser.add_argument(
        "--conditions", nargs="+", required=True, metavar="CONDITION", help="such as KLF1+CEBPA"
    )
    parser.add_argument(
        "--n-samples",
        type=_positive(int),
        default=200,
        metavar="N",
        help="cells for each condition; default: 200",
    )
    parser.add_argument("--batch", metavar="LABEL", help="default: batches as among controls")
    parser.add_argument(
        "--library-size",
        type=_positive(float),
        metavar="L",
        help="of every cell; default: library sizes as among controls",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="default: 0")


def _add_output(parser: argparse.ArgumentParser, help: str, metavar: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=help)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this program wrote there"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:  # what numpy takes
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 2**32")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


_seed.__name__, _fraction.__name__ = "int", "number"  # as argparse calls them
