"""Held-out evaluation: splits, baselines, scores and the scorecard, for any model."""

from scvi_sams.evaluation._agreement import (
    CollapseIndex,
    collapse_index,
    differential_expression_weights,
    effect_correlation,
    effect_correlation_by_condition,
    interval_coverage,
    perturbation_discrimination,
    perturbed_reference,
    relative_squared_error,
    weighted_effect_error,
)
from scvi_sams.evaluation._baselines import (
    AdditiveEffects,
    Baseline,
    BilinearRidge,
    ConditionMean,
    MatchingMean,
    NearestMeasuredCombination,
    NoChange,
    PerturbedMean,
)
from scvi_sams.evaluation._ceilings import (
    bootstrap_effects,
    split_half_effects,
)
from scvi_sams.evaluation._cell_eval import (
    CellEvalExport,
    differential_expression_overlap,
    export_cell_eval,
)
from scvi_sams.evaluation._differential_expression import (
    differential_expression_agreement,
    observed_differential_expression,
)
from scvi_sams.evaluation._distribution import (
    ExpressionPCA,
    distribution_distances,
    energy_distance,
    maximum_mean_discrepancy,
    median_bandwidths,
)
from scvi_sams.evaluation._interactions import (
    InteractionAgreement,
    interaction_agreement,
    interaction_residuals,
)
from scvi_sams.evaluation._leakage import (
    CELLS_USED_UNS_KEY,
    check_leakage,
    record_cells_used,
    select_genes,
)
from scvi_sams.evaluation._observed import (
    batch_matched_treatment_effect,
    observed_average_treatment_effect,
)
from scvi_sams.evaluation._pathways import PathwayAccuracy, pathway_accuracy
from scvi_sams.evaluation._recovery import (
    EffectRecovery,
    MaskRecovery,
    effect_recovery,
    linear_r2,
    mask_recovery,
    mean_correlation_coefficient,
)
from scvi_sams.evaluation._score_predictions import score_predictions
from scvi_sams.evaluation._scorecard import scorecard
from scvi_sams.evaluation._scorecard_report import Scorecard
from scvi_sams.evaluation._splits import (
    SPLIT_LABELS,
    SPLITS_UNS_KEY,
    HeldOutBy,
    count_seen_perturbations,
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_indices,
    split_pairs,
    split_pairs_by_training_cells,
    split_pairs_out_of_distribution,
    split_perturbations,
)

__all__ = [
    "AdditiveEffects",
    "Baseline",
    "BilinearRidge",
    "CELLS_USED_UNS_KEY",
    "CellEvalExport",
    "CollapseIndex",
    "ConditionMean",
    "EffectRecovery",
    "ExpressionPCA",
    "HeldOutBy",
    "InteractionAgreement",
    "MaskRecovery",
    "MatchingMean",
    "NearestMeasuredCombination",
    "NoChange",
    "PathwayAccuracy",
    "PerturbedMean",
    "SPLITS_UNS_KEY",
    "SPLIT_LABELS",
    "Scorecard",
    "batch_matched_treatment_effect",
    "bootstrap_effects",
    "check_leakage",
    "collapse_index",
    "count_seen_perturbations",
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
    "record_cells_used",
    "relative_squared_error",
    "score_predictions",
    "scorecard",
    "select_genes",
    "split_batches",
    "split_cells",
    "split_conditions",
    "split_doses",
    "split_half_effects",
    "split_indices",
    "split_pairs",
    "split_pairs_by_training_cells",
    "split_pairs_out_of_distribution",
    "split_perturbations",
    "weighted_effect_error",
]
