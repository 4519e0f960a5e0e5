"""Torch modules: networks, global latents and their posteriors. No AnnData here."""

from scvi_sams.module._base_module import PerturbationVAEModule
from scvi_sams.module._closed_form_inference import ClosedFormInference
from scvi_sams.module._conditionalvae_module import ConditionalVAEModule
from scvi_sams.module._correlated_embedding import CorrelatedEmbedding
from scvi_sams.module._direct_effects import DirectEffects, GeneEffects
from scvi_sams.module._dose_response import HillDoseResponse, HillDraws
from scvi_sams.module._expected_expression import expected_log_normalized
from scvi_sams.module._global_draws import GlobalDraws
from scvi_sams.module._interactions import PairInteractions
from scvi_sams.module._mask_prior import MaskPrior
from scvi_sams.module._networks import Decoded, ExpressionDecoder, Potential, PotentialEncoder
from scvi_sams.module._perturbation_effects import PerturbationEffects
from scvi_sams.module._population import CellPopulation
from scvi_sams.module._samsvae_module import SAMSVAEModule

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
