"""The posterior of masks and effects of perturbations, and its prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn
from torch.distributions import Beta, kl_divergence

from scvi_sams.module.closed_form import SpikeSlab
from scvi_sams.module.doses import kl_bernoulli_log_prior, kl_centred_normal, relaxed_bernoulli

if TYPE_CHECKING:
    from torch import Tensor


__all__ = [
    "CorrelatedEmbedding",
    "EmbeddingPosterior",
    "MaskPrior",
    "MaskPriorSharing",
    "PerturbationEffects",
    "effects_divergence",
]


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


class CorrelatedEmbedding(nn.Module):
    r"""Moments of :math:`q(e_t \mid m_t)` from one network that all perturbations share.

    The network sees the mask of a perturbation and a code of it, and adds to free moments of the
    embedding what the mask changes. Bereket and Karaletsos (2023) let the network see a one-hot
    vector in place of the code, which costs time and memory that grow with the square of the
    number of perturbations; a code has the same part (a row of weights a perturbation) and costs
    a row. The last layer starts at zero: training begins at the mean-field posterior.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of masks and embeddings.
    n_hidden
        Width of the network.
    """

    def __init__(self, n_perturbations: int, n_latent: int, n_hidden: int = 100) -> None:
        super().__init__()
        self.code = nn.Parameter(0.1 * torch.randn(n_perturbations, n_hidden))
        self.from_mask = nn.Linear(n_latent, n_hidden)
        self.moments = nn.Linear(n_hidden, 2 * n_latent)
        nn.init.zeros_(self.moments.weight)
        nn.init.zeros_(self.moments.bias)

    def freeze_network(self) -> None:
        """Leave only the codes of perturbations to training."""
        self.from_mask.requires_grad_(False)
        self.moments.requires_grad_(False)

    def forward(self, rows: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks add to mean and log-variance of embeddings.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``.
        masks
            Zeros and ones, shape ``(..., n_rows, n_latent)``.

        Returns
        -------
        Each of shape ``(..., n_rows, n_latent)``.
        """
        hidden = torch.relu(self.from_mask(masks) + self.code[rows])
        mean, log_variance = self.moments(hidden).chunk(2, -1)
        return mean, log_variance


_MAX_DIVERGENCE_ROWS = 1_024  # a step costs the same however many perturbations there are


def effects_divergence(effects: PerturbationEffects, temperature: float) -> dict[str, Tensor]:
    """Divergences of masks, and of effects given masks, in nats.

    See :meth:`~scvi_sams.module.PerturbationEffects.kl_divergence`.

    Parameters
    ----------
    effects
        Posterior and prior.
    temperature
        Temperature of the relaxed draws of masks, for the correlated posterior.

    Returns
    -------
    ``"kl_mask"`` and ``"kl_embedding"``, scalars.
    """
    if not effects.masks_on:
        zero = effects.slab_mean.new_zeros(())
        return {"kl_mask": zero, "kl_embedding": zero}
    rows, weight = None, 1.0
    if effects.trainable and effects.training and effects.n_rows > _MAX_DIVERGENCE_ROWS:
        device = effects.slab_mean.device
        rows = torch.randint(effects.n_rows, (_MAX_DIVERGENCE_ROWS,), device=device)
        weight = effects.n_rows / _MAX_DIVERGENCE_ROWS
    q = effects._rows(rows)
    on = effects._inclusion(q.mask_logits, rows)
    log_on, log_off = effects.log_mask_prior(rows)
    is_given, log_off = log_off.isinf(), log_off.clamp(min=-1e6)
    kl_mask = kl_bernoulli_log_prior(q.mask_logits, log_on, log_off)
    if not effects.sparse:  # masks of perturbations are given, those of pairs are not
        kl_mask = torch.where(is_given, 0.0, kl_mask)
    return {
        "kl_mask": weight * kl_mask.sum() + effects.mask_prior.kl_probability(),
        "kl_embedding": weight * _kl_embedding(effects, q, on, rows, temperature).sum(),
    }


