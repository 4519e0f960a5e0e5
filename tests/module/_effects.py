"""Effects of known truth, and what they are compared with."""

from __future__ import annotations

import torch

from scvi_sams.module.posteriors import MaskPrior, SpikeAndSlab

__all__ = ["make_effects", "match_columns", "random_rotation", "sparse_matrix"]


def sparse_matrix(n_rows: int, n_columns: int) -> torch.Tensor:
    """One entry in ten is not zero, and one more in every row."""
    matrix = torch.randn(n_rows, n_columns, dtype=torch.float64)
    matrix = matrix.sign() * (0.7 + matrix.abs())
    matrix *= torch.rand(n_rows, n_columns) < 0.1
    place = torch.arange(n_rows)
    matrix[place, place % n_columns] = 1.5
    return matrix


def random_rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def match_columns(columns: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cosine of each true column with the column found for it, none of which serves twice."""
    cosine = torch.nn.functional.normalize(truth, dim=0).T @ torch.nn.functional.normalize(
        columns, dim=0
    )
    best = cosine.abs().argmax(1)
    assert len(best.unique()) == truth.shape[1]
    return cosine.abs().amax(1)


def make_effects(
    n_perturbations: int, n_latent: int, mask_prior: float = 0.02, **kwargs
) -> SpikeAndSlab:
    prior = MaskPrior(n_perturbations, n_latent, mask_prior)
    return SpikeAndSlab(prior, **({"trainable": False, "background_scale": "learned"} | kwargs))
