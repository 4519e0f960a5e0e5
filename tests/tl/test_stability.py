from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError
from scvi_sams.tl import match_latents, mechanism_stability

NAMES = [f"P{k}" for k in range(12)]


@pytest.fixture
def effect():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 11)) * (rng.random((12, 11)) < 0.4)  # latent_10 sorts early
    values[:, 3] = 0  # a latent that nobody uses
    return pd.DataFrame(values, index=NAMES, columns=[f"latent_{k}" for k in range(11)])


def _table(effect, called=None):
    called = effect != 0 if called is None else called
    return pd.DataFrame(
        {
            "perturbation": np.repeat(effect.index, effect.shape[1]),
            "latent": np.tile(effect.columns, len(effect)),
            "effect_mean": effect.to_numpy().ravel(),
            "called": called.to_numpy().ravel(),
        }
    )


def _shuffled(effect, seed):
    """The same fit with latents in another order, flipped, and perturbations in another order."""
    rng = np.random.default_rng(seed)
    order, sign = rng.permutation(effect.shape[1]), rng.choice([-1.0, 1.0], effect.shape[1])
    shuffled = (effect * sign).iloc[:, order].set_axis(effect.columns, axis=1)
    return shuffled.iloc[rng.permutation(len(effect))], order, sign


def test_order_and_sign_of_latents_are_found(effect):
    shuffled, order, sign = _shuffled(effect, 1)
    match = match_latents(effect, shuffled)
    for new, old in enumerate(order):
        if old != 3:
            assert match.loc[f"latent_{old}", "other_latent"] == f"latent_{new}"
            assert match.loc[f"latent_{old}", "sign"] == sign[old]
            assert match.loc[f"latent_{old}", "correlation"] == pytest.approx(1)
    assert match.loc["latent_3", ["correlation", "sign"]].tolist() == [0, 0]


def test_the_same_fit_agrees_wholly(effect):
    others = [_table(_shuffled(effect, seed)[0]) for seed in (1, 2)]
    stability = mechanism_stability([_table(effect), *others])
    assert len(stability) == (effect != 0).to_numpy().sum()
    assert (stability["share_called"] == 1).all()
    assert (stability["share_perturbation_called"] == 1).all()
    assert stability["latent_correlation"].to_numpy() == pytest.approx(1)
    assert stability.attrs["agreement"] == 1


def test_a_call_that_one_of_two_lacks(effect):
    called = effect != 0
    lacking = called.copy()
    lacking.loc["P0"] = False
    stability = mechanism_stability([_table(effect), _table(effect, lacking), _table(effect)])
    of_first = stability["perturbation"] == "P0"
    assert (stability.loc[of_first, "share_called"] == 0.5).all()
    assert (stability.loc[of_first, "share_perturbation_called"] == 0.5).all()
    assert (stability.loc[~of_first, "share_called"] == 1).all()


def test_an_effect_of_the_other_sign_is_not_the_same_call(effect):
    name, latent = np.argwhere(effect.to_numpy() != 0)[0]
    other = effect.copy()
    other.iloc[name, latent] *= -1
    stability = mechanism_stability([_table(effect), _table(other)]).set_index(
        ["perturbation", "latent"]
    )["share_called"]
    flipped = (effect.index[name], effect.columns[latent])
    assert stability[flipped] == 0
    assert (stability.drop(flipped) == 1).all()


def test_fewer_latents_in_the_other_fit(effect):
    other = effect.drop(columns="latent_0")
    stability = mechanism_stability([_table(effect), _table(other)])
    is_lost = stability["latent"] == "latent_0"
    assert (stability.loc[is_lost, "share_called"] == 0).all()
    assert (stability.loc[~is_lost, "share_called"] == 1).all()


def test_latents_can_be_matched_by_their_genes(effect):
    """Where perturbations say nothing of which latent is which, genes do."""
    rng = np.random.default_rng(5)
    genes = pd.DataFrame(rng.normal(size=(30, 2)), columns=["latent_0", "latent_1"])
    same = pd.DataFrame(1.0, index=NAMES, columns=genes.columns)
    same.loc["P0"] = 3.0
    swapped = genes[["latent_1", "latent_0"]].set_axis(genes.columns, axis=1)
    called = same.gt(2).assign(latent_1=False)
    other_called = called[["latent_1", "latent_0"]].set_axis(genes.columns, axis=1)
    tables = [_table(same, called), _table(same, other_called)]
    assert mechanism_stability(tables, [genes, swapped]).attrs["agreement"] == 1
    assert mechanism_stability(tables, [genes, genes]).attrs["agreement"] == 0


def test_errors(effect):
    table = _table(effect)
    with pytest.raises(ScreenError, match="at least one other"):
        mechanism_stability([table])
    with pytest.raises(ScreenError, match="'P11' is in one fit only"):
        mechanism_stability([table, _table(effect.drop(index="P11"))])
    with pytest.raises(ValueError, match="holds 1 tables for 2 fits"):
        mechanism_stability([table, table], [effect])
