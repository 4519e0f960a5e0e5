"""The posterior q(m, e) of masks and embeddings, one class a family, and the prior of masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.distributions import Beta, kl_divergence
from torch.nn import functional as F

from scvi_sams._compat import HostState
from scvi_sams.module.doses import additive_shift

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.doses import Doses


GIVEN_LOGIT = 40.0  # of a mask that is given: its probability is exactly one in any precision
_LEAST_LOG = -1e6  # stands in for the logarithm of zero, which has no product with zero
_RELAXATION_TEMPERATURE = 0.5
_BACKGROUND_SCALES = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # of the basal standard deviation
_N_CODE = 100  # width of the network that the correlated posterior shares


def kl_bernoulli_log_prior(logits: Tensor, log_on: Tensor, log_off: Tensor) -> Tensor:
    """Divergence of Bernoulli distributions from their prior in nats, elementwise.

    Parameters
    ----------
    logits
        Log-odds of the posterior, any shape.
    log_on, log_off
        (Expected) logarithms of the prior probabilities of one and of zero, broadcastable.

    Examples
    --------
    >>> half = torch.tensor(0.5).log()
    >>> kl_bernoulli_log_prior(torch.tensor(0.0), half, half)
    tensor(0.)
    """
    probability = torch.sigmoid(logits)
    return (probability * (logits - log_on + log_off) - F.softplus(logits) - log_off).clamp(min=0)


def kl_centred_normal(mean: Tensor, variance: Tensor, prior_variance: Tensor | float) -> Tensor:
    """Divergence of normal distributions from one centred at zero in nats, elementwise.

    Examples
    --------
    >>> kl_centred_normal(torch.tensor(2.0), torch.tensor(1.0), 1.0)
    tensor(2.)
    """
    ratio = variance / prior_variance
    return 0.5 * (ratio + mean.square() / prior_variance - 1 - ratio.log())


def relaxed_bernoulli(logits: Tensor, temperature: float) -> Tensor:
    """Draw zeros and ones with a gradient: straight-through relaxed Bernoulli.

    The forward value is an exact Bernoulli draw; the gradient is that of the binary concrete
    relaxation of the same draw (Jang et al. 2017; Maddison et al. 2017), which is less biased and
    noisier at a lower temperature.

    Examples
    --------
    >>> relaxed_bernoulli(torch.full((2,), 50.0), 1.0)
    tensor([1., 1.])
    """
    uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is zero, so that the sum is exact


MaskPriorSharing: TypeAlias = Literal["all", "latent", "perturbation"]
"""Which masks share one learned prior probability."""


class MaskPrior(nn.Module):
    r"""Prior of the masks.

    Fixed, :math:`m_{tl} \sim \mathrm{Bernoulli}(\pi)` (Bereket and Karaletsos 2023), or with
    :math:`\pi_k \sim \mathrm{Beta}(a, b)` for each group k of masks. The optimal posterior of
    :math:`\pi_k` given those of the masks is conjugate,
    :math:`\mathrm{Beta}(a + \sum q(m{=}1), b + \sum q(m{=}0))`, so that no gradient is needed.
    One probability for each perturbation with a = 1 and b the number of latents is the prior of
    SVAE+ (Lopez et al., CLeaR 2023). With probability one the masks are given: CPA-VAE.

    Parameters
    ----------
    n_perturbations, n_latent
        Shape of the masks of perturbations.
    probability
        The fixed probability, or the pair ``(a, b)`` of the Beta hyper-prior.
    shared_by
        Masks that share a learned probability: ``"all"``, those of a ``"latent"`` or those of a
        ``"perturbation"``.
    n_pairs, pair_probability
        Measured pairs, whose rows follow, and the fixed probability of their masks.
    n_deviations, deviation_probability
        The same of deviations by context, whose rows are the last.

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
    given: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        probability: float | tuple[float, float] = 0.02,
        shared_by: MaskPriorSharing = "all",
        n_pairs: int = 0,
        pair_probability: float = 0.002,
        n_deviations: int = 0,
        deviation_probability: float = 0.002,
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
        self.n_perturbations, self.n_latent = n_perturbations, n_latent
        self.n_pairs, self.pair_probability = n_pairs, pair_probability
        self.n_deviations, self.deviation_probability = n_deviations, deviation_probability
        self.a, self.b = a, b
        self.shared_by = shared_by
        self.n_shared = n_perturbations * n_latent // torch.Size(shapes[shared_by]).numel()
        shape = shapes[shared_by] if self.fixed is None else (1, 1)
        self.register_buffer("posterior_a", torch.full(shape, a))
        self.register_buffer("posterior_b", torch.full(shape, b))
        n_rows = n_perturbations + n_pairs + n_deviations
        given = torch.arange(n_rows).unsqueeze(1) < n_perturbations
        self.register_buffer("given", given & (not self.sparse), persistent=False)

    @property
    def sparse(self) -> bool:
        """Whether masks of perturbations may be zero."""
        return self.fixed != 1.0

    def mean(self) -> Tensor:
        """Prior probability that a mask is one, or its posterior mean.

        Shape ``(1, 1)``, ``(1, n_latent)`` or ``(n_perturbations, 1)``.
        """
        if self.fixed is not None:
            return torch.full_like(self.posterior_a, self.fixed)
        return self.posterior_a / (self.posterior_a + self.posterior_b)

    def log_probabilities(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Expected logarithms of the probabilities of one and of zero, for the masks of rows."""
        if self.fixed is not None:
            on = torch.full_like(self.posterior_a, self.fixed).log()
            off = torch.full_like(self.posterior_a, 1 - self.fixed).log()
        else:
            both = torch.digamma(self.posterior_a + self.posterior_b)
            on = torch.digamma(self.posterior_a) - both
            off = torch.digamma(self.posterior_b) - both
        if self.n_pairs + self.n_deviations == 0:
            return (on[rows], off[rows]) if len(on) > 1 else (on, off)
        pair, deviation = self.pair_probability, self.deviation_probability
        whole_on, whole_off = (
            torch.cat(
                [
                    of_perturbations.expand(self.n_perturbations, self.n_latent),
                    on.new_full((self.n_pairs, self.n_latent), math.log(of_pair)),
                    on.new_full((self.n_deviations, self.n_latent), math.log(of_deviation)),
                ]
            )
            for of_perturbations, of_pair, of_deviation in (
                (on, pair, deviation),
                (off, 1 - pair, 1 - deviation),
            )
        )
        return whole_on[rows], whole_off[rows]

    @torch.no_grad()
    def update(self, mask_probability: Tensor) -> None:
        """Learn the probabilities from the masks of perturbations, as they are believed in."""
        if self.fixed is not None:
            return
        axes = {"all": (0, 1), "latent": (0,), "perturbation": (1,)}[self.shared_by]
        on = mask_probability.sum(axes, keepdim=True)
        self.posterior_a.copy_(self.a + on)
        self.posterior_b.copy_(self.b + self.n_shared - on)

    @torch.no_grad()
    def order_latents(self, order: Tensor) -> None:
        """Put latents in another order."""
        if self.shared_by == "latent" and self.fixed is None:
            self.posterior_a.copy_(self.posterior_a[:, order])
            self.posterior_b.copy_(self.posterior_b[:, order])

    def kl_masks(self, mask_logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Divergence of masks from the prior, expected over it, shape ``(n_rows, n_latent)``."""
        log_on, log_off = self.log_probabilities(rows)
        kl = kl_bernoulli_log_prior(mask_logits, log_on, log_off.clamp(min=_LEAST_LOG))
        return torch.where(self.given[rows], 0.0, kl)

    def kl_probability(self) -> Tensor:
        """Divergence of the learned probabilities from their hyper-prior, a scalar in nats."""
        if self.fixed is not None:
            return self.posterior_a.new_zeros(())
        prior = Beta(torch.full_like(self.posterior_a, self.a), self.b)
        return kl_divergence(Beta(self.posterior_a, self.posterior_b), prior).sum()


EmbeddingPosterior: TypeAlias = Literal["mean_field", "correlated", "spike_and_slab", "point"]
"""Names of the posteriors, the keys of :data:`POSTERIORS`."""


class EffectsPosterior(HostState, nn.Module):
    r"""Posterior of masks and embeddings of perturbations, pairs and deviations, a row each.

    The effect of perturbation t on latent l is :math:`m_{tl} e_{tl}` with
    :math:`m_{tl} \sim \mathrm{Bernoulli}(\pi)` and :math:`e_{tl} \sim \mathrm{Normal}(0, \beta^2)`
    (Bereket and Karaletsos 2023). A family says what it knows of an embedding given the masks
    (:meth:`_embedding`), of an effect whose mask is zero (:meth:`_spike`), and their divergence
    from the prior (:meth:`_kl_embedding`); the rest is shared.

    Latents are rotated against the coordinates in which encoder and decoder work: ``z`` in the
    former is ``z @ rotation`` in the latter. As the basal prior does not change under rotation,
    this is an exact reparametrisation of the decoder's first layer; it frees the sparse axes from
    those in which the basal posterior is diagonal. :meth:`shift_moments`, :meth:`sampled_shift`
    and :meth:`to_network` speak the networks' coordinates, as all of the module does; everything
    else here, and what users see, is in latents.

    Parameters
    ----------
    prior
        Prior of the masks.
    embedding_scale
        Prior standard deviation of an embedding.
    trainable
        Whether the posterior is learned by gradient; otherwise closed-form updates set it.

    Attributes
    ----------
    masks_on
        Whether perturbations move cells yet: not during the warm-up.
    n_frozen, frozen
        Number of rows that training leaves as they are, and which, shape ``(n_rows, 1)``.
    max_divergence_rows
        Rows from which the divergence is estimated, where gradients train more: a step costs the
        same however many perturbations there are.
    rotation
        Orthogonal matrix, shape ``(n_latent, n_latent)``.
    """

    host_state: ClassVar[tuple[str, ...]] = ("masks_on", "n_frozen")
    has_variance: ClassVar[bool] = True
    max_divergence_rows = 1_024
    rotation: Tensor
    frozen: Tensor

    def __init__(
        self, prior: MaskPrior, embedding_scale: float = 1.0, trainable: bool = True
    ) -> None:
        super().__init__()
        self.mask_prior = prior
        self.embedding_variance = embedding_scale**2
        self.trainable = trainable
        self.masks_on, self.n_frozen = False, 0
        shape = (self.n_rows, prior.n_latent)
        self.mask_logits = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.slab_mean = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.slab_log_variance = nn.Parameter(
            torch.full(shape, math.log(1e-2)), requires_grad=False
        )
        self.set_mask_logits(0.0)
        self.register_buffer("rotation", torch.eye(prior.n_latent))
        self.register_buffer("frozen", torch.zeros(self.n_rows, 1, dtype=torch.bool))
        for parameter in EffectsPosterior.row_parameters(self):
            parameter.requires_grad_(True)

    @property
    def n_perturbations(self) -> int:
        """Number of perturbations."""
        return self.mask_prior.n_perturbations

    @property
    def n_pairs(self) -> int:
        """Number of pairs with an effect of their own."""
        return self.mask_prior.n_pairs

    @property
    def n_deviations(self) -> int:
        """Number of deviations by context."""
        return self.mask_prior.n_deviations

    @property
    def n_rows(self) -> int:
        """Number of perturbations, pairs and deviations."""
        return self.n_perturbations + self.n_pairs + self.n_deviations

    @property
    def sparse(self) -> bool:
        """Whether masks of perturbations may be zero."""
        return self.mask_prior.sparse

    @property
    def is_query(self) -> bool:
        """Whether some perturbations are known from a reference and stay as they are."""
        return self.n_frozen > 0

    @property
    def is_frozen(self) -> bool:
        """Whether all perturbations stay as they are."""
        return self.n_frozen == self.n_rows

    def row_parameters(self) -> list[nn.Parameter]:
        """What is learned by gradient of each perturbation."""
        if not self.trainable:
            return []
        masks = [self.mask_logits] if self.sparse or self.n_rows > self.n_perturbations else []
        return [self.slab_mean, *masks, *([self.slab_log_variance] if self.has_variance else [])]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What is learned by gradient; of a query, not what perturbations share."""
        return self.row_parameters()

    @torch.no_grad()
    def set_mask_logits(self, logits: Tensor | float) -> None:
        """Set the log-odds of the masks that are not given."""
        self.mask_logits.copy_(torch.where(self.mask_prior.given, GIVEN_LOGIT, logits))

    @torch.no_grad()
    def freeze(self, rows: Tensor | slice = slice(None), frozen: bool = True) -> None:
        """Keep rows from training, or leave them to it."""
        self.frozen[rows] = frozen
        self.n_frozen = int(self.frozen.sum())

    @torch.no_grad()
    def update_mask_prior(self) -> None:
        """Learn the prior probability of masks from their posterior."""
        if self.masks_on and not self.is_query:
            self.mask_prior.update(torch.sigmoid(self.mask_logits[: self.n_perturbations]))

    # -- what a family says --------------------------------------------------------------------

    def _embedding(self, rows: Tensor | slice, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of embeddings of rows given masks, broadcast to the masks."""
        return self.slab_mean[rows], self.slab_log_variance[rows].exp()

    def _spike(self, rows: Tensor | slice) -> tuple[Tensor | float, Tensor | float]:
        """Mean and variance of effects whose mask is zero."""
        return 0.0, 0.0

    def _kl_embedding(self, rows: Tensor | slice, on: Tensor) -> Tensor:
        """Divergence of effects given the masks, whose probabilities are `on`; in nats."""
        raise NotImplementedError

    # -- latents -------------------------------------------------------------------------------

    def mask_log_odds(self) -> Tensor:
        """Log-odds of masks as they are reported, shape ``(n_rows, n_latent)``."""
        return self.mask_logits

    def mask_probability(self) -> Tensor:
        """Probability of masks as it is reported, zero before they are switched on."""
        return torch.sigmoid(self.mask_log_odds()) * self.masks_on

    def slab_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each effect given that its mask is one, ``(n_rows, n_latent)``."""
        return self.slab_mean, self.slab_log_variance.exp()

    def moments(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of effects.

        Parameters
        ----------
        rows
            Perturbations or pairs, of any shape; all by default.

        Returns
        -------
        tuple of Tensor
            Each of shape ``(*rows.shape, n_latent)``; zero before the masks are switched on.
        """
        if not self.masks_on:
            zero = torch.zeros_like(self.slab_mean[rows])
            return zero, zero
        return self._moments(rows, torch.sigmoid(self.mask_logits[rows]))

    def _moments(self, rows: Tensor | slice, on: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._embedding(rows, on)
        spike_mean, spike_variance = self._spike(rows)
        first = on * mean + (1 - on) * spike_mean
        second = on * (variance + mean.square()) + (1 - on) * (spike_variance + spike_mean**2)
        return first, (second - first.square()).clamp(min=0)

    def sample(self, n_samples: int = 1, rows: Tensor | slice = slice(None)) -> Tensor:
        """Draw effects from the posterior, shape ``(n_samples, n_rows, n_latent)``."""
        shape = (n_samples, *self.slab_mean[rows].shape)
        if not self.masks_on:
            return self.slab_mean.new_zeros(shape)
        noise = torch.randn(shape, dtype=self.slab_mean.dtype, device=self.slab_mean.device)
        on = torch.bernoulli(torch.sigmoid(self.mask_logits[rows]).expand(shape))
        mean, variance = self._embedding(rows, on)
        spike_mean, spike_variance = self._spike(rows)
        slab = mean + variance.sqrt() * noise
        return torch.where(on.bool(), slab, spike_mean + spike_variance**0.5 * noise)

    def rsample(self, rows: Tensor, n_samples: int = 1) -> Tensor:
        """Draw effects of some rows, with gradients to the posterior.

        Masks are straight-through relaxed Bernoulli draws, embeddings are reparametrised. Shape
        ``(n_samples, n_rows, n_latent)``.
        """
        shape = (n_samples, *self.slab_mean[rows].shape)
        if not self.masks_on:
            return self.slab_mean.new_zeros(shape)
        masks = relaxed_bernoulli(self.mask_logits[rows].expand(shape), _RELAXATION_TEMPERATURE)
        mean, variance = self._embedding(rows, masks)
        noise = torch.randn(shape, dtype=self.slab_mean.dtype, device=self.slab_mean.device)
        return masks * (mean + variance.sqrt() * noise)

    def kl(self) -> dict[str, Tensor]:
        """Divergence of the posterior of all rows from the prior, in nats.

        While a posterior of many rows is trained by gradient, estimated from some of them.

        Returns
        -------
        dict of Tensor
            ``"kl_mask"`` (with that of a learned prior probability) and ``"kl_embedding"``.
        """
        if not self.masks_on:
            zero = self.slab_mean.new_zeros(())
            return {"kl_mask": zero, "kl_embedding": zero}
        rows: Tensor | slice = slice(None)
        weight = 1.0
        n_some = self.max_divergence_rows
        if self.trainable and self.training and self.n_rows > n_some:
            rows = torch.randint(self.n_rows, (n_some,), device=self.slab_mean.device)
            weight = self.n_rows / n_some
        logits = self.mask_logits[rows]
        kl_mask = self.mask_prior.kl_masks(logits, rows).sum()
        kl_embedding = self._kl_embedding(rows, torch.sigmoid(logits)).sum()
        return {
            "kl_mask": weight * kl_mask + self.mask_prior.kl_probability(),
            "kl_embedding": weight * kl_embedding,
        }

    # -- networks ------------------------------------------------------------------------------

    def to_network(self, z: Tensor) -> Tensor:
        """States or effects in the coordinates of encoder and decoder."""
        return z @ self.rotation

    def to_latents(self, u: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States in latents, and their variances, from those in the networks' coordinates."""
        rotation = self.rotation.T
        return u @ rotation, rotation.new_zeros(()) if variance is None else (
            variance @ rotation.square()
        )

    def shift_moments(self, doses: Doses) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean and variance of the shifts of cells, in the networks' coordinates.

        Returns
        -------
        tuple of Tensor
            Mean and variance of each coordinate, each of shape ``(n_cells, n_latent)``, and the
            mean effect of each dose, shape ``(n_cells, n_columns, n_latent)``.
        """
        mean, variance = self.moments(doses.perturbation)
        effect = self.to_network(mean)
        shift_variance = additive_shift(doses, variance, power=2) @ self.rotation.square()
        return additive_shift(doses, effect), shift_variance, effect

    def sampled_shift(self, doses: Doses, n_samples: int) -> Tensor:
        """Draws of the shifts, shared by the cells of a perturbation, with gradients.

        Rows that no cell has are not drawn, so that a step costs the same however many there are.
        Shape ``([n_samples,] n_cells, n_latent)``, in the networks' coordinates.
        """
        rows = doses.perturbation[doses.dose > 0].unique()
        if len(rows) == 0:  # controls alone
            shape = (n_samples, len(doses.perturbation), self.mask_prior.n_latent)
            shift = self.rotation.new_zeros(shape)
        else:
            index = torch.searchsorted(rows, doses.perturbation).clamp(max=len(rows) - 1)
            effects = self.rsample(rows, n_samples)[:, index]
            shift = self.to_network(additive_shift(doses, effects))
        return shift[0] if n_samples == 1 else shift


class MeanFieldEmbeddings(EffectsPosterior):
    """Embeddings that are normal, whatever the mask (Bereket and Karaletsos 2023)."""

    def _kl_embedding(self, rows: Tensor | slice, on: Tensor) -> Tensor:
        moments = self.slab_mean[rows], self.slab_log_variance[rows].exp()
        return kl_centred_normal(*moments, self.embedding_variance)


class PointEmbeddings(EffectsPosterior):
    """Embeddings that are parameters without a prior (Lopez et al., CLeaR 2023)."""

    has_variance = False

    def slab_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each effect given that its mask is one, ``(n_rows, n_latent)``."""
        return self.slab_mean, torch.zeros_like(self.slab_mean)

    def _embedding(self, rows: Tensor | slice, masks: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.slab_mean[rows]
        return mean, torch.zeros_like(mean)

    def _kl_embedding(self, rows: Tensor | slice, on: Tensor) -> Tensor:
        return torch.zeros_like(on)


class CorrelatedEmbeddings(EffectsPosterior):
    r"""Embeddings given the masks, :math:`q(e_t \mid m_t)`, from one network for all rows.

    The network sees the mask of a perturbation and a code of it, and adds to free moments of the
    embedding what the mask changes. Bereket and Karaletsos (2023) let the network see a one-hot
    vector in place of the code, which costs time and memory that grow with the square of the
    number of perturbations; a code has the same part (a row of weights a perturbation) and costs
    a row. The last layer starts at zero: training begins at the mean-field posterior.

    Attributes
    ----------
    n_moment_draws
        Draws of masks, always the same, over which :meth:`moments` are taken.
    """

    n_moment_draws = 64

    def __init__(
        self, prior: MaskPrior, embedding_scale: float = 1.0, trainable: bool = True
    ) -> None:
        super().__init__(prior, embedding_scale, trainable)
        self.code = nn.Parameter(0.1 * torch.randn(self.n_rows, _N_CODE))
        self.from_mask = nn.Linear(prior.n_latent, _N_CODE)
        self.to_moments = nn.Linear(_N_CODE, 2 * prior.n_latent)
        nn.init.zeros_(self.to_moments.weight)
        nn.init.zeros_(self.to_moments.bias)

    def row_parameters(self) -> list[nn.Parameter]:
        """What is learned by gradient of each perturbation."""
        return [*super().row_parameters(), self.code]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What is learned by gradient; of a query, not what perturbations share."""
        shared = [*self.from_mask.parameters(), *self.to_moments.parameters()]
        return self.row_parameters() + ([] if self.is_query else shared)

    def _embedding(self, rows: Tensor | slice, masks: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.from_mask(masks) + self.code[rows])
        mean, log_variance = self.to_moments(hidden).chunk(2, -1)
        log_variance = self.slab_log_variance[rows] + log_variance
        return self.slab_mean[rows] + mean, log_variance.exp()

    def _moments(self, rows: Tensor | slice, on: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        # A Latin hypercube: each mask is on in its share of the draws. All rows have the same,
        # so that the moments of one do not depend on which others are asked for.
        uniform = torch.rand(self.n_moment_draws, on.shape[-1], generator=generator)
        rank = uniform.argsort(0).to(on).view(-1, *([1] * (on.dim() - 1)), on.shape[-1])
        masks = ((rank + 0.5) / self.n_moment_draws < on).to(on.dtype)
        mean, variance = self._embedding(rows, masks)
        first = (masks * mean).mean(0)
        second = (masks * (variance + mean.square())).mean(0)
        return first, (second - first.square()).clamp(min=0)

    def slab_moments(self) -> tuple[Tensor, Tensor]:
        """Moments over the masks of the other latents; the prior where a mask is never on."""
        on = torch.sigmoid(self.mask_logits)
        first, spread = self.moments()
        ranks = torch.arange(self.n_moment_draws).to(on).view(-1, 1, 1)
        share = ((ranks + 0.5) / self.n_moment_draws < on).to(on.dtype).mean(0)  # of the draws
        known = share > 0  # else the draws say nothing of an effect given that it is there
        mean = torch.where(known, first / share, 0.0)
        variance = (spread + first.square()) / share - mean.square()
        return mean, torch.where(known, variance, self.embedding_variance).clamp(min=0)

    def _kl_embedding(self, rows: Tensor | slice, on: Tensor) -> Tensor:
        masks = relaxed_bernoulli(self.mask_logits[rows], _RELAXATION_TEMPERATURE)
        return kl_centred_normal(*self._embedding(rows, masks), self.embedding_variance)


class SpikeSlab(NamedTuple):
    """Parameters of a spike-and-slab posterior, each of shape ``(n_rows, n_latent)``.

    The effect is ``Normal(slab_mean, slab_variance)`` where the mask is one (log-odds
    ``mask_logits``) and ``Normal(spike_mean, spike_variance)`` where it is zero.
    """

    mask_logits: Tensor
    slab_mean: Tensor
    slab_variance: Tensor
    spike_mean: Tensor
    spike_variance: Tensor


class SpikeAndSlab(EffectsPosterior):
    r"""Embeddings that are normal where the mask is one, and the prior where it is zero.

    With a background, perturbations have the effect :math:`m_{tl} e_{tl} + r_{tl}`,
    :math:`r_{tl} \sim \mathrm{Normal}(0, \tau^2)`: it takes up what is too small or too
    widespread to be a mechanism, so that predictions keep it and masks stay clean. Pairs and
    deviations have none.

    Parameters
    ----------
    prior, embedding_scale, trainable
        See :class:`EffectsPosterior`.
    background_scale
        Standard deviation of the background, or ``"learned"``.

    Attributes
    ----------
    selection_penalty
        Log-odds that reported masks are charged, see
        :func:`~scvi_sams.module.closed_form.selection_penalty`: training and prediction keep the
        posterior itself, so that one fit gives both clean masks and full effects.
    """

    host_state: ClassVar[tuple[str, ...]] = ("masks_on", "n_frozen", "has_mixture")
    spike_mean: Tensor
    spike_variance: Tensor
    spike_divergence: Tensor
    background_variance: Tensor
    background_scales: Tensor
    background_weights: Tensor
    selection_penalty: Tensor

    def __init__(
        self,
        prior: MaskPrior,
        embedding_scale: float = 1.0,
        trainable: bool = True,
        background_scale: float | Literal["learned"] = 0.0,
    ) -> None:
        super().__init__(prior, embedding_scale, trainable)
        self.learns_background = background_scale == "learned" and self.sparse
        initial = 0.1 if background_scale == "learned" else float(background_scale)
        self.has_background = initial > 0 and self.sparse
        self.register_buffer("spike_mean", torch.zeros_like(self.slab_mean))
        self.register_buffer("spike_variance", torch.zeros_like(self.slab_mean))
        variance = initial**2 if self.has_background else 0.0
        self.register_buffer("background_variance", torch.tensor(variance))
        self.register_buffer("selection_penalty", torch.zeros_like(self.slab_mean))
        self.has_mixture = False
        # A mixture of scales takes the place of the normal background at the end of training.
        self.register_buffer("spike_divergence", torch.zeros_like(self.slab_mean))
        self.register_buffer("background_scales", torch.tensor(_BACKGROUND_SCALES))
        self.register_buffer("background_weights", torch.zeros(len(_BACKGROUND_SCALES)))

    @torch.no_grad()
    def start_mixture(self) -> None:
        """Let a mixture of scales, all as likely, take the place of a background that is learned.

        Unlike one normal it shrinks what is noise and leaves what is weak and real.
        """
        if self.learns_background:
            self.background_weights.fill_(1 / len(self.background_weights))
            self.has_mixture = True

    @torch.no_grad()
    def order_latents(self) -> None:
        """Put latents in the order of their share of the effects, the strongest of each positive.

        Which comes first, and which end of it is up, means nothing: the rotation turns with them
        and all that is in the networks' coordinates stays as it is.
        """
        if self.is_query or not self.sparse:
            return
        effect = (self.mask_probability() * self.slab_mean)[: self.n_perturbations]
        order = effect.square().sum(0).argsort(descending=True, stable=True)
        strongest = effect.gather(0, effect.abs().argmax(0, keepdim=True))[0, order]
        sign = torch.where(strongest < 0, -1.0, 1.0)
        for field in (
            self.mask_logits,
            self.slab_log_variance,
            self.spike_variance,
            self.spike_divergence,
            self.selection_penalty,
        ):
            field.copy_(field[:, order])
        for field in (self.slab_mean, self.spike_mean):
            field.copy_(field[:, order] * sign)
        self.rotation.copy_(self.rotation[order] * sign.unsqueeze(1))
        self.mask_prior.order_latents(order)

    def prior_background(self) -> Tensor:
        """Prior variance of the background, broadcasts to ``(n_rows, n_latent)``."""
        index = torch.arange(self.n_rows, device=self.rotation.device).unsqueeze(1)
        return torch.where(index < self.n_perturbations, self.background_variance, 0.0)

    def parameters_of(self, rows: Tensor | slice = slice(None)) -> SpikeSlab:
        """The posterior as the closed form speaks of it."""
        return SpikeSlab(
            self.mask_logits[rows],
            self.slab_mean[rows],
            self.slab_log_variance[rows].exp(),
            self.spike_mean[rows],
            self.spike_variance[rows],
        )

    @torch.no_grad()
    def assign(self, posterior: SpikeSlab, step: Tensor | float = 1.0) -> None:
        """Move means and log-odds a share of the way to a new posterior; take its variances."""
        weight = step * (~self.frozen).to(self.slab_mean.dtype)
        self.set_mask_logits(self.mask_logits.lerp(posterior.mask_logits, weight))
        self.slab_mean.lerp_(posterior.slab_mean, weight)
        self.spike_mean.lerp_(posterior.spike_mean, weight)
        for field, new in (
            (self.slab_log_variance, posterior.slab_variance.log()),
            (self.spike_variance, posterior.spike_variance),
        ):
            field.copy_(torch.where(self.frozen, field, new))

    def mask_log_odds(self) -> Tensor:
        """Log-odds of masks as they are reported, shape ``(n_rows, n_latent)``."""
        return self.mask_logits - self.selection_penalty

    def _spike(self, rows: Tensor | slice) -> tuple[Tensor | float, Tensor | float]:
        if not self.has_background:
            return 0.0, 0.0
        return self.spike_mean[rows], self.spike_variance[rows]

    def _kl_embedding(self, rows: Tensor | slice, on: Tensor) -> Tensor:
        mean, variance = self.slab_mean[rows], self.slab_log_variance[rows].exp()
        if not self.has_background:
            return on * kl_centred_normal(mean, variance, self.embedding_variance)
        if self.has_mixture:
            kl_slab = kl_centred_normal(mean, variance, self.embedding_variance)
            return on * kl_slab + (1 - on) * self.spike_divergence[rows]
        background = self.prior_background()[rows]
        kl_slab = kl_centred_normal(mean, variance, self.embedding_variance + background)
        spike = self.spike_mean[rows], self.spike_variance[rows]
        kl_spike = kl_centred_normal(*spike, background.clamp(min=1e-30))
        return on * kl_slab + (1 - on) * torch.where(background > 0, kl_spike, 0.0)


POSTERIORS: dict[EmbeddingPosterior, type[EffectsPosterior]] = {
    "mean_field": MeanFieldEmbeddings,
    "correlated": CorrelatedEmbeddings,
    "spike_and_slab": SpikeAndSlab,
    "point": PointEmbeddings,
}
"""The posteriors by name."""
