"""The rows of the ablation of Bereket and Karaletsos (2023), and what this package adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAMILY", "make_model"]

# The paper's correlated guide of the basal state is a network of counts and shift: "amortized".
_MEAN_FIELD = {"basal_posterior": "mean_field", "embedding_posterior": "mean_field"}
_BASAL = {"basal_posterior": "amortized", "embedding_posterior": "mean_field"}
_EMBEDDING = {"basal_posterior": "mean_field", "embedding_posterior": "correlated"}
_BOTH = {"basal_posterior": "amortized", "embedding_posterior": "correlated"}
_SPIKE_AND_SLAB = {
    "basal_posterior": "amortized",
    "embedding_posterior": "spike_and_slab",
    "global_inference": "gradient",
}
_PAPER = {"direct_effects": False}

FAMILY: Mapping[str, tuple[type, dict[str, Any]]] = {
    "ConditionalVAE": (ConditionalVAE, {}),
    "SVAEPlus": (SVAEPlus, {}),
    "CPAVAE mean-field": (CPAVAE, _PAPER | _MEAN_FIELD),
    "CPAVAE correlated basal": (CPAVAE, _PAPER | _BASAL),
    "SAMSVAE mean-field": (SAMSVAE, _PAPER | _MEAN_FIELD),
    "SAMSVAE correlated embedding": (SAMSVAE, _PAPER | _EMBEDDING),
    "SAMSVAE correlated basal": (SAMSVAE, _PAPER | _BASAL),
    "SAMSVAE both correlated": (SAMSVAE, _PAPER | _BOTH),
    "SAMSVAE spike and slab": (SAMSVAE, _PAPER | _SPIKE_AND_SLAB),
    "CPAVAE closed form": (CPAVAE, _PAPER),
    "SAMSVAE closed form": (SAMSVAE, _PAPER),
    "SAMSVAE default": (SAMSVAE, {}),
}
"""Class and arguments of each row, by name; all else is as it is by default."""


def make_model(row: str, adata: Any, setup: Mapping[str, Any], **kwargs: Any) -> Any:
    """Set up an AnnData for a row of the table and make its model."""
    model_class, arguments = FAMILY[row]
    model_class.setup_anndata(adata, **setup)
    return model_class(adata, **(arguments | kwargs))
