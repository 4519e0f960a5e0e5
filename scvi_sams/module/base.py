"""What the modules of the family share: decoder, likelihood, and the local loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import nn

from scvi_sams._compat import HostState
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module.doses import HillDraws, add_gene_effects, additive_shift
from scvi_sams.module.likelihood import observation_distribution, observation_log_likelihood
from scvi_sams.module.networks import (
    ExpressionDecoder,
    PotentialEncoder,
    covariates_of,
    network_covariates,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_sams.module.closed_form import ClosedForm
    from scvi_sams.module.doses import Doses, GeneEffects
    from scvi_sams.module.gene_effects import ResidualDraws, ResidualEffects
    from scvi_sams.module.likelihood import Dispersion, GeneLikelihood, Observation
    from scvi_sams.module.networks import BasalPosterior, Decoded
    from scvi_sams.module.posteriors import EffectsPosterior


class CellPopulation(NamedTuple):
    """Basal states of cells and what else the decoder asks for.

    Attributes
    ----------
    basal
        Basal states in the networks' coordinates, shape ``(n_cells, n_latent)``.
    library
        Library sizes or size factors, shape ``(n_cells, 1)``.
    batch_index, cat_covs, cont_covs
        Covariates, shapes ``(n_cells, 1)``, ``(n_cells, n_categorical)`` and
        ``(n_cells, n_continuous)``, or ``None`` where there are none.
    context
        Context of each cell, shape ``(n_cells, 1)``, which says where basal states lie.
    """

    basal: Tensor
    library: Tensor
    batch_index: Tensor | None = None
    cat_covs: Tensor | None = None
    cont_covs: Tensor | None = None
    context: Tensor | None = None

    def covariates(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the generative model besides the latent state."""
        fields = self._asdict()
        del fields["basal"]
        return fields


class GlobalDraws(NamedTuple):
    """Draws from the posterior of perturbations, the same for every cell.

    Attributes
    ----------
    n_samples
        Number of draws.
    effects
        Shifts of perturbations, pairs and deviations in the networks' coordinates, shape
        ``(n_samples, n_rows, n_latent)``.
    rows
        Which rows of the effects those are, sorted, shape ``(n_rows,)``.
    direct
        Log fold changes of target genes, shape ``(n_samples, n_perturbations)``.
    hill
        Parameters of dose responses, each of shape ``(n_samples, n_perturbations)``.
    residual
        Draws of the effects on single genes that latents leave over; ``None`` to leave them out.
    multiple
        What the effects of perturbations are multiplied with, shape ``(n_perturbations,)``; one
        for all where ``None``.
    """

    n_samples: int
    effects: Tensor | None = None
    rows: Tensor | None = None
    direct: Tensor | None = None
    hill: HillDraws | None = None
    residual: ResidualDraws | None = None
    multiple: Tensor | None = None

    def shift(self, doses: Doses) -> Tensor:
        """Shifts of cells, shape ``(n_samples, n_cells, n_latent)``."""
        if self.effects is None or self.rows is None:
            raise ValueError("These draws hold no effects.")
        if len(self.rows) == 0:  # of controls alone
            return self.effects.new_zeros(
                self.n_samples, len(doses.perturbation), self.effects.shape[-1]
            )
        # What fills up a column need not be among the rows: its dose is zero.
        place = torch.searchsorted(self.rows, doses.perturbation).clamp(max=len(self.rows) - 1)
        return additive_shift(doses, self.effects[:, place])

    def subset(self, start: int, stop: int) -> GlobalDraws:
        """Some of the draws."""
        kept = slice(start, stop)
        return GlobalDraws(
            len(range(*kept.indices(self.n_samples))),
            None if self.effects is None else self.effects[kept],
            self.rows,
            None if self.direct is None else self.direct[kept],
            None if self.hill is None else HillDraws(*(field[kept] for field in self.hill)),
            None if self.residual is None else self.residual.subset(start, stop),
            self.multiple,
        )


_CEILING_MARGIN = 1.25  # a cell may hold more counts per size factor than any that was read


_LEAST_VARIATION = 1e-6  # of a float32, relative to its mean


