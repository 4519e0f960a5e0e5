"""Ctrl-C while a model trains: stop after the step, and keep what was learned."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, Self

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Interruption(Callback):
    """Take over Ctrl-C during training; the second one is not held up.

    Lightning would leave by ``SystemExit``, with the model untrained and Ctrl-C ignored from then
    on. Who has a handler of their own keeps it, and several processes are left to their launcher.

    Attributes
    ----------
    stopped_in
        The epoch in which training was stopped, in words; ``None`` if it was not.
    """

    def __init__(self) -> None:
        self.stopped_in: str | None = None

    def __enter__(self) -> Self:
        """Remember who has Ctrl-C."""
        self._is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Take over Ctrl-C."""

        def stop(*_: object) -> None:
            self._give_back()
            self.stopped_in = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            trainer.should_stop = True

        if self._is_ours and trainer.world_size == 1:
            signal.signal(signal.SIGINT, stop)
