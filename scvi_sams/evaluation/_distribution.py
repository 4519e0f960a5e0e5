"""Distances between distributions of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_chunked

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.tables import log_expression_chunks
from scvi_sams.evaluation._observed import _obs_column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Self

    import anndata as ad
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ExpressionPCA",
    "distribution_distances",
    "energy_distance",
    "maximum_mean_discrepancy",
    "median_bandwidths",
]


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
    >>> pca = scvi_sams.evaluation.ExpressionPCA(n_components=10).fit(adata[:400])
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
        return log_expression_chunks(adata, layer, library, self.scale)


def energy_distance(x: ArrayLike, y: ArrayLike, unbiased: bool = False) -> float:
    r"""Energy distance (E-distance) between two sets of cells.

    .. math::

        E(X, Y) = \frac{2}{nm} \sum_{ij} \lVert x_i - y_j \rVert
            - \frac{1}{n^2} \sum_{ii'} \lVert x_i - x_{i'} \rVert
            - \frac{1}{m^2} \sum_{jj'} \lVert y_j - y_{j'} \rVert

    Parameters
    ----------
    x, y
        Cells x dimensions, :math:`n` and :math:`m` cells; see :class:`ExpressionPCA`.
    unbiased
        Divide by :math:`n(n-1)` and :math:`m(m-1)`, which estimates the distance of the
        distributions without bias and can be negative. As it stands, the value is 0 or more, and
        larger the fewer the cells.

    Returns
    -------
    Distance, in the units of the dimensions; NaN if a set has no cells (unbiased: fewer than 2).

    Raises
    ------
    ValueError
        If dimensions differ.

    Notes
    -----
    Szekely and Rizzo (2013); for perturbation screens Peidli et al., *scPerturb* (Nature Methods
    2024). Euclidean distances, as in pertpy 1.0. With squared ones, as in some other programs,
    the value would see means only.

    Examples
    --------
    >>> from scvi_sams.evaluation import energy_distance
    >>> energy_distance([[0.0], [0.0]], [[1.0], [3.0]])
    3.0
    """
    return _discrepancy(x, y, lambda distance: -distance, unbiased)


def maximum_mean_discrepancy(
    x: ArrayLike, y: ArrayLike, bandwidths: Sequence[float], unbiased: bool = False
) -> float:
    r"""Squared maximum mean discrepancy (MMD) between two sets of cells.

    .. math::

        \mathrm{MMD}^2(X, Y) = \frac{1}{n^2} \sum_{ii'} k(x_i, x_{i'})
            + \frac{1}{m^2} \sum_{jj'} k(y_j, y_{j'}) - \frac{2}{nm} \sum_{ij} k(x_i, y_j),
        \qquad
        k(x, y) = \frac1B \sum_b \exp\left( -\frac{\lVert x - y \rVert^2}{2 \sigma_b^2} \right)

    Parameters
    ----------
    x, y
        Cells x dimensions, :math:`n` and :math:`m` cells.
    bandwidths
        Bandwidths :math:`\sigma_b` of the kernels, in the units of the dimensions; see
        :func:`median_bandwidths`. Take the same for all that is compared.
    unbiased
        As for :func:`energy_distance`.

    Returns
    -------
    Squared discrepancy, at most 2; NaN if a set has no cells (unbiased: fewer than 2).

    Raises
    ------
    ValueError
        If dimensions differ, or a bandwidth is not positive.

    Notes
    -----
    Gretton et al., JMLR 13, 723 (2012). With one bandwidth it is the MMD of pertpy 1.0 with
    ``kernel="rbf"`` and :math:`\gamma = 1 / 2 \sigma^2`.

    Examples
    --------
    >>> from scvi_sams.evaluation import maximum_mean_discrepancy
    >>> round(maximum_mean_discrepancy([[0.0]], [[1.0]], bandwidths=[0.5, 1.0]), 6)
    1.258134
    """
    if not len(bandwidths) or not all(np.isfinite(width) and width > 0 for width in bandwidths):
        raise ValueError(f"bandwidths={list(bandwidths)!r}: give positive numbers.")
    rates = [0.5 / width**2 for width in bandwidths]

    def kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        squared = distance**2
        total = np.zeros_like(squared)
        for rate in rates:
            total += np.exp(-rate * squared)
        return total / len(rates)

    return _discrepancy(x, y, kernel, unbiased)


def median_bandwidths(
    cells: ArrayLike,
    factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    max_cells: int = 1_000,
    seed: int = 0,
) -> list[float]:
    r"""Bandwidths around the median distance between cells.

    .. math:: \sigma_b = f_b \cdot \mathrm{median}_{i < i'} \lVert x_i - x_{i'} \rVert

    Parameters
    ----------
    cells
        Cells x dimensions; training cells, so that the kernel does not depend on the test cells.
    factors
        Factors :math:`f_b`.
    max_cells
        Of more cells, so many are drawn.
    seed
        Seed of this draw.

    Returns
    -------
    A bandwidth for each factor, in the units of the dimensions.

    Raises
    ------
    ScreenError
        If there are fewer than two cells, or most of them are the same.

    Notes
    -----
    The median heuristic of Gretton et al., JMLR 13, 723 (2012); the factors, powers of 2 about it,
    are customary for sums of kernels.

    Examples
    --------
    >>> from scvi_sams.evaluation import median_bandwidths
    >>> median_bandwidths([[0.0], [1.0], [4.0]], factors=[0.5, 1.0])
    [1.5, 3.0]
    """
    drawn = _drawn(np.asarray(cells, dtype=np.float64), max_cells, np.random.default_rng(seed))
    median = float(np.median(pdist(drawn))) if len(drawn) > 1 else 0.0
    if not median > 0:
        raise ScreenError(
            f"The median distance of the {len(drawn)} cells is 0: a bandwidth needs cells that "
            f"differ."
        )
    return [float(factor * median) for factor in factors]


def distribution_distances(
    predicted_cells: ad.AnnData,
    observed_cells: ad.AnnData,
    perturbation_key: str,
    representation: str,
    bandwidths: Sequence[float],
    conditions: Sequence[str] | None = None,
    unbiased: bool = False,
    max_cells: int = 2_000,
    seed: int = 0,
) -> pd.DataFrame:
    """E-distance and MMD between the predicted and the observed cells of each condition.

    Parameters
    ----------
    predicted_cells, observed_cells
        Cells with their condition in ``obs[perturbation_key]`` and their coordinates in
        ``obsm[representation]``, of one and the same space.
    perturbation_key
        Column of ``obs`` with the conditions. Cells without one are left out.
    representation
        Key of ``obsm``, for instance for what :meth:`ExpressionPCA.transform` returns.
    bandwidths
        As for :func:`maximum_mean_discrepancy`; see :func:`median_bandwidths`.
    conditions
        Conditions wanted; by default all with both predicted and observed cells.
    unbiased
        As for :func:`energy_distance`. Matters where numbers of cells differ.
    max_cells
        Of more cells of a condition, so many are drawn.
    seed
        Seed of these draws. A condition's cells do not depend on which others are asked for.

    Returns
    -------
    Table of conditions with ``e_distance``, ``mmd`` (squared) and the cells used, ``n_predicted``
    and ``n_observed``. ``attrs`` has the ``bandwidths`` and the ``representation``.

    Raises
    ------
    ScreenError
        If a column or coordinates are missing, no condition has both predicted and observed
        cells, or one asked for has not.

    Notes
    -----
    A value says little alone: compare with the distance between halves of the observed cells.

    Examples
    --------
    >>> import scvi_sams
    >>> from scvi_sams.evaluation import ExpressionPCA, distribution_distances, median_bandwidths
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000)
    >>> adata.obsm["X_pca"] = ExpressionPCA(n_components=10).fit(adata[:500]).transform(adata)
    >>> table = distribution_distances(
    ...     adata[::2],
    ...     adata[1::2],
    ...     perturbation_key="perturbation",
    ...     representation="X_pca",
    ...     bandwidths=median_bandwidths(adata.obsm["X_pca"][:500]),
    ... )
    >>> list(table.columns)
    ['e_distance', 'mmd', 'n_predicted', 'n_observed']
    """
    sides = []
    for name, adata in (("predicted_cells", predicted_cells), ("observed_cells", observed_cells)):
        if representation not in adata.obsm:
            raise ScreenError(
                f"`{name}` has no obsm[{representation!r}], only "
                f"{', '.join(map(repr, adata.obsm)) or 'none'}."
            )
        codes, labels = pd.factorize(_obs_column(adata, perturbation_key))  # no label: code -1
        rows = {str(label): np.flatnonzero(codes == k) for k, label in enumerate(labels)}
        sides.append((np.asarray(adata.obsm[representation], dtype=np.float64), rows))
    common = sides[0][1].keys() & sides[1][1].keys()
    if conditions is None:
        wanted = sorted(common)
    elif lacking := [condition for condition in conditions if condition not in common]:
        raise ScreenError(f"There are no predicted, or no observed, cells of {lacking[0]!r}.")
    else:
        wanted = list(conditions)
    if not wanted:
        raise ScreenError("No condition has both predicted and observed cells.")
    records = []
    for condition in wanted:
        rng = np.random.default_rng([seed, *condition.encode()])
        predicted, observed = (
            _drawn(coordinates[rows[condition]], max_cells, rng) for coordinates, rows in sides
        )
        records.append(
            {
                "e_distance": energy_distance(predicted, observed, unbiased),
                "mmd": maximum_mean_discrepancy(predicted, observed, bandwidths, unbiased),
                "n_predicted": len(predicted),
                "n_observed": len(observed),
            }
        )
    table = pd.DataFrame(records, index=pd.Index(wanted, name=perturbation_key))
    table.attrs = {"bandwidths": list(bandwidths), "representation": representation}
    return table


def _discrepancy(
    x: ArrayLike,
    y: ArrayLike,
    kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    unbiased: bool,
) -> float:
    """Mean of the kernel within both sets, less twice its mean between them."""
    left, right = (np.asarray(cells, dtype=np.float64) for cells in (x, y))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"Shapes {left.shape} and {right.shape}: both must be cells x the same dimensions."
        )
    if min(len(left), len(right)) < (2 if unbiased else 1):
        return float("nan")
    centre = left.mean(axis=0)  # far from the origin, squared norms would swallow distances
    left, right = left - centre, right - centre

    def mean(a: NDArray[np.float64], b: NDArray[np.float64] | None = None) -> float:
        chunks = pairwise_distances_chunked(a, b, reduce_func=lambda d, _: kernel(d).sum(axis=1))
        total = float(sum(chunk.sum() for chunk in chunks))
        if b is not None:
            return total / (len(a) * len(b))
        if unbiased:
            return (total - len(a) * float(kernel(np.zeros(1))[0])) / (len(a) * (len(a) - 1))
        return total / len(a) ** 2

    return mean(left) + mean(right) - 2 * mean(left, right)


def _drawn(
    cells: NDArray[np.float64], max_cells: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    if len(cells) <= max_cells:
        return cells
    return cells[np.sort(rng.choice(len(cells), max_cells, replace=False))]
