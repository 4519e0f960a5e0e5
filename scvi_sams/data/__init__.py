"""Registration of screens: what cells received, checks, and minibatches."""

from scvi_sams.data.checks import (
    check_confounding,
    check_counts,
    check_features,
    check_size_factor,
)
from scvi_sams.data.conditions import Conditions, ConditionsLike
from scvi_sams.data.field import PerturbationField
from scvi_sams.data.loader import DeviceCells, HostCells
from scvi_sams.data.matrices import CompactMatrix

__all__ = [
    "CompactMatrix",
    "Conditions",
    "ConditionsLike",
    "DeviceCells",
    "HostCells",
    "PerturbationField",
    "check_confounding",
    "check_counts",
    "check_features",
    "check_size_factor",
]
