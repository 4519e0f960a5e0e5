"""The conditional variational autoencoder, without any structure of perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.module.base import auto_move_data
from torch.distributions import Normal

from scvi_sams.module.base import GlobalDraws, PerturbationVAEModule
from scvi_sams.module.doses import Doses

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_sams.module.base import CellPopulation
    from scvi_sams.module.likelihood import Observation


class ConditionalVAEModule(PerturbationVAEModule):
    r"""VAE whose encoder and decoder see the doses of a cell.

    :math:`z_i \sim \mathrm{Normal}(0, I)`, and the mean of the counts is
    :math:`l_i \, \mathrm{softmax}_g f(z_i, d_i, s_i)`. Perturbations act through the networks
    alone: there are no masks, embeddings or shifts to look at.

    Parameters
    ----------
    n_input, n_perturbations
        Number of genes and of perturbations.
    **kwargs
        Arguments of :class:`~scvi_sams.module.base.PerturbationVAEModule`.
    """

    def __init__(self, n_input: int, n_perturbations: int, **kwargs: Any) -> None:
        super().__init__(
            n_input,
            n_perturbations,
            basal_posterior="mean_field",
            n_side_input=n_perturbations,
            **kwargs,
        )

    @auto_move_data
    def inference(
        self,
        x: Tensor,
        perturbation: Tensor,
        dose: Tensor,
        library: Tensor | None = None,
        batch_index: Tensor | None = None,
        cat_covs: Tensor | None = None,
        cont_covs: Tensor | None = None,
        n_samples: int = 1,
    ) -> dict[str, Any]:
        """Infer the latent state of cells, as :meth:`SAMSVAEModule.inference` does."""
        side_input = self._dense(Doses(perturbation.long(), dose))
        categories, cont = self._encoder_covariates(batch_index, cat_covs, cont_covs)
        potential = self.encoder(x, *categories, cont=cont, side_input=side_input)
        qz = Normal(potential.location, potential.variance.sqrt(), validate_args=False)
        return {
            "z": qz.rsample() if n_samples == 1 else qz.rsample((n_samples,)),
            "qz": qz,
            "library": self._library(x, library),
            "side_input": side_input,
        }

    def kl_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Divergence of the state of cells from its prior, shape ``(n_cells,)``."""
        qz = inference_outputs["qz"]
        variance = qz.variance
        return 0.5 * (qz.loc.square() + variance - 1 - variance.log()).sum(-1)

    def sample_basal(self, inference_outputs: dict[str, Any]) -> Tensor:
        """Draw the states of cells, shape ``(n_cells, n_latent)``."""
        return inference_outputs["qz"].sample()

    def sample_globals(self, n_samples: int, perturbations: Tensor | None = None) -> GlobalDraws:
        """Nothing is drawn: networks are point estimates."""
        return GlobalDraws(n_samples)

    def decode_condition(
        self,
        population: CellPopulation,
        doses: Doses,
        draws: GlobalDraws,
        one_draw_a_cell: bool = False,
    ) -> Observation:
        """Distribution of the genes of a population of cells under a condition."""
        basal = population.basal if one_draw_a_cell else population.basal.unsqueeze(0)
        return self.generative(basal, side_input=self._dense(doses), **population.covariates())[
            "px"
        ]

    @torch.inference_mode()
    def log_importance_weights(self, tensors: dict[str, Tensor], draws: GlobalDraws) -> Tensor:
        """``log p(x | z, d) + log p(z) - log q(z | x, d)``, shape ``(n_particles, n_cells)``."""
        inputs = self._get_inference_input(tensors)
        device = self.px_r.device
        inputs = {key: None if v is None else v.to(device) for key, v in inputs.items()}
        outputs = self.inference(**inputs)
        qz = outputs["qz"]
        noise = torch.randn(draws.n_samples, *qz.loc.shape, device=device, dtype=qz.loc.dtype)
        z = qz.loc + qz.scale * noise
        covariates = {key: inputs[key] for key in ("batch_index", "cat_covs", "cont_covs")}
        decoded = self.generative(
            z, outputs["library"], side_input=outputs["side_input"], **covariates
        )
        log_ratio = 0.5 * (noise.square() - z.square() + qz.variance.log()).sum(-1)
        return self._log_likelihood(decoded, inputs["x"], outputs["library"]) + log_ratio

    def _dense(self, doses: Doses) -> Tensor:
        """Doses of all perturbations, shape ``(n_cells, n_perturbations)``."""
        dense = doses.dose.new_zeros(len(doses.perturbation), self.n_perturbations)
        return dense.scatter_add(1, doses.perturbation, doses.dose)
