"""Analyses of a fitted model: mechanisms, programmes, pairs, differential expression."""

from scvi_sams.tl._contexts import context_differences
from scvi_sams.tl._control_null import add_control_null
from scvi_sams.tl._detectable_effects import detectable_effects
from scvi_sams.tl._differential_expression import differential_expression
from scvi_sams.tl._gene_programs import gene_programs, top_genes
from scvi_sams.tl._guides import guides
from scvi_sams.tl._mechanisms import active_perturbations, mechanisms
from scvi_sams.tl._pairs import classify_pairs, pair_interactions, rank_unmeasured_pairs
from scvi_sams.tl._permuted_null import add_permuted_null
from scvi_sams.tl._plan_screen import plan_screen
from scvi_sams.tl._rank_perturbations import rank_perturbations
from scvi_sams.tl._read_outs import (
    direct_effects,
    dose_response,
    interaction_effects,
    mask_prior,
)
from scvi_sams.tl._similarity import perturbation_distance, perturbation_graph
from scvi_sams.tl._stability import match_latents, mechanism_stability
from scvi_sams.tl._unseen import predict_unseen
from scvi_sams.tl._write_results import write_results
from scvi_sams.tl.pair_statistics import PairThresholds

__all__ = [
    "PairThresholds",
    "active_perturbations",
    "add_control_null",
    "add_permuted_null",
    "classify_pairs",
    "context_differences",
    "detectable_effects",
    "differential_expression",
    "direct_effects",
    "dose_response",
    "gene_programs",
    "guides",
    "interaction_effects",
    "mask_prior",
    "match_latents",
    "mechanism_stability",
    "mechanisms",
    "pair_interactions",
    "perturbation_distance",
    "perturbation_graph",
    "plan_screen",
    "predict_unseen",
    "rank_perturbations",
    "rank_unmeasured_pairs",
    "top_genes",
    "write_results",
]
