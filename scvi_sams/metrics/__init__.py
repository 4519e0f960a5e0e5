from scvi_sams.metrics._collapse import CollapseIndex, collapse_index
from scvi_sams.metrics._coverage import interval_coverage
from scvi_sams.metrics._discrimination import perturbation_discrimination
from scvi_sams.metrics._effect_agreement import (
    effect_correlation,
    effect_correlation_by_condition,
    perturbed_reference,
    relative_squared_error,
)
from scvi_sams.metrics._effects import observed_average_treatment_effect
from scvi_sams.metrics._interactions import (
    InteractionAgreement,
    interaction_agreement,
    interaction_residuals,
)
from scvi_sams.metrics._recovery import (
    EffectRecovery,
    MaskRecovery,
    effect_recovery,
    mask_recovery,
)
from scvi_sams.metrics._weighted_error import (
    differential_expression_weights,
    weighted_effect_error,
)

__all__ = [
    "CollapseIndex",
    "EffectRecovery",
    "InteractionAgreement",
    "MaskRecovery",
    "collapse_index",
    "differential_expression_weights",
    "effect_correlation",
    "effect_correlation_by_condition",
    "effect_recovery",
    "interaction_agreement",
    "interaction_residuals",
    "interval_coverage",
    "mask_recovery",
    "observed_average_treatment_effect",
    "perturbation_discrimination",
    "perturbed_reference",
    "relative_squared_error",
    "weighted_effect_error",
]
