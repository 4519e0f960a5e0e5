"""Model classes: AnnData in, labelled tables out."""

from scvi_sams.model.family import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model.samsvae import SAMSVAE

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"]
