from scvi_sams.metrics._effect_agreement import (
    effect_correlation,
    effect_correlation_by_condition,
    perturbed_reference,
    relative_squared_error,
)
from scvi_sams.metrics._effects import observed_average_treatment_effect
from scvi_sams.metrics._recovery import (
    EffectRecovery,
    MaskRecovery,
    effect_recovery,
    mask_recovery,
)

__all__ = [
    "EffectRecovery",
    "MaskRecovery",
    "effect_correlation",
    "effect_correlation_by_condition",
    "effect_recovery",
    "mask_recovery",
    "observed_average_treatment_effect",
    "perturbed_reference",
    "relative_squared_error",
]
