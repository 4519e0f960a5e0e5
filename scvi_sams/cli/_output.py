"""Results that appear whole or not at all."""

from __future__ import annotations

__all__ = ["staged_file", "staged_folder"]

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scvi_sams.cli._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MARK = "summary.json"  # a folder that has this was written by `scvi-sams fit`


@contextmanager
def staged_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside `output` to write to, and move it there at the end.

    What was written before an error stays in the folder beside, which the error then names: a
    trained model is not thrown away because a disk ran full.

    Raises
    ------
    CommandError
        If `output` exists and `overwrite` is false, or it was not written by this program.
    """
    output = output.resolve()
    if output.exists():
        _refuse_unless(overwrite, output)
        if not output.is_dir() or (any(output.iterdir()) and not (output / _MARK).is_file()):
            raise CommandError(
                f"{output} is not a folder that `scvi-sams fit` wrote, and is not overwritten; "
                "choose another -o"
            )
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException as error:
        if any(staging.iterdir()):
            error.add_note(f"what was finished is in {staging}")
        else:
            staging.rmdir()
        raise
    if output.exists():
        replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
        output.rename(replaced)
        staging.rename(output)
        shutil.rmtree(replaced)
    else:
        staging.rename(output)


@contextmanager
def staged_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a path beside `output` to write to, and move the file there at the end.

    Raises
    ------
    CommandError
        If `output` is a folder, or exists and `overwrite` is false.
    """
    output = output.resolve()
    if output.is_dir():
        raise CommandError(f"{output} is a folder; name a file with -o")
    if output.exists():
        _refuse_unless(overwrite, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        yield staging
        staging.replace(output)
    finally:
        staging.unlink(missing_ok=True)


def _refuse_unless(overwrite: bool, output: Path) -> None:
    if not overwrite:
        raise CommandError(f"{output} exists; choose another -o or add --overwrite")
