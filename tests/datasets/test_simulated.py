from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats

from scvi_sams import ScreenError
from scvi_sams.datasets import benchmark_screen, simulated_bereket_2023, simulated_screen


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulated_screen(seed=3)


class TestLayout:
    def test_counts_are_float32_integers_in_x_and_in_a_layer_of_their_own(self, screen):
        assert screen.shape == (4_000, 500)
        for matrix in (screen.X, screen.layers["counts"]):
            assert sp.issparse(matrix)
            assert matrix.format == "csr"
            assert matrix.dtype == np.float32
            assert (matrix.data == np.round(matrix.data)).all()
        assert not np.shares_memory(screen.X.data, screen.layers["counts"].data)
        assert (screen.X != screen.layers["counts"]).nnz == 0
        np.testing.assert_array_equal(screen.obs["total_counts"], screen.X.sum(axis=1).A1)

    def test_obs_names_conditions_and_batches(self, screen):
        labels = screen.obs["perturbation"]
        assert labels.dtype == "category"
        assert set(screen.obs["replicate"].cat.categories) == {"replicate_1", "replicate_2"}
        assert (labels == "control").sum() == 400
        pairs = labels[labels.str.contains("+", regex=False)]
        assert len(pairs) == 1_000
        assert pairs.nunique() == 8
        singles = set(labels.cat.categories) - set(pairs) - {"control"}
        assert singles == set(screen.uns["truth"]["perturbation_names"])
        for pair in pairs.unique():
            first, second = pair.split("+")
            assert first < second
            assert {first, second} <= singles

    def test_names_are_unique_and_sort_as_numbers(self, screen):
        assert screen.obs_names.is_unique
        assert screen.obs_names.is_monotonic_increasing
        assert screen.var_names.is_monotonic_increasing

    def test_truth_survives_an_h5ad(self, screen, tmp_path):
        screen[:50].copy().write_h5ad(tmp_path / "screen.h5ad")
        truth = ad.read_h5ad(tmp_path / "screen.h5ad").uns["truth"]
        for name in ("mask", "embedding", "effect"):
            np.testing.assert_array_equal(truth[name], screen.uns["truth"][name])
        assert truth["mask"].dtype == bool
        assert list(truth["perturbation_names"]) == list(screen.uns["truth"]["perturbation_names"])
        assert truth["seed"] == 3
        assert truth["parameters"] == screen.uns["truth"]["parameters"]

    def test_rebuilds_from_its_own_parameters(self):
        screen = simulated_screen(n_cells=60, n_genes=20, seed=5)
        truth = screen.uns["truth"]
        again = simulated_screen(**truth["parameters"], seed=truth["seed"])
        assert (screen.X != again.X).nnz == 0


class TestTruth:
    def test_effect_is_mask_times_embedding_and_no_mask_is_empty(self, screen):
        truth = screen.uns["truth"]
        np.testing.assert_array_equal(truth["effect"], truth["mask"] * truth["embedding"])
        assert truth["mask"].any(axis=1).all()

    def test_effects_have_the_size_asked_for(self):
        truth = simulated_screen(
            n_cells=10, n_genes=5, n_perturbations=2_000, n_pairs=0, effect_size=1.5
        ).uns["truth"]
        assert np.abs(truth["embedding"]).mean() == pytest.approx(1.5, abs=0.01)
        assert np.abs(truth["embedding"]).std() == pytest.approx(0.3, abs=0.01)
        assert truth["embedding"].mean() == pytest.approx(0.0, abs=0.05)

    def test_inactive_perturbations_move_nothing(self):
        truth = simulated_screen(n_cells=10, n_genes=5, inactive_fraction=0.5).uns["truth"]
        assert (~truth["mask"].any(axis=1)).sum() == 15

    def test_perturbed_cells_move_along_their_effect(self):
        """Strong one-latent shifts change the profile more than sampling does."""
        screen = simulated_screen(n_cells=2_000, n_genes=200, n_perturbations=4, n_pairs=1)
        profile = np.log1p(
            1e4 * screen.X.toarray() / screen.obs["total_counts"].to_numpy()[:, None]
        )
        labels = screen.obs["perturbation"]
        control = profile[labels == "control"]
        null = np.linalg.norm(control[::2].mean(0) - control[1::2].mean(0))
        for name in screen.uns["truth"]["perturbation_names"]:
            shift = np.linalg.norm(profile[labels == name].mean(0) - control.mean(0))
            assert shift > 2 * null

    def test_counts_are_negative_binomial_about_the_rate(self):
        """One gene alone takes the whole library, so its mean and variance are known."""
        screen = simulated_screen(
            n_cells=20_000,
            n_genes=1,
            library_size=100.0,
            library_spread=0.0,
            inverse_dispersion=4.0,
            seed=1,
        )
        counts = screen.X.toarray().ravel()
        assert counts.mean() == pytest.approx(100.0, rel=0.02)
        assert counts.var() == pytest.approx(100.0 + 100.0**2 / 4.0, rel=0.05)

    def test_batches_shift_expression_only_when_asked(self):
        def gap(size: float) -> float:
            screen = simulated_screen(n_cells=3_000, n_genes=100, batch_effect_size=size)
            first = (screen.obs["replicate"] == "replicate_1").to_numpy()
            means = [screen.X[rows].mean(axis=0).A1 for rows in (first, ~first)]
            return float(np.abs(np.log(means[0] / means[1])).mean())

        assert gap(0.5) > 5 * gap(0.0)


