"""Linear regression from the embedding of the perturbed gene to the change of every gene."""

from __future__ import annotations

__all__ = ["BilinearRidge"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from scvi_sams.metrics._baselines import Baseline, Prediction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass
class BilinearRidge(Baseline):
    r"""Bilinear ridge regression: genes and perturbations embedded by principal components.

    With :math:`Y` the training effects (genes x conditions), :math:`b` its means over conditions
    and :math:`G` (genes x k) the scores of the genes on the first :math:`k` principal components
    of :math:`Y - b`,

    .. math::

        \hat\Delta_c = G K p_c + b, \qquad
        K = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P (P^\top P + \lambda I)^{-1},

    where :math:`p_c` is the row of :math:`G` of the gene that the condition perturbs, the sum of
    rows for several, and :math:`P` (conditions x k) has those of the training conditions. It
    predicts perturbations that were never measured, from how their own gene responds to others.

    A condition with a part that is not among the genes has no embedding: it is left out of the
    regression, and its prediction is :math:`b`, the mean of all conditions.

    Parameters
    ----------
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.
    n_components
        Principal components :math:`k`; fewer where the table has a lower rank.
    ridge_penalty
        Penalty :math:`\lambda` on both sides.
    perturbed_genes
        Gene that each perturbation acts on, where it is not named like it.

    Notes
    -----
    Ahlmann-Eltze, Huber and Anders (Nature Methods 2025), with their 10 components and penalty of
    0.1. They predict single perturbations; that the embedding of a combination is the sum of those
    of its parts is our extension.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from scvi_sams.metrics import BilinearRidge
    >>> genes = ["A", "B", "C"]
    >>> effects = pd.DataFrame(np.eye(3)[:2], index=["A", "B"], columns=genes)
    >>> predicted = BilinearRidge().fit(effects).predict(["C", "unmeasured"])
    >>> predicted.to_df().loc["unmeasured"].tolist()
    [0.5, 0.5, 0.0]
    """

    n_components: int = 10
    ridge_penalty: float = 0.1
    perturbed_genes: Mapping[str, str] | None = None

    name: ClassVar[str] = "bilinear ridge"

    def __post_init__(self) -> None:
        if self.n_components < 1:
            raise ValueError(f"n_components={self.n_components} must be at least 1.")
        if self.ridge_penalty <= 0:
            raise ValueError(f"ridge_penalty={self.ridge_penalty} must be above 0.")

    def _fit(self) -> None:
        response = self.effects_.to_numpy().T
        self.mean_ = response.mean(axis=1)
        centred = response - self.mean_[:, None]
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        used = np.flatnonzero(singular > 1e-10 * singular.max(initial=1e-300))
        used = used[: self.n_components]
        self.gene_embedding_ = left[:, used] * singular[used]
        row_of_gene = {str(gene): row for row, gene in enumerate(self.effects_.columns)}
        self.gene_row_ = row_of_gene | {
            perturbation: row_of_gene[gene]
            for perturbation, gene in (self.perturbed_genes or {}).items()
            if gene in row_of_gene
        }
        embeddings = [self._embedding(parts) for parts in self.parts_of_.values()]
        embedded = [row for row, embedding in enumerate(embeddings) if embedding is not None]
        self.coefficients_: NDArray[np.float64] | None = None
        if embedded and used.size:
            genes = self.gene_embedding_
            conditions = np.array([embeddings[row] for row in embedded])
            penalty = self.ridge_penalty * np.eye(used.size)
            left_side = np.linalg.solve(genes.T @ genes + penalty, genes.T @ centred[:, embedded])
            self.coefficients_ = np.linalg.solve(
                conditions.T @ conditions + penalty, (left_side @ conditions).T
            ).T

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        embedding = self._embedding(parts)
        if embedding is None:
            absent = [part for part in parts if part not in self.gene_row_]
            return Prediction(
                self.mean_, f"{', '.join(absent)} not among the genes: mean of all conditions"
            )
        if self.coefficients_ is None:
            return Prediction(
                self.mean_, "no training condition among the genes: mean of all conditions"
            )
        return Prediction(self.mean_ + self.gene_embedding_ @ (self.coefficients_ @ embedding))

    def _embedding(self, parts: tuple[str, ...]) -> NDArray[np.float64] | None:
        if not all(part in self.gene_row_ for part in parts):
            return None
        rows = [self.gene_row_[part] for part in parts]
        return np.asarray(self.gene_embedding_[rows].sum(axis=0))
