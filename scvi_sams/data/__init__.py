"""Registration of screens: what cells received, checks, and minibatches."""

from scvi_sams.data.checks import (
    check_confounding,
    check_counts,
    check_features,
    check_size_factor,
)
from scvi_sams.data.conditions import (
    ConditionDosage,
    Conditions,
    Dosage,
    align_dosage,
    dosage_from_conditions,
    dosage_from_labels,
    dosage_from_matrix,
)
from scvi_sams.data.field import PerturbationField
from scvi_sams.data.loader import DeviceCells, HostCells
from scvi_sams.data.matrices import CompactMatrix

__all__ = [
    "CompactMatrix",
    "ConditionDosage",
    "Conditions",
    "DeviceCells",
    "Dosage",
    "HostCells",
    "PerturbationField",
    "align_dosage",
    "check_confounding",
    "check_counts",
    "check_features",
    "check_size_factor",
    "dosage_from_conditions",
    "dosage_from_labels",
    "dosage_from_matrix",
]
