from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from scvi.model.base._de_core import _fdr_de_prediction

from scvi_sams.tl.summaries import differential_expression_table

GENES = [f"G{i}" for i in range(60)]


@pytest.fixture
def draws():
    """Draws of log fold changes from none to large, of growing uncertainty."""
    rng = np.random.default_rng(0)
    return rng.normal(np.linspace(-1, 1, 60), np.linspace(0.05, 0.6, 60), (4_000, 60))


def test_probabilities(draws):
    table = differential_expression_table(draws, GENES, delta=0.3)
    mean, std = np.linspace(-1, 1, 60), np.linspace(0.05, 0.6, 60)
    proba_de = norm.sf((0.3 - mean) / std) + norm.cdf((-0.3 - mean) / std)
    np.testing.assert_allclose(table["proba_de"], proba_de, atol=0.03)
    np.testing.assert_allclose(table["lfsr"], norm.sf(np.abs(mean) / std), atol=0.03)
    np.testing.assert_allclose(table["proba_de"] + table["proba_not_de"], 1)
    np.testing.assert_allclose(table["lfc_lower"], mean - 1.96 * std, atol=0.08)
    np.testing.assert_allclose(table["lfc_upper"], mean + 1.96 * std, atol=0.08)
    assert table.index.tolist() == GENES


@pytest.mark.parametrize("fdr", [0.05, 0.2])
def test_calls_are_scvi_tools(draws, fdr):
    table = differential_expression_table(draws, GENES, fdr=fdr)
    expected = _fdr_de_prediction(pd.Series(table["proba_de"].to_numpy()), fdr=fdr)
    called = table[f"is_de_fdr_{fdr}"].to_numpy()
    assert 5 < called.sum() < 55
    np.testing.assert_array_equal(called, expected)
    assert table.loc[called, "proba_not_de"].mean() <= fdr


def test_realised_error_rate():
    """With a posterior that is right, the share of false calls is as promised."""
    rng = np.random.default_rng(1)
    n_genes = 20_000
    truth = rng.normal(0, 0.5, n_genes)
    noise = 0.2
    shrinkage = 0.25 / (0.25 + noise**2)
    posterior_mean = shrinkage * (truth + rng.normal(0, noise, n_genes))
    draws = rng.normal(posterior_mean, np.sqrt(shrinkage) * noise, (400, n_genes))
    table = differential_expression_table(draws, range(n_genes), delta=0.25, fdr=0.1)
    called = table["is_de_fdr_0.1"].to_numpy()
    false = (np.abs(truth) < 0.25)[called].mean()
    assert called.sum() > 5_000
    assert false == pytest.approx(0.1, abs=0.015)


def test_zero_is_no_sign():
    table = differential_expression_table(np.zeros((10, 1)), ["MYC"])
    assert table.loc["MYC", "lfsr"] == 1
    assert table.loc["MYC", "proba_de"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lfc": np.zeros((3, 2))}, "draws x genes"),
        ({"lfc": np.zeros(1)}, "draws x genes"),
        ({"lfc": np.zeros((0, 1))}, "draws x genes"),
        ({"delta": -1.0}, "delta=-1.0"),
        ({"fdr": 1.0}, "fdr=1.0"),
        ({"credible_level": 1.5}, "credible_level=1.5"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        differential_expression_table(**({"lfc": np.zeros((3, 1)), "genes": ["MYC"]} | arguments))
