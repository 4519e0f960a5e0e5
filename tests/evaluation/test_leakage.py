from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    check_leakage,
    split_batches,
    split_cells,
    split_conditions,
    split_doses,
    split_pairs,
    split_perturbations,
)

LABELS = ("perturbation", "control")


@pytest.fixture
def screen() -> ad.AnnData:
    return simulated_screen(n_cells=1_000, n_genes=60, n_perturbations=12, n_pairs=16, seed=1)


def cells_of(adata: ad.AnnData, condition: str) -> pd.Index:
    return adata.obs_names[adata.obs["perturbation"] == condition]


class TestHeldOut:
    @pytest.mark.parametrize(
        ("split", "status"),
        [
            (lambda adata: split_cells(adata), "not checked"),
            (lambda adata: split_conditions(adata, *LABELS), "passed"),
            (lambda adata: split_conditions(adata, *LABELS, 0.2, 0.2), "passed"),
            (lambda adata: split_perturbations(adata, *LABELS), "passed"),
            (lambda adata: split_pairs(adata, *LABELS, 0, 0.5), "passed"),
            (lambda adata: split_pairs(adata, *LABELS, 1, 0.5), "passed"),
            (lambda adata: split_pairs(adata, *LABELS, 2), "passed"),
            (lambda adata: split_batches(adata, "replicate", ["replicate_1"]), "passed"),
            (lambda adata: split_doses(adata, *LABELS, "dose"), "passed"),
        ],
    )
    def test_splits_of_the_package_pass(self, tmp_path, split, status):
        adata = simulated_screen(1_000, 60, 12, 16, doses=[1.0, 10.0], seed=1)
        split(adata)
        table = check_leakage(adata)
        assert list(table.index) == ["held out", "duplicate names", "controls"]
        assert table.loc["held out", "status"] == status
        assert table.loc["duplicate names", "status"] == "passed"
        adata.write_h5ad(tmp_path / "screen.h5ad")
        pd.testing.assert_frame_equal(check_leakage(ad.read_h5ad(tmp_path / "screen.h5ad")), table)

    @pytest.mark.parametrize("n_seen", [0, 1])
    def test_an_unused_cell_with_an_unseen_perturbation(self, screen, n_seen):
        split_pairs(screen, *LABELS, n_seen, 0.5)
        unused = screen.obs_names[screen.obs["split"] == "unused"][:2]
        screen.obs.loc[unused, "split"] = ["train", "validation"]
        with pytest.raises(ScreenError, match="perturbations held out are seen"):
            check_leakage(screen)

    def test_labels_that_are_taken_whole(self, screen):
        """The record knows that there was no delimiter, so a part is another perturbation."""
        pair = next(c for c in screen.obs["perturbation"].cat.categories if "+" in c)
        part = pair.split("+")[0]
        split_perturbations(screen, *LABELS, [part], combination_delimiter=None)
        assert (screen.obs.loc[cells_of(screen, pair), "split"] != "test").all()
        assert check_leakage(screen).loc["held out", "status"] == "passed"
        with pytest.raises(ScreenError, match=part):
            check_leakage(screen, perturbation_key="perturbation", control="control")

    def test_another_delimiter_and_several_controls(self, screen):
        labels = screen.obs["perturbation"].astype(str).str.replace("+", "|")
        labels[cells_of(screen, "control")[::2]] = "safe"
        screen.obs["perturbation"] = labels
        split_perturbations(
            screen, "perturbation", ["control", "safe"], ["P001"], combination_delimiter="|"
        )
        table = check_leakage(screen)
        assert table.loc["held out", "status"] == "passed"
        n_control = [
            f"{((screen.obs['split'] == part) & labels.isin(['control', 'safe'])).sum()} in {part}"
            for part in ("train", "validation", "test")
        ]
        assert ", ".join(n_control) in table.loc["controls", "detail"]
        pair = next(label for label in labels if label.startswith("P001|"))
        screen.obs.loc[cells_of(screen, pair)[:1], "split"] = "train"
        with pytest.raises(ScreenError, match=r"'P001 \(1 cells\)'"):
            check_leakage(screen)

    def test_a_training_cell_of_a_held_out_condition(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"])
        screen.obs.loc[cells_of(screen, "P002")[:3], "split"] = "train"
        with pytest.raises(ScreenError, match=r"conditions held out are seen.*'P002 \(3 cells\)'"):
            check_leakage(screen)

    def test_a_validation_cell_counts_as_seen(self, screen):
        split_conditions(screen, *LABELS, ["P001"])
        screen.obs.loc[cells_of(screen, "P001")[:1], "split"] = "validation"
        with pytest.raises(ScreenError, match="P001"):
            check_leakage(screen)

    def test_a_held_out_condition_that_was_all_moved_to_training(self, screen):
        split_conditions(screen, *LABELS, ["P001", "P002"])
        screen.obs.loc[cells_of(screen, "P001"), "split"] = "train"
        with pytest.raises(ScreenError, match="P001"):
            check_leakage(screen)

    def test_the_same_pair_in_the_other_order(self, screen):
        pair = next(c for c in screen.obs["perturbation"].cat.categories if "+" in c)
        split_conditions(screen, *LABELS, [pair])
        screen.obs["perturbation"] = screen.obs["perturbation"].astype(str)
        cell = cells_of(screen, pair)[0]
        screen.obs.loc[cell, ["perturbation", "split"]] = [
            "+".join(pair.split("+")[::-1]),
            "train",
        ]
        with pytest.raises(ScreenError, match=pair.replace("+", r"\+")):
            check_leakage(screen)

    def test_a_pair_with_a_perturbation_held_out(self, screen):
        pair = next(c for c in screen.obs["perturbation"].cat.categories if "+" in c)
        part = pair.split("+")[0]
        split_perturbations(screen, *LABELS, [part])
        screen.obs.loc[cells_of(screen, pair)[:1], "split"] = "train"
        with pytest.raises(ScreenError, match=f"perturbations held out are seen.*{part}"):
            check_leakage(screen)

    def test_a_batch(self, screen):
        split_batches(screen, "replicate", ["replicate_2"])
        moved = (screen.obs["replicate"] == "replicate_2") & (screen.obs["perturbation"] == "P001")
        screen.obs.loc[moved, "split"] = "train"
        with pytest.raises(ScreenError, match="batches held out are seen.*replicate_2"):
            check_leakage(screen)

    def test_controls_of_a_held_out_batch_are_reported(self, screen):
        split_batches(
            screen,
            "replicate",
            ["replicate_2"],
            perturbation_key="perturbation",
            control="control",
            train_on_controls=True,
            validation_size=0,
        )
        n_control = (screen.obs["perturbation"] == "control").sum()
        table = check_leakage(screen)
        assert table.loc["held out", "status"] == "passed"
        assert table.loc["controls", "status"] == "reported"
        assert f"{n_control} in train, 0 in validation" in table.loc["controls", "detail"]

    def test_a_dose(self, screen):
        screen.obs["perturbation"] = np.where(np.arange(1_000) % 4, "A", "control")
        screen.obs["dose"] = np.where(np.arange(1_000) % 4, np.arange(1_000) % 4, 0)
        split_doses(screen, *LABELS, "dose")
        assert check_leakage(screen).loc["held out", "status"] == "passed"
        screen.obs.loc[screen.obs_names[3], "split"] = "train"
        with pytest.raises(ScreenError, match="doses held out are seen.*A:3"):
            check_leakage(screen)


class TestOwnColumn:
    """A split that was not made here has no record."""

    def test_by_cell_unless_told(self, screen):
        screen.obs["mine"] = np.where(np.arange(1_000) % 2, "train", "test")
        table = check_leakage(screen, "mine")
        assert table.loc["held out", "status"] == "not checked"
        assert table.loc["controls", "status"] == "not checked"

    def test_conditions(self, screen):
        screen.obs["mine"] = np.where(screen.obs["perturbation"] == "P001", "test", "train")
        arguments = {"perturbation_key": "perturbation", "control": "control"}
        check_leakage(screen, "mine", held_out_by="condition", **arguments)
        with pytest.raises(ScreenError, match="P002"):
            check_leakage(
                screen, "mine", held_out_by="condition", held_out=["P001", "P002"], **arguments
            )
        with pytest.raises(ScreenError, match="perturbation_key"):
            check_leakage(screen, "mine", held_out_by="condition")
        with pytest.raises(ValueError, match="held_out_by='gene'"):
            check_leakage(screen, "mine", held_out_by="gene")

    def test_perturbations_of_test_cells(self, screen):
        screen.obs["mine"] = np.where(screen.obs["perturbation"] == "P001", "test", "train")
        with pytest.raises(ScreenError, match="P001"):  # in pairs that are trained on
            check_leakage(
                screen,
                "mine",
                held_out_by="perturbation",
                perturbation_key="perturbation",
                control="control",
            )

    @pytest.mark.parametrize(
        ("held_out_by", "held_out", "near"),
        [
            ("perturbation", "P007", "P0071"),
            ("batch", "replicate_1", "replicate_11"),
            ("dose", "A:2", "A:20"),
        ],
    )
    def test_names(self, screen, held_out_by, held_out, near):
        """What is named is looked for in all that is seen, test cells with it or none."""
        if held_out_by == "dose":
            screen.obs["perturbation"] = np.where(np.arange(1_000) % 4, "A", "control")
            screen.obs["dose"] = np.arange(1_000) % 4
        screen.obs["mine"] = "train"
        arguments = {
            "perturbation_key": "perturbation",
            "control": "control",
            "dosage_key": "dose" if held_out_by == "dose" else None,
            "batch_key": "replicate",
            "held_out_by": held_out_by,
        }
        with pytest.raises(ScreenError, match=rf"{held_out_by}e?s held out are seen.*{held_out} "):
            check_leakage(screen, "mine", **arguments, held_out=[held_out])
        has_it = {
            "perturbation": screen.obs["perturbation"].str.contains(held_out),
            "batch": screen.obs["replicate"] == held_out,
            "dose": np.arange(1_000) % 4 == 2,
        }
        is_control = screen.obs["perturbation"] == "control"
        screen.obs["mine"] = np.where(has_it[held_out_by] & ~is_control, "unused", "train")
        table = check_leakage(screen, "mine", **arguments, held_out=held_out)
        assert table.loc["held out", "status"] == "passed"
        with pytest.raises(ScreenError, match=rf"`held_out` names.*'{near}'.*{held_out}"):
            check_leakage(screen, "mine", **arguments, held_out=[near])

    def test_names_of_what(self, screen):
        screen.obs["mine"] = "train"
        with pytest.raises(ValueError, match="say of what, with `held_out_by`"):
            check_leakage(
                screen, "mine", held_out=["P001"], perturbation_key="perturbation", control="NT"
            )

    def test_overrides_the_record(self, screen):
        split_conditions(screen, *LABELS, ["P001"])
        with pytest.raises(ScreenError, match="perturbations held out are seen.*P001"):
            check_leakage(screen, held_out_by="perturbation")
        with pytest.raises(ScreenError, match="batches held out are seen"):
            check_leakage(screen, held_out_by="batch", batch_key="replicate")

    def test_labels_of_another_kind(self, screen):
        screen.obs["mine"] = np.where(np.arange(1_000) % 2, "train", "ood")
        with pytest.raises(ScreenError, match="holds 'ood'"):
            check_leakage(screen, "mine")

    def test_doses_and_batches_need_their_columns(self, screen):
        split_cells(screen)
        for by, key in (("dose", "dosage_key"), ("batch", "batch_key")):
            with pytest.raises(ScreenError, match=key):
                check_leakage(
                    screen, held_out_by=by, perturbation_key="perturbation", control="control"
                )


class TestDuplicates:
    @pytest.fixture
    def doubled(self, screen) -> ad.AnnData:
        """A cell for training and one for testing have the same name."""
        split_cells(screen)
        names = screen.obs_names.to_numpy(dtype=object).copy()
        train, test = (np.flatnonzero(screen.obs["split"] == p)[0] for p in ("train", "test"))
        names[train] = names[test]
        screen.obs_names = pd.Index(names)
        return screen

    def test_identical_names(self, doubled):
        name = doubled.obs_names[doubled.obs_names.duplicated()][0]
        with pytest.raises(
            ScreenError, match=rf"2 cells have identical names.*'{name}' in test and train"
        ):
            check_leakage(doubled)

    @pytest.mark.parametrize("part", ["test", "unused"])
    def test_copies_within_a_part_or_unused_are_no_leak(self, doubled, part):
        position = np.flatnonzero(doubled.obs_names.duplicated(keep=False))
        doubled.obs.iloc[position, doubled.obs.columns.get_loc("split")] = ["test", part]
        assert check_leakage(doubled).loc["duplicate names", "status"] == "passed"


def test_all_leaks_are_named_at_once(screen):
    split_conditions(screen, *LABELS, ["P001"])
    screen.obs.loc[cells_of(screen, "P001")[:1], "split"] = "train"
    train, test = (np.flatnonzero(screen.obs["split"] == p)[-1] for p in ("train", "test"))
    names = screen.obs_names.to_numpy(dtype=object).copy()
    names[train] = names[test]
    screen.obs_names = pd.Index(names)
    with pytest.raises(ScreenError, match=r"P001.*identical names"):
        check_leakage(screen)