def _kl_embedding(
    effects: PerturbationEffects,
    q: SpikeSlab,
    on: Tensor,
    rows: Tensor | None,
    temperature: float,
) -> Tensor:
    """Divergence of each effect given the masks, shape ``(n_rows, n_latent)``."""
    if effects.posterior_family == "point":
        return torch.zeros_like(q.slab_mean)
    if effects.correlated is not None:
        index = torch.arange(effects.n_rows, device=on.device) if rows is None else rows
        masks = effects._relaxed_masks(q.mask_logits, index, temperature)
        moments = effects._embedding_given(q, masks, index)
        return kl_centred_normal(*moments, effects.embedding_variance)
    if effects.posterior_family == "mean_field":
        return kl_centred_normal(q.slab_mean, q.slab_variance, effects.embedding_variance)
    background = effects.background_variance()
    if rows is not None and background.dim() > 0:
        background = background[rows]
    kl_slab = kl_centred_normal(
        q.slab_mean, q.slab_variance, effects.embedding_variance + background
    )
    if not effects.spike_variance > 0:
        return on * kl_slab
    kl_spike = kl_centred_normal(q.spike_mean, q.spike_variance, background.clamp(min=1e-30))
    return on * kl_slab + (1 - on) * torch.where(background > 0, kl_spike, 0.0)


EmbeddingPosterior: TypeAlias = Literal["mean_field", "correlated", "spike_and_slab", "point"]
"""The posteriors of the embeddings, see :class:`PerturbationEffects`."""

_N_MOMENT_DRAWS = 64