class TestSeed:
    def test_same_seed_same_bits(self):
        first, second = simulated_screen(n_cells=200), simulated_screen(n_cells=200)
        np.testing.assert_array_equal(first.X.data, second.X.data)
        np.testing.assert_array_equal(first.X.indices, second.X.indices)
        np.testing.assert_array_equal(first.obsm["true_basal"], second.obsm["true_basal"])
        assert (first.obs == second.obs).all(axis=None)

    def test_another_seed_another_screen(self):
        first, second = simulated_screen(n_cells=200), simulated_screen(n_cells=200, seed=1)
        assert (first.X != second.X).nnz > 0
        assert (first.uns["truth"]["effect"] != second.uns["truth"]["effect"]).any()

    def test_truth_does_not_change_with_the_cells(self):
        few = simulated_screen(n_cells=50, library_size=500.0)
        many = simulated_screen(n_cells=5_000)
        np.testing.assert_array_equal(few.uns["truth"]["effect"], many.uns["truth"]["effect"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": 0}, "`n_cells` must be at least 1"),
        ({"library_size": 0.0}, "`library_size` must be above 0"),
        ({"effect_jitter": -1.0}, "`effect_jitter` must be 0 or more"),
        ({"mask_probability": 1.5}, "`mask_probability` must be between 0 and 1"),
        ({"control_fraction": 0.8, "pair_fraction": 0.3}, "add up to more than 1"),
        ({"n_perturbations": 3, "n_pairs": 4}, "make only 3 pairs"),
    ],
)
def test_refuses_what_is_out_of_range(arguments, message):
    with pytest.raises(ScreenError, match=message):
        simulated_screen(**arguments)


def test_extremes():
    every_pair = simulated_screen(n_cells=400, n_genes=3, n_perturbations=4, n_pairs=6)
    assert every_pair.obs["perturbation"].str.contains("+", regex=False).sum() == 100
    one = simulated_screen(n_cells=20, n_genes=3, n_perturbations=1, n_pairs=0, n_batches=1)
    assert set(one.obs["perturbation"]) == {"control", "P001"}
    dense = simulated_screen(n_cells=20, n_genes=3, mask_probability=1.0)
    assert dense.uns["truth"]["mask"].all()


def small(seed=0, **arguments):
    """A screen of few cells, of which the truth is looked at."""
    arguments = {"n_cells": 1, "n_genes": 1, "n_pairs": 0, "n_batches": 1} | arguments
    return simulated_screen(**arguments, seed=seed)


def pairs_of(adata):
    """Numbers of the members of the pairs, in the order of the table of pairs."""
    labels = [label for label in adata.obs["perturbation"].cat.categories if "+" in label]
    return [tuple(int(name[1:]) - 1 for name in label.split("+")) for label in labels]


class TestPairs:
    @pytest.mark.parametrize("n_perturbations", [2, 3, 7])
    def test_all_that_there_are(self, n_perturbations):
        every_pair = list(itertools.combinations(range(n_perturbations), 2))
        adata = small(
            n_cells=400,
            n_perturbations=n_perturbations,
            n_pairs=len(every_pair),
            pair_fraction=0.9,
        )
        assert pairs_of(adata) == every_pair

    def test_each_is_as_likely(self):
        arguments = {"n_perturbations": 5, "n_pairs": 3, "n_latent": 1, "n_hidden": 1}
        arguments |= {"n_cells": 80, "n_features": 1, "pair_fraction": 0.9}
        drawn = [pairs_of(simulated_bereket_2023(**arguments, seed=seed)) for seed in range(1_000)]
        assert all(len(set(pairs)) == 3 for pairs in drawn)
        _, counts = np.unique(np.concatenate(drawn), axis=0, return_counts=True)
        assert len(counts) == 10
        assert scipy.stats.chisquare(counts).pvalue > 1e-4

    def test_none(self):
        assert pairs_of(small(n_cells=100, n_perturbations=4)) == []


