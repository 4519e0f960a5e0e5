from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

import scvi_sams
from scvi_sams import pl, tl


def _curves(ec50, slope, log_std=0.5, level=0.95):
    ec50, slope = np.asarray(ec50, float), np.asarray(slope, float)
    width = np.exp(stats.norm.ppf(0.5 + level / 2) * log_std)
    columns = {}
    for name, values in (("ec50", ec50), ("slope", slope)):
        columns |= {name: values, f"{name}_lower": values / width, f"{name}_upper": values * width}
    return pd.DataFrame(columns, index=[f"GENE{row}" for row in range(len(ec50))])


def test_curves_are_hill_curves_with_their_ec50_marked():
    ax = pl.dose_response(_curves([1.0, 10.0], [1.0, 2.0]))
    for ec50, slope, line in zip([1.0, 10.0], [1.0, 2.0], ax.lines[1::3], strict=True):
        dose, share = line.get_data()
        np.testing.assert_allclose(share, dose**slope / (dose**slope + ec50**slope))
    assert [line.get_xdata()[0] for line in ax.lines[2::3]] == [1.0, 10.0]
    assert ax.get_legend().get_texts()[0].get_text().startswith("GENE0: 1 [0.38, 2.7]")
    assert ax.get_xlim() == pytest.approx((0.1, 100))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_is_that_of_posterior_draws(level):
    rng = np.random.default_rng(0)
    ec50 = 2.0 * np.exp(0.5 * rng.standard_normal(200_000))
    slope = 1.5 * np.exp(0.5 * rng.standard_normal(200_000))
    band = pl.dose_response(_curves([2.0], [1.5], level=level), credible_level=level).collections[
        0
    ]
    corners = pd.DataFrame(band.get_paths()[0].vertices, columns=["dose", "share"])
    ends = corners.groupby("dose")["share"].agg(["min", "max"])
    tails = [(1 - level) / 2, (1 + level) / 2]
    for dose, drawn in ends.iloc[5:-5:30].iterrows():  # the ends have a corner in the middle
        share = 1 / (1 + (ec50 / dose) ** slope)
        np.testing.assert_allclose(drawn, np.quantile(share, tails), atol=0.01)


@pytest.mark.parametrize("wrong", [0.0, 1.0, np.nan])
def test_what_cannot_be_drawn_is_refused(wrong):
    curves = _curves(np.ones(9), np.ones(9))
    with pytest.raises(ValueError, match=r"9 perturbations: choose 1 to 8 with curves\.loc"):
        pl.dose_response(curves)
    with pytest.raises(ValueError, match="credible_level"):
        pl.dose_response(curves[:2], credible_level=wrong)
    with pytest.raises(ValueError, match="no column slope: give what"):
        pl.dose_response(curves[:2].drop(columns="slope"))
    measured = pd.DataFrame({"min": [1.0, -wrong], "max": 2.0}, index=["GENE0", "GENE1"])
    if not wrong > 0 or wrong == 1:
        with pytest.raises(ValueError, match="no positive range of doses for 'GENE1'"):
            pl.dose_response(curves[:2], measured)


def test_curves_are_solid_where_doses_were_measured():
    measured = pd.DataFrame({"min": [0.1], "max": [10.0]}, index=["GENE0"])
    ax = Figure().subplots()
    assert pl.dose_response(_curves([1.0, 1.0], [1.0, 2.0]), measured, ax=ax) is ax
    dose, share = ax.lines[1].get_data()
    solid = dose[np.isfinite(share)]
    assert 0.1 <= solid.min() < 0.12
    assert 8 < solid.max() <= 10
    assert np.isfinite(ax.lines[4].get_ydata()).all()  # of which nothing is known
    assert ax.get_xlim() == pytest.approx((0.1 / 3, 30))


def test_curves_of_a_model_are_drawn():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=200, n_genes=20, n_perturbations=3, n_pairs=0, doses=[0.1, 1.0, 10.0]
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, perturbation_key="perturbation", dosage_key="dose", control="control"
    )
    model = scvi_sams.SAMSVAE(adata, n_latent=3, n_hidden=8, dose_response="hill")
    model.train(max_epochs=1, accelerator="cpu")
    ax = pl.dose_response(tl.dose_response(model))
    assert len(ax.get_legend().get_texts()) == 3
