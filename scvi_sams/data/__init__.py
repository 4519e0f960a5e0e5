"""Registration of screens: what cells received, checks, and minibatches."""

from scvi_sams.data.conditions import Conditions, ConditionsLike

__all__ = ["Conditions", "ConditionsLike"]
