from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.tl import add_control_null

KEY = "perturbation_with_null"


@pytest.fixture
def screen():
    adata = simulated_screen(
        n_cells=1_000, n_genes=20, n_perturbations=6, n_pairs=3, control_fraction=0.5
    )
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    guide = np.where(is_control, "NT", adata.obs["perturbation"].astype(str))
    number = np.random.default_rng(0).choice(5, adata.n_obs, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    adata.obs["guide"] = [f"{g}_{n}" for g, n in zip(guide, number, strict=True)]
    return adata


def _sizes(adata):
    """Cells that carry each perturbation, alone or in a pair."""
    labels = adata.obs["perturbation"].astype(str)
    return sorted(sum(name in lab.split("+") for lab in labels) for name in _names(adata))


def _names(adata):
    return sorted(
        {part for lab in adata.obs["perturbation"] for part in lab.split("+")} - {"control"}
    )


def test_sizes_are_those_of_the_real_ones(screen):
    null = add_control_null(screen, "perturbation", "control", max_control_share=0.99, n_null=3)
    assert sorted(null["n_cells"]) == [_sizes(screen)[k] for k in (0, 2, 4)]  # evenly spaced
    counts = screen.obs[KEY].value_counts()
    assert counts[null.index].tolist() == null["n_cells"].tolist()


def test_as_many_as_real_ones_have_their_very_sizes(screen):
    # 500 cells are not enough for six times the size of real ones of 750, so make those smaller
    adata = screen[(screen.obs["perturbation"] == "control").to_numpy() | (np.arange(1_000) < 400)]
    adata = adata.copy()
    null = add_control_null(adata, "perturbation", "control", max_control_share=0.9)
    assert sorted(null["n_cells"]) == _sizes(adata)


def test_many_small_ones_of_a_given_size(screen):
    null = add_control_null(screen, "perturbation", "control", n_cells=20)
    assert null["n_cells"].tolist() == [20] * 12  # of half of 500
    assert len(add_control_null(screen, "perturbation", "control", n_cells=20, n_null=3)) == 3


def test_only_control_cells_change_and_enough_are_left(screen):
    before = screen.obs["perturbation"].astype(str).copy()
    null = add_control_null(screen, "perturbation", "control")
    after = screen.obs[KEY].astype(str)
    changed = (before != after).to_numpy()
    assert (before[changed] == "control").all()
    assert (
        set(after[changed])
        == set(null.index)
        == {name for name in after.unique() if name.startswith("control_null_")}
    )
    assert screen.obs["perturbation"].astype(str).equals(before)
    left = (after == "control").sum()
    assert left >= 0.5 * (before == "control").sum()
    assert screen.uns[KEY]["n_controls_left"] == left


def test_a_seed_gives_the_same_cells_and_another_gives_others(screen):
    labels = []
    for seed in (0, 0, 1):
        add_control_null(screen, "perturbation", "control", seed=seed)
        labels.append(screen.obs[KEY].astype(str).to_numpy())
    assert (labels[0] == labels[1]).all()
    assert (labels[0] != labels[2]).any()


def test_a_guide_stays_whole(screen):
    null = add_control_null(screen, "perturbation", "control", guide_key="guide", n_null=2)
    for name, guide in null["guide"].items():
        is_guide = (screen.obs["guide"] == guide) & (screen.obs["perturbation"] == "control")
        assert ((screen.obs[KEY] == name) == is_guide).all()
    assert null["n_cells"].sum() <= 0.5 * (screen.obs["perturbation"] == "control").sum()


def test_what_it_adds_survives_a_file_and_can_be_set_up(screen, tmp_path):
    null = add_control_null(screen, "perturbation", "control", guide_key="guide")
    screen.write_h5ad(tmp_path / "screen.h5ad")
    SAMSVAE.setup_anndata(screen, layer="counts", perturbation_key=KEY, control="control")
    names = SAMSVAE(screen, n_latent=2, n_hidden=4).perturbation_names
    assert set(null.index) <= set(names)


def test_errors_name_the_culprit(screen):
    call = lambda **kwargs: add_control_null(screen, "perturbation", "control", **kwargs)  # noqa: E731
    with pytest.raises(ScreenError, match="no column 'nonsense'"):
        add_control_null(screen, "nonsense", "control")
    with pytest.raises(ScreenError, match="no column 'nonsense'"):
        call(guide_key="nonsense")
    with pytest.raises(ScreenError, match="suffice for 2 null"):
        call(n_null=20)
    with pytest.raises(ScreenError, match="suffice for 0 null"):
        call(max_control_share=0.01)
    with pytest.raises(ScreenError, match="guides of the control cells fit"):
        call(guide_key="guide", n_null=5)
    with pytest.raises(ValueError, match="n_null"):
        call(n_null=0)
    with pytest.raises(ValueError, match="n_cells"):
        call(n_cells=0)
    with pytest.raises(ValueError, match="n_cells"):
        call(n_cells=10, guide_key="guide")
    with pytest.raises(ScreenError, match="suffice for 12 null"):
        call(n_cells=20, n_null=13)
    with pytest.raises(ValueError, match="max_control_share"):
        call(max_control_share=1.0)
    call()
    with pytest.raises(ScreenError, match="already"):
        add_control_null(screen, KEY, "control")