class PerturbationEffects(nn.Module):
    r"""Posterior of the masks and embeddings of all perturbations.

    The effect of perturbation t on latent l is :math:`m_{tl} e_{tl} + r_{tl}` with

    .. math:: m_{tl} \sim \mathrm{Bernoulli}(\pi), \quad e_{tl} \sim \mathrm{Normal}(0, \beta^2),
       \quad r_{tl} \sim \mathrm{Normal}(0, \tau^2).

    With ``spike_scale = 0`` the background r vanishes and the effect is the one of Bereket and
    Karaletsos (2023). A learned background takes up what is too small or too widespread to be a
    mechanism, so that predictions keep it and masks stay clean. With ``mask_prior = 1`` every
    mask is one: CPA-VAE.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of masks and effects.
    posterior
        Of embeddings e and masks m. ``"spike_and_slab"``: normal where the mask is one, the prior
        where it is zero. ``"mean_field"``: normal, whatever the mask. ``"correlated"``: normal,
        with moments from a network that sees the masks. ``"point"``: a parameter without a prior.
    mask_prior, mask_prior_shared_by
        See :class:`MaskPrior`.
    embedding_scale
        Prior standard deviation of an embedding.
    spike_scale
        Standard deviation of the background, or ``"learned"``.
    n_pairs, interaction_prior
        Number of pairs with an effect of their own, whose rows follow those of the perturbations
        (:class:`PairInteractions`), and the prior probability of their masks. Pairs have no
        background.
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
        :func:`~scvi_sams.module.closed_form.selection_penalty`.
    frozen
        Rows that training leaves as they are, shape ``(n_rows, 1)``.
    masks_on
        Whether perturbations move cells yet: not during the warm-up.
    """

    spike_mean: Tensor
    spike_posterior_variance: Tensor
    spike_variance: Tensor
    selection_penalty: Tensor
    frame: Tensor
    frozen: Tensor
    masks_on: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        *,
        posterior: EmbeddingPosterior = "spike_and_slab",
        mask_prior: float | tuple[float, float] = 0.02,
        mask_prior_shared_by: MaskPriorSharing = "all",
        embedding_scale: float = 1.0,
        spike_scale: float | Literal["learned"] = "learned",
        n_pairs: int = 0,
        interaction_prior: float = 0.002,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.n_perturbations, self.n_pairs = n_perturbations, n_pairs
        self.posterior_family = posterior
        self.trainable = trainable
        self.mask_prior = MaskPrior(n_perturbations, n_latent, mask_prior, mask_prior_shared_by)
        self.interaction_prior = interaction_prior
        self.embedding_variance = embedding_scale**2
        self.learn_spike_scale = spike_scale == "learned" and self.sparse
        shape = (n_perturbations + n_pairs, n_latent)
        self.mask_logits = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.slab_mean = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.slab_log_variance = nn.Parameter(
            torch.full(shape, math.log(1e-2)), requires_grad=False
        )
        self.correlated = CorrelatedEmbedding(*shape) if posterior == "correlated" else None
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)
        self.register_buffer("spike_mean", torch.zeros(shape))
        self.register_buffer("spike_posterior_variance", torch.zeros(shape))
        initial = 0.1 if spike_scale == "learned" else float(spike_scale)
        self.register_buffer("spike_variance", torch.tensor(initial**2 if self.sparse else 0.0))
        self.register_buffer("selection_penalty", torch.zeros(shape))
        self.register_buffer("frame", torch.eye(n_latent))
        self.register_buffer("frozen", torch.zeros(shape[0], 1, dtype=torch.bool))
        self.register_buffer("masks_on", torch.tensor(False))

    @property
    def sparse(self) -> bool:
        """Whether masks of perturbations may be zero."""
        return self.mask_prior.sparse

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What is learned by gradient."""
        if not self.trainable:
            return []
        parameters = [self.slab_mean]
        if self.sparse or self.n_pairs > 0:
            parameters.append(self.mask_logits)
        if self.posterior_family != "point":
            parameters.append(self.slab_log_variance)
        return parameters + ([] if self.correlated is None else [*self.correlated.parameters()])

    @property
    def n_rows(self) -> int:
        """Number of perturbations and pairs."""
        return self.n_perturbations + self.n_pairs

    @property
    def posterior(self) -> SpikeSlab:
        """The posterior, each field of shape ``(n_rows, n_latent)``."""
        return self._rows(None)

    def _rows(self, rows: Tensor | None) -> SpikeSlab:
        """The posterior of some rows, at a cost that does not grow with the others."""
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
        variance = q.slab_variance.exp()
        if self.posterior_family == "point":
            variance = torch.zeros_like(variance)
        return q._replace(slab_variance=variance)

    def _inclusion(self, mask_logits: Tensor, rows: Tensor | None) -> Tensor:
        """Probability that masks are one."""
        probability = torch.sigmoid(mask_logits)
        if self.sparse:
            return probability
        if self.n_pairs == 0:
            return torch.ones_like(probability)
        index = torch.arange(self.n_rows, device=probability.device) if rows is None else rows
        return torch.where((index < self.n_perturbations).unsqueeze(1), 1.0, probability)

    def log_mask_prior(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expected log prior probabilities of one and of zero, broadcast to the masks of rows."""
        if self.n_pairs == 0:
            return self.mask_prior.log_probabilities(rows)
        n_latent = self.frame.shape[0]
        both = []
        for of_perturbations, probability in zip(
            self.mask_prior.log_probabilities(),
            (self.interaction_prior, 1 - self.interaction_prior),
            strict=True,
        ):
            of_pairs = of_perturbations.new_full((self.n_pairs, n_latent), math.log(probability))
            shape = (self.n_perturbations, n_latent)
            whole = torch.cat([of_perturbations.expand(shape), of_pairs])
            both.append(whole if rows is None else whole[rows])
        return both[0], both[1]

    def background_variance(self) -> Tensor:
        """Prior variance of the background of each row, broadcasts to ``(n_rows, n_latent)``."""
        if self.n_pairs == 0:
            return self.spike_variance
        index = torch.arange(self.n_rows, device=self.spike_variance.device).unsqueeze(1)
        return torch.where(index < self.n_perturbations, self.spike_variance, 0.0)

    @torch.no_grad()
    def assign(self, posterior: SpikeSlab, damping: float = 1.0) -> None:
        """Move means and log-odds a share of the way to a new posterior; take its variances."""
        weight = damping * (~self.frozen).to(self.slab_mean.dtype)
        self.mask_logits.lerp_(posterior.mask_logits, weight)
        self.slab_mean.lerp_(posterior.slab_mean, weight)
        self.spike_mean.lerp_(posterior.spike_mean, weight)
        for field, new in (
            (self.slab_log_variance, posterior.slab_variance.log()),
            (self.spike_posterior_variance, posterior.spike_variance),
        ):
            field.copy_(torch.where(self.frozen, field, new))

    @torch.no_grad()
    def update_mask_prior(self) -> None:
        """Learn the prior probability of masks from their posterior."""
        if self.masks_on and not self.frozen.any():
            on = torch.sigmoid(self.mask_logits[: self.n_perturbations])
            self.mask_prior.update(on)

    def mask_probability(self) -> Tensor:
        """Probability that each mask is one, as it is reported.

        Training and prediction keep the posterior itself; what is reported is charged
        :attr:`selection_penalty`, so that one fit gives both clean masks and full effects.

        Returns
        -------
        Shape ``(n_rows, n_latent)``; zero before the masks are switched on.
        """
        return self._inclusion(self.mask_logits - self.selection_penalty, None) * self.masks_on

    def moments(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of effects.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``; all by default.

        Returns
        -------
        Each of shape ``(n_rows, n_latent)``; zero before the masks are switched on. For the
        correlated posterior estimated from draws of the masks that are always the same.
        """
        q = self._rows(rows)
        if not self.masks_on:
            zero = torch.zeros_like(q.slab_mean)
            return zero, zero
        on = self._inclusion(q.mask_logits, rows)
        if self.correlated is not None:
            generator = torch.Generator().manual_seed(0)
            # A Latin hypercube: each mask is on in its share of the draws. All rows have the same,
            # so that the moments of one do not depend on which others are asked for.
            uniform = torch.rand(_N_MOMENT_DRAWS, 1, on.shape[1], generator=generator)
            rank = uniform.argsort(0).to(on)
            masks = ((rank + 0.5) / _N_MOMENT_DRAWS < on).to(on.dtype)
            mean, variance = self._embedding_given(q, masks, rows)
            first = (masks * mean).mean(0)
            second = (masks * (variance + mean.square())).mean(0)
        else:
            first = on * q.slab_mean + (1 - on) * q.spike_mean
            second = on * (q.slab_variance + q.slab_mean.square()) + (1 - on) * (
                q.spike_variance + q.spike_mean.square()
            )
        return first, (second - first.square()).clamp(min=0)

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
        on = torch.bernoulli(self._inclusion(q.mask_logits, rows).expand(shape))
        mean, variance = self._embedding_given(q, on, rows)
        slab = mean + variance.sqrt() * noise
        return torch.where(on.bool(), slab, q.spike_mean + q.spike_variance.sqrt() * noise)

    def rsample(self, rows: Tensor, temperature: float, n_samples: int = 1) -> Tensor:
        """Draw effects of some perturbations, with gradients to the posterior.

        Masks are straight-through relaxed Bernoulli draws, embeddings are reparametrised.

        Parameters
        ----------
        rows
            Perturbations to draw, shape ``(n_rows,)``.
        temperature
            Temperature of the relaxation.
        n_samples
            Number of draws.

        Returns
        -------
        Shape ``(n_samples, n_rows, n_latent)``.
        """
        q = self._rows(rows)
        shape = (n_samples, *q.slab_mean.shape)
        if not self.masks_on:
            return q.slab_mean.new_zeros(shape)
        masks = self._relaxed_masks(q.mask_logits.expand(shape), rows, temperature)
        mean, variance = self._embedding_given(q, masks, rows)
        noise = torch.randn(shape, dtype=q.slab_mean.dtype, device=q.slab_mean.device)
        return masks * (mean + variance.sqrt() * noise)

    def _relaxed_masks(self, mask_logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        masks = relaxed_bernoulli(mask_logits, temperature)
        if self.sparse:
            return masks
        return torch.where((rows < self.n_perturbations).unsqueeze(1), 1.0, masks)

    def _embedding_given(
        self, q: SpikeSlab, masks: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Moments of embeddings given masks, each broadcasts to the shape of the masks."""
        if self.correlated is None:
            return q.slab_mean, q.slab_variance
        index = torch.arange(self.n_rows, device=masks.device) if rows is None else rows
        mean, log_variance = self.correlated(index, masks)
        return q.slab_mean + mean, q.slab_variance * log_variance.exp()

    def kl_divergence(self, temperature: float = 0.5) -> dict[str, Tensor]:
        """Divergence of the posterior of all rows from the prior, in nats.

        In closed form, but for the correlated posterior, where the divergence of embeddings given
        masks is averaged over one draw of masks (Bereket and Karaletsos 2023). While a posterior
        of very many perturbations is trained by gradient, the sum is estimated from random rows.

        Parameters
        ----------
        temperature
            Temperature of the relaxation of that draw.

        Returns
        -------
        ``"kl_mask"`` for the masks (and their prior probability) and ``"kl_embedding"`` for the
        effects given the masks, scalars. Both are zero before the masks are switched on.
        """
        return effects_divergence(self, temperature)
