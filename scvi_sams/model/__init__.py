"""Model classes: AnnData in, labelled tables out."""

from scvi_sams.model._conditionalvae import ConditionalVAE
from scvi_sams.model._cpavae import CPAVAE
from scvi_sams.model._samsvae import SAMSVAE
from scvi_sams.model._svaeplus import SVAEPlus

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"]
