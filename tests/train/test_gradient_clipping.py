"""Adaptive clipping against norms by hand."""

from __future__ import annotations

import math

import pytest
import torch

from scvi_sams.train.guard import AdaptiveClipping


def clipped(clipping: AdaptiveClipping, *gradients: list[float]) -> list[torch.Tensor]:
    parameters = [torch.zeros(len(gradient), requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    clipping(parameters)
    return [parameter.grad for parameter in parameters]


def test_first_norm_is_the_mean():
    clipping = AdaptiveClipping(2.0)
    first, second = clipped(clipping, [3.0, 0.0], [4.0])
    assert clipping.mean_norm == 5
    assert first.tolist() == [3, 0]
    assert second.tolist() == [4]


def test_a_spike_is_cut_and_enters_the_mean_as_cut():
    clipping = AdaptiveClipping(2.0)
    clipped(clipping, [5.0])
    first, second = clipped(clipping, [60.0], [80.0])
    torch.testing.assert_close(first, torch.tensor([6.0]))
    torch.testing.assert_close(second, torch.tensor([8.0]))
    assert clipping.mean_norm == pytest.approx(5 + 0.02 * (10 - 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_dropped(bad):
    clipping = AdaptiveClipping(2.0)
    clipped(clipping, [5.0])
    assert clipped(clipping, [bad], [1.0]) == [None, None]
    assert clipping.mean_norm == 5
