"""Means of an epoch against sums by hand."""

from __future__ import annotations

import pytest
import torch
from scvi.module.base import LossOutput

from scvi_sams.train.trainingplan import EpochMeans


def output(loss: float, reconstruction: list[float], kl_local: list[float]) -> LossOutput:
    return LossOutput(
        loss=torch.tensor(loss),
        reconstruction_loss=torch.tensor(reconstruction),
        kl_local=torch.tensor(kl_local),
        kl_global=torch.tensor(20.0),
    )


def test_cells_weigh_alike_and_global_terms_are_spread():
    means = EpochMeans()
    means.offer(output(4.0, [1.0, 2.0, 6.0], [0.0, 1.0, 2.0]))
    means.accept()
    means.offer(output(8.0, [7.0], [5.0]))
    means.accept()
    found = means.read(n_training_cells=10)
    assert {name: float(value) for name, value in found.items()} == {
        "train_loss": 5.0,
        "reconstruction_loss_train": 4.0,
        "kl_local_train": 2.0,
        "kl_global_train": 20.0,
        "elbo_train": 4.0 + 2.0 + 20.0 / 10,
    }
    assert means.read(10) == {}


def test_a_step_that_is_not_accepted_does_not_count():
    means = EpochMeans()
    means.offer(output(float("nan"), [float("nan")], [0.0]))
    means.offer(output(3.0, [1.0], [2.0]))
    means.accept()
    assert means.read(10)["train_loss"] == pytest.approx(3.0)
