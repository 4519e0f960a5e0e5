"""What a fit that was stopped leaves beside its output, for ``fit --resume`` to go on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from scvi_sams.cli._console import PROGRAM, CommandError

if TYPE_CHECKING:
    import argparse
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
        return json.loads(path.read_text()) if path.is_file() else {}


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
    folder, state = last.parent.parent, json.loads(last.read_text())
    then, now = state["arguments"], arguments_of(args)
    if differs := sorted(n for n in then | now if then.get(n) != now.get(n)):
        name = differs[0]
        option = {"screen": name, "version": PROGRAM}.get(name, "--" + name.replace("_", "-"))
        raise CommandError(
            f"--resume: the fit that was stopped in {folder} had {option} {_shown(then.get(name))}"
            f", and now it is {_shown(now.get(name))}; give the same arguments, or leave out "
            "--resume to begin anew"
        )
    return Stopped(folder, state)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
