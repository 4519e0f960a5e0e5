"""A fit that was stopped goes on where it was, and only as the same fit of the same screen."""

from __future__ import annotations

import json
import signal

import anndata as ad
import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback

import scvi_sams

pytestmark = pytest.mark.slow

LABELS = ("--perturbation-key", "perturbation", "--control", "control")
SIZE = ("--n-latent", 4, "--max-epochs", 6, "--threads", 1, "--accelerator", "cpu")


class Terminate(Callback):
    """Send SIGTERM within an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def fit(run, screen_path, tmp_path):
    def fit(*words, screen=screen_path, out="out"):
        return run("fit", screen, *LABELS, *SIZE, *words, "-o", tmp_path / out)

    return fit


@pytest.fixture
def stop(fit, monkeypatch, tmp_path):
    """Fit until the fifth epoch, keeping the state of each; give the folder that is left."""

    def stop(*words):
        real = scvi_sams.SAMSVAE.train

        def train(model, *, callbacks, **arguments):
            real(model, callbacks=[*callbacks, Terminate(4)], **arguments)

        with monkeypatch.context() as patch:
            patch.setattr("scvi_sams.cli._training._KEEP_EVERY", 0.0)
            patch.setattr(scvi_sams.SAMSVAE, "train", train)
            done = fit(*words)
        assert done.code == 143
        assert done.error.endswith("the same command with --resume goes on from there")
        (left,) = tmp_path.iterdir()
        return left

    return stop


def test_the_result_is_that_of_the_unbroken_fit(fit, stop, tmp_path):
    stop()
    done = fit("--resume")
    assert done.code == 0, done.err
    assert "epoch 1 of 6" not in done.err
    assert "Training: epoch 6 of 6" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "resume").exists()
    assert fit(out="unbroken").code == 0
    folders = tmp_path / "out", tmp_path / "unbroken"
    for name in ("masks.csv", "effects.csv"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
    np.testing.assert_array_equal(*(ad.read_h5ad(f / "ate.h5ad").X for f in folders))
    histories = [scvi_sams.SAMSVAE.load(f / "model", adata=False).history for f in folders]
    for name in ("train_loss", "elbo_validation"):
        resumed, unbroken = (history[name] for history in histories)
        assert list(resumed.index) == list(unbroken.index)
        np.testing.assert_array_equal(resumed.to_numpy(float), unbroken.to_numpy(float))


def test_what_was_trained_is_not_trained_again(fit, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no such disk")

    with monkeypatch.context() as patch:
        patch.setattr(scvi_sams.SAMSVAE, "get_average_treatment_effect", fail)
        assert fit().code == 1
    with monkeypatch.context() as patch:
        patch.setattr(scvi_sams.SAMSVAE, "train", fail)
        done = fit("--resume", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["training_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_fit_is_refused_at_once(fit, stop):
    left = stop()
    done = fit("--resume", "--n-latent", 5)
    assert done.code == 1
    assert f"the fit that was stopped in {left} had --n-latent 4, and now it is 5" in done.error
    assert done.err.count("\n") == 1
    assert left.is_dir()


def test_damage_is_named(fit, stop):
    left = stop()
    for name, content in (
        ("last.ckpt", b"none"),
        ("last.ckpt", None),
        ("history.json", b"[1]"),
        ("fit.json", b"{}"),
    ):
        path = left / "resume" / name
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        done = fit("--resume")
        path.write_bytes(whole)
        assert done.code == 1
        assert f"--resume: {path} is damaged" in done.error
        assert "leave out --resume to begin anew" in done.error


def test_another_screen_is_refused(fit, stop, screen_path, tmp_path):
    left = stop()
    screen = ad.read_h5ad(screen_path)
    screen.X.data[0] += 1
    changed = screen_path.read_bytes()
    try:
        screen.write_h5ad(screen_path)
        done = fit("--resume")
    finally:
        screen_path.write_bytes(changed)
    assert done.code == 1
    assert f"{screen_path} is not the screen of the fit that was stopped" in done.error
    assert (left / "resume" / "last.ckpt").is_file() or list(tmp_path.glob("*/resume/last.ckpt"))


def test_without_a_stopped_fit_it_begins_anew(fit, tmp_path):
    done = fit("--resume")
    assert done.code == 0, done.err
    assert "There is no stopped fit to go on from: begins anew" in done.err
    assert "was stopped" not in done.err
    assert "left" in done.err  # an estimate
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
