"""Shifts that saturate with the dose."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, tl

from ._members import fit_member, read_outs, tiny_screen
from ._simulations import fit_recovery, recovery_screen, true_effects

DOSES = [0.1, 0.3, 1.0, 3.0, 10.0]
DOSED = {"dosage_key": "dose"}


def dose_screen(**kwargs):
    return tiny_screen(**({"doses": DOSES} | kwargs))


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def dosed(request):
    return fit_member(
        "SAMSVAE",
        dose_screen(),
        setup=DOSED,
        dose_response="hill",
        global_inference=request.param,
        mask_evidence_cells=None,
        max_epochs=6,
    )


class TestReadOut:
    def test_table(self, dosed):
        table = tl.dose_response(dosed)
        assert table.index.tolist() == dosed.perturbation_names
        for name in ("ec50", "slope"):
            assert (table[name] > 0).all()
            assert (table[f"{name}_lower"] < table[name]).all()
            assert (table[name] < table[f"{name}_upper"]).all()
        assert table["ec50"].nunique() == len(table)

    def test_intervals_widen_with_the_level(self, dosed):
        narrow, wide = (tl.dose_response(dosed, level) for level in (0.5, 0.9))
        np.testing.assert_array_equal(narrow["ec50"], wide["ec50"])
        # The intervals are normal in the logarithm: 1.645 against 0.674 standard deviations.
        ratio = np.log(wide["ec50_upper"] / wide["ec50"]) / np.log(
            narrow["ec50_upper"] / narrow["ec50"]
        )
        np.testing.assert_allclose(ratio, 1.6449 / 0.6745, rtol=1e-3)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95])
    def test_wrong_level(self, dosed, level):
        with pytest.raises(ValueError, match=f"credible_level={level}"):
            tl.dose_response(dosed, level)

    def test_shift_follows_the_curve(self, dosed):
        """The shift at a dose is the saturated one times the Hill curve of the table."""
        curve = tl.dose_response(dosed).loc["P002"]
        doses = np.array([*DOSES, 50.0])
        shift = dosed.get_perturbation_shift([{"P002": dose} for dose in [*doses, 1e6]])
        power = doses ** curve["slope"]
        response = power / (power + curve["ec50"] ** curve["slope"])
        saturated = shift.iloc[-1].to_numpy()
        assert np.abs(saturated).max() > 0
        np.testing.assert_allclose(
            shift.iloc[:-1], response[:, None] * saturated, rtol=2e-2, atol=1e-6
        )

    def test_half_at_ec50(self, dosed):
        ec50 = tl.dose_response(dosed).loc["P001", "ec50"]
        half, whole = dosed.get_perturbation_shift([{"P001": ec50}, {"P001": 1e9}]).to_numpy()
        np.testing.assert_allclose(half, whole / 2, rtol=1e-4, atol=1e-6)

    def test_no_dose_no_shift(self, dosed):
        assert not dosed.get_perturbation_shift([{"P001": 0.0}]).to_numpy().any()

    def test_shifts_of_pairs_add_up(self, dosed):
        first, second = {"P001": 0.3}, {"P004": 3.0}
        parts = dosed.get_perturbation_shift([first, second, first | second]).to_numpy()
        np.testing.assert_allclose(parts[2], parts[0] + parts[1], rtol=1e-5, atol=1e-7)

    def test_effect_grows_with_the_dose(self, dosed):
        conditions = [{"P003": dose} for dose in (0.1, 1.0, 10.0)]
        effect = dosed.get_average_treatment_effect(conditions)
        size = np.abs(effect.X).mean(1)
        assert size[0] < size[1] < size[2]


class TestStart:
    def test_prior_is_about_the_median_dose(self):
        adata = dose_screen()
        model = fit_member("SAMSVAE", adata, setup=DOSED, dose_response="hill", max_epochs=1)
        labels = adata.obs["perturbation"].astype(str).str.split("+")
        doses = adata.obs["dose"].astype(str).str.split("+")
        given = {name: [] for name in model.perturbation_names}
        for parts, values in zip(labels, doses, strict=True):
            if parts != ["control"]:
                for part, value in zip(parts, values, strict=True):
                    given[part].append(float(value))
        medians = np.log([np.median(given[name]) for name in model.perturbation_names])
        found = model.module.dose_response.log_reference_dose
        np.testing.assert_allclose(found, medians, rtol=1e-5)

    def test_frame_with_dense_masks(self):
        model = fit_member("CPAVAE", dose_screen(), setup=DOSED, dose_response="hill")
        assert (tl.dose_response(model)["ec50"] > 0).all()

    def test_linear_by_default(self):
        model = fit_member("SAMSVAE", dose_screen(), setup=DOSED)
        shift = model.get_perturbation_shift([{"P001": dose} for dose in (1.0, 3.0)])
        np.testing.assert_allclose(shift.iloc[1], 3 * shift.iloc[0], rtol=1e-5)


def test_saved(dosed, tmp_path):
    dosed.save(str(tmp_path / "model"))
    other = dose_screen()[:200].copy()  # another AnnData may have other median doses
    other.obs["dose"] = other.obs["dose"].astype(str).str.replace("10.0", "0.1")
    loaded = SAMSVAE.load(str(tmp_path / "model"), other, accelerator="cpu")
    without = SAMSVAE.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    expected = read_outs(dosed, ["P001"], with_cells=False)
    for model in (loaded, without):
        np.testing.assert_array_equal(tl.dose_response(model), tl.dose_response(dosed))
        for name, value in read_outs(model, ["P001"], with_cells=False).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


RECOVERY_SCREEN = {
    "n_cells": 4_000,
    "n_perturbations": 8,
    "n_latent": 4,
    "mask_probability": 0.3,
    "effect_size": 2.5,
    "doses": DOSES,
}


@pytest.fixture(scope="module")
def recovered():
    """Models of either curve, fitted without the cells of one of five doses."""
    adata = recovery_screen(**RECOVERY_SCREEN)
    seen = adata[adata.obs["dose"] != "3.0"].copy()
    return {
        curve: fit_recovery("SAMSVAE", seen, setup=DOSED, n_latent=8, dose_response=curve)
        for curve in ("hill", "linear")
    }


@pytest.mark.slow
class TestRecovery:
    """Hill curves of known EC50 at five doses, one of which is held out."""

    def test_ec50(self, recovered):
        table = tl.dose_response(recovered["hill"])
        truth = recovered["hill"].adata.uns["truth"]["ec50"]
        assert truth.max() / truth.min() > 10
        ratio = table["ec50"] / truth
        assert np.abs(np.log(ratio)).max() < np.log(2.5)
        assert np.corrcoef(np.log(table["ec50"]), np.log(truth))[0, 1] > 0.9
        covered = (table["ec50_lower"] < truth) & (truth < table["ec50_upper"])
        assert covered.sum() >= 6  # of eight intervals at 95 %

    def test_held_out_dose(self, recovered):
        names = recovered["hill"].perturbation_names
        truth = true_effects(names, dose="3.0", **RECOVERY_SCREEN)
        error = {}
        for curve, model in recovered.items():
            predicted = model.get_average_treatment_effect([{name: 3.0} for name in names])
            error[curve] = np.square(predicted.X - truth.X).mean() / np.square(truth.X).mean()
        assert error["hill"] < 0.1
        assert error["hill"] < error["linear"] / 4
