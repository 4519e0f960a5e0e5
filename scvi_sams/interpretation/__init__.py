"""What latents, effects and pairs mean: gene programmes, gene sets, kinds of interactions."""

from scvi_sams.interpretation._differential_expression import differential_expression_table
from scvi_sams.interpretation._enrichment import gene_set_enrichment
from scvi_sams.interpretation._gene_programs import (
    EffectSummary,
    summarize_effects,
    top_genes,
    total_variance_share,
)
from scvi_sams.interpretation._gene_sets import (
    GeneSets,
    MeasuredGeneSets,
    measured_gene_sets,
    read_gene_sets,
)
from scvi_sams.interpretation._pair_classes import (
    PAIR_CLASSES,
    PairThresholds,
    classify_pairs,
    pair_class,
)
from scvi_sams.interpretation._pair_draws import Surprise, expected_surprise, pair_summary
from scvi_sams.interpretation._pair_regression import PairRegression, regress_pair

__all__ = [
    "PAIR_CLASSES",
    "EffectSummary",
    "GeneSets",
    "MeasuredGeneSets",
    "PairRegression",
    "PairThresholds",
    "Surprise",
    "classify_pairs",
    "differential_expression_table",
    "expected_surprise",
    "gene_set_enrichment",
    "measured_gene_sets",
    "pair_class",
    "pair_summary",
    "read_gene_sets",
    "regress_pair",
    "summarize_effects",
    "top_genes",
    "total_variance_share",
]
