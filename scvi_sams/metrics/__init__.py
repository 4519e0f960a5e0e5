from scvi_sams.metrics._baseline_ridge import (
    BilinearRidge,
)
from scvi_sams.metrics._baselines import (
    AdditiveEffects,
    Baseline,
    ConditionMean,
    MatchingMean,
    NearestMeasuredCombination,
    NoChange,
    PerturbedMean,
)
from scvi_sams.metrics._ceilings import (
    bootstrap_effects,
    split_half_effects,
)
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
from scvi_sams.metrics._matched_effects import (
    batch_matched_treatment_effect,
)
from scvi_sams.metrics._recovery import (
    EffectRecovery,
    MaskRecovery,
    effect_recovery,
    linear_r2,
    mask_recovery,
    mean_correlation_coefficient,
)
from scvi_sams.metrics._weighted_error import (
    differential_expression_weights,
    weighted_effect_error,
)

__all__ = [
    "AdditiveEffects",
    "Baseline",
    "BilinearRidge",
    "CollapseIndex",
    "ConditionMean",
    "EffectRecovery",
    "InteractionAgreement",
    "MaskRecovery",
    "MatchingMean",
    "NearestMeasuredCombination",
    "NoChange",
    "PerturbedMean",
    "batch_matched_treatment_effect",
    "bootstrap_effects",
    "collapse_index",
    "differential_expression_weights",
    "effect_correlation",
    "effect_correlation_by_condition",
    "effect_recovery",
    "interaction_agreement",
    "interaction_residuals",
    "interval_coverage",
    "linear_r2",
    "mask_recovery",
    "mean_correlation_coefficient",
    "observed_average_treatment_effect",
    "perturbation_discrimination",
    "perturbed_reference",
    "relative_squared_error",
    "split_half_effects",
    "weighted_effect_error",
]
