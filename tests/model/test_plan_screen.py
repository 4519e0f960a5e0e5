from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import SAMSVAE, ScreenError, tl
from scvi_sams.tl.call_power import bayesian_calls, depth_factor
from scvi_sams.tl.error_rates import bayesian_q_value

from ._simulations import fit_recovery, recovery_screen
from .conftest import SETUP, fit, small_screen


@pytest.fixture(scope="module")
def pilot():
    return fit_recovery("SAMSVAE", recovery_screen(), max_epochs=25)


def test_calls_are_those_of_the_bayesian_rule():
    rng = np.random.default_rng(0)
    for _ in range(20):
        log_odds = rng.normal(-3, 3, (10, 4))
        probability = pd.DataFrame(1 / (1 + np.exp(-log_odds)))
        expected = bayesian_q_value(probability).to_numpy() <= 0.1
        np.testing.assert_array_equal(bayesian_calls(log_odds, 0.1), expected)


def test_of_its_own_size_a_pilot_promises_what_it_calls(pilot):
    table = tl.plan_screen(pilot)
    own = table[np.isclose(table["cells"], table.attrs["cells"])].squeeze()
    called = table.attrs["mechanisms_called"]
    assert own["mechanisms_lower"] - 2 <= called <= own["mechanisms_upper"] + 2
    received = pilot.adata.obs["perturbation"].iloc[np.sort(pilot.train_indices)]
    assert own["controls"] == pytest.approx((received == "control").sum(), rel=0.03)
    assert own["cells"] * 15 == pytest.approx((received != "control").sum(), rel=0.03)


def test_more_cells_recover_more_until_all_are(pilot):
    table = tl.plan_screen(pilot, [0.1, 10, 50, 250, 100_000])
    assert table["mechanisms"].is_monotonic_increasing
    assert table["mechanisms_share"].iloc[0] < 0.2
    assert table["mechanisms_share"].iloc[-1] > 0.9
    for name in ("mechanisms", "perturbations"):
        assert (table[f"{name}_lower"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_upper"]).all()


def test_designs_are_all_combinations_and_a_seed_repeats_them(pilot):
    arguments = {"cells": [20, 40], "controls": [100, 300], "depth": [0.5, 2]}
    table = tl.plan_screen(pilot, **arguments, n_samples=20)
    assert len(table) == 8
    pd.testing.assert_frame_equal(table, tl.plan_screen(pilot, **arguments, n_samples=20))
    other = tl.plan_screen(pilot, **arguments, n_samples=20, seed=1)
    assert (table["mechanisms"] != other["mechanisms"]).any()


def test_few_controls_make_more_calls_false(pilot):
    few, many = tl.plan_screen(pilot, 100, controls=[10, 10_000])["false_share"]
    assert few > many + 0.05


def test_guides_that_differ_even_out(pilot):
    few, many = tl.plan_screen(pilot, 40, guides=[1, 100], guide_variation=1.0)["perturbations"]
    same = tl.plan_screen(pilot, 40)["perturbations"].item()
    assert few < many
    assert many == pytest.approx(same, rel=0.05)
    with pytest.raises(ScreenError, match="give guide_variation"):
        tl.plan_screen(pilot, guides=4)


class TestDepth:
    def test_of_poisson_counts_information_is_proportional_to_it(self):
        adata = small_screen(n_pairs=0)
        SAMSVAE.setup_anndata(adata, **SETUP)
        model = fit(adata, gene_likelihood="poisson")
        statistics = model.module.closed_form.statistics
        n_cells = statistics.n_cells(model.module.n_training_cells)
        gain = ((n_cells * statistics.curvature).sum(0) / n_cells.sum()).double().numpy()
        gain = np.clip(gain, 1e-6, 1 - 1e-4)
        precision = gain / (1 - gain)
        for depth in (0.1, 3.0):
            expected = depth * precision / (1 + depth * precision) / gain
            np.testing.assert_allclose(depth_factor(model, depth), expected, rtol=1e-3)

    def test_of_overdispersed_counts_it_saturates(self, pilot):
        shallow, deep, deeper = (depth_factor(pilot, k) for k in (0.01, 100.0, 1e4))
        assert (shallow < 1).all()
        assert (deep >= 1).all()
        np.testing.assert_allclose(deep, deeper, rtol=0.1)

    def test_shallow_screens_recover_less(self, pilot):
        table = tl.plan_screen(pilot, 30, depth=[0.002, 0.05, 1])
        assert table["mechanisms"].is_monotonic_increasing
        assert table["mechanisms"].iloc[0] < 0.8 * table["mechanisms"].iloc[-1]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"cells": []}, r"cells=\[\]"),
        ({"cells": [-1]}, r"cells=\[-1\]"),
        ({"depth": 0}, "depth=0"),
        ({"guides": 1.5}, "guides=1.5 cannot be used: give positive whole"),
        ({"replicate_variation": -1}, "replicate_variation=-1"),
        ({"fdr": 0}, "fdr=0"),
    ],
)
def test_what_cannot_be_planned_is_refused(pilot, arguments, culprit):
    with pytest.raises(ScreenError, match=culprit):
        tl.plan_screen(pilot, **arguments)


def test_a_pilot_without_effects_is_refused():
    adata = small_screen(n_pairs=0, inactive_fraction=1.0)
    SAMSVAE.setup_anndata(adata, **SETUP)
    with pytest.raises(ScreenError, match="no mask of this fit is on"):
        tl.plan_screen(fit(adata, max_epochs=3))
