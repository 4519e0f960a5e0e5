from ._checks import check_confounding, check_counts, check_features, check_size_factor
from ._conditions import ConditionDosage, Conditions, dosage_from_conditions
from ._dosage import Dosage, align_dosage, dosage_from_matrix
from ._field import PerturbationField
from ._labels import dosage_from_labels
from ._messages import unknown_perturbations

__all__ = [
    "ConditionDosage",
    "Conditions",
    "Dosage",
    "PerturbationField",
    "align_dosage",
    "check_confounding",
    "check_counts",
    "check_features",
    "check_size_factor",
    "dosage_from_conditions",
    "dosage_from_labels",
    "dosage_from_matrix",
    "unknown_perturbations",
]
