"""Guards: what is taken for divergence, what it goes back to, and clipping by hand."""

from __future__ import annotations

import math

import pytest
import torch

from scvi_sams.train.guard import AdaptiveClipping, DivergenceGuard


@pytest.fixture
def guard() -> DivergenceGuard:
    """A guard that has seen 200 losses around 300."""
    guard = DivergenceGuard()
    for noise in torch.randn(200).tolist():
        assert not guard.is_divergent(300 + 5 * noise)
    return guard


class TestJudgement:
    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
    def test_not_finite_is_divergent_from_the_first_step(self, loss):
        assert DivergenceGuard().is_divergent(loss)

    def test_far_above_the_mean_is_divergent(self, guard):
        assert guard.mean == pytest.approx(300, rel=0.02)
        assert guard.is_divergent(1_000.0)

    def test_a_bad_minibatch_is_not(self, guard):
        assert not guard.is_divergent(330.0)
        assert not guard.is_divergent(420.0)

    def test_far_below_is_progress(self, guard):
        assert not guard.is_divergent(10.0)

    def test_the_first_steps_may_jump(self):
        guard = DivergenceGuard()
        assert not any(guard.is_divergent(loss) for loss in (300.0, 9_000.0, 40.0))

    def test_a_slow_rise_is_followed(self):
        guard = DivergenceGuard()
        assert not any(guard.is_divergent(300 + step) for step in range(1_000))

    def test_divergent_losses_leave_the_mean_alone(self, guard):
        before = guard.state_dict()
        for loss in (math.nan, 1e9):
            assert guard.is_divergent(loss)
        assert guard.state_dict() == before

    def test_negative_losses(self):
        guard = DivergenceGuard()
        for noise in torch.randn(100).tolist():
            guard.is_divergent(-300 + noise)
        assert not guard.is_divergent(-280.0)
        assert guard.is_divergent(300.0)


def make_step(module, optimizer):
    optimizer.zero_grad()
    module(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


class TestSnapshot:
    @pytest.fixture
    def module(self) -> torch.nn.Module:
        return torch.nn.Linear(3, 2)

    @pytest.fixture
    def optimizer(self, module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=0.1)

    def test_restores_parameters_and_optimizer_but_not_the_learning_rate(self, module, optimizer):
        guard = DivergenceGuard()
        make_step(module, optimizer)
        guard.keep(module, optimizer)
        weight = module.weight.detach().clone()
        average = optimizer.state[module.weight]["exp_avg"].clone()
        make_step(module, optimizer)
        optimizer.param_groups[0]["lr"] = 0.05
        with torch.no_grad():
            module.weight.fill_(math.nan)
        guard.restore(module, optimizer)
        assert torch.equal(module.weight, weight)
        assert torch.equal(optimizer.state[module.weight]["exp_avg"], average)
        assert optimizer.param_groups[0]["lr"] == 0.05

    def test_can_be_restored_more_than_once(self, module, optimizer):
        guard = DivergenceGuard()
        guard.keep(module, optimizer)
        weight = module.weight.detach().clone()
        for _ in range(2):
            make_step(module, optimizer)
            assert not torch.equal(module.weight, weight)
            guard.restore(module, optimizer)
            assert torch.equal(module.weight, weight)
            assert not optimizer.state

    def test_is_renewed_when_due(self, module, optimizer):
        guard = DivergenceGuard(snapshot_every=3)
        weights = []
        for _ in range(5):
            guard.is_divergent(1.0)
            make_step(module, optimizer)
            weights.append(module.weight.detach().clone())
            guard.keep(module, optimizer)
        guard.restore(module, optimizer)
        assert torch.equal(module.weight, weights[2])

    def test_is_renewed_when_due_if_several_steps_are_judged_at_once(self, module, optimizer):
        guard = DivergenceGuard(snapshot_every=100)
        kept = []
        guard.keep(module, optimizer)
        for step in range(1, 301):
            guard.is_divergent(1.0)
            if step % 30 == 0 or step == 105:
                make_step(module, optimizer)
                guard.keep(module, optimizer)
                weight = module.weight.detach().clone()
                guard.restore(module, optimizer)
                if torch.equal(module.weight, weight):
                    kept.append(step)
                module.weight.data.copy_(weight)
        assert kept == [105, 210, 300]

    def test_nothing_to_restore(self, module, optimizer):
        with pytest.raises(RuntimeError, match="No snapshot"):
            DivergenceGuard().restore(module, optimizer)


def test_state_goes_through_a_checkpoint(guard):
    other = DivergenceGuard()
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    assert other.is_divergent(1_000.0)


def clipped(clipping: AdaptiveClipping, *gradients: list[float]) -> list[torch.Tensor]:
    parameters = [torch.zeros(len(gradient), requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    clipping(parameters)
    return [parameter.grad for parameter in parameters]


class TestClipping:
    def test_first_norm_is_the_mean(self):
        clipping = AdaptiveClipping(2.0)
        first, second = clipped(clipping, [3.0, 0.0], [4.0])
        assert clipping.mean_norm == 5
        assert first.tolist() == [3, 0]
        assert second.tolist() == [4]

    def test_a_spike_is_cut_and_enters_the_mean_as_cut(self):
        clipping = AdaptiveClipping(2.0)
        clipped(clipping, [5.0])
        first, second = clipped(clipping, [60.0], [80.0])
        torch.testing.assert_close(first, torch.tensor([6.0]))
        torch.testing.assert_close(second, torch.tensor([8.0]))
        assert clipping.mean_norm == pytest.approx(5 + 0.02 * (10 - 5))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_gradients_that_are_not_finite_become_zero(self, bad):
        clipping = AdaptiveClipping(2.0)
        clipped(clipping, [5.0])
        assert [gradient.tolist() for gradient in clipped(clipping, [bad], [1.0])] == [[0], [0]]
        assert clipping.mean_norm == 5

    def test_a_first_gradient_that_is_not_finite_says_nothing_of_the_norm(self):
        clipping = AdaptiveClipping(2.0)
        first, second = clipped(clipping, [math.nan, 2.0], [1.0])
        assert [*first.tolist(), *second.tolist()] == [0, 0, 0]
        clipped(clipping, [5.0])
        assert clipping.mean_norm == 5

    def test_cuts_as_torch_does(self):
        clipping = AdaptiveClipping(1.5)
        mean = None
        for _ in range(20):
            gradients = [torch.randn(7).mul(3).tolist(), torch.randn(4).exp().tolist()]
            norm = torch.cat([torch.tensor(g) for g in gradients]).norm().item()
            mean = norm if mean is None else mean
            expected = [torch.zeros(len(g), requires_grad=True) for g in gradients]
            for parameter, gradient in zip(expected, gradients, strict=True):
                parameter.grad = torch.tensor(gradient)
            torch.nn.utils.clip_grad_norm_(expected, 1.5 * mean)
            for ours, parameter in zip(clipped(clipping, *gradients), expected, strict=True):
                torch.testing.assert_close(ours, parameter.grad)
            mean += 0.02 * (min(norm, 1.5 * mean) - mean)
            assert float(clipping.mean_norm) == pytest.approx(mean, rel=1e-6)

    def test_mean_goes_through_a_checkpoint(self):
        clipping, other = AdaptiveClipping(2.0), AdaptiveClipping(2.0)
        clipped(clipping, [5.0])
        other.mean_norm = float(clipping.mean_norm)
        assert torch.equal(clipped(clipping, [80.0])[0], clipped(other, [80.0])[0])
