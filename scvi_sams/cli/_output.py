"""Results that appear when they are finished, and never in place of a user's own files."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from scvi_sams.cli._console import PROGRAM, CommandError
from scvi_sams.cli._resume import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_MARK = ".scvi-sams-output.json"  # lists the files of a folder that `scvi-sams fit` wrote
_MAY_WRITE = (
    *("model", "summary.json", "ate.h5ad", "latent.h5ad", "scorecard.json", "scorecard.md"),
    *("masks.csv", "effects.csv", "direct_effects.csv", "scorecard.csv"),
    *("mechanisms.csv", "context_differences.csv"),
    *("scorecard_per_condition.csv", "scorecard_comparison.csv", "scorecard.png"),
    *("training.png", "latent_umap.png", "masks.png", "effects.png"),
)


def check_folder(output: Path, overwrite: bool) -> None:
    """Refuse a folder that is not to be written to."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    written = _written_before(output) if output.is_dir() else []
    if not written:
        raise CommandError(
            f"{output} is not a folder that `scvi-sams fit` wrote, and is not overwritten; "
            "choose another -o"
        )
    if not overwrite:
        raise CommandError(f"{output} exists; choose another -o or add --overwrite")
    _check_foreign(output, _MAY_WRITE, {PurePosixPath(name).parts[0] for name in written})


@contextmanager
def staged_folder(output: Path, overwrite: bool, stopped: Path | None = None) -> Iterator[Path]:
    """Give a folder beside `output` to write to, and move its files there at the end.

    What was written before an error stays in the folder beside, which the error then names: a
    trained model is not thrown away because a disk ran full. Of an earlier result, the files that
    this program wrote are replaced, and all others stay. A folder of a fit that was `stopped` is
    taken over: under a new name, so that a process that still writes to it fails.
    """
    output = output.resolve()
    check_folder(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = _new_folder(output)
    if stopped is not None:
        staging.rmdir()
        stopped.rename(staging)
    try:
        yield staging
        check_folder(output, overwrite)
        _publish(staging, output)
    except BaseException as error:
        if any(staging.iterdir()):
            error.add_note(f"what was finished is in {staging}")
            if (staging / FOLDER).is_dir():
                error.add_note("the same command with --resume goes on from there")
        else:
            staging.rmdir()
        raise


def _new_folder(output: Path) -> Path:
    """Make a folder beside `output` whose name nothing has."""
    for number in count(1):
        folder = output.with_name(f"{output.name}.partial-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError  # there is always a number


def _publish(staging: Path, output: Path) -> None:
    """Move the files of a folder, and remove those of an earlier result that have no successor."""
    files = [path for path in staging.rglob("*") if path.is_file()]
    written = sorted(path.relative_to(staging).as_posix() for path in files)
    if not output.exists():
        _mark(staging, written)
        staging.rename(output)
        return
    before = _written_before(output)
    _check_foreign(output, written, before)
    # A mark of both, so that nothing is taken for a user's should the machine stop in between.
    _mark(output, {*before, *written})
    for name in written:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, output / name)
    for name in set(before).difference(written):
        (output / name).unlink(missing_ok=True)
    _mark(output, written)
    shutil.rmtree(staging)


def _check_foreign(output: Path, names: Iterable[str], written: Iterable[str]) -> None:
    """Refuse names under which there is something that this program did not write."""
    for name in sorted(set(names).difference(written)):
        if os.path.lexists(output / name):
            raise CommandError(
                f"{output / name} was not written by `scvi-sams fit` and would be replaced; move "
                "it, or choose another -o"
            )


def _mark(folder: Path, written: Iterable[str]) -> None:
    partial = folder / f"{_MARK}.partial"
    mark = {"version": version(PROGRAM), "files": sorted(written)}
    partial.write_text(json.dumps(mark, indent=1) + "\n")
    os.replace(partial, folder / _MARK)


def _written_before(folder: Path) -> list[str]:
    """Files of a folder that its mark lists; none where there is no mark that can be read."""
    try:
        mark = json.loads((folder / _MARK).read_text())
        names = [PurePosixPath(name) for name in mark["files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [str(name) for name in names if not name.is_absolute() and ".." not in name.parts]


def check_file(output: Path, overwrite: bool) -> None:
    """Refuse a file that is not to be written."""
    if output.is_dir():
        raise CommandError(f"{output} is a folder; name a file with -o")
    if output.exists() and not overwrite:
        raise CommandError(f"{output} exists; choose another -o or add --overwrite")


@contextmanager
def staged_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a path beside `output` to write to, and move the file there at the end."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        yield staging
        check_file(output, overwrite)
        staging.replace(output)
    finally:
        staging.unlink(missing_ok=True)
