"""Principal components that were fitted on training cells, for distances between cells."""

from __future__ import annotations

__all__ = ["ExpressionPCA"]

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._effects import _log_expression, _obs_column

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

    import anndata as ad
    from numpy.typing import NDArray


class ExpressionPCA:
    r"""Principal components of log expression, fitted on some cells and applied to others.

    Distances between cells need a space. This one is fitted on the training cells only, so that
    nothing of the test cells enters it, and is the same for every prediction. Expression is
    :math:`y_{ig} = \log_2(1 + \mathrm{scale} \cdot x_{ig} / l_i)`, as in
    :func:`observed_average_treatment_effect`; genes are centred and not scaled.

    Parameters
    ----------
    n_components
        Principal components; fewer where cells or genes do not allow so many.
    scale
        Counts per cell to which libraries are scaled.
    seed
        Seed of the solver's start.

    Attributes
    ----------
    genes_
        Names of the genes, in the order of the components.
    components_
        Components x genes, a DataFrame with orthonormal rows.
    explained_variance_ratio_
        Share of the variance of each component, a Series.

    Notes
    -----
    :class:`sklearn.decomposition.PCA` with its ARPACK solver, which leaves sparse counts sparse.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> pca = scvi_sams.metrics.ExpressionPCA(n_components=10).fit(adata[:400])
    >>> adata.obsm["X_pca"] = pca.transform(adata)
    >>> adata.obsm["X_pca"].shape
    (500, 10)
    """

    def __init__(self, n_components: int = 50, scale: float = 1e4, seed: int = 0) -> None:
        if n_components < 1:
            raise ValueError(f"n_components={n_components}: at least one is needed.")
        self.n_components = n_components
        self.scale = scale
        self.seed = seed

    def fit(
        self, adata: ad.AnnData, layer: str | None = None, size_factor_key: str | None = None
    ) -> Self:
        """Fit the components on training cells.

        Parameters
        ----------
        adata
            Cells x genes, with counts.
        layer
            Layer of the counts; ``X`` by default.
        size_factor_key
            Column of ``adata.obs`` with library sizes; by default the sum of the cell's counts.

        Returns
        -------
        Itself.

        Raises
        ------
        ScreenError
            If there are fewer than two cells or genes, a layer or column is not there, or a
            library size is not a positive number.
        """
        if min(adata.shape) < 2:
            raise ScreenError(f"Principal components need 2 cells and genes, not {adata.shape}.")
        chunks = [chunk for _, chunk in self._chunks(adata, layer, size_factor_key)]
        matrix = sp.vstack(chunks, "csr") if sp.issparse(chunks[0]) else np.vstack(chunks)
        n_components = min(self.n_components, min(adata.shape) - 1)
        pca = PCA(n_components, svd_solver="arpack", random_state=self.seed).fit(matrix)
        self.genes_ = adata.var_names.copy()
        names = [f"PC{k}" for k in range(1, n_components + 1)]
        self.components_ = pd.DataFrame(pca.components_, index=names, columns=self.genes_)
        self.explained_variance_ratio_ = pd.Series(pca.explained_variance_ratio_, index=names)
        self._mean: NDArray[np.float64] = pca.mean_
        return self

    def transform(
        self, adata: ad.AnnData, layer: str | None = None, size_factor_key: str | None = None
    ) -> pd.DataFrame:
        """Coordinates of cells, measured or predicted.

        Parameters
        ----------
        adata
            Cells x genes, with counts; all genes of the fit, in any order. Others are not used,
            not for library sizes either.
        layer, size_factor_key
            As in :meth:`fit`.

        Returns
        -------
        Cells x components.

        Raises
        ------
        ScreenError
            If it is not fitted, a gene of the fit is missing, or as in :meth:`fit`.
        """
        if not hasattr(self, "components_"):
            raise ScreenError("The principal components are not fitted: call `fit` first.")
        if (missing := self.genes_.difference(adata.var_names)).size:
            raise ScreenError(
                f"{missing.size} genes of the fit are not in `adata`, the first {missing[0]!r}."
            )
        if not adata.var_names.equals(self.genes_):
            adata = adata[:, self.genes_]
        loadings = self.components_.to_numpy().T
        coordinates = np.empty((adata.n_obs, loadings.shape[1]))
        for cells, expression in self._chunks(adata, layer, size_factor_key):
            coordinates[cells] = expression @ loadings - self._mean @ loadings
        return pd.DataFrame(
            coordinates, index=adata.obs_names.copy(), columns=self.components_.index
        )

    def _chunks(
        self, adata: ad.AnnData, layer: str | None, size_factor_key: str | None
    ) -> Iterator[tuple[slice, Any]]:
        library = None if size_factor_key is None else _obs_column(adata, size_factor_key)
        return _log_expression(adata, layer, library, self.scale)