def _scale(mean: Tensor, std: Tensor) -> Tensor:
    """Standard deviations, or one where all cells are the same but for rounding."""
    return torch.where(std > _LEAST_VARIATION * mean.abs(), std, torch.ones_like(std))


class PerturbationVAEModule(HostState, BaseModuleClass):
    """Base of the modules: encoder and decoder of one cell, and what is measured in it.

    A member of the family says how perturbations enter: :meth:`inference`, :meth:`kl_basal`,
    :meth:`sample_basal`, :meth:`sample_globals`, :meth:`decode_condition` and
    :meth:`log_importance_weights`. The loss is the local part of the negative bound; the training
    plan adds :meth:`global_divergences`. States are in the networks' coordinates throughout, which
    :meth:`to_latents` turns to what users see.

    Parameters
    ----------
    n_input
        Number of genes.
    n_perturbations
        Number of perturbations.
    n_batch, n_cats_per_cov, n_continuous_cov
        Batches, categories of each further categorical covariate, continuous covariates.
    n_hidden, n_latent, n_layers, dropout_rate
        Size of the networks; dropout is in the encoder only.
    encode_covariates
        Whether the encoder sees the covariates too.
    gene_likelihood, dispersion
        Distribution of what is measured, and what shares its dispersion.
    basal_posterior
        See :class:`~scvi_sams.module.networks.PotentialEncoder`.
    n_side_input
        Doses that encoder and decoder see as they are.
    use_size_factor_key
        Whether libraries are size factors that are given, which need not be the sums of the
        counts.
    """

    host_state = ("n_training_cells", "initialized", "counts_per_cell")
    latent_distribution = "normal"
    n_contexts = 1
    # Cells of a minibatch whose counts move the dispersion. All cells share it, so that its
    # gradient is precise enough from few, and the digamma functions it takes are the dearest of
    # a step.
    n_dispersion_cells = 8
    closed_form: ClosedForm | None
    effects: EffectsPosterior | None
    gene_effects: ResidualEffects | None
    library_ceiling: Tensor
    covariate_mean: Tensor
    covariate_std: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        n_input: int,
        n_perturbations: int,
        *,
        n_batch: int = 1,
        n_cats_per_cov: Sequence[int] | None = None,
        n_continuous_cov: int = 0,
        n_hidden: int = 400,
        n_latent: int = 40,
        n_layers: int = 1,
        dropout_rate: float = 0.05,
        encode_covariates: bool = False,
        gene_likelihood: GeneLikelihood = "nb",
        dispersion: Dispersion = "gene",
        basal_posterior: BasalPosterior = "correlated",
        n_side_input: int = 0,
        use_size_factor_key: bool = False,
    ) -> None:
        super().__init__()
        self.closed_form, self.effects, self.gene_effects = None, None, None
        self.n_latent = n_latent
        self.n_perturbations = n_perturbations
        self.n_batch = n_batch
        self.encode_covariates = encode_covariates
        self.gene_likelihood: GeneLikelihood = gene_likelihood
        self.dispersion: Dispersion = dispersion
        self.use_size_factor_key = use_size_factor_key and self.is_count_model
        covariates: dict[str, Any] = {
            "n_cat_list": [n_batch, *(n_cats_per_cov or ())],
            "n_cont": n_continuous_cov,
        }
        self.encoder = PotentialEncoder(
            n_input,
            n_latent,
            basal_posterior=basal_posterior,
            n_layers=n_layers,
            n_hidden=n_hidden,
            dropout_rate=dropout_rate,
            n_side_input=n_side_input,
            log_transform=self.is_count_model,
            **(covariates if encode_covariates else {}),
        )
        self.decoder = ExpressionDecoder(
            n_latent + n_side_input,
            n_input,
            n_layers=n_layers,
            n_hidden=n_hidden,
            zero_inflated=gene_likelihood == "zinb",
            **covariates,
        )
        shape = (n_input, n_batch) if dispersion == "gene-batch" else (n_input,)
        self.px_r = nn.Parameter(torch.zeros(shape), requires_grad=gene_likelihood != "poisson")
        self.n_training_cells, self.initialized, self.counts_per_cell = 0, False, 0.0
        self.register_buffer("library_ceiling", torch.tensor(1.0))
        self.register_buffer("covariate_mean", torch.zeros(n_continuous_cov))
        self.register_buffer("covariate_std", torch.ones(n_continuous_cov))
        n_features = 0 if self.is_count_model else n_input
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_std", torch.ones(n_features))

    @property
    def is_count_model(self) -> bool:
        """Whether what is measured is counts."""
        return self.gene_likelihood != "normal"

    @torch.no_grad()
    def initialize(
        self,
        mean: Tensor,
        input_mean: Tensor,
        input_std: Tensor,
        library_mean: Tensor | None = None,
        largest_share: Tensor | None = None,
        covariates: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Set the scales of what the networks see and the decoder's bias from training data.

        Parameters
        ----------
        mean
            Mean of each gene, shape ``(n_genes,)``.
        input_mean, input_std
            Mean and standard deviation of what the encoder standardises, ``log1p(counts)`` or
            the features themselves, shape ``(n_genes,)``.
        library_mean, largest_share
            Mean size factor, and the largest ratio of a cell's counts to its size factor,
            scalars, where size factors are given.
        covariates
            Mean and standard deviation of each continuous covariate, where there are any.
        """
        if covariates is not None:
            self.covariate_mean.copy_(covariates[0])
            self.covariate_std.copy_(_scale(*covariates))
        self.encoder.input_mean.copy_(input_mean)
        self.encoder.input_std.copy_(
            input_std.clamp(min=1e-3) if self.is_count_model else _scale(input_mean, input_std)
        )
        if self.is_count_model:
            # Relative to the mean gene, a gene that was never seen starts at a ten-thousandth.
            share = mean / mean.mean() + 1e-4
            log_share = (share / share.sum()).log()
            if library_mean is not None and largest_share is not None:
                self.library_ceiling.copy_(_CEILING_MARGIN * largest_share)
                of_ceiling = mean.sum() / (library_mean * self.library_ceiling)
                log_share = log_share + torch.logit(of_ceiling)
            self.decoder.logits.bias.copy_(log_share)
            self.counts_per_cell = mean.sum().item()
        else:
            self.decoder.logits.bias.zero_()
            self.feature_mean.copy_(mean)
            self.feature_std.copy_(self.encoder.input_std)
            log_std = self.encoder.input_std.log()
            self.px_r.copy_(log_std if self.px_r.dim() == 1 else log_std.unsqueeze(1))
            self.counts_per_cell = torch.inf
        self.initialized = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("covariate_mean", "feature_mean"):  # unscaled in 0.1.0, which had them not
            mean, std = getattr(self, name), name.replace("mean", "std")
            state_dict.setdefault(prefix + name, torch.zeros_like(mean))
            state_dict.setdefault(prefix + std, torch.ones_like(mean))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- scvi-tools interface ------------------------------------------------------------------

    def _get_inference_input(
        self, tensors: dict[str, Tensor], full_forward_pass: bool = False
    ) -> dict[str, Any]:
        return {
            "x": tensors[REGISTRY_KEYS.X_KEY],
            "perturbation": tensors[SAMS_REGISTRY_KEYS.PERTURBATION_KEY],
            "dose": tensors[SAMS_REGISTRY_KEYS.DOSE_KEY],
            "library": tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY),
            **covariates_of(tensors),
            **self._context_of(tensors),
        }

    def _context_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Contexts of cells, for a model that knows several."""
        key = SAMS_REGISTRY_KEYS.CONTEXT_KEY
        return {"context": tensors[key].long()} if self.n_contexts > 1 else {}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "z": inference_outputs["z"],
            "library": inference_outputs["library"],
            "gene_effects": inference_outputs.get("gene_effects"),
            "side_input": inference_outputs.get("side_input"),
            **covariates_of(tensors),
            **self._context_of(tensors),
        }

    def _library(self, x: Tensor, library: Tensor | None) -> Tensor:
        """Library sizes: those given, the total counts, or one where there are no counts."""
        if library is not None:
            return library
        return x.sum(1, keepdim=True) if self.is_count_model else torch.ones_like(x[:, :1])

    def _encoder_covariates(
        self, batch_index: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        if not self.encode_covariates:
            return (), None
        return self._network_covariates(batch_index, cat_covs, cont_covs)

    def _network_covariates(
        self, batch_index: Tensor | None, cat_covs: Tensor | None, cont_covs: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """Covariates as the networks take them: continuous ones on the scale of training cells."""
        if cont_covs is not None:
            cont_covs = (cont_covs - self.covariate_mean) / self.covariate_std
        return network_covariates(batch_index, cat_covs, cont_covs)

    def _basal_mean(
        self, batch_index: Tensor | None, n_cells: int, context: Tensor | None = None
    ) -> Tensor | float:
        """Mean basal state of the batches and contexts of cells."""
        return 0.0

    # -- what a member of the family says ------------------------------------------------------

    @abstractmethod
    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the latent state of cells from its prior, shape ``(n_cells,)``."""

    @abstractmethod
    def sample_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Draw the basal states of cells from their posterior, shape ``(n_cells, n_latent)``."""

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
        doses: Doses,
        draws: GlobalDraws,
        one_draw_a_cell: bool = False,
    ) -> Observation:
        """Distribution of the genes of a population of cells under a condition.

        Parameters
        ----------
        population
            Basal states and covariates of cells.
        doses
            Doses of the condition, a single row.
        draws
            Draws of what all cells share.
        one_draw_a_cell
            Give the k-th draw to the k-th cell only.

        Returns
        -------
        scvi.distributions.NegativeBinomial or another observation
            Of shape ``(n_samples, n_cells, n_genes)``, or ``(n_cells, n_genes)`` with one draw a
            cell.
        """

    @abstractmethod
    def log_importance_weights(self, tensors: dict[str, Tensor], draws: GlobalDraws) -> Tensor:
        """Importance weights of cells, shape ``(n_particles, n_cells)``."""

    n_global_elements: int = 1
    """Numbers in one draw of what all cells share."""

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

    def drop_frozen_gradients(self) -> None:
        """Keep a step from moving perturbations that are frozen."""

    def observe(self, inference_outputs: dict[str, Any]) -> None:
        """Take in a minibatch for inference without gradients, where a member has it."""

    def to_latents(self, u: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of states in latents, from those in the networks' coordinates."""
        return (u, variance) if self.effects is None else self.effects.to_latents(u, variance)

    def to_network(self, z: Tensor) -> Tensor:
        """States in the networks' coordinates, from those in latents."""
        return z if self.effects is None else self.effects.to_network(z)

    # -- networks ------------------------------------------------------------------------------

    def forward(
        self,
        tensors: dict[str, Tensor],
        *,
        generative_kwargs: dict[str, Any] | None = None,
        compute_loss: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run inference, generation and, by default, the loss, as scvi-tools' modules do.

        A training step leaves out the distribution of what is measured: the loss is worked out
        from the logits, and nothing else reads it.

        Parameters
        ----------
        tensors
            A minibatch.
        generative_kwargs
            Arguments of :meth:`generative`.
        compute_loss
            Whether to return the loss too.
        **kwargs
            Further arguments of :meth:`scvi.module.base.BaseModuleClass.forward`.
        """
        if self.training and compute_loss:
            generative_kwargs = {"give_distribution": False} | (generative_kwargs or {})
        return super().forward(
            tensors, generative_kwargs=generative_kwargs, compute_loss=compute_loss, **kwargs
        )

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        context: Tensor | None = None,
        gene_effects: GeneEffects | None = None,
        side_input: Tensor | None = None,
        log_fold_change: Tensor | None = None,
        transform_batch: int | Tensor | None = None,
        give_distribution: bool = True,
    ) -> dict[str, Any]:
        """Decode latent states.

        Parameters
        ----------
        z
            Full states, shape ``(..., n_cells, n_latent)``.
        library
            Size factors, shape ``(n_cells, 1)``.
        batch_index, cat_covs, cont_covs
            Covariates, shapes ``(n_cells, 1)``, ``(n_cells, n_categorical)`` and
            ``(n_cells, n_continuous)``.
        context
            Contexts of cells, shape ``(n_cells, 1)``.
        gene_effects
            Log fold changes of single genes to add.
        side_input
            Doses that the decoder sees, shape ``(n_cells, n_perturbations)``.
        log_fold_change
            Log fold changes of all genes to add, shape ``(..., n_cells, n_genes)`` or one that
            broadcasts to it.
        transform_batch
            Decode all cells as if they came from this batch.
        give_distribution
            Whether to form ``px``.

        Returns
        -------
        ``px`` (distribution of what is measured; ``px.scale`` is normalised expression of
        counts), ``decoded`` and ``log_dispersion``, the first two of shape
        ``(..., n_cells, n_genes)``.
        """
        if transform_batch is not None and batch_index is not None:
            batch_index = torch.ones_like(batch_index) * transform_batch
        categories, cont = self._network_covariates(batch_index, cat_covs, cont_covs)
        u = z + self._basal_mean(batch_index, z.shape[-2], context)
        if side_input is not None:
            u = torch.cat([u, side_input.expand(*u.shape[:-1], side_input.shape[-1])], -1)
        decoded: Decoded = self.decoder(u, *categories, cont=cont)
        if not self.is_count_model:  # back in the units of the features
            logits = self.feature_mean + self.feature_std * decoded.logits
            decoded = decoded._replace(logits=logits)
        if self.use_size_factor_key:
            decoded = decoded._replace(ceiling=self.library_ceiling)
        if gene_effects is not None:
            decoded = decoded._replace(logits=add_gene_effects(decoded.logits, gene_effects))
        if log_fold_change is not None:
            decoded = decoded._replace(logits=decoded.logits + log_fold_change)
        log_dispersion = self._log_dispersion(batch_index)
        outputs = {"decoded": decoded, "log_dispersion": log_dispersion}
        if give_distribution:
            outputs["px"] = observation_distribution(
                self.gene_likelihood, decoded, log_dispersion, library
            )
        return outputs

    def _log_dispersion(self, batch_index: Tensor | None) -> Tensor:
        if self.px_r.dim() == 1:
            return self.px_r
        if batch_index is None:
            return self.px_r[:, 0]
        return self.px_r.T[batch_index.squeeze(-1).long()]

    def _log_likelihood(
        self,
        generative_outputs: dict[str, Any],
        x: Tensor,
        library: Tensor,
        nonzero: Tensor | None = None,
    ) -> Tensor:
        return observation_log_likelihood(
            self.gene_likelihood,
            generative_outputs["decoded"],
            generative_outputs["log_dispersion"],
            x,
            library,
            self.n_dispersion_cells if self.training else None,
            nonzero,
        )

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float | Tensor = 1.0,
    ) -> LossOutput:
        """Local part of the negative bound, a mean over the cells of a minibatch."""
        reconstruction = -self._log_likelihood(
            generative_outputs,
            tensors[REGISTRY_KEYS.X_KEY],
            inference_outputs["library"],
            tensors.get(SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY),
        )
        kl_basal = self.kl_basal(inference_outputs)
        if reconstruction.dim() > 1:  # particles
            reconstruction = reconstruction.mean(0)
        if kl_basal.dim() > 1:
            kl_basal = kl_basal.mean(0)
        return LossOutput(
            loss=(reconstruction + kl_weight * kl_basal).mean(),
            reconstruction_loss=reconstruction,
            kl_local={"kl_basal": kl_basal},
        )

    @torch.inference_mode()
    def sample(
        self,
        tensors: dict[str, Tensor],
        n_samples: int = 1,
        generative_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Draw counts from the posterior predictive distribution of given cells.

        Returns
        -------
        Shape ``(n_cells, n_genes)``, with a last axis of ``n_samples`` if there are several.
        """
        _, outputs = self.forward(
            tensors,
            inference_kwargs={"n_samples": n_samples},
            generative_kwargs=generative_kwargs,
            compute_loss=False,
        )
        counts = outputs["px"].sample()
        return counts.cpu() if n_samples == 1 else counts.permute(1, 2, 0).cpu()
