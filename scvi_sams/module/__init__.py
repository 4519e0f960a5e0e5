"""Torch modules: networks, global latents and their posteriors. No AnnData here."""

from scvi_sams.module.base import CellPopulation, GlobalDraws, PerturbationVAEModule
from scvi_sams.module.closed_form import ClosedFormInference
from scvi_sams.module.conditionalvae import ConditionalVAEModule
from scvi_sams.module.doses import (
    DirectEffects,
    GeneEffects,
    HillDoseResponse,
    HillDraws,
    PairInteractions,
)
from scvi_sams.module.likelihood import expected_log_normalized
from scvi_sams.module.networks import Decoded, ExpressionDecoder, Potential, PotentialEncoder
from scvi_sams.module.posteriors import CorrelatedEmbedding, MaskPrior, PerturbationEffects
from scvi_sams.module.samsvae import SAMSVAEModule

__all__ = [
    "CellPopulation",
    "ClosedFormInference",
    "ConditionalVAEModule",
    "CorrelatedEmbedding",
    "Decoded",
    "DirectEffects",
    "ExpressionDecoder",
    "GeneEffects",
    "GlobalDraws",
    "HillDoseResponse",
    "HillDraws",
    "MaskPrior",
    "PairInteractions",
    "PerturbationEffects",
    "PerturbationVAEModule",
    "Potential",
    "PotentialEncoder",
    "SAMSVAEModule",
    "expected_log_normalized",
]
