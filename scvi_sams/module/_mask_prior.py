"""The prior probability that a mask is one: given, or learned under a Beta hyper-prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn
from torch.distributions import Beta, kl_divergence

from scvi_sams.module._functional import kl_bernoulli_log_prior

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MaskPrior", "MaskPriorSharing"]

MaskPriorSharing: TypeAlias = Literal["all", "latent", "perturbation"]
"""Which masks share one learned prior probability."""


class MaskPrior(nn.Module):
    r"""Prior of the masks.

    Fixed, :math:`m_{tl} \sim \mathrm{Bernoulli}(\pi)` (Bereket and Karaletsos 2023), or with
    :math:`\pi_k \sim \mathrm{Beta}(a, b)` for each group k of masks. The optimal posterior of
    :math:`\pi_k` given those of the masks is conjugate,
    :math:`\mathrm{Beta}(a + \sum q(m{=}1), b + \sum q(m{=}0))`, so that no gradient is needed.
    One probability for each perturbation with a = 1 and b the number of latents is the prior of
    SVAE+ (Lopez et al., CLeaR 2023).

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of the masks.
    probability
        The fixed probability, or the pair ``(a, b)`` of the Beta hyper-prior.
    shared_by
        Masks that share a learned probability: ``"all"``, those of a ``"latent"`` or those of a
        ``"perturbation"``.

    Examples
    --------
    >>> prior = MaskPrior(2, 3, (1.0, 3.0), shared_by="perturbation")
    >>> prior.update(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    >>> prior.mean()
    tensor([[0.5714],
            [0.1429]])
    """

    posterior_a: Tensor
    posterior_b: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        probability: float | tuple[float, float] = 0.02,
        shared_by: MaskPriorSharing = "all",
    ) -> None:
        super().__init__()
        if isinstance(probability, tuple | list):
            a, b = (float(value) for value in probability)
            if not (a > 0 and b > 0):
                raise ValueError(f"mask_prior={probability!r}: a Beta prior needs two positives.")
            self.fixed: float | None = None
        else:
            if not 0 < probability <= 1:
                raise ValueError(
                    f"mask_prior={probability!r} must be above 0 and at most 1 (no sparsity), or "
                    "the pair (a, b) of a Beta hyper-prior."
                )
            self.fixed = float(probability)
            a = b = 1.0
        shapes = {
            "all": (1, 1),
            "latent": (1, n_latent),
            "perturbation": (n_perturbations, 1),
        }
        if shared_by not in shapes:
            raise ValueError(
                f"mask_prior_shared_by={shared_by!r} is unknown; use {', '.join(shapes)}."
            )
        self.a, self.b = a, b
        self.shared_by = shared_by
        self.n_shared = n_perturbations * n_latent // torch.Size(shapes[shared_by]).numel()
        shape = shapes[shared_by] if self.fixed is None else (1, 1)
        self.register_buffer("posterior_a", torch.full(shape, a))
        self.register_buffer("posterior_b", torch.full(shape, b))

    @property
    def sparse(self) -> bool:
        """Whether masks may be zero."""
        return self.fixed != 1.0

    def mean(self) -> Tensor:
        """Prior probability that a mask is one, or its posterior mean.

        Returns
        -------
        Shape ``(1, 1)``, ``(1, n_latent)`` or ``(n_perturbations, 1)``.
        """
        if self.fixed is not None:
            return torch.full_like(self.posterior_a, self.fixed)
        return self.posterior_a / (self.posterior_a + self.posterior_b)

    def log_probabilities(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expected logarithms of the probabilities of one and of zero.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``; all by default.

        Returns
        -------
        Two tensors that broadcast to the masks of the rows.
        """
        if self.fixed is not None:
            on = torch.full_like(self.posterior_a, self.fixed).log()
            return on, torch.full_like(self.posterior_a, 1 - self.fixed).log()
        a, b = self.posterior_a, self.posterior_b
        if rows is not None and self.shared_by == "perturbation":
            a, b = a[rows], b[rows]
        both = torch.digamma(a + b)
        return torch.digamma(a) - both, torch.digamma(b) - both

    def logit(self) -> Tensor:
        """Expected log-odds of a mask, broadcasts to ``(n_perturbations, n_latent)``."""
        on, off = self.log_probabilities()
        return on - off

    @torch.no_grad()
    def update(self, mask_probability: Tensor) -> None:
        """Take in the posterior of all masks, shape ``(n_perturbations, n_latent)``."""
        if self.fixed is not None:
            return
        axes = {"all": (0, 1), "latent": (0,), "perturbation": (1,)}[self.shared_by]
        on = mask_probability.sum(axes, keepdim=True)
        self.posterior_a.copy_(self.a + on)
        self.posterior_b.copy_(self.b + self.n_shared - on)

    def kl_masks(self, mask_logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Divergence of mask posteriors from the prior, expected over the probability.

        Parameters
        ----------
        mask_logits
            Log-odds, shape ``(n_rows, n_latent)``.
        rows
            Perturbations, shape ``(n_rows,)``; all by default.

        Returns
        -------
        Nats, shape ``(n_rows, n_latent)``; zero without sparsity.
        """
        if not self.sparse:
            return torch.zeros_like(mask_logits)
        return kl_bernoulli_log_prior(mask_logits, *self.log_probabilities(rows))

    def kl_probability(self) -> Tensor:
        """Divergence of the learned probabilities from their hyper-prior, a scalar in nats."""
        if self.fixed is not None:
            return self.posterior_a.new_zeros(())
        prior = Beta(torch.full_like(self.posterior_a, self.a), self.b)
        return kl_divergence(Beta(self.posterior_a, self.posterior_b), prior).sum()
