"""What a fit that was stopped leaves beside its output, for ``fit --resume`` to go on from."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from scvi_sams.cli._console import PROGRAM, CommandError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = "resume"
"""Folder, in that of the results, of what is needed until they are finished."""
STATE, CHECKPOINT, HISTORY = "fit.json", "last.ckpt", "history.json"
_OF_THE_RUN = frozenset(
    {"command", "output", "overwrite", "debug", "json", "resume", "threads", "accelerator"}
)
"""Arguments that do not change what is fitted."""


@dataclass(frozen=True)
class Stopped:
    """A fit that was stopped."""

    folder: Path
    """Of its results so far."""
    state: dict[str, Any]
    """``arguments`` of the fit, ``screen`` (a digest of the data), ``seconds`` of training."""

    @property
    def checkpoint(self) -> Path | None:
        """State of the training; None where that was done."""
        path = self.folder / FOLDER / CHECKPOINT
        return path if path.is_file() else None

    @property
    def history(self) -> dict[str, dict[str, float]]:
        """Values by name and epoch, of the epochs before the checkpoint."""
        path = self.folder / FOLDER / HISTORY
        found = json.loads(path.read_text()) if path.is_file() else {}
        return {
            name: {str(int(epoch)): float(value) for epoch, value in rows.items()}
            for name, rows in found.items()
        }

    def check(self) -> None:
        """Raise ``CommandError`` if something of the training cannot be read."""
        import torch  # slow, and needed for nothing else

        folder = self.folder / FOLDER
        with _damage_named(folder / HISTORY):
            _ = self.history
        if not (self.folder / "model" / "model.pt").is_file():
            with _damage_named(folder / CHECKPOINT):
                torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """What makes one fit the same as another, as JSON keeps it."""
    given = {name: value for name, value in vars(args).items() if name not in _OF_THE_RUN}
    return json.loads(json.dumps({"version": version(PROGRAM)} | given, default=str))


def stopped_fit(args: argparse.Namespace) -> Stopped | None:
    """The last fit for this output that was stopped; None if there is none to go on from.

    Refuses one whose result would not be that of these arguments.
    """
    output = args.output.resolve()
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    folders = [path for path in beside if path.name.startswith(f"{output.name}.partial-")]
    states = [state for folder in folders if (state := folder / FOLDER / STATE).is_file()]
    if not states:
        return None
    last = max(states, key=lambda path: path.stat().st_mtime_ns)
    folder = last.parent.parent
    now = arguments_of(args)
    with _damage_named(last):
        state = json.loads(last.read_text())
        then = dict(state["arguments"])
        float(state["seconds"]), str(state["screen"])
    if differs := sorted(n for n in then | now if then.get(n) != now.get(n)):
        name = differs[0]
        option = {"screen": name, "version": PROGRAM}.get(name, "--" + name.replace("_", "-"))
        raise CommandError(
            f"--resume: the fit that was stopped in {folder} had {option} {_shown(then.get(name))}"
            f", and now it is {_shown(now.get(name))}; give the same arguments, or leave out "
            "--resume to begin anew"
        )
    return Stopped(folder, state)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Name the file that does not hold what a stopped fit left."""
    try:
        yield
    except Exception as error:
        raise CommandError(
            f"--resume: {path} is damaged ({type(error).__name__}); leave out --resume to begin "
            "anew"
        ) from error


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
