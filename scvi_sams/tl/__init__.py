"""Analyses of a fitted model: mechanisms, programmes, pairs, differential expression."""

from scvi_sams.tl._control_null import (
    NULL_PREFIX,
    add_control_null,
    null_perturbations,
)
from scvi_sams.tl._differential_expression import differential_expression_table
from scvi_sams.tl._gene_programs import (
    EffectSummary,
    summarize_effects,
    top_genes,
    total_variance_share,
)
from scvi_sams.tl._gene_sets import (
    GeneSets,
    MeasuredGeneSets,
    gene_set_enrichment,
    measured_gene_sets,
    read_gene_sets,
)
from scvi_sams.tl._mechanisms import (
    bayesian_q_value,
    calibrated_q_value,
    effect_interval,
    local_false_sign_rate,
)
from scvi_sams.tl._pairs import (
    PAIR_CLASSES,
    PairRegression,
    PairThresholds,
    Surprise,
    classify_pairs,
    expected_surprise,
    pair_class,
    pair_summary,
    regress_pair,
)
from scvi_sams.tl._similarity import (
    effect_distance,
    hierarchical_clusters,
    mask_distance,
    perturbation_graph,
)
from scvi_sams.tl._stability import match_latents, mechanism_stability

__all__ = [
    "EffectSummary",
    "GeneSets",
    "MeasuredGeneSets",
    "NULL_PREFIX",
    "PAIR_CLASSES",
    "PairRegression",
    "PairThresholds",
    "Surprise",
    "add_control_null",
    "bayesian_q_value",
    "calibrated_q_value",
    "classify_pairs",
    "differential_expression_table",
    "effect_distance",
    "effect_interval",
    "expected_surprise",
    "gene_set_enrichment",
    "hierarchical_clusters",
    "local_false_sign_rate",
    "mask_distance",
    "match_latents",
    "measured_gene_sets",
    "mechanism_stability",
    "null_perturbations",
    "pair_class",
    "pair_summary",
    "perturbation_graph",
    "read_gene_sets",
    "regress_pair",
    "summarize_effects",
    "top_genes",
    "total_variance_share",
]
