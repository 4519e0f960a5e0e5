"""Which perturbations move which latents, with error control, and which are alike."""

from scvi_sams.mechanisms._control_null import (
    NULL_PREFIX,
    add_control_null,
    null_perturbations,
)
from scvi_sams.mechanisms._effect_posterior import (
    effect_interval,
    local_false_sign_rate,
)
from scvi_sams.mechanisms._false_discovery import bayesian_q_value, calibrated_q_value
from scvi_sams.mechanisms._similarity import (
    effect_distance,
    hierarchical_clusters,
    mask_distance,
    perturbation_graph,
)
from scvi_sams.mechanisms._stability import match_latents, mechanism_stability

__all__ = [
    "NULL_PREFIX",
    "add_control_null",
    "bayesian_q_value",
    "calibrated_q_value",
    "effect_distance",
    "effect_interval",
    "hierarchical_clusters",
    "local_false_sign_rate",
    "mask_distance",
    "match_latents",
    "mechanism_stability",
    "null_perturbations",
    "perturbation_graph",
]
