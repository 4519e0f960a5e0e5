"""From the doses of cells to the shifts of their latent states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_sams.module._dose_response import HillDoseResponse
from scvi_sams.module._functional import additive_shift, dosage_entries

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._closed_form_inference import ClosedFormInference
    from scvi_sams.module._direct_effects import DirectEffects, GeneEffects
    from scvi_sams.module._functional import DosageEntries
    from scvi_sams.module._global_draws import GlobalDraws
    from scvi_sams.module._interactions import PairInteractions
    from scvi_sams.module._networks import PotentialEncoder
    from scvi_sams.module._perturbation_effects import PerturbationEffects

__all__ = ["PerturbationShift"]

_RELAXATION_TEMPERATURE = 0.5


class PerturbationShift(nn.Module):
    """Part of a module whose perturbations add up to shifts of the latent state.

    Doses act as they are or through a dose response, pairs may have an effect of their own, and
    single genes direct effects.
    """

    closed_form: ClosedFormInference | None
    effects: PerturbationEffects
    encoder: PotentialEncoder
    interactions: PairInteractions
    dose_response: HillDoseResponse | None
    direct_effects: DirectEffects | None

    @property
    def _samples_shift(self) -> bool:
        """Whether training must draw shifts.

        The divergence of the basal state is quadratic in the shift. Where the state that is
        decoded does not depend on it (residual guide), or its two moments stand in for it (closed
        form), no draw is needed.
        """
        if self.closed_form is not None:
            return False
        return (
            self.encoder.basal_posterior != "residual"
            or self.effects.posterior_family == "correlated"
        )

    # What follows up to the sums over doses has shapes that change from step to step, which
    # torch.compile would compile anew each time.

    @torch.compiler.disable
    def _cell_entries(self, dosage: Tensor) -> tuple[DosageEntries, GeneEffects | None]:
        """Doses of cells as they act, and the direct effects; drawn once in training."""
        entries = dosage_entries(dosage)
        if self.dose_response is not None:
            curves = self.dose_response
            parameters = curves.rsample() if self.training else curves.mean()
            entries = curves.respond(entries, parameters)
        gene_effects = None
        if self.direct_effects is not None:
            direct = self.direct_effects
            gene_effects = direct.of(entries, direct.rsample() if self.training else direct.mean)
        return self.interactions(entries), gene_effects

    @torch.compiler.disable
    def shift_moments(self, entries: DosageEntries) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the shifts of cells, in the frame of the networks.

        Returns
        -------
        Mean and variance of each coordinate, each of shape ``(n_cells, n_latent)``.
        """
        rows, index = entries.perturbation.unique(return_inverse=True)
        mean, variance = self.effects.moments(rows)
        frame = self.effects.frame
        return (
            additive_shift(entries, mean[index]) @ frame,
            additive_shift(entries, variance[index], power=2) @ frame.square(),
        )

    def expected_shift(self, dosage: Tensor) -> Tensor:
        """Expected shifts under conditions, in the frame of the masks.

        Parameters
        ----------
        dosage
            Doses, shape ``(n_conditions, n_perturbations)``.

        Returns
        -------
        Shape ``(n_conditions, n_latent)``.
        """
        entries, _ = self._cell_entries(dosage)
        mean, _ = self.effects.moments(entries.perturbation)
        return additive_shift(entries, mean)

    @torch.compiler.disable
    def _sampled_shift(self, entries: DosageEntries, n_samples: int) -> Tensor:
        """Draws of the shifts, shared by the cells of a perturbation, with gradients."""
        rows, index = entries.perturbation.unique(return_inverse=True)
        effects = self.effects.rsample(rows, _RELAXATION_TEMPERATURE, n_samples)
        shift = additive_shift(entries, effects[:, index]) @ self.effects.frame
        return shift[0] if n_samples == 1 else shift

    def _drawn_entries(
        self, dosage: Tensor, draws: GlobalDraws
    ) -> tuple[DosageEntries, GeneEffects | None]:
        """Doses as they act, and direct effects, under draws of what all cells share."""
        entries = dosage_entries(dosage)
        if draws.hill is not None:
            entries = HillDoseResponse.respond(entries, draws.hill)
        gene_effects = None
        if self.direct_effects is not None and draws.direct is not None:
            gene_effects = self.direct_effects.of(entries, draws.direct)
        return self.interactions(entries), gene_effects
