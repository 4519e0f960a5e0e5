"""What all splits share: shares, names, the record, and the positions for training."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_indices,
    split_pairs,
    split_perturbations,
)

LABELS = ("perturbation", "control")


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=2_000, n_genes=20, n_perturbations=12, n_pairs=16, seed=1)


def labelled(**columns) -> ad.AnnData:
    frame = pd.DataFrame(columns)
    frame.index = frame.index.astype(str)
    return ad.AnnData(obs=frame)


def is_test(strata, share, seed=0) -> np.ndarray:
    adata = labelled(stratum=strata)
    return (split_cells(adata, 0, share, stratify_by="stratum", seed=seed) == "test").to_numpy()


class TestShare:
    def test_a_stratum_gives_its_share_rounded_up_or_down(self):
        strata = np.random.default_rng(0).integers(50, size=5_000)
        drawn = is_test(strata, 0.3)
        wanted = 0.3 * np.bincount(strata)
        assert (np.abs(np.bincount(strata, drawn) - wanted) < 1).all()

    def test_strata_of_one_cell_give_the_share_together(self):
        assert is_test(np.arange(20_000), 0.2).mean() == pytest.approx(0.2, abs=0.01)

    def test_larger_shares_contain_smaller_ones(self):
        strata = np.repeat(np.arange(30), 7)
        draws = [is_test(strata, share, seed=3) for share in (0.0, 0.25, 0.5, 0.75, 0.99)]
        assert not draws[0].any()
        for smaller, larger in zip(draws, draws[1:], strict=False):
            assert (smaller <= larger).all()

    def test_every_cell_is_as_likely(self):
        strata = np.zeros(5, dtype=int)
        counts = sum(is_test(strata, 0.4, seed).astype(int) for seed in range(2_000))
        np.testing.assert_allclose(counts / 2_000, 0.4, atol=0.045)


class TestRecord:
    def test_says_how_the_split_was_made(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"], seed=7, key_added="mine")
        record = screen.uns["scvi_sams_splits"]["mine"]
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
        assert set(screen.uns["scvi_sams_splits"]) == {"first", "second"}

    def test_column_is_categorical_in_the_documented_order(self, screen):
        assert tuple(split_cells(screen).cat.categories) == (
            "train",
            "validation",
            "test",
            "unused",
        )


SPLITS = {
    "split_cells": lambda adata, seed: split_cells(adata, stratify_by="replicate", seed=seed),
    "split_conditions": lambda adata, seed: split_conditions(adata, *LABELS, 0.3, seed=seed),
    "split_perturbations": lambda adata, seed: split_perturbations(adata, *LABELS, seed=seed),
    "split_pairs_0": lambda adata, seed: split_pairs(adata, *LABELS, 0, 0.5, seed=seed),
    "split_pairs_1": lambda adata, seed: split_pairs(adata, *LABELS, 1, 0.5, seed=seed),
    "split_pairs_2": lambda adata, seed: split_pairs(adata, *LABELS, 2, seed=seed),
    "split_batches": lambda adata, seed: split_batches(adata, "replicate", 0.5, seed=seed),
    "split_doses": lambda adata, seed: split_doses(adata, *LABELS, "dose", [1, 3.5], seed=seed),
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
        record = read.uns["scvi_sams_splits"]["split"]
        split = getattr(scvi_sams.evaluation, record["kind"])
        again = split(read, **record["arguments"], seed=int(record["seed"]))
        assert list(again) == list(column)

    def test_a_share_of_the_controls_is_held_out(self, screen, name):
        column = SPLITS[name](screen, 3)
        of_controls = column[screen.obs["perturbation"] == "control"].value_counts()
        if name in {"split_cells", "split_batches"}:
            assert of_controls["test"] > 0
        else:
            assert of_controls["test"] == int(0.2 * of_controls.sum())

    def test_order_of_categories_does_not_matter(self, screen, name):
        column = SPLITS[name](screen, 3).copy()
        for key in ("perturbation", "replicate"):
            categories = screen.obs[key].cat.categories[::-1]
            screen.obs[key] = screen.obs[key].cat.reorder_categories(categories)
        assert (SPLITS[name](screen, 3) == column).all()


def drawn_batches(wanted, names, seed=0) -> list[str]:
    adata = labelled(batch=[*names, "always trained on"])
    split_batches(adata, "batch", wanted, validation_size=0, seed=seed)
    return adata.uns["scvi_sams_splits"]["split"]["held_out"].tolist()


class TestNames:
    def test_share_of_names(self):
        names = [f"n{i}" for i in range(9)]
        drawn = [drawn_batches(0.3, names, seed) for seed in range(1_000)]
        assert all(len(set(draw)) == 3 and draw == sorted(draw) for draw in drawn)
        _, counts = np.unique(np.concatenate(drawn), return_counts=True)
        np.testing.assert_allclose(counts / 1_000, 0.3, atol=0.07)

    @pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.01, 1), (0.6, 2)])
    def test_a_share_is_at_least_one_name(self, share, n):
        assert len(drawn_batches(share, list("bc"))) == n

    def test_given_names_are_sorted_and_once(self):
        assert drawn_batches(["b", "a", "b"], list("abc")) == ["a", "b"]
        assert drawn_batches("b", list("abc")) == ["b"]

    def test_refusals(self):
        with pytest.raises(ScreenError, match="There are no perturbations of pairs to hold out"):
            split_pairs(labelled(perturbation=["control", "A"]), *LABELS, n_seen=1)
        with pytest.raises(ScreenError, match=r"`test_batches` names batches.*'dnor1'.*'donor1'"):
            drawn_batches(["dnor1"], ["donor1", "other"])
        with pytest.raises(ScreenError, match="'z'. There are 'always trained on', 'donor1'"):
            drawn_batches(["z"], ["donor1"])
        with pytest.raises(ValueError, match="test_batches=-0.5"):
            drawn_batches(-0.5, ["donor1"])


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
        split_pairs(screen, *LABELS, 1, 0.5)
        with pytest.raises(ScreenError, match=r"adata\[adata\.obs\['split'\] != 'unused'\]"):
            split_indices(screen)
        parts = split_indices(screen[screen.obs["split"] != "unused"].copy())
        assert sum(map(len, parts)) == (screen.obs["split"] != "unused").sum()

    def test_other_labels_are_refused(self, screen):
        screen.obs["split"] = ["ood", *["train"] * (screen.n_obs - 1)]
        with pytest.raises(ScreenError, match="holds 'ood'"):
            split_indices(screen)
