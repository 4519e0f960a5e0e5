"""Entry point: run a command, and turn what went wrong into one line and an exit code."""

from __future__ import annotations

__all__ = ["main"]

import logging
import sys
import warnings
from typing import TYPE_CHECKING

from scvi_sams._exceptions import ScreenError, TrainingDivergedError
from scvi_sams.cli._errors import CommandError, one_line
from scvi_sams.cli._fit import fit
from scvi_sams.cli._parser import build_parser
from scvi_sams.cli._predict import predict

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_COMMANDS = {"fit": fit, "predict": predict}
_FAILED, _INTERRUPTED = 1, 130

_NOTHING_TO_MEND = (
    # A small screen has fewer batches in an epoch than scvi-tools has Lightning log by.
    ("The number of training batches", r"(lightning|scvi)\."),
    # The dropout of the encoder is off when a model is read out, and on again in training.
    ("Found [0-9]+ module.s. in eval mode", r"(lightning|scvi)\."),
    # Batches are cut from memory; workers would copy the screen to gain nothing.
    ("The '.*dataloader' does not have many workers", r"(lightning|scvi)\."),
    # Asked for, by --accelerator cpu.
    ("GPU available but not used", r"(lightning|scvi)\."),
)
"""Warnings about how libraries work with this one: what they begin with, and whose they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``scvi-sams``.

    Parameters
    ----------
    arguments
        Words after the program's name; those of the process by default.

    Returns
    -------
    Exit code: 0, 1 if the input cannot be used or training diverged, 130 if interrupted.

    Raises
    ------
    SystemExit
        With code 2 for arguments that do not parse; with 0 after ``--help`` and ``--version``.

    Examples
    --------
    >>> from scvi_sams.cli import main
    >>> main(["predict", "no_such_folder", "--conditions", "KLF1", "-o", "cells.h5ad"])
    1
    """
    args = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        _quieten_libraries()
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        _COMMANDS[args.command](args)
    except KeyboardInterrupt as interrupt:
        _print_line("error", interrupt, "interrupted")
        return _INTERRUPTED
    except (CommandError, ScreenError, TrainingDivergedError, OSError) as error:
        _print_line("error", error)
        return _FAILED
    return 0


def _print_line(kind: str, error: BaseException, message: str | None = None) -> None:
    parts = [message or str(error), *getattr(error, "__notes__", ())]
    print(one_line(kind, "; ".join(parts)), file=sys.stderr)


def _quieten_libraries() -> None:
    """Show each warning once, as a line of its own, but for those that name nothing to mend."""
    warnings.simplefilter("default")
    # Of changes to come in a library, which are for those who write code against it.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    for message, module in _NOTHING_TO_MEND:
        warnings.filterwarnings("ignore", message, UserWarning, module)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(one_line("warning", str(message)), file=sys.stderr)

    warnings.showwarning = show
    for library in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(library).setLevel(logging.ERROR)
