"""How the shift of a perturbation grows with its dose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module._functional import DosageEntries

__all__ = ["HillDoseResponse", "HillDraws"]

_LOG_EC50_SCALE = 1.5  # prior: a factor of 4.5 either way of the median dose
_LOG_SLOPE_SCALE = 0.5


class HillDraws(NamedTuple):
    """Draws of the parameters of all curves, each of shape ``([n_samples,] n_perturbations)``."""

    log_ec50: Tensor
    log_slope: Tensor


class HillDoseResponse(nn.Module):
    r"""Monotone saturating response :math:`g_t(d) = d^{h_t} / (d^{h_t} + \mathrm{EC50}_t^{h_t})`.

    It takes the place of the dose: the shift is :math:`g_t(d) \, (m_t \odot e_t)`, so that the
    effect is the one of a saturating dose. Priors are log-normal, of EC50 about the median dose
    of the perturbation, of the slope about one; posteriors are normal in the logarithms, learned
    by gradient.

    Parameters
    ----------
    n_perturbations
        Number of perturbations.

    Attributes
    ----------
    log_reference_dose
        Logarithm of the median positive dose of each perturbation, shape ``(n_perturbations,)``.
    """

    log_reference_dose: Tensor

    def __init__(self, n_perturbations: int) -> None:
        super().__init__()
        self.register_buffer("log_reference_dose", torch.zeros(n_perturbations))
        initial = math.log(0.2**2)
        # Relative to the prior mean.
        self.log_ec50_offset = nn.Parameter(torch.zeros(n_perturbations))
        self.log_ec50_log_variance = nn.Parameter(torch.full((n_perturbations,), initial))
        self.log_slope_mean = nn.Parameter(torch.zeros(n_perturbations))
        self.log_slope_log_variance = nn.Parameter(torch.full((n_perturbations,), initial))

    def mean(self) -> HillDraws:
        """Posterior means of the logarithms."""
        return HillDraws(self.log_reference_dose + self.log_ec50_offset, self.log_slope_mean)

    def std(self) -> HillDraws:
        """Posterior standard deviations of the logarithms."""
        return HillDraws(
            (0.5 * self.log_ec50_log_variance).exp(), (0.5 * self.log_slope_log_variance).exp()
        )

    def rsample(self, n_samples: int | None = None) -> HillDraws:
        """Draw parameters, with gradients; without an axis of draws by default."""
        draws = []
        for mean, std in zip(self.mean(), self.std(), strict=True):
            shape = mean.shape if n_samples is None else (n_samples, *mean.shape)
            draws.append(mean + std * torch.randn(shape, dtype=mean.dtype, device=mean.device))
        return HillDraws(*draws)

    @staticmethod
    def respond(entries: DosageEntries, parameters: HillDraws) -> DosageEntries:
        """Replace doses by responses between zero and one.

        Returns
        -------
        Entries with responses of shape ``([n_samples,] n_entries)``.
        """
        rows = entries.perturbation
        slope = parameters.log_slope[..., rows].exp()
        excess = entries.dose.to(slope.dtype).log() - parameters.log_ec50[..., rows]
        return entries._replace(dose=torch.sigmoid(slope * excess))

    def kl_divergence(self) -> Tensor:
        """Divergence of the posterior of all curves from the prior, a scalar in nats."""
        total = self.log_ec50_offset.new_zeros(())
        for mean, log_variance, scale in (
            (self.log_ec50_offset, self.log_ec50_log_variance, _LOG_EC50_SCALE),
            (self.log_slope_mean, self.log_slope_log_variance, _LOG_SLOPE_SCALE),
        ):
            ratio = log_variance.exp() / scale**2
            total = total + 0.5 * (ratio + (mean / scale).square() - 1 - ratio.log()).sum()
        return total
