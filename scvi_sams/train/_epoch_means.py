"""Means over the cells of an epoch, summed while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scvi.module.base import LossOutput
    from torch import Tensor

__all__ = ["EpochMeans"]


class EpochMeans:
    """What scvi-tools logs at every step, summed and read once an epoch.

    The logging would cost as much as a step of these small networks. A step counts only once it
    is accepted, so that one that diverged can be left out.
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._n_cells_of_step = 0
        self._sums: dict[str, Tensor | float] = {}
        self._n_cells = 0

    def offer(self, output: LossOutput) -> None:
        """Note what a step found; it takes the place of one that was not accepted."""
        n_cells = output.n_obs_minibatch
        self._step = {
            "train_loss": output.loss.detach() * n_cells,
            "reconstruction_loss_train": output.reconstruction_loss_sum.detach(),
            "kl_local_train": output.kl_local_sum.detach(),
            "kl_global_train": output.kl_global_sum.detach() * n_cells,
        }
        self._n_cells_of_step = n_cells

    def accept(self) -> None:
        """Let the last step count."""
        for name, value in self._step.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._n_cells += self._n_cells_of_step

    def read(self, n_training_cells: int) -> dict[str, Tensor | float]:
        """Means by scvi-tools' names, and begin the next epoch; empty without a step.

        Parameters
        ----------
        n_training_cells
            Training cells, over which the global terms of the bound are spread.
        """
        if not self._n_cells:
            return {}
        means = {name: total / self._n_cells for name, total in self._sums.items()}
        means["elbo_train"] = (
            means["reconstruction_loss_train"]
            + means["kl_local_train"]
            + means["kl_global_train"] / n_training_cells
        )
        self._sums, self._n_cells = {}, 0
        return means