class TestMasks:
    def test_density_and_no_empty_mask(self):
        truth = small(n_perturbations=20_000, n_latent=6, mask_probability=0.4).uns["truth"]
        assert truth["mask"].any(axis=1).all()
        # An empty mask, of probability 0.6 ** 6, gets one latent.
        np.testing.assert_allclose(truth["mask"].mean(axis=0), 0.4 + 0.6**6 / 6, atol=0.015)

    def test_inactive_are_those_asked_for_and_the_others_are_as_before(self):
        arguments = {"n_perturbations": 40, "n_latent": 6, "mask_probability": 0.3, "seed": 1}
        active = small(**arguments).uns["truth"]["mask"]
        some = small(**arguments, inactive_fraction=0.25).uns["truth"]["mask"]
        empty = ~some.any(axis=1)
        assert empty.sum() == 10
        np.testing.assert_array_equal(some[~empty], active[~empty])


def test_interactions_move_one_latent_by_the_effect_size():
    interaction = small(
        n_perturbations=30, n_pairs=400, n_latent=5, interaction_fraction=0.5, effect_size=1.7
    ).uns["truth"]["interaction"]
    moved = interaction != 0
    assert moved.sum(axis=1).tolist().count(1) == moved.sum() == 200
    assert set(interaction[moved]) == {-1.7, 1.7}
    assert scipy.stats.chisquare(moved.sum(axis=0)).pvalue > 1e-4


def test_hill_curves_lie_within_the_doses():
    truth = small(n_perturbations=20_000, n_latent=1, doses=[10.0, 0.1, 1.0]).uns["truth"]
    log_ec50 = scipy.stats.uniform(np.log(0.1), np.log(100.0))
    assert scipy.stats.kstest(np.log(truth["ec50"]), log_ec50.cdf).pvalue > 1e-4
    assert scipy.stats.kstest(np.log(truth["slope"] / 1.5) / 0.2, "norm").pvalue > 1e-4


def test_conditions_have_their_shares():
    screen = small(n_cells=10_000, n_perturbations=3, n_pairs=2)
    counts = screen.obs["perturbation"].value_counts()
    singles = counts[["P001", "P002", "P003"]]
    assert counts["control"] == 1_000
    assert singles.sum() == 6_500
    assert counts.sum() - singles.sum() - counts["control"] == 2_500
    assert scipy.stats.chisquare(singles).pvalue > 1e-4
    is_control = screen.obs["perturbation"] == "control"
    assert is_control.iloc[:5_000].sum() == pytest.approx(500, abs=80)  # shuffled


@pytest.mark.parametrize("n", [1, 9, 10, 1_234])
def test_names_sort_as_numbers(n):
    names = list(small(n_perturbations=n).uns["truth"]["perturbation_names"])
    assert names == sorted(names)
    assert [int(name[1:]) for name in names] == list(range(1, n + 1))
    assert len(set(map(len, names))) == 1


class TestInteractions:
    ARGUMENTS = {"n_cells": 400, "n_genes": 20, "n_perturbations": 8, "n_pairs": 10}

    def test_share_of_pairs(self):
        plain = simulated_screen(**self.ARGUMENTS)
        screen = simulated_screen(**self.ARGUMENTS, interaction_fraction=0.4, effect_size=2.0)
        truth = screen.uns["truth"]
        assert truth["interaction"].shape == (10, 8)
        moved = truth["interaction"] != 0
        assert moved.any(1).sum() == 4
        assert moved.sum() == 4
        assert (np.abs(truth["interaction"][moved]) == 2).all()
        pairs = {label for label in screen.obs["perturbation"] if "+" in label}
        assert pairs <= set(truth["pair_names"])
        # All else is simulated as without interactions.
        np.testing.assert_array_equal(truth["effect"], plain.uns["truth"]["effect"])
        np.testing.assert_array_equal(screen.obsm["true_basal"], plain.obsm["true_basal"])

    def test_none_by_default(self):
        assert "interaction" not in simulated_screen(**self.ARGUMENTS).uns["truth"]


