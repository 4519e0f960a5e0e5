from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_sams import ScreenError
from scvi_sams.evaluation import observed_effects

N_CELLS = 80
KEYS = {"perturbation_key": "perturbation", "control": "control", "size_factor_key": "library"}


def screen(n_conditions=20, n_cells=N_CELLS, effect_size=0.0, seed=0):
    """Poisson counts whose log expression has known means."""
    rng = np.random.default_rng(seed)
    label = np.repeat(["control", *(f"P{k:02d}" for k in range(n_conditions))], n_cells)
    effect = np.vstack([np.zeros(30), effect_size * rng.normal(size=(n_conditions, 30))])
    counts = rng.poisson(40 * np.exp(np.repeat(effect, n_cells, axis=0))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": label,
            "batch": np.tile(["one", "two"], len(label) // 2),
            "library": 1000.0,
        }
    )
    obs.index = obs.index.astype(str)
    return ad.AnnData(counts, obs=obs)


@pytest.fixture(scope="module")
def unperturbed():
    return screen()


def times_drawn(adata, resample, **kwargs):
    """How often each cell is counted, told from cells that have a gene of their own each."""
    own_genes = ad.AnnData(sp.identity(adata.n_obs, np.float32, "csr"), obs=adata.obs)
    effects = observed_effects(own_genes, **KEYS, resample=resample, **kwargs)
    of_perturbed = (effects.X * effects.obs["n_cells"].to_numpy()[:, None]).clip(0).sum(axis=0)
    of_controls = effects.var["control_mean"] * effects.uns["n_control_cells"]
    drawn = (of_perturbed + of_controls.to_numpy()) / np.log2(1 + 10)
    np.testing.assert_allclose(drawn, drawn.round(), atol=1e-3)
    return drawn.round()


def halves_of(adata, **kwargs):
    return [
        observed_effects(adata, **KEYS, resample=half, **kwargs)
        for half in ("first half", "second half")
    ]


def test_halves_share_no_cell_and_leave_none_out(unperturbed):
    first, second = (
        times_drawn(unperturbed, half, batch_key="batch") for half in ("first half", "second half")
    )
    assert set(first) == {0.0, 1.0}
    np.testing.assert_array_equal(first + second, 1)
    table = pd.crosstab([unperturbed.obs["perturbation"], unperturbed.obs["batch"]], first)
    assert (table == N_CELLS / 4).all(axis=None)


def test_the_first_half_has_the_odd_cell():
    adata = screen(n_conditions=1)[: N_CELLS + 5].copy()
    first = times_drawn(adata, "first half")
    assert first[N_CELLS:].sum() == 3


def test_drawn_cells_are_as_many_and_of_the_same_condition_and_batch(unperturbed):
    weights = times_drawn(unperturbed, "bootstrap", batch_key="batch")
    keys = [unperturbed.obs["perturbation"], unperturbed.obs["batch"]]
    assert (pd.Series(weights).groupby([k.to_numpy() for k in keys]).sum() == N_CELLS / 2).all()
    # Of cells drawn n times out of n, a share of (1 - 1/n)^n is never drawn.
    assert abs((weights == 0).mean() - (1 - 2 / N_CELLS) ** (N_CELLS / 2)) < 0.03


def test_half_effects_are_those_of_the_cells_in_the_halves(unperturbed):
    halves = halves_of(unperturbed, seed=3)
    first = times_drawn(unperturbed, "first half", seed=3) == 1
    for cells, half in zip((first, ~first), halves, strict=True):
        expected = observed_effects(unperturbed[cells], **KEYS)
        np.testing.assert_allclose(half.X, expected.X, atol=1e-5)
        np.testing.assert_allclose(
            half.layers["standard_error"], expected.layers["standard_error"], rtol=1e-4
        )


def test_distances_are_those_that_the_docstrings_state(unperturbed):
    """Without effects all variance is noise: 4 sigma^2 / n between halves, and 1 for a draw."""
    expression = np.log2(1 + 10 * unperturbed.X)
    noise = expression[unperturbed.obs["perturbation"] != "control"].var(axis=0, ddof=1).mean()
    # Variances over conditions: the noise of controls is the same in all, and drops out.
    first, second = (half.X for half in halves_of(unperturbed))
    between = np.var(first - second, axis=0, ddof=1).mean()
    assert between == pytest.approx(4 * noise / N_CELLS, rel=0.2)
    observed = observed_effects(unperturbed, **KEYS).X
    drawn = observed_effects(unperturbed, **KEYS, resample="bootstrap").X
    assert np.var(drawn - observed, axis=0, ddof=1).mean() == pytest.approx(
        noise / N_CELLS, rel=0.2
    )


def test_a_draw_scores_what_the_truth_scores():
    """The correlation with the observed effects, for the truth and for a draw."""
    many = screen(effect_size=0.3, n_cells=2_000)
    few = screen(effect_size=0.3, n_cells=20, seed=0)
    observed = observed_effects(few, **KEYS).X.ravel()
    truth = observed_effects(many, **KEYS).X.ravel()
    drawn = observed_effects(few, **KEYS, resample="bootstrap").X.ravel()
    of_truth, of_draw = (np.corrcoef(each, observed)[0, 1] for each in (truth, drawn))
    assert of_truth == pytest.approx(of_draw, abs=0.01)
    assert of_truth < 0.995


def test_the_same_seed_gives_the_same_bits(unperturbed):
    for resample in ("first half", "bootstrap"):
        one, two, other = (
            observed_effects(unperturbed, **KEYS, resample=resample, seed=seed)
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(one.X, two.X)
        assert (one.X != other.X).any()


def test_a_condition_of_one_cell_has_no_halves():
    adata = screen(n_conditions=2)[: 2 * N_CELLS + 1].copy()
    assert list(halves_of(adata)[0].obs_names) == ["P00"]


def test_no_controls_is_an_error(unperturbed):
    adata = unperturbed[unperturbed.obs["perturbation"] != "control"].copy()
    with pytest.raises(ScreenError, match="control"):
        observed_effects(adata, **KEYS, resample="bootstrap")
    with pytest.raises(ValueError, match="resample='thirds' is unknown"):
        observed_effects(unperturbed, **KEYS, resample="thirds")
