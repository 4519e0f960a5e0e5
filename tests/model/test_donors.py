"""Calls against the spread between donors."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, ScreenError, tl

from ._members import fit_member, tiny_screen
from ._simulations import fit_recovery, recovery_screen

DONORS = {
    "n_perturbations": 30,
    "n_cells": 5_000,
    "inactive_fraction": 0.5,
    "effect_size": 1.5,
    "control_fraction": 0.25,
    "n_batches": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("variation", [0.5, 0.0])
def test_calls_hold_across_donors(variation):
    """Half of the perturbations do nothing, but in single donors."""
    adata = recovery_screen(
        batch_variation=variation, **(DONORS | {"n_batches": 8, "n_cells": 8_000})
    )
    model = fit_recovery("SAMSVAE", adata, setup={"batch_key": "replicate"}, max_epochs=25)
    truth = adata.uns["truth"]
    active = set(np.asarray(truth["perturbation_names"])[truth["mask"].any(axis=1)])
    called, false = {}, {}
    for key in (None, "replicate"):
        table = tl.mechanisms(model, 0.1, donor_key=key)
        called[key] = set(table.query("called")["perturbation"])
        false[key] = len(called[key] - active)
    assert false["replicate"] <= 0.1 * len(called["replicate"]) + 1
    assert len(called["replicate"] & active) >= len(active) - 1
    if variation > 0:
        assert false[None] >= 3
        # The planted spread is of latents on the scale of the simulator, not of the fit.
        assert table["donor_sd"].mean() == pytest.approx(variation, rel=0.5)
        plain = tl.mechanisms(model, 0.1)
        width, wider = (t["effect_upper"] - t["effect_lower"] for t in (plain, table))
        both = plain["called"] & table["called"]
        assert (wider[both] > 1.2 * width[both]).all()  # donors may agree by chance
        assert wider[both].mean() > 2 * width[both].mean()
    else:
        assert called["replicate"] == called[None]


@pytest.mark.slow
def test_donors_are_held_against_themselves_in_other_contexts():
    """What a donor shows in all contexts hides no difference between them."""
    arguments = {"n_contexts": 2, "context_fraction": 0.3, "inactive_fraction": 0.0}
    adata = recovery_screen(batch_variation=0.5, **(DONORS | arguments))
    setup = {"batch_key": "replicate", "context_key": "context"}
    model = fit_recovery("SAMSVAE", adata, setup=setup, max_epochs=30)
    truth = adata.uns["truth"]
    differs = truth["context_difference"].any(axis=(1, 2))
    planted = set(np.asarray(truth["perturbation_names"])[differs])
    table = tl.context_differences(model, 0.1, donor_key="replicate")
    called = set(table.query("called")["perturbation"])
    assert len(called & planted) >= len(planted) - 2
    assert len(called - planted) <= 1


@pytest.mark.slow
def test_differences_between_contexts_hold_across_donors():
    """A context has donors of its own, so that a donor's whim looks like the context's."""
    arguments = {"n_contexts": 2, "n_batches": 8, "n_cells": 10_000, "inactive_fraction": 0.0}
    adata = recovery_screen(batch_variation=0.8, **(DONORS | arguments))
    first = adata.obs["replicate"].cat.codes < 4
    adata = adata[(first == (adata.obs["context"] == "context_1")).to_numpy()].copy()
    setup = {"batch_key": "replicate", "context_key": "context"}
    model = fit_recovery("SAMSVAE", adata, setup=setup, max_epochs=30)
    n_called = [
        tl.context_differences(model, 0.1, donor_key=key)["called"].sum()
        for key in (None, "replicate")
    ]
    assert n_called[0] >= 5
    assert n_called[1] <= 1


def test_of_what_columns():
    adata = tiny_screen()
    adata.obs["one"], adata.obs["gap"] = "the same", adata.obs["replicate"].astype(object)
    adata.obs.loc[adata.obs_names[:3], "gap"] = None
    model = fit_member("SAMSVAE", adata, setup={"batch_key": "replicate"})
    for key, message in (
        ("donor", "no column 'donor'"),
        ("one", "is 'the same' in all cells"),
        ("gap", "3 cells have no donor"),
    ):
        with pytest.raises(ScreenError, match=message):
            tl.mechanisms(model, donor_key=key)
    table = tl.active_perturbations(model, donor_key="replicate")
    assert np.isfinite(table["log_odds"]).all()
    gradient = fit_member("SAMSVAE", adata, global_inference="gradient")
    with pytest.raises(NotImplementedError, match="closed-form"):
        tl.mechanisms(gradient, donor_key="replicate")


def test_without_its_cells(tmp_path):
    model = fit_member("SAMSVAE")
    model.save(str(tmp_path / "model"))
    loaded = SAMSVAE.load(str(tmp_path / "model"), False, accelerator="cpu")
    with pytest.raises(ScreenError, match="loaded without its AnnData"):
        tl.mechanisms(loaded, donor_key="replicate")
