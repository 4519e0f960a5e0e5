"""What all splits share: shares, names, the record, and the positions for training."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    SPLIT_LABELS,
    SPLITS_UNS_KEY,
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_indices,
    split_pairs,
    split_pairs_by_training_cells,
    split_pairs_out_of_distribution,
    split_perturbations,
)
from scvi_sams.evaluation._splits import choose_names, random_share

LABELS = ("perturbation", "control")


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=2_000, n_genes=20, n_perturbations=12, n_pairs=16, seed=1)


class TestShare:
    def test_a_stratum_gives_its_share_rounded_up_or_down(self):
        rng = np.random.default_rng(0)
        strata = rng.integers(50, size=5_000)
        drawn = random_share(strata, 0.3, rng)
        wanted = 0.3 * np.bincount(strata)
        assert (np.abs(np.bincount(strata, drawn) - wanted) < 1).all()

    def test_strata_of_one_cell_give_the_share_together(self):
        drawn = random_share(np.arange(20_000), 0.2, np.random.default_rng(0))
        assert drawn.mean() == pytest.approx(0.2, abs=0.01)

    def test_larger_shares_contain_smaller_ones(self):
        strata = np.repeat(np.arange(30), 7)
        draws = [
            random_share(strata, share, np.random.default_rng(3))
            for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert not draws[0].any()
        assert draws[-1].all()
        for smaller, larger in zip(draws, draws[1:], strict=False):
            assert (smaller <= larger).all()

    def test_every_cell_is_as_likely(self):
        counts = sum(
            random_share(np.zeros(5, dtype=int), 0.4, np.random.default_rng(seed)).astype(int)
            for seed in range(5_000)
        )
        np.testing.assert_allclose(counts / 5_000, 0.4, atol=0.03)


class TestRecord:
    def test_says_how_the_split_was_made(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"], seed=7, key_added="mine")
        record = screen.uns[SPLITS_UNS_KEY]["mine"]
        assert record["kind"] == "split_conditions"
        assert record["seed"] == 7
        assert record["held_out_by"] == "condition"
        assert record["held_out"].tolist() == ["P001", "P002"]
        assert record["arguments"]["control"] == "control"
        assert record["arguments"]["test_conditions"].tolist() == ["P001", "P002"]
        assert record["package_version"]

    def test_of_one_split_does_not_touch_that_of_another(self, screen):
        split_cells(screen, key_added="first")
        split_cells(screen, key_added="second", seed=1)
        assert set(screen.uns[SPLITS_UNS_KEY]) == {"first", "second"}

    def test_column_is_categorical_in_the_documented_order(self, screen):
        assert tuple(split_cells(screen).cat.categories) == SPLIT_LABELS


SPLITS = {
    "split_cells": lambda adata, seed: split_cells(adata, stratify_by="replicate", seed=seed),
    "split_conditions": lambda adata, seed: split_conditions(adata, *LABELS, 0.3, seed=seed),
    "split_perturbations": lambda adata, seed: split_perturbations(adata, *LABELS, seed=seed),
    "split_pairs_0": lambda adata, seed: split_pairs(adata, *LABELS, 0, 0.5, seed=seed),
    "split_pairs_1": lambda adata, seed: split_pairs(adata, *LABELS, 1, 0.5, seed=seed),
    "split_pairs_2": lambda adata, seed: split_pairs(adata, *LABELS, 2, seed=seed),
    "split_batches": lambda adata, seed: split_batches(adata, "replicate", 0.5, seed=seed),
    "split_doses": lambda adata, seed: split_doses(adata, *LABELS, "dose", [1, 3.5], seed=seed),
    "split_pairs_out_of_distribution": lambda adata, seed: split_pairs_out_of_distribution(
        adata, *LABELS, 0.5, seed=seed
    ),
    "split_pairs_by_training_cells": lambda adata, seed: split_pairs_by_training_cells(
        adata, *LABELS, 0.5, seed=seed
    ),
}


@pytest.mark.parametrize("name", SPLITS)
class TestEverySplit:
    @pytest.fixture(autouse=True)
    def _doses(self, screen):
        n_parts = screen.obs["perturbation"].str.count(r"\+") + 1
        doses = ["1", "2", "3.5"]
        screen.obs["dose"] = ["+".join([doses[i % 3]] * n) for i, n in enumerate(n_parts)]

    def test_depends_on_its_seed_alone(self, screen, name):
        np.random.seed(1)  # noqa: NPY002
        first = SPLITS[name](screen, 4).copy()
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        assert (SPLITS[name](screen, 4) == first).all()
        assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
        assert any((SPLITS[name](screen, seed) != first).any() for seed in (5, 6, 7))

    def test_record_makes_it_again(self, screen, tmp_path, name):
        column = SPLITS[name](screen, 3)
        screen.write_h5ad(tmp_path / "screen.h5ad")
        read = ad.read_h5ad(tmp_path / "screen.h5ad")
        record = read.uns[SPLITS_UNS_KEY]["split"]
        split = getattr(scvi_sams.evaluation, record["kind"])
        again = split(read, **record["arguments"], seed=int(record["seed"]))
        assert list(again) == list(column)

    def test_order_of_categories_does_not_matter(self, screen, name):
        column = SPLITS[name](screen, 3).copy()
        for key in ("perturbation", "replicate"):
            categories = screen.obs[key].cat.categories[::-1]
            screen.obs[key] = screen.obs[key].cat.reorder_categories(categories)
        assert (SPLITS[name](screen, 3) == column).all()


class TestNames:
    def test_share_of_names(self):
        names = [f"n{i}" for i in range(10)]
        drawn = [
            choose_names(0.3, names, "names", "held_out", np.random.default_rng(seed))
            for seed in range(2_000)
        ]
        assert all(len(set(draw)) == 3 and draw == sorted(draw) for draw in drawn)
        _, counts = np.unique(np.concatenate(drawn), return_counts=True)
        np.testing.assert_allclose(counts / 2_000, 0.3, atol=0.05)

    @pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.01, 1), (0.6, 2), (1.0, 3)])
    def test_a_share_is_at_least_one_name(self, share, n):
        rng = np.random.default_rng(0)
        assert len(choose_names(share, list("abc"), "names", "held_out", rng)) == n

    def test_given_names_are_sorted_and_once(self):
        rng = np.random.default_rng(0)
        assert choose_names(["b", "a", "b"], list("abc"), "names", "x", rng) == ["a", "b"]
        assert choose_names("b", list("abc"), "names", "x", rng) == ["b"]

    def test_refusals(self):
        rng = np.random.default_rng(0)
        with pytest.raises(ScreenError, match="There are no donors to hold out"):
            choose_names(0.5, [], "donors", "held_out", rng)
        with pytest.raises(ScreenError, match=r"`held_out` names donors.*'dnor1'.*'donor1'"):
            choose_names(["dnor1"], ["donor1", "other"], "donors", "held_out", rng)
        with pytest.raises(ScreenError, match="'z'. There are 'donor1'"):
            choose_names(["z"], ["donor1"], "donors", "held_out", rng)
        with pytest.raises(ValueError, match="held_out=-0.5"):
            choose_names(-0.5, ["donor1"], "donors", "held_out", rng)


class TestIndices:
    def test_train_a_model_on_them(self, screen):
        split_cells(screen, seed=1)
        SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
        model = SAMSVAE(screen, n_latent=4, n_hidden=8)
        parts = split_indices(screen)
        model.train(
            max_epochs=1,
            accelerator="cpu",
            enable_progress_bar=False,
            datasplitter_kwargs={"external_indexing": parts},
        )
        np.testing.assert_array_equal(np.sort(model.train_indices), parts[0])
        np.testing.assert_array_equal(np.sort(model.test_indices), parts[2])

    def test_unused_cells_are_to_be_left_out(self, screen):
        split_pairs_out_of_distribution(screen, *LABELS, 0.5)
        with pytest.raises(ScreenError, match=r"adata\[adata\.obs\['split'\] != 'unused'\]"):
            split_indices(screen)
        parts = split_indices(screen[screen.obs["split"] != "unused"].copy())
        assert sum(map(len, parts)) == (screen.obs["split"] != "unused").sum()

    def test_other_labels_are_refused(self, screen):
        screen.obs["split"] = ["ood", *["train"] * (screen.n_obs - 1)]
        with pytest.raises(ScreenError, match="holds 'ood'"):
            split_indices(screen)
