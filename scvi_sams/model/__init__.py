"""Model classes: AnnData in, labelled tables out."""

from scvi_sams.model._samsvae import SAMSVAE

__all__ = ["SAMSVAE"]
