"""Plots: each draws a table that a model or the evaluation returned, and returns the axes."""

from scvi_sams.pl._contexts import context_differences
from scvi_sams.pl._dose_response import dose_response
from scvi_sams.pl._effects import model_vs_observed_effects, pair_vs_additive_effects
from scvi_sams.pl._gene_program import gene_program
from scvi_sams.pl._guides import guide_efficacy, perturbed_probability
from scvi_sams.pl._heatmaps import effect_heatmap, mask_heatmap
from scvi_sams.pl._plan_screen import plan_screen
from scvi_sams.pl._scorecard import scorecard
from scvi_sams.pl._training_history import training_history
from scvi_sams.pl._volcano import volcano

__all__ = [
    "context_differences",
    "dose_response",
    "effect_heatmap",
    "gene_program",
    "guide_efficacy",
    "mask_heatmap",
    "model_vs_observed_effects",
    "pair_vs_additive_effects",
    "perturbed_probability",
    "plan_screen",
    "scorecard",
    "training_history",
    "volcano",
]
