"""Shares of a library."""

from __future__ import annotations

import pytest
import torch

from scvi_sams.module.likelihood import log_share


def test_without_a_ceiling_is_a_softmax():
    logits = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(log_share(logits).exp(), torch.softmax(logits, -1))


def test_ceiling_adds_a_category_that_is_not_measured():
    logits, ceiling = torch.randn(3, 5, dtype=torch.float64), torch.tensor(0.7)
    with_rest = torch.softmax(torch.cat([logits, torch.zeros(3, 1).double()], -1), -1)
    torch.testing.assert_close(log_share(logits, ceiling).exp(), 0.7 * with_rest[:, :-1])


@pytest.mark.parametrize("size", [-80.0, 80.0])
def test_extreme_logits_stay_finite(size):
    share = log_share(torch.full((1, 4), size), torch.tensor(2.0))
    assert torch.isfinite(share).all()
    assert share.exp().sum() <= 2.0 + 1e-5
