"""Torch modules: networks, global latents and their posteriors. No AnnData here."""

from scvi_sams.module._closed_form_inference import ClosedFormInference
from scvi_sams.module._expected_expression import expected_log_normalized
from scvi_sams.module._module import SAMSVAEModule
from scvi_sams.module._networks import ExpressionDecoder, Potential, PotentialEncoder
from scvi_sams.module._perturbation_effects import PerturbationEffects
from scvi_sams.module._population import CellPopulation

__all__ = [
    "CellPopulation",
    "ClosedFormInference",
    "ExpressionDecoder",
    "PerturbationEffects",
    "Potential",
    "PotentialEncoder",
    "SAMSVAEModule",
    "expected_log_normalized",
]
