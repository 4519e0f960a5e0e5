from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

import scvi_sams
from scvi_sams import pl
from scvi_sams.pl._dose_response import _response_interval


def _curves(ec50, slope, log_std=0.5, level=0.95):
    ec50, slope = np.asarray(ec50, float), np.asarray(slope, float)
    width = np.exp(stats.norm.ppf(0.5 + level / 2) * log_std)
    columns = {}
    for name, values in (("ec50", ec50), ("slope", slope)):
        columns |= {name: values, f"{name}_lower": values / width, f"{name}_upper": values * width}
    return pd.DataFrame(columns, index=[f"GENE{row}" for row in range(len(ec50))])


def test_curves_are_hill_curves_with_their_ec50_marked(known_readouts):
    model = known_readouts(np.ones((2, 3)), curves=_curves([1.0, 10.0], [1.0, 2.0]))
    ax = pl.dose_response(model)
    for ec50, slope, line in zip([1.0, 10.0], [1.0, 2.0], ax.lines[1::3], strict=True):
        dose, share = line.get_data()
        np.testing.assert_allclose(share, dose**slope / (dose**slope + ec50**slope))
    assert [line.get_xdata()[0] for line in ax.lines[2::3]] == [1.0, 10.0]
    assert ax.get_legend().get_texts()[0].get_text().startswith("GENE0: 1 [0.38, 2.7]")
    assert ax.get_xlim() == pytest.approx((0.1, 100))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_is_that_of_posterior_draws(level):
    rng = np.random.default_rng(0)
    row = _curves([2.0], [1.5], level=level).iloc[0]
    ec50 = 2.0 * np.exp(0.5 * rng.standard_normal(200_000))
    slope = 1.5 * np.exp(0.5 * rng.standard_normal(200_000))
    doses = np.array([0.1, 1.0, 2.0, 20.0])
    lower, upper = _response_interval(doses, row, level)
    tails = [(1 - level) / 2, (1 + level) / 2]
    for dose, *ends in zip(doses, lower, upper, strict=True):
        share = 1 / (1 + (ec50 / dose) ** slope)
        np.testing.assert_allclose(ends, np.quantile(share, tails), atol=0.01)


def test_the_strongest_are_drawn_by_default(known_readouts):
    model = known_readouts(np.diag(range(6)), curves=_curves(np.ones(6), np.ones(6)))
    labels = [text.get_text()[:5] for text in pl.dose_response(model).get_legend().get_texts()]
    assert labels == ["GENE5", "GENE4", "GENE3", "GENE2"]


def test_what_cannot_be_drawn_is_refused(known_readouts):
    model = known_readouts(np.ones((9, 1)), curves=_curves(np.ones(9), np.ones(9)))
    with pytest.raises(scvi_sams.UnknownPerturbationError, match="GENE"):
        pl.dose_response(model, ["GENE99"])
    with pytest.raises(ValueError, match="9 perturbations: give 1 to 8"):
        pl.dose_response(model, [f"GENE{row}" for row in range(9)])


def test_curves_of_a_model_are_solid_where_doses_were_measured():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=200, n_genes=20, n_perturbations=3, n_pairs=0, doses=[0.1, 1.0, 10.0]
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, perturbation_key="perturbation", dosage_key="dose", control="control"
    )
    model = scvi_sams.SAMSVAE(adata, n_latent=3, n_hidden=8, dose_response="hill")
    model.train(max_epochs=1, accelerator="cpu")
    ax = Figure().subplots()
    assert pl.dose_response(model, "P001", ax=ax) is ax
    dose, share = ax.lines[1].get_data()
    measured = dose[np.isfinite(share)]
    assert 0.1 <= measured.min() < 0.12
    assert 8 < measured.max() <= 10
    assert ax.get_xlim() == pytest.approx((0.1 / 3, 30))


def test_a_model_without_curves_says_so(trained_model):
    with pytest.raises(NotImplementedError, match="hill"):
        pl.dose_response(trained_model)
