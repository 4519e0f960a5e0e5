from scvi_sams.metrics._effects import (
    effect_correlation,
    effect_correlation_by_condition,
    observed_average_treatment_effect,
    relative_squared_error,
)
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
    "relative_squared_error",
]
