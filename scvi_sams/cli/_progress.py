"""Progress of training for a log, where a bar that redraws itself would fill the disk."""

from __future__ import annotations

__all__ = ["EpochLines"]

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from rich.console import Console

_N_LINES = 10


class EpochLines(Callback):
    """Print a line after every tenth of the epochs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Print the epoch, if its turn has come."""
        n_epochs, done = trainer.max_epochs or 0, trainer.current_epoch + 1
        if done * _N_LINES // n_epochs > (done - 1) * _N_LINES // n_epochs:
            self.console.print(f"Training: epoch {done} of {n_epochs}")