class TestDoses:
    DOSES = (0.1, 1.0, 10.0)

    @pytest.fixture
    def screen(self):
        return simulated_screen(
            3_000, 50, 6, 2, 3, doses=self.DOSES, effect_size=3.0, batch_effect_size=0.0, seed=4
        )

    def test_doses_of_each_part(self, screen):
        for label, text in zip(screen.obs["perturbation"], screen.obs["dose"], strict=True):
            doses = [float(part) for part in text.split("+")] if text else []
            assert len(doses) == (0 if label == "control" else 1 + label.count("+"))
            assert set(doses) <= set(self.DOSES)

    def test_curves(self, screen):
        truth = screen.uns["truth"]
        assert ((truth["ec50"] >= 0.1) & (truth["ec50"] <= 10)).all()
        assert (truth["slope"] > 0).all()

    def test_effects_grow_with_the_dose(self, screen):
        counts = np.asarray(screen.X.todense())
        profile = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
        control = profile[(screen.obs["perturbation"] == "control").to_numpy()].mean(0)
        sizes = []
        for name in screen.uns["truth"]["perturbation_names"]:
            of_name = screen.obs["perturbation"] == name
            sizes.append(
                [
                    np.abs(
                        profile[(of_name & (screen.obs["dose"] == str(dose))).to_numpy()].mean(0)
                        - control
                    ).mean()
                    for dose in self.DOSES
                ]
            )
        low, _, high = np.array(sizes).T
        assert (high > low).all()

    def test_impossible(self):
        with pytest.raises(ScreenError, match="`doses` must be positive"):
            simulated_screen(doses=(0.0, 1.0))


class TestBenchmarkScreens:
    def test_variants_differ_from_the_default_as_documented(self, monkeypatch):
        # As they are asked for, without simulating them.
        monkeypatch.setitem(benchmark_screen.__globals__, "simulated_screen", dict)
        variants = ("default", "weak", "shallow", "small")
        parameters = {variant: benchmark_screen(variant) for variant in variants}
        default = parameters["default"]
        assert parameters["weak"] == default | {"effect_size": default["effect_size"] / 2}
        assert parameters["shallow"]["library_size"] == 1_500
        assert parameters["small"]["mask_probability"] > default["mask_probability"]
        assert default["n_batches"] == 1

    def test_small(self):
        screen = benchmark_screen("small", seed=1)
        assert screen.shape == (6_000, 500)
        assert screen.uns["truth"]["mask"].shape == (60, 10)
        assert screen.obs["replicate"].nunique() == 1

    def test_unknown_variant_lists_the_known(self):
        with pytest.raises(ScreenError, match=r"'huge'.*'default', 'weak', 'shallow', 'small'"):
            benchmark_screen("huge")


class TestContexts:
    ARGUMENTS = {"n_perturbations": 40, "n_latent": 5, "n_contexts": 3, "context_fraction": 0.5}

    def test_others_are_as_without(self):
        """A stream of its own: neither truth nor what cells received changes."""
        plain, planted = small(n_cells=300), small(n_cells=300, n_contexts=3)
        np.testing.assert_array_equal(plain.uns["truth"]["effect"], planted.uns["truth"]["effect"])
        assert plain.obs["perturbation"].tolist() == planted.obs["perturbation"].tolist()
        assert "context" not in plain.obs

    def test_planted_differences(self):
        truth = small(**self.ARGUMENTS).uns["truth"]
        difference, effect = truth["context_difference"], truth["effect"]
        rows, _, latents = np.nonzero(difference)
        assert len(rows) == len(set(rows)) == 20
        before, change = effect[rows, latents], difference.sum(1)[rows, latents]
        kinds = {
            "new": (before == 0) & np.isclose(np.abs(change), 2.0),
            "lost": (before != 0) & np.isclose(change, -before),
            "turned": (before != 0) & np.isclose(change, -2 * before),
        }
        assert np.sum(list(kinds.values()), axis=0).tolist() == [1] * 20
        assert all(kind.any() for kind in kinds.values())

    def test_basal_states_lie_about_the_mean_of_their_context(self):
        arguments = self.ARGUMENTS | {"n_cells": 6_000, "context_spread": 3.0}
        adata = small(n_genes=2, **arguments)
        states = pd.DataFrame(adata.obsm["true_basal"])
        by_context = states.groupby(adata.obs["context"].to_numpy())
        assert 1.5 < by_context.mean().to_numpy().std() < 6.0
        np.testing.assert_allclose(by_context.std(), 1.0, atol=0.06)
