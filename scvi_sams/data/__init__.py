from ._cell_datasets import DeviceCells, HostCells
from ._cells_used import CELLS_USED_UNS_KEY, record_cells_used, select_genes
from ._checks import check_confounding, check_counts, check_features, check_size_factor
from ._compact_matrix import CompactMatrix
from ._condition_splits import split_conditions, split_perturbations
from ._conditions import ConditionDosage, Conditions, dosage_from_conditions
from ._dosage import Dosage, align_dosage, dosage_from_matrix
from ._field import PerturbationField
from ._labels import dosage_from_labels
from ._leakage import check_leakage
from ._messages import unknown_perturbations
from ._pair_splits import count_seen_perturbations, split_pairs
from ._paper_splits import split_pairs_by_training_cells, split_pairs_out_of_distribution
from ._split_column import SPLIT_LABELS, SPLITS_UNS_KEY, HeldOutBy, split_indices
from ._splits import split_batches, split_cells, split_doses

__all__ = [
    "CELLS_USED_UNS_KEY",
    "CompactMatrix",
    "ConditionDosage",
    "Conditions",
    "DeviceCells",
    "Dosage",
    "HeldOutBy",
    "HostCells",
    "PerturbationField",
    "SPLITS_UNS_KEY",
    "SPLIT_LABELS",
    "align_dosage",
    "check_confounding",
    "check_counts",
    "check_features",
    "check_leakage",
    "check_size_factor",
    "count_seen_perturbations",
    "dosage_from_conditions",
    "dosage_from_labels",
    "dosage_from_matrix",
    "record_cells_used",
    "select_genes",
    "split_batches",
    "split_cells",
    "split_conditions",
    "split_doses",
    "split_indices",
    "split_pairs",
    "split_pairs_by_training_cells",
    "split_pairs_out_of_distribution",
    "split_perturbations",
    "unknown_perturbations",
]
