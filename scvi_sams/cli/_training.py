"""Training from the command line: what it says meanwhile, and what it keeps to go on from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
from lightning.pytorch.callbacks import Callback

from scvi_sams.cli._console import CommandError, say
from scvi_sams.cli._resume import CHECKPOINT, FOLDER, HISTORY, STATE, arguments_of
from scvi_sams.data.field import registered_conditions

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

    from scvi_sams.cli._resume import Stopped
    from scvi_sams.model import CPAVAE, SAMSVAE

_N_LINES = 10  # of progress in a log, where a bar that redraws itself would fill the disk
_KEEP_EVERY = 30.0  # seconds at the least, so that writing is a small part of training


def train(
    model: SAMSVAE | CPAVAE,
    held_out: NDArray[np.bool_],
    args: argparse.Namespace,
    folder: Path,
    stopped: Stopped | None = None,
) -> tuple[SAMSVAE | CPAVAE, float]:
    """Train and save the model at once: whatever fails from here on, it is there.

    Returns the trained model, which is another where training was done before the stop, and the
    seconds that it took, those before a stop included.
    """
    state: dict[str, Any] = {
        "arguments": arguments_of(args),
        "screen": _digest(model),
        "seconds": 0.0,
    }
    if stopped is not None:
        if stopped.state["screen"] != state["screen"]:
            raise CommandError(
                f"--resume: {args.screen} is not the screen of the fit that was stopped in "
                f"{stopped.folder}; leave out --resume to begin anew"
            )
        state["seconds"] = stopped.state["seconds"]
        if stopped.checkpoint is None:
            say("Training was done before the stop")
            return type(model).load(str(folder / "model"), model.adata), state["seconds"]
    interactive = sys.stderr.isatty()
    scvi.settings.progress_bar_style = "tqdm" if interactive else "rich"  # rich: quiet in a log
    parts = [np.flatnonzero(~held_out), np.flatnonzero(held_out), np.array([], dtype=int)]
    history = {} if stopped is None else stopped.history
    keeper = _Keeper(folder / FOLDER, state, history)
    model.train(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        enable_progress_bar=interactive,
        callbacks=[keeper] if interactive else [_Progress(), keeper],
        # Nothing is chosen by the held-out cells; they are for the curve, and for warnings.
        datasplitter_kwargs={"external_indexing": parts},
        check_val_every_n_epoch=1 if held_out.any() else None,
        ckpt_path=None if stopped is None else str(stopped.checkpoint),
    )
    _prepend(history, model.history_)
    model.save(str(folder / "model"), overwrite=True)
    if model.stopped_in is not None:
        raise KeyboardInterrupt(f"interrupted in {model.stopped_in}")
    keeper.finish()
    return model, keeper.seconds


class _Progress(Callback):
    """Say a line after every tenth of the steps, with an estimate of the time that is left."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock."""
        self._n_steps = int(trainer.estimated_stepping_batches)
        self._first, self._started = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Say how far it is, if its turn has come."""
        done, n_steps = trainer.global_step, self._n_steps
        if done * _N_LINES // n_steps == (done - 1) * _N_LINES // n_steps:
            return
        line = f"Training: epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        if done < n_steps:
            seconds = time.perf_counter() - self._started
            left = seconds / (done - self._first) * (n_steps - done)
            line += f", {100 * done // n_steps}%, about {_duration(left)} left"
        say(line)


def _duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds <= 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Keeper(Callback):
    """Keep what a stopped fit needs, at the end of an epoch, from which it goes on bit for bit."""

    def __init__(
        self, folder: Path, state: dict[str, Any], history: dict[str, dict[str, float]]
    ) -> None:
        self._folder, self._state, self._history = folder, state, history
        self._before = state["seconds"]
        self._started = self._kept = time.perf_counter()
        self._is_behind = False

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a stop included."""
        return self._before + time.perf_counter() - self._started

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep what was logged of the epoch that was kept."""
        if self._is_behind:
            self._keep_history(trainer)
            self._is_behind = False

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Keep the state of an epoch that is whole, if the last is some time ago."""
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        is_soon = time.perf_counter() - self._kept < _KEEP_EVERY
        if is_soon or is_last or trainer.should_stop or not trainer.is_global_zero:
            return
        self._keep_state()
        self._keep_history(trainer)
        partial = self._folder / f"{CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        os.replace(partial, self._folder / CHECKPOINT)
        self._kept, self._is_behind = time.perf_counter(), True

    def finish(self) -> None:
        """Note that training is done."""
        self._keep_state()
        (self._folder / CHECKPOINT).unlink(missing_ok=True)

    def _keep_state(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._write(STATE, self._state | {"seconds": self.seconds})

    def _keep_history(self, trainer: Trainer) -> None:
        found = {name: dict(rows) for name, rows in self._history.items()}
        for name, table in getattr(trainer.logger, "history", {}).items():
            rows = table[name].astype(float)
            found.setdefault(name, {}).update({str(epoch): value for epoch, value in rows.items()})
        self._write(HISTORY, found)

    def _write(self, name: str, content: Any) -> None:
        partial = self._folder / f"{name}.partial"
        partial.write_text(json.dumps(content))
        os.replace(partial, self._folder / name)


def _prepend(before: dict[str, dict[str, float]], history: dict[str, pd.DataFrame] | None) -> None:
    """Put the epochs before a stop in front of those after it."""
    for name, table in (history or {}).items():
        rows = {int(epoch): value for epoch, value in before.get(name, {}).items()}
        rows = {epoch: value for epoch, value in rows.items() if epoch < table.index.min()}
        if not rows:
            continue
        first = pd.DataFrame({name: rows}, dtype=object)
        first.index.name = table.index.name
        history[name] = pd.concat([first, table])  # type: ignore[index]


def _digest(model: SAMSVAE | CPAVAE) -> str:
    """Of cells, genes, conditions and the sum of the counts, to know a screen again."""
    adata, manager = model.adata, model.adata_manager
    digest = hashlib.sha256()
    for names in (adata.obs_names, adata.var_names):
        digest.update("\n".join(map(str, names)).encode("utf-8", "surrogatepass"))
    digest.update(np.asarray(registered_conditions(manager).codes, np.int64).tobytes())
    counts = manager.get_from_registry(scvi.REGISTRY_KEYS.X_KEY)
    digest.update(np.float64(counts.sum(dtype=np.float64)).tobytes())
    return digest.hexdigest()


def remove_state(folder: Path) -> None:
    """Remove what was for a resumed fit, once all is finished."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
