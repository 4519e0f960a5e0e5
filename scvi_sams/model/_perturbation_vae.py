"""What the model classes of the family share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.model.base import ArchesMixin, BaseModelClass, RNASeqMixin, VAEMixin

from scvi_sams._exceptions import ScreenError, unknown_perturbations
from scvi_sams.data.field import registered_dosage
from scvi_sams.data.loader import OrderedAnnDataLoader
from scvi_sams.model._differential_expression_mixin import DifferentialExpressionMixin
from scvi_sams.model._effects_mixin import EffectsMixin
from scvi_sams.model._latent_mixin import LatentMixin
from scvi_sams.model._likelihood_mixin import LikelihoodMixin
from scvi_sams.model._mechanisms_mixin import MechanismsMixin
from scvi_sams.model._pairs_mixin import PairsMixin
from scvi_sams.model._query_mixin import QueryMixin
from scvi_sams.model._results_mixin import ResultsMixin
from scvi_sams.model._setup_mixin import SetupMixin
from scvi_sams.model._similarity_mixin import SimilarityMixin
from scvi_sams.model._training_mixin import SAMSTrainingMixin
from scvi_sams.model._treatment_effect_mixin import TreatmentEffectMixin
from scvi_sams.module.likelihood import Dispersion, GeneLikelihood
from scvi_sams.module.networks import BasalPosterior
from scvi_sams.module.posteriors import EmbeddingPosterior

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scvi_sams.module.base import PerturbationVAEModule

__all__ = ["PerturbationVAE"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "gene_likelihood": get_args(GeneLikelihood),
    "dispersion": get_args(Dispersion),
    "global_inference": ("closed_form", "gradient"),
    "basal_posterior": get_args(BasalPosterior),
    "embedding_posterior": get_args(EmbeddingPosterior),
    "dose_response": ("linear", "hill"),
}


class PerturbationVAE(
    ResultsMixin,
    DifferentialExpressionMixin,
    PairsMixin,
    LatentMixin,
    SimilarityMixin,
    MechanismsMixin,
    EffectsMixin,
    TreatmentEffectMixin,
    LikelihoodMixin,
    SetupMixin,
    QueryMixin,
    SAMSTrainingMixin,
    RNASeqMixin,
    VAEMixin,
    ArchesMixin,
    BaseModelClass,
):
    """Base of the model classes: registration, training, prediction and evaluation."""

    _module_cls: type[PerturbationVAEModule]
    _data_loader_cls = OrderedAnnDataLoader

    def _create_module(self, **module_kwargs: Any) -> None:
        """Make the module for the registered data.

        Raises
        ------
        ValueError
            If a setting is unknown.
        ScreenError
            If a likelihood of counts is asked for data that were registered as something else.
        """
        for name, choices in _CHOICES.items():
            value = module_kwargs.get(name, choices[0])
            if value not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={value!r} is unknown; use one of {known}.")
        is_count_data = self.registry["setup_args"].get("is_count_data", True)
        gene_likelihood = module_kwargs["gene_likelihood"]
        if gene_likelihood != "normal" and not is_count_data:
            raise ScreenError(
                f"gene_likelihood={gene_likelihood!r} is for counts, and the data were set up "
                "with is_count_data=False; use gene_likelihood='normal', or set up the counts."
            )
        self._module_kwargs = module_kwargs
        stats = self.summary_stats
        n_cats_per_cov = None
        if stats.get("n_extra_categorical_covs", 0) > 0:
            n_cats_per_cov = list(self._field_state(REGISTRY_KEYS.CAT_COVS_KEY)["n_cats_per_key"])
        self.module = self._module_cls(
            n_input=stats.n_vars,
            n_perturbations=stats.n_perturbation,
            n_batch=stats.n_batch,
            n_cats_per_cov=n_cats_per_cov,
            n_continuous_cov=stats.get("n_extra_continuous_covs", 0),
            use_size_factor_key=self.registry["setup_args"].get("size_factor_key") is not None,
            **module_kwargs,
        )
        shown = {k: v for k, v in module_kwargs.items() if k not in {"targets", "interactions"}}
        self._model_summary_string = (
            f"{type(self).__name__} with {stats.n_perturbation} perturbations, "
            + ", ".join(f"{name}={value!r}" for name, value in shown.items())
        )

    def _target_genes(self, direct_effects: bool | Mapping[str, str] | None) -> list[int] | None:
        """Index of the gene that each perturbation targets, -1 for none; ``None`` if none does.

        Raises
        ------
        ScreenError
            If direct effects are asked for where there are no targets.
        """
        if direct_effects is False:
            return None
        genes = {str(gene): index for index, gene in enumerate(self.get_var_names())}
        names = self.perturbation_names
        if direct_effects is None or direct_effects is True:
            targets = [genes.get(name, -1) for name in names]
            if max(targets) >= 0:
                return targets
            if direct_effects is None:
                return None
            raise ScreenError(
                "direct_effects=True, but no perturbation is named like a gene of "
                "adata.var_names; give a dict of perturbations to genes."
            )
        target_of = {str(name): str(gene) for name, gene in direct_effects.items()}
        if unknown := [name for name in target_of if name not in names]:
            raise unknown_perturbations(unknown, names)
        if absent := [gene for gene in target_of.values() if gene not in genes]:
            raise ScreenError(
                "direct_effects names genes that are not in adata.var_names: "
                f"{', '.join(absent[:5])}. Correct or leave them out."
            )
        return [genes[target_of[name]] if name in target_of else -1 for name in names]

    def _reference_doses(self, dose_response: str) -> list[float] | None:
        """Median dose of each perturbation, about which the prior of its EC50 lies."""
        if dose_response != "hill":
            return None
        medians = [1.0] * len(self.perturbation_names)
        if self.adata is None:
            return medians
        dosage = registered_dosage(self.adata_manager).tocsc()
        for column in range(dosage.shape[1]):
            doses = dosage.data[dosage.indptr[column] : dosage.indptr[column + 1]]
            if len(doses):
                medians[column] = float(np.median(doses))
        return medians
