"""The global latents: masks and effects of the perturbations, and the frame they are sparse in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from scvi_sams.module._closed_form import SpikeSlab
from scvi_sams.module._functional import kl_bernoulli, kl_centred_normal, relaxed_bernoulli

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PerturbationEffects"]


class PerturbationEffects(nn.Module):
    r"""Spike-and-slab posterior of the masks and embeddings of all perturbations.

    The effect of perturbation t on latent l is :math:`m_{tl} e_{tl} + r_{tl}` with

    .. math:: m_{tl} \sim \mathrm{Bernoulli}(\pi), \quad e_{tl} \sim \mathrm{Normal}(0, \beta^2),
       \quad r_{tl} \sim \mathrm{Normal}(0, \tau^2).

    With ``spike_scale = 0`` the background r vanishes and the effect is the one of Bereket and
    Karaletsos (2023). A learned background takes up what is too small or too widespread to be a
    mechanism, so that predictions keep it and masks stay clean.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of masks and effects.
    mask_prior
        Prior probability that a mask is one.
    embedding_scale
        Prior standard deviation of an embedding.
    spike_scale
        Standard deviation of the background, or ``"learned"``.
    trainable
        Whether the posterior is learned by gradient. Otherwise it is set by :meth:`assign`.

    Attributes
    ----------
    frame
        Orthogonal matrix, shape ``(n_latent, n_latent)``. The state of a cell is ``z`` in the
        frame of the masks and ``z @ frame`` in that of encoder and decoder. As the basal prior is
        rotation invariant, this is an exact reparametrisation of the decoder's first layer; it
        frees the sparse axes from those in which the basal posterior is diagonal.
    selection_penalty
        Log-odds that reported masks are charged, see
        :func:`~scvi_sams.module._closed_form.selection_penalty`.
    masks_on
        Whether perturbations move cells yet: not during the warm-up.
    """

    spike_mean: Tensor
    spike_posterior_variance: Tensor
    spike_variance: Tensor
    selection_penalty: Tensor
    frame: Tensor
    masks_on: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        *,
        mask_prior: float = 0.02,
        embedding_scale: float = 1.0,
        spike_scale: float | Literal["learned"] = "learned",
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.mask_prior_logit = math.log(mask_prior / (1 - mask_prior))
        self.embedding_variance = embedding_scale**2
        self.learn_spike_scale = spike_scale == "learned"
        shape = (n_perturbations, n_latent)
        self.mask_logits = nn.Parameter(torch.zeros(shape), requires_grad=trainable)
        self.slab_mean = nn.Parameter(torch.zeros(shape), requires_grad=trainable)
        self.slab_log_variance = nn.Parameter(
            torch.full(shape, math.log(1e-2)), requires_grad=trainable
        )
        self.register_buffer("spike_mean", torch.zeros(shape))
        self.register_buffer("spike_posterior_variance", torch.zeros(shape))
        initial = 0.1 if spike_scale == "learned" else float(spike_scale)
        self.register_buffer("spike_variance", torch.tensor(initial**2))
        self.register_buffer("selection_penalty", torch.zeros(shape))
        self.register_buffer("frame", torch.eye(n_latent))
        self.register_buffer("masks_on", torch.tensor(False))

    @property
    def posterior(self) -> SpikeSlab:
        """The posterior, each field of shape ``(n_perturbations, n_latent)``."""
        return self._rows(None)

    def _rows(self, rows: Tensor | None) -> SpikeSlab:
        """The posterior of some perturbations, at a cost that does not grow with the others."""
        fields: tuple[Tensor, ...] = (
            self.mask_logits,
            self.slab_mean,
            self.slab_log_variance,
            self.spike_mean,
            self.spike_posterior_variance,
        )
        if rows is not None:
            fields = tuple(field[rows] for field in fields)
        q = SpikeSlab(*fields)
        return q._replace(slab_variance=q.slab_variance.exp())

    @torch.no_grad()
    def assign(self, posterior: SpikeSlab, damping: float = 1.0) -> None:
        """Move means and log-odds a share of the way to a new posterior; take its variances."""
        self.mask_logits.lerp_(posterior.mask_logits, damping)
        self.slab_mean.lerp_(posterior.slab_mean, damping)
        self.slab_log_variance.copy_(posterior.slab_variance.log())
        self.spike_mean.lerp_(posterior.spike_mean, damping)
        self.spike_posterior_variance.copy_(posterior.spike_variance)

    def mask_probability(self) -> Tensor:
        """Probability that each mask is one, as it is reported.

        Training and prediction keep the posterior itself; what is reported is charged
        :attr:`selection_penalty`, so that one fit gives both clean masks and full effects.

        Returns
        -------
        Shape ``(n_perturbations, n_latent)``; zero before the masks are switched on.
        """
        return torch.sigmoid(self.mask_logits - self.selection_penalty) * self.masks_on

    def moments(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of effects.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``; all by default.

        Returns
        -------
        Each of shape ``(n_rows, n_latent)``; zero before the masks are switched on.
        """
        q = self._rows(rows)
        if not self.masks_on:
            zero = torch.zeros_like(q.slab_mean)
            return zero, zero
        on = torch.sigmoid(q.mask_logits)
        mean = on * q.slab_mean + (1 - on) * q.spike_mean
        second = on * (q.slab_variance + q.slab_mean.square()) + (1 - on) * (
            q.spike_variance + q.spike_mean.square()
        )
        return mean, (second - mean.square()).clamp(min=0)

    def sample(self, n_samples: int = 1, rows: Tensor | None = None) -> Tensor:
        """Draw effects from the posterior.

        Parameters
        ----------
        n_samples
            Number of draws.
        rows
            Perturbations to draw, shape ``(n_rows,)``; all by default.

        Returns
        -------
        Shape ``(n_samples, n_rows, n_latent)``.
        """
        q = self._rows(rows)
        shape = (n_samples, *q.slab_mean.shape)
        if not self.masks_on:
            return q.slab_mean.new_zeros(shape)
        noise = torch.randn(shape, dtype=q.slab_mean.dtype, device=q.slab_mean.device)
        on = torch.bernoulli(torch.sigmoid(q.mask_logits).expand(shape)).bool()
        slab = q.slab_mean + q.slab_variance.sqrt() * noise
        return torch.where(on, slab, q.spike_mean + q.spike_variance.sqrt() * noise)

    def rsample(self, rows: Tensor, temperature: float) -> Tensor:
        """Draw effects of some perturbations once, with gradients to the posterior.

        Masks are straight-through relaxed Bernoulli draws, embeddings are reparametrised.

        Parameters
        ----------
        rows
            Perturbations to draw, shape ``(n_rows,)``.
        temperature
            Temperature of the relaxation.

        Returns
        -------
        Shape ``(n_rows, n_latent)``.
        """
        mean, log_variance = self.slab_mean[rows], self.slab_log_variance[rows]
        if not self.masks_on:
            return torch.zeros_like(mean)
        embedding = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return relaxed_bernoulli(self.mask_logits[rows], temperature) * embedding

    def kl_divergence(self) -> dict[str, Tensor]:
        """Divergence of the posterior of all perturbations from the prior, in nats.

        Returns
        -------
        ``"kl_mask"`` for the masks and ``"kl_embedding"`` for the effects given the masks,
        scalars. Both are zero before the masks are switched on.
        """
        if not self.masks_on:
            zero = self.slab_mean.new_zeros(())
            return {"kl_mask": zero, "kl_embedding": zero}
        q = self.posterior
        on = torch.sigmoid(q.mask_logits)
        slab_prior = self.embedding_variance + self.spike_variance
        kl_effect = on * kl_centred_normal(q.slab_mean, q.slab_variance, slab_prior)
        if self.spike_variance > 0:
            kl_spike = kl_centred_normal(q.spike_mean, q.spike_variance, self.spike_variance)
            kl_effect = kl_effect + (1 - on) * kl_spike
        return {
            "kl_mask": kl_bernoulli(q.mask_logits, self.mask_prior_logit).sum(),
            "kl_embedding": kl_effect.sum(),
        }
