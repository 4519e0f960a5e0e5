"""Registration of screens: what cells received, checks, and minibatches."""

from scvi_sams.data.conditions import Conditions, ConditionsLike
from scvi_sams.data.guide_inputs import (
    guides_from_features,
    guides_from_mudata,
    guides_from_table,
)
from scvi_sams.data.joined import join_files

__all__ = [
    "Conditions",
    "ConditionsLike",
    "guides_from_features",
    "guides_from_mudata",
    "guides_from_table",
    "join_files",
]
