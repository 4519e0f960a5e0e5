"""Ctrl-C and SIGTERM: one line, a status of their own, and what was learned is kept."""

from __future__ import annotations

import signal

import pytest
from lightning.pytorch.callbacks import Callback

import scvi_sams

LABELS = ("--perturbation-key", "perturbation", "--control", "control", "--n-latent", 4)


class Raise(Callback):
    """Send signals to this process at the end of the second epoch."""

    def __init__(self, *signals):
        self.signals = signals

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            for each in self.signals:
                signal.raise_signal(each)


@pytest.fixture
def fit_with(run, screen_path, tmp_path, monkeypatch):
    """Fit for five epochs, in the second of which signals come."""

    def fit_with(*signals):
        train = scvi_sams.SAMSVAE.train

        def train_until(model, *, callbacks, **arguments):
            train(model, callbacks=[*callbacks, Raise(*signals)], **arguments)

        monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train_until)
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        done = run("fit", screen_path, *LABELS, "--max-epochs", 5, "-o", tmp_path / "out")
        assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        return done

    return fit_with


def test_an_interruption_keeps_what_was_learned(run, fit_with, tmp_path):
    done = fit_with(signal.SIGINT)
    (kept,) = tmp_path.iterdir()
    assert done.code == 130
    assert done.out == ""
    assert done.error == (
        f"scvi-sams: error: interrupted in epoch 2 of 5; what was finished is in {kept}"
    )
    model = scvi_sams.SAMSVAE.load(str(kept / "model"), adata=False)
    assert len(model.history["elbo_train"]) == 2
    words = ("--conditions", "P001", "--n-samples", 2, "-o", tmp_path / "cells.h5ad")
    assert run("predict", kept, *words).code == 0


def test_a_second_interruption_is_not_held_up(fit_with, tmp_path):
    done = fit_with(signal.SIGINT, signal.SIGINT)
    assert (done.code, done.error) == (130, "scvi-sams: error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_termination_is_one_line(fit_with, tmp_path):
    done = fit_with(signal.SIGTERM)
    assert (done.code, done.error) == (143, "scvi-sams: error: terminated")
    assert "xception" not in done.err
    assert list(tmp_path.iterdir()) == []


# SystemExit is what Lightning makes of an interruption, whatever its status.
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), SystemExit(0)])
def test_no_status_is_0_without_a_result(run, screen_path, tmp_path, monkeypatch, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", stop)
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert (done.code, done.error) == (130, "scvi-sams: error: interrupted")
    assert list(tmp_path.iterdir()) == []
