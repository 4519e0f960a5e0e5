"""Held-out evaluation: splits, baselines, scores and the scorecard, for any model."""

from scvi_sams.evaluation._baselines import BASELINES
from scvi_sams.evaluation._cell_eval import export_cell_eval
from scvi_sams.evaluation._distances import distribution_distance
from scvi_sams.evaluation._leakage import check_leakage
from scvi_sams.evaluation._measures import (
    collapse_index,
    effect_agreement,
    effect_correlation,
    interaction_residuals,
    interval_coverage,
    perturbation_discrimination,
)
from scvi_sams.evaluation._observed import differential_expression_weights, observed_effects
from scvi_sams.evaluation._recovery import latent_recovery, mask_recovery
from scvi_sams.evaluation._report import Scorecard
from scvi_sams.evaluation._scorecard import Predictor, score_predictions, scorecard
from scvi_sams.evaluation._splits import (
    count_seen_perturbations,
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_indices,
    split_pairs,
    split_perturbations,
)

__all__ = [
    "BASELINES",
    "Predictor",
    "Scorecard",
    "check_leakage",
    "collapse_index",
    "count_seen_perturbations",
    "differential_expression_weights",
    "distribution_distance",
    "effect_agreement",
    "effect_correlation",
    "export_cell_eval",
    "interaction_residuals",
    "interval_coverage",
    "latent_recovery",
    "mask_recovery",
    "observed_effects",
    "perturbation_discrimination",
    "score_predictions",
    "scorecard",
    "split_batches",
    "split_cells",
    "split_conditions",
    "split_doses",
    "split_indices",
    "split_pairs",
    "split_perturbations",
]
