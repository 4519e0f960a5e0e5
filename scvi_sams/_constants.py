"""Names shared by registration, modules and training."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SAMS_REGISTRY_KEYS"]


class _SAMSRegistryKeys(NamedTuple):
    PERTURBATION_KEY: str = "perturbation"
    DOSE_KEY: str = "dose"
    """Registry key, and key in every minibatch, of the dosage matrix (cells x perturbations)."""
    DOSAGE_OBSM_KEY: str = "_scvi_perturbation_dosage"
    """Where `setup_anndata` writes the dosage matrix (CSR) in `adata.obsm`."""
    NONZERO_COUNTS_KEY: str = "nonzero_counts"
    """Key in a minibatch of the positions of counts that are not zero, cells x genes flattened."""


SAMS_REGISTRY_KEYS = _SAMSRegistryKeys()
