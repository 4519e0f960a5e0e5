"""Registration of screens: what cells received, checks, and minibatches."""

from scvi_sams.data.conditions import Conditions, ConditionsLike
from scvi_sams.data.joined import join_files

__all__ = ["Conditions", "ConditionsLike", "join_files"]
