"""Guards of training: divergence noticed and undone, gradients clipped to what they were."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_MEMORY = 0.98


class AdaptiveClipping:
    """Clip gradients to a multiple, ``factor``, of the running mean of their norm."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.mean_norm: Tensor | float = math.nan

    def __call__(self, parameters: Sequence[Tensor]) -> None:
        """Clip in place; gradients that are not finite become zero. No number is asked for."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_finite, value = torch.isfinite(norm), norm.double()
        mean = torch.as_tensor(self.mean_norm, dtype=value.dtype, device=value.device)
        mean = torch.where(mean.isnan(), value, mean)
        limit = self.factor * mean
        # As torch.nn.utils.clip_grads_with_norm_, which takes the limit for a number of Python.
        share = (limit.to(norm.dtype) / (norm + 1e-6)).clamp(max=1.0)
        share = torch.where(is_finite, share, 0.0)
        for gradient in gradients:
            gradient.mul_(share).nan_to_num_(0.0, 0.0, 0.0)  # zero times infinity
        mean = mean + (1 - _MEMORY) * (torch.minimum(value, limit) - mean)
        self.mean_norm = torch.where(is_finite, mean, self.mean_norm)


_MIN_HISTORY = 50  # steps before a running mean means something


class DivergenceGuard:
    """Notices a loss far above its running mean, and keeps a snapshot to go back to.

    Parameters
    ----------
    tolerance
        A loss is called divergent if it lies above its running mean by more than this many
        running mean absolute deviations and by more than half of the mean's absolute value.
    snapshot_every
        Healthy steps between snapshots.
    """

    def __init__(self, tolerance: float = 30.0, snapshot_every: int = 100) -> None:
        self.tolerance = tolerance
        self.snapshot_every = snapshot_every
        self.mean = math.nan
        self.deviation = 0.0
        self.n_healthy = self._n_due = 0
        self._snapshot: tuple[dict[str, Any], dict[str, Any]] | None = None

    def is_divergent(self, loss: float) -> bool:
        """Judge the loss of a step; a healthy one enters the running mean."""
        if not math.isfinite(loss):
            return True
        excess = loss - self.mean
        is_far = excess > self.tolerance * self.deviation and excess > 0.5 * abs(self.mean)
        if self.n_healthy >= _MIN_HISTORY and is_far:
            return True
        if self.n_healthy == 0:
            self.mean = loss
        self.deviation = _MEMORY * self.deviation + (1 - _MEMORY) * abs(loss - self.mean)
        self.mean = _MEMORY * self.mean + (1 - _MEMORY) * loss
        self.n_healthy += 1
        return False

    def keep(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a snapshot if one is due."""
        n_due = self.n_healthy // self.snapshot_every  # by now; several steps are judged at once
        if self._snapshot is None or n_due > self._n_due:
            self._n_due = n_due
            state = {key: value.clone() for key, value in module.state_dict().items()}
            self._snapshot = state, copy.deepcopy(optimizer.state_dict())

    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go back to the last snapshot; the learning rates of the optimizer stay."""
        if self._snapshot is None:
            raise RuntimeError("No snapshot was kept before training diverged.")
        state, optimizer_state = self._snapshot
        module.load_state_dict(state)
        learning_rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate

    def state_dict(self) -> dict[str, float]:
        """Running statistics, for a checkpoint."""
        return {"mean": self.mean, "deviation": self.deviation, "n_healthy": self.n_healthy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.mean, self.deviation = state["mean"], state["deviation"]
        self.n_healthy = int(state["n_healthy"])


def describe_divergence(loss: float, terms: Mapping[str, Tensor]) -> str:
    """Say which terms of a loss are not finite, or how large it is.

    Examples
    --------
    >>> describe_divergence(math.nan, {"reconstruction loss": torch.tensor(math.nan)})
    'reconstruction loss is not finite'
    """
    culprits = [name for name, term in terms.items() if not torch.isfinite(term).all()]
    return f"{' and '.join(culprits)} is not finite" if culprits else f"the loss is {loss:.4g}"
