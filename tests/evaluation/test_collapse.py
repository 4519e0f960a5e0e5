from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import collapse_index, observed_effects


@pytest.fixture
def observed() -> pd.DataFrame:
    effects = np.random.default_rng(0).normal(size=(6, 20))
    return pd.DataFrame(effects, index=list("ABCDEF")).add_prefix("g")


def test_agrees_with_the_formula(observed):
    predicted = 0.5 * observed + 3
    result = collapse_index(predicted, observed, standard_error=None)
    expected = sum(np.var(observed[g], ddof=1) for g in observed)
    assert result.observed_variance == pytest.approx(expected)
    assert result.ratio == pytest.approx(0.25)
    assert np.isnan(result.sampling_variance)
    assert np.isnan(result.noise_corrected_ratio)


def test_perfect_constant_and_permuted(observed):
    assert collapse_index(observed, observed, None).ratio == pytest.approx(1)
    constant = pd.DataFrame([observed.mean()] * 6, index=observed.index)
    assert collapse_index(constant, observed, None).ratio == pytest.approx(0, abs=1e-12)
    permuted = observed.iloc[[1, 2, 3, 4, 5, 0]].set_axis(observed.index)
    assert collapse_index(permuted, observed, None).ratio == pytest.approx(1)
    assert collapse_index(3 * observed, observed, None).ratio == pytest.approx(9)  # no bound


def test_table_of_standard_errors(observed):
    errors = observed.abs() / 10
    result = collapse_index(observed.iloc[:3], observed, errors)
    assert result.sampling_variance == pytest.approx((errors.iloc[:3] ** 2).mean().sum())
    expected = result.predicted_variance / (result.observed_variance - result.sampling_variance)
    assert result.noise_corrected_ratio == pytest.approx(expected)
    assert np.isnan(collapse_index(observed, observed, 10 * errors.abs() + 5)[1])


def test_the_truth_is_1_once_noise_is_taken_out():
    """Simulated: with 20 cells a condition, noise is a large part of the observed variance."""
    rng = np.random.default_rng(1)
    n_conditions, n_genes, n_cells = 40, 60, 20
    rate = rng.lognormal(2.5, 0.15, (n_conditions + 1, n_genes))
    counts = rng.poisson(np.repeat(rate, n_cells, axis=0))
    labels = np.repeat(["control", *(f"p{i}" for i in range(n_conditions))], n_cells)
    cells = pd.DataFrame(
        {"perturbation": labels, "size": 1e4}, index=[f"cell{i}" for i in range(len(labels))]
    )
    adata = ad.AnnData(counts.astype(np.float32), obs=cells)
    observed = observed_effects(adata, "perturbation", "control", size_factor_key="size")
    draws = rng.poisson(rate, (1_000, *rate.shape))
    truth = np.log2(1 + draws).mean(axis=0)
    names = [f"p{i}" for i in range(n_conditions)]
    predicted = pd.DataFrame(truth[1:] - truth[0], index=names, columns=adata.var_names)
    result = collapse_index(predicted, observed)
    assert result.ratio < 0.85
    assert result.noise_corrected_ratio == pytest.approx(1, abs=0.05)
    # The controls' part is common to all conditions: counted in, it would correct too much.
    total = float((observed.layers["standard_error"] ** 2).mean(axis=0).sum())
    assert result.sampling_variance == pytest.approx(total / 2, rel=0.1)


def test_refusals(observed):
    with pytest.raises(ScreenError, match="has 1 conditions: a variance takes 2"):
        collapse_index(observed.iloc[:1], observed, None)
    with pytest.raises(ScreenError, match="pass `standard_error` as one as well, or None"):
        collapse_index(observed, observed)
    with pytest.raises(ScreenError, match="`observed` has no layer 'standard_error'"):
        collapse_index(observed, ad.AnnData(observed))
    errors = observed.abs()
    with pytest.raises(ScreenError, match="lacks 1 genes of `predicted`, the first 'g0'"):
        collapse_index(observed, observed, errors.iloc[:, 1:])
    errors.loc["C", "g4"] = np.nan
    with pytest.raises(ScreenError, match="Condition 'C' has no standard error"):
        collapse_index(observed, observed, errors)
