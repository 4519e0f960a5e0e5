"""Names shared by registration, modules and training."""

from __future__ import annotations

from typing import NamedTuple


class _SAMSRegistryKeys(NamedTuple):
    PERTURBATION_KEY: str = "perturbation"
    """Registry key, and key in every minibatch, of the perturbations of each cell by position.

    Cells x K, with K the most of any cell; a cell with fewer has dose 0 of the first in the rest.
    """
    DOSE_KEY: str = "dose"
    """Registry key, and key in every minibatch, of their doses, cells x K."""
    CONTEXT_KEY: str = "context"
    """Registry key, and key in every minibatch, of the context of each cell, cells x 1."""
    INDEX_OBSM_KEY: str = "_scvi_perturbation_index"
    """Where `setup_anndata` writes the positions in `adata.obsm`."""
    DOSE_OBSM_KEY: str = "_scvi_perturbation_dose"
    """Where `setup_anndata` writes the doses in `adata.obsm`."""
    GUIDE_KEY: str = "guide"
    """Registry key, and key in every minibatch, of their guides, cells x K: from 1, 0 for none."""
    GUIDE_OBSM_KEY: str = "_scvi_guide"
    """Where `setup_anndata` writes the guides in `adata.obsm`."""
    NONZERO_COUNTS_KEY: str = "nonzero_counts"
    """Key in a minibatch of the positions of counts that are not zero, cells x genes flattened."""


SAMS_REGISTRY_KEYS = _SAMSRegistryKeys()
