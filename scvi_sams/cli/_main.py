"""Entry point: run a command, and turn what went wrong into one line and an exit status."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from scvi_sams._exceptions import ScreenError, TrainingDivergedError
from scvi_sams.cli._console import CommandError, one_line
from scvi_sams.cli._output import check_file, check_folder
from scvi_sams.cli._parser import SIMULATED, build_parser
from scvi_sams.cli._resume import stopped_fit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

_FAILED, _INTERRUPTED, _TERMINATED = 1, 130, 143  # the latter as a shell has them, 128 + signal

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


class _Terminated(BaseException):
    """SIGTERM came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``scvi-sams``.

    Parameters
    ----------
    arguments
        Words after the program's name; those of the process by default.

    Returns
    -------
    int
        Exit status: 0; 1 if the input cannot be used or something failed; 130 if interrupted,
        143 if terminated.

    Raises
    ------
    SystemExit
        With status 2 for arguments that do not parse; with 0 after ``--help`` and ``--version``.

    Examples
    --------
    >>> from scvi_sams.cli import main
    >>> main(["predict", "no_such_folder", "--conditions", "KLF1", "-o", "cells.h5ad"])
    1
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(arguments)
    status, message = 0, ""
    try:
        with _signals(), warnings.catch_warnings():
            _quieten_libraries()
            _run(args)
    except _Terminated as error:
        status, message = _TERMINATED, _with_notes("terminated", error)
    except KeyboardInterrupt as error:
        status, message = _INTERRUPTED, _with_notes(str(error) or "interrupted", error)
    except SystemExit as error:  # of Lightning, that was interrupted a second time
        status, message = _INTERRUPTED, _with_notes("interrupted", error)
    except Exception as error:  # noqa: BLE001 - whatever it is, a user sees one line
        status, message = _FAILED, _with_notes(_cause(error), error)
        if args.debug:
            traceback.print_exc()
    if message:
        print(one_line("error", message), file=sys.stderr)
    return status


def _run(args: argparse.Namespace) -> None:
    """Check what needs no library, then import those that the command needs."""
    if args.command == "fit":
        files = [] if args.screen == SIMULATED else [(args.screen, f" or '{SIMULATED}'")]
        if args.targets is not None:
            files.append((args.targets, " of --targets"))
        for file, role in files:
            if not Path(file).is_file():
                kind = "a .csv file" if file == args.targets else "an .h5ad file"
                raise CommandError(f"there is no file {file}; give {kind}{role}")
        if args.screen != SIMULATED:
            from scvi_sams.cli._file import check_file_of_screen

            check_file_of_screen(Path(args.screen), args)
        check_folder(args.output, args.overwrite)
        if args.resume:
            stopped_fit(args)
        from scvi_sams.cli._fit import fit as command
    else:
        if not (args.model / "model" / "model.pt").is_file():
            raise CommandError(f"there is no model in {args.model}; give a folder that fit wrote")
        check_file(args.output, args.overwrite)
        if args.command == "plan":
            from scvi_sams.cli._plan import plan as command
        else:
            from scvi_sams.cli._predict import predict as command
    for library in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(library).setLevel(logging.ERROR)  # now that the libraries have set it
    command(args)


def _cause(error: Exception) -> str:
    """What went wrong and what may mend it."""
    text = str(error) or type(error).__name__
    if isinstance(error, CommandError | ScreenError | TrainingDivergedError):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"out of memory ({text}); use fewer cells, genes or latents, or a larger machine"
    if "No space left" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}); free some space or choose another -o"
    if isinstance(error, OSError):
        return text
    return (
        f"{type(error).__name__}: {text}; --debug shows where. If the input is right, please "
        "report this"
    )


def _with_notes(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", ())])


@contextmanager
def _signals() -> Iterator[None]:
    """Raise at SIGTERM; leave the handlers as they were."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may have handlers
        return

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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
