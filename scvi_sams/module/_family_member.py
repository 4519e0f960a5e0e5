"""What each module of the family says of its own: how perturbations enter."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from scvi.module.base import BaseModuleClass

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scvi_sams.module._global_draws import GlobalDraws
    from scvi_sams.module._observation import Observation
    from scvi_sams.module._population import CellPopulation

__all__ = ["FamilyMember"]


class FamilyMember(BaseModuleClass):
    """Interface of a member of the family: what all cells share, and how it moves a cell.

    Training plan and read-outs use a module through these methods and those of scvi-tools.
    """

    @property
    @abstractmethod
    def n_global_elements(self) -> int:
        """Numbers in one draw of what all cells share."""

    @abstractmethod
    def sample_globals(self, n_samples: int, perturbations: Tensor | None = None) -> GlobalDraws:
        """Draw what all cells share from its posterior.

        Parameters
        ----------
        n_samples
            Number of draws.
        perturbations
            Those that will be asked for, sorted, shape ``(n,)``; all by default.
        """

    @abstractmethod
    def decode_condition(
        self,
        population: CellPopulation,
        dosage: Tensor,
        draws: GlobalDraws,
        one_draw_a_cell: bool = False,
    ) -> Observation:
        """Distribution of the genes of a population of cells under a condition.

        Parameters
        ----------
        population
            Basal states and covariates of cells.
        dosage
            Doses of the condition, shape ``(1, n_perturbations)``.
        draws
            Draws of what all cells share.
        one_draw_a_cell
            Give the k-th draw to the k-th cell only.

        Returns
        -------
        Of shape ``(n_samples, n_cells, n_genes)``, or ``(n_cells, n_genes)`` with one draw a
        cell.
        """

    @abstractmethod
    def sample_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Draw the basal states of cells from their posterior, shape ``(n_cells, n_latent)``."""

    @abstractmethod
    def log_importance_weights(self, tensors: dict[str, Tensor], draws: GlobalDraws) -> Tensor:
        """Importance weights of cells, shape ``(n_particles, n_cells)``."""

    @abstractmethod
    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the latent state of cells from its prior, shape ``(n_cells,)``."""

    def global_divergences(self, of_effects: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Divergences of what all cells share from its prior, scalars in nats by name.

        Parameters
        ----------
        of_effects
            Those of masks and embeddings, where they are known.
        """
        return {}

    def global_parameters(self) -> list[nn.Parameter]:
        """Parameters of the posterior of what all cells share that are learned by gradient."""
        return []

    def zero_frozen_gradients(self) -> None:
        """Keep training from moving perturbations that are frozen."""

    def observe(self, inference_outputs: dict[str, Any]) -> None:
        """Take in a minibatch for inference without gradients, where a member has it."""
