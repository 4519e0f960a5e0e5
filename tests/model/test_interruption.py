"""Ctrl-C while a model trains."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

from scvi_sams import SAMSVAE

from ._members import tiny_screen
from .conftest import QUIET, SETUP, SIZE


class CtrlC(Callback):
    """Press it at a step of training, some times."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def model():
    adata = tiny_screen()
    SAMSVAE.setup_anndata(adata, **SETUP)
    return SAMSVAE(adata, **SIZE)


def train(model, *callbacks):
    model.train(max_epochs=10, batch_size=64, callbacks=list(callbacks), **QUIET)


@pytest.mark.parametrize(("step", "epoch"), [(33, 7), (40, 8)])  # within an epoch of 5, at its end
def test_what_was_learned_is_kept(model, tmp_path, step, epoch):
    with pytest.warns(UserWarning, match=f"interrupted in epoch {epoch} of 10") as told:
        train(model, CtrlC(step))
    assert "masks were not on" not in str(told[0].message)
    assert model.is_trained
    assert model.trainer.global_step == step
    assert len(model.history["train_loss"]) == epoch
    assert np.isfinite(model.predict(["P001"], n_samples=3).X.toarray()).all()
    assert np.isfinite(model.get_elbo(indices=model.validation_indices))
    model.save(tmp_path / "model")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(model)
    assert model.stopped_in is None


def test_before_the_masks_are_on(model):
    with pytest.warns(UserWarning, match="all effects are zero"):
        train(model, CtrlC(2))
    assert (model.get_perturbation_effect() == 0).all(axis=None)


def test_the_second_is_not_held_up(model):
    with pytest.raises(SystemExit):
        train(model, CtrlC(7, times=2))
    assert not model.is_trained
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Lightning ignores it


def test_another_handler_stays(model):
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("theirs"))
    try:
        train(model, CtrlC(7))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["theirs"]
    assert model.trainer.global_step == 50


def test_in_a_thread(model):
    """Where no handler may be set."""
    thread = threading.Thread(target=train, args=(model,))
    thread.start()
    thread.join()
    assert model.is_trained
