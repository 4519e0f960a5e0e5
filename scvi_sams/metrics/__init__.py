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
from scvi_sams.metrics._cell_eval import (
    CellEvalExport,
    differential_expression_overlap,
    export_cell_eval,
)
from scvi_sams.metrics._collapse import CollapseIndex, collapse_index
from scvi_sams.metrics._coverage import interval_coverage
from scvi_sams.metrics._differential_expression import (
    differential_expression_agreement,
    observed_differential_expression,
)
from scvi_sams.metrics._discrimination import perturbation_discrimination
from scvi_sams.metrics._distribution_distance import (
    distribution_distances,
    energy_distance,
    maximum_mean_discrepancy,
    median_bandwidths,
)
from scvi_sams.metrics._effect_agreement import (
    effect_correlation,
    effect_correlation_by_condition,
    perturbed_reference,
    relative_squared_error,
)
from scvi_sams.metrics._effects import observed_average_treatment_effect
from scvi_sams.metrics._embedding import ExpressionPCA
from scvi_sams.metrics._interactions import (
    InteractionAgreement,
    interaction_agreement,
    interaction_residuals,
)
from scvi_sams.metrics._matched_effects import (
    batch_matched_treatment_effect,
)
from scvi_sams.metrics._pathways import PathwayAccuracy, pathway_accuracy
from scvi_sams.metrics._recovery import (
    EffectRecovery,
    MaskRecovery,
    effect_recovery,
    linear_r2,
    mask_recovery,
    mean_correlation_coefficient,
)
from scvi_sams.metrics._score_predictions import score_predictions
from scvi_sams.metrics._scorecard import scorecard
from scvi_sams.metrics._scorecard_report import Scorecard
from scvi_sams.metrics._weighted_error import (
    differential_expression_weights,
    weighted_effect_error,
)

__all__ = [
    "AdditiveEffects",
    "Baseline",
    "BilinearRidge",
    "CellEvalExport",
    "CollapseIndex",
    "ConditionMean",
    "EffectRecovery",
    "ExpressionPCA",
    "InteractionAgreement",
    "MaskRecovery",
    "MatchingMean",
    "NearestMeasuredCombination",
    "NoChange",
    "PathwayAccuracy",
    "PerturbedMean",
    "Scorecard",
    "batch_matched_treatment_effect",
    "bootstrap_effects",
    "collapse_index",
    "differential_expression_agreement",
    "differential_expression_overlap",
    "differential_expression_weights",
    "distribution_distances",
    "effect_correlation",
    "effect_correlation_by_condition",
    "effect_recovery",
    "energy_distance",
    "export_cell_eval",
    "interaction_agreement",
    "interaction_residuals",
    "interval_coverage",
    "linear_r2",
    "mask_recovery",
    "maximum_mean_discrepancy",
    "mean_correlation_coefficient",
    "median_bandwidths",
    "observed_average_treatment_effect",
    "observed_differential_expression",
    "pathway_accuracy",
    "perturbation_discrimination",
    "perturbed_reference",
    "relative_squared_error",
    "score_predictions",
    "scorecard",
    "split_half_effects",
    "weighted_effect_error",
]
