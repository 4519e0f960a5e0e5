from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import ExpressionPCA


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    rates = rng.gamma(2, 2, size=(120, 3)) @ rng.gamma(0.3, 2, size=(3, 40)) + 0.1
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    return ad.AnnData(
        counts,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(120)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(40)]),
    )


def _expression(adata: ad.AnnData, scale: float = 1e4) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    return np.log2(1 + scale * counts / counts.sum(axis=1, keepdims=True))


def test_is_the_singular_value_decomposition_of_the_training_cells(adata):
    training = adata[:80]
    pca = ExpressionPCA(n_components=5).fit(training)
    centre = _expression(training).mean(axis=0)
    _, singular, rows = np.linalg.svd(_expression(training) - centre, full_matrices=False)
    found = pca.components_.to_numpy()
    np.testing.assert_allclose(np.abs(found @ rows[:5].T), np.eye(5), atol=1e-6)
    share = singular[:5] ** 2 / (singular**2).sum()
    np.testing.assert_allclose(pca.explained_variance_ratio_, share, rtol=1e-6)
    expected = (_expression(adata) - centre) @ found.T
    coordinates = pca.transform(adata)
    np.testing.assert_allclose(coordinates, expected, atol=1e-8)
    assert list(coordinates.index) == list(adata.obs_names)
    assert list(coordinates.columns) == ["PC1", "PC2", "PC3", "PC4", "PC5"]


def test_distances_are_kept_by_all_components(adata):
    few = adata[:, :8]
    coordinates = ExpressionPCA().fit(few).transform(few).to_numpy()
    assert coordinates.shape[1] == 7  # no more than genes allow
    all_but_the_last = coordinates @ coordinates.T
    centred = _expression(few) - _expression(few).mean(axis=0)
    assert np.trace(all_but_the_last) < np.trace(centred @ centred.T)
    pca = ExpressionPCA().fit(few)
    share = pca.explained_variance_ratio_.sum()
    assert np.trace(all_but_the_last) == pytest.approx(share * np.trace(centred @ centred.T))


def test_storage_order_and_other_genes_do_not_matter(adata):
    dense = ad.AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)
    dense.layers["counts"] = dense.X.copy()
    dense.X = dense.X * 0
    sparse_fit = ExpressionPCA(n_components=4).fit(adata[:, :30])
    dense_fit = ExpressionPCA(n_components=4).fit(dense[:, :30], layer="counts")
    np.testing.assert_allclose(sparse_fit.components_, dense_fit.components_, atol=1e-6)
    np.testing.assert_allclose(
        sparse_fit.transform(adata[:, ::-1]), sparse_fit.transform(adata[:, :30]), atol=1e-10
    )


def test_same_seed_same_bits(adata):
    first, second = (ExpressionPCA(n_components=4, seed=3).fit(adata) for _ in range(2))
    assert first.components_.equals(second.components_)


def test_library_sizes_that_are_given(adata):
    adata.obs["size"] = np.asarray(adata.X.sum(axis=1)).ravel() * 2
    given = ExpressionPCA(n_components=3, scale=2e4).fit(adata, size_factor_key="size")
    own = ExpressionPCA(n_components=3).fit(adata)
    np.testing.assert_allclose(given.components_, own.components_, atol=1e-8)
    np.testing.assert_allclose(
        given.transform(adata, size_factor_key="size"), own.transform(adata), atol=1e-6
    )


def test_refusals(adata):
    with pytest.raises(ValueError, match="n_components=0"):
        ExpressionPCA(n_components=0)
    pca = ExpressionPCA(n_components=2)
    with pytest.raises(ScreenError, match="call `fit` first"):
        pca.transform(adata)
    with pytest.raises(ScreenError, match="2 cells and genes"):
        pca.fit(adata[:1])
    pca.fit(adata)
    with pytest.raises(ScreenError, match="2 genes of the fit are not in `adata`, the first 'g0'"):
        pca.transform(adata[:, 2:])
    with pytest.raises(ScreenError, match=r"no obs\['size'\]"):
        pca.transform(adata, size_factor_key="size")
