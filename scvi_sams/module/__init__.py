"""Torch modules: networks, global latents and their posteriors. No AnnData here."""

from scvi_sams.module.conditionalvae import ConditionalVAEModule
from scvi_sams.module.samsvae import SAMSVAEModule

__all__ = ["ConditionalVAEModule", "SAMSVAEModule"]
