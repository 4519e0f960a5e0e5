from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    count_seen_perturbations,
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
    return simulated_screen(n_cells=2_000, n_genes=20, n_perturbations=12, n_pairs=16, seed=1)


def labelled(labels: list[str], **columns) -> ad.AnnData:
    index = [f"c{i}" for i in range(len(labels))]
    return ad.AnnData(obs=pd.DataFrame({"perturbation": labels, **columns}, index=index))


def parts_of(adata: ad.AnnData, label: str) -> set[str]:
    cells = adata.obs["split"] == label
    return set(adata.obs.loc[cells, "perturbation"])


class TestCells:
    def test_shares(self, screen):
        counts = split_cells(screen).value_counts()
        assert counts.to_dict() == {"train": 1280, "validation": 320, "test": 400, "unused": 0}

    def test_strata_are_in_every_part(self, screen):
        split_cells(screen, 0.25, 0.25, stratify_by="perturbation")
        table = pd.crosstab(screen.obs["perturbation"], screen.obs["split"])
        assert (np.abs(table["test"] - 0.25 * table.sum(axis=1)) < 1).all()
        assert (np.abs(table["validation"] - 0.25 * table.sum(axis=1)) < 2).all()

    def test_same_seed_same_split_and_another_another(self, screen):
        first = split_cells(screen, seed=4).copy()
        assert (split_cells(screen, seed=4) == first).all()
        assert (split_cells(screen, seed=5) != first).any()

    def test_all_for_training(self, screen):
        assert (split_cells(screen, 0, 0) == "train").all()

    @pytest.mark.parametrize("sizes", [(0.6, 0.6), (-0.1, 0.2), (0.1, 1.2)])
    def test_impossible_shares_are_refused(self, screen, sizes):
        with pytest.raises(ValueError, match=r"add up to more than 1|between 0 and 1"):
            split_cells(screen, *sizes)

    def test_nothing_left_for_training_is_refused(self, screen):
        with pytest.raises(ScreenError, match="no cell for training"):
            split_cells(screen, 0, 1)

    def test_a_view_is_refused(self, screen):
        with pytest.raises(ScreenError, match=r"adata\.copy\(\)"):
            split_cells(screen[:100])

    def test_unknown_column_names_the_nearest(self, screen):
        with pytest.raises(ScreenError, match="'perturbation'"):
            split_cells(screen, stratify_by="perturbatoin")


class TestConditions:
    def test_holds_out_whole_conditions_by_name(self, screen):
        split_conditions(screen, *LABELS, ["P003"], test_controls=0)
        assert parts_of(screen, "test") == {"P003"}
        assert "P003" not in parts_of(screen, "train") | parts_of(screen, "validation")
        assert "control" in parts_of(screen, "train")

    def test_order_of_parts_and_control_parts_do_not_matter(self):
        adata = labelled(["control", "A", "A+B", "B+A", "B+A+control", "B", "C"])
        split_conditions(adata, *LABELS, ["B+A"], validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "train", *["test"] * 3, "train", "train"]

    def test_share_is_of_conditions_not_of_controls(self, screen):
        split_conditions(screen, *LABELS, 0.25, test_controls=0)
        assert len(parts_of(screen, "test")) == round(0.25 * 28)
        assert "control" not in parts_of(screen, "test")

    def test_validation_on_conditions(self, screen):
        split_conditions(screen, *LABELS, 0.2, 0.2, test_controls=0)
        parts = [parts_of(screen, label) for label in ("train", "validation", "test")]
        assert not parts[0] & parts[1]
        assert not parts[1] & parts[2]
        assert not parts[0] & parts[2]
        assert parts[1]

    def test_several_controls_and_another_delimiter(self):
        adata = labelled(["NT", "safe", "A", "A|safe", "A|B", "B"])
        split_conditions(adata, "perturbation", ["NT", "safe"], ["A"], combination_delimiter="|")
        assert adata.obs["split"].tolist()[2:4] == ["test", "test"]
        assert "test" not in adata.obs["split"].tolist()[:2]

    def test_no_delimiter_takes_labels_whole(self):
        adata = labelled(["NT", "HLA+B", "B", "B"])
        split_conditions(adata, "perturbation", "NT", ["HLA+B"], combination_delimiter=None)
        assert adata.obs["split"].tolist()[1] == "test"
        assert "test" not in adata.obs["split"].tolist()[2:]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["P0011"],), "'P0011'.*Did you mean.*'P001'"),
            ((["control"],), "'control' is the control"),
            ((["P001"], ["P001"]), "'P001' is named in `test_conditions` and"),
        ],
    )
    def test_refusals_name_the_culprit(self, screen, arguments, message):
        with pytest.raises(ScreenError, match=message):
            split_conditions(screen, *LABELS, *arguments)

    def test_share_out_of_range(self, screen):
        with pytest.raises(ValueError, match="test_conditions=1.5"):
            split_conditions(screen, *LABELS, 1.5)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
    def test_a_share_of_the_controls_is_held_out(self, screen, share):
        split_conditions(screen, *LABELS, ["P003"], test_controls=share)
        is_control = screen.obs["perturbation"] == "control"
        n_test = (screen.obs.loc[is_control, "split"] == "test").sum()
        assert n_test == int(share * is_control.sum())
        assert parts_of(screen, "test") - {"control"} == {"P003"}
        with pytest.raises(ValueError, match="test_controls=1.5"):
            split_conditions(screen, *LABELS, ["P003"], test_controls=1.5)

    def test_the_only_control_is_trained_on(self):
        adata = labelled(["control", "A", "B"])
        split_conditions(adata, *LABELS, ["A"], validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "test", "train"]


class TestPerturbations:
    def test_holds_out_every_cell_that_has_one(self, screen):
        split_perturbations(screen, *LABELS, ["P001", "P002"], test_controls=0)
        has_one = screen.obs["perturbation"].str.contains("P001|P002")
        assert ((screen.obs["split"] == "test") == has_one).all()
        assert has_one.any()

    def test_share_is_of_perturbations(self, screen):
        split_perturbations(screen, *LABELS, 0.25, test_controls=0)
        held_out = set(screen.uns["scvi_sams_splits"]["split"]["held_out"])
        assert len(held_out) == 3
        for label, has_one in (("train", False), ("validation", False), ("test", True)):
            for name in parts_of(screen, label):
                assert bool(held_out & set(name.split("+"))) == has_one

    def test_unknown_name(self, screen):
        with pytest.raises(ScreenError, match=r"`test_perturbations` names.*'P1'"):
            split_perturbations(screen, *LABELS, ["P1"])


class TestPairs:
    @pytest.mark.parametrize("n_seen", [0, 1, 2])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_test_pairs_have_that_many_seen_perturbations(self, screen, n_seen, seed):
        split_pairs(screen, *LABELS, n_seen, 0.5, seed=seed)
        table = count_seen_perturbations(screen, "split", *LABELS)
        tested = table[table["n_test"] > 0]
        assert len(tested)
        assert (tested["n_perturbations"] == 2).all()
        assert (tested["n_seen"] == n_seen).all()
        assert (tested[["n_train", "n_validation"]] == 0).all(axis=None)

    def test_unseen_perturbations_are_nowhere_in_training(self, screen):
        split_pairs(screen, *LABELS, 0, 0.5)
        unseen = "|".join(screen.uns["scvi_sams_splits"]["split"]["held_out"])
        seen = screen.obs["split"].isin(["train", "validation"])
        assert not screen.obs.loc[seen, "perturbation"].str.contains(unseen).any()

    def test_a_pair_without_its_singles_does_not_qualify_as_seen(self):
        adata = labelled(["control", "A", "B", "A+B", "A+C"])
        split_pairs(adata, *LABELS, 2, 1.0, validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "train", "train", "test", "train"]
        with pytest.raises(ScreenError, match=r"'A\+C' is no pair"):
            split_pairs(adata, *LABELS, 2, ["C+A"])

    def test_pairs_by_name_in_any_order(self):
        adata = labelled(["control", "A", "B", "A+B", "B+A", "C", "B+C"])
        split_pairs(adata, *LABELS, 2, ["B+A"], validation_size=0)
        assert parts_of(adata, "test") == {"A+B", "B+A"}
        assert (adata.obs["split"] != "unused").all()

    @pytest.mark.parametrize(
        ("n_seen", "expected"),
        [
            (1, ["train", "unused", "train", "test", "test", "unused", "train", "unused"]),
            (0, ["train", "unused", "train", "unused", "unused", "unused", "train", "unused"]),
        ],
    )
    def test_one_perturbation_held_out_by_hand(self, n_seen, expected):
        """A single and a triple of it are unused; with two unseen, all but pairs of both are."""
        labels = ["control", "A", "B", "A+B", "C+A", "A+B+C", "B+C", "A"]
        adata = labelled([*labels, "A+D"])
        held_out = ["A"] if n_seen else ["A", "D"]
        split_pairs(adata, *LABELS, n_seen, held_out, validation_size=0)
        assert adata.obs["split"].tolist() == [*expected, "test"]

    def test_triples_are_no_pairs(self):
        adata = labelled(["control", "A", "B", "C", "A+B", "A+B+C"])
        split_pairs(adata, *LABELS, 2, 1.0, validation_size=0)
        assert parts_of(adata, "test") == {"A+B"}
        with pytest.raises(ScreenError, match=r"'A\+B\+C' is no pair"):
            split_pairs(adata, *LABELS, 2, ["A+B+C"])

    def test_a_screen_without_pairs(self):
        adata = labelled(["control", "A", "B"])
        with pytest.raises(ScreenError, match="no pairs of single perturbations to hold out"):
            split_pairs(adata, *LABELS)
        with pytest.raises(ScreenError, match="no perturbations of pairs to hold out"):
            split_pairs(adata, *LABELS, 1)

    def test_no_pair_left(self):
        adata = labelled(["control", "A", "B", "A+B"])
        with pytest.raises(ScreenError, match="No pair has 0 seen perturbations when A"):
            split_pairs(adata, *LABELS, 0, ["A"])
        with pytest.raises(ValueError, match="n_seen=3"):
            split_pairs(adata, *LABELS, 3)

    def test_counts_of_seen_perturbations_by_hand(self):
        adata = labelled(["control", "A", "A+B", "B+A", "C", "B+C"])
        adata.obs["split"] = ["train", "train", "test", "unused", "validation", "test"]
        table = count_seen_perturbations(adata, "split", *LABELS)
        assert table["n_seen"].to_dict() == {"A": 1, "A+B": 1, "B+C": 0, "C": 0}
        assert table.loc["A+B", ["n_test", "n_unused"]].tolist() == [1, 1]


class TestBatches:
    def test_holds_out_batches(self, screen):
        split_batches(screen, "replicate", ["replicate_2"])
        is_second = screen.obs["replicate"] == "replicate_2"
        assert ((screen.obs["split"] == "test") == is_second).all()

    def test_share_is_of_batches(self, screen):
        screen.obs["donor"] = [f"donor_{i % 10}" for i in range(screen.n_obs)]
        split_batches(screen, "donor", 0.3)
        is_test = screen.obs["split"] == "test"
        held_out = set(screen.obs.loc[is_test, "donor"])
        assert len(held_out) == 3
        assert (screen.obs["donor"].isin(held_out) == is_test).all()
        share = (screen.obs.loc[~is_test, "split"] == "validation").mean()
        assert share == pytest.approx(0.1, abs=0.001)

    def test_controls_of_held_out_batches_may_be_trained_on(self, screen):
        split_batches(
            screen,
            "replicate",
            ["replicate_2"],
            perturbation_key="perturbation",
            control="control",
            train_on_controls=True,
        )
        controls = screen.obs["perturbation"] == "control"
        assert (screen.obs.loc[controls, "split"] != "test").all()
        perturbed = (screen.obs["replicate"] == "replicate_2") & ~controls
        assert (screen.obs.loc[perturbed, "split"] == "test").all()

    def test_refusals(self, screen):
        with pytest.raises(ScreenError, match="needs to know the control cells"):
            split_batches(screen, "replicate", train_on_controls=True)
        with pytest.raises(ScreenError, match="no cell has: 'replicate_9'"):
            split_batches(screen, "replicate", ["replicate_9"])
        screen.obs["lane"] = [None, *["1"] * (screen.n_obs - 1)]
        with pytest.raises(ScreenError, match="Cells without a value in obs"):
            split_batches(screen, "lane")


class TestDoses:
    ROWS = (("control", 0), ("A", 1), ("A", 10), ("B", 1), ("C", 5), ("C", 10))

    def adata(self) -> ad.AnnData:
        labels, doses = zip(*self.ROWS, strict=True)
        return labelled(list(labels), dose=list(doses))

    @pytest.mark.parametrize(
        ("doses", "tested"),
        [("highest", {2, 5}), ("lowest", {1, 4}), ([1.0], {1, 3}), ([5, 10], {2, 4, 5})],
    )
    def test_holds_out_doses(self, doses, tested):
        adata = self.adata()
        split_doses(adata, *LABELS, "dose", doses, validation_size=0)
        assert set(np.flatnonzero(adata.obs["split"] == "test")) == tested

    def test_controls_may_have_any_dose_or_none(self):
        adata = labelled(["control", "control", "A", "A"], dose=[None, "7", "1", "2"])
        split_doses(adata, *LABELS, "dose", validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "train", "train", "test"]

    def test_missing_doses_of_controls_in_strings_of_pandas_3(self):
        with pd.option_context("future.infer_string", True):
            adata = labelled(["control", "A", "A"], dose=[None, "1", "2"])
            split_doses(adata, *LABELS, "dose", validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "train", "test"]

    def test_combinations_with_a_held_out_dose(self):
        adata = labelled(["control", "A", "A", "A+B"], dose=["0", "1", "2", "2+1"])
        split_doses(adata, *LABELS, "dose", validation_size=0)
        assert adata.obs["split"].tolist() == ["train", "train", "test", "test"]
        assert adata.uns["scvi_sams_splits"]["split"]["held_out"].tolist() == ["A:2"]

    def test_refusals(self):
        with pytest.raises(ScreenError, match="No cell has the doses 7"):
            split_doses(self.adata(), *LABELS, "dose", [7])
        with pytest.raises(ScreenError, match="No perturbation has two doses"):
            split_doses(labelled(["control", "A"], dose=[0, 1]), *LABELS, "dose")
        with pytest.raises(ValueError, match="'middle'"):
            split_doses(self.adata(), *LABELS, "dose", "middle")


def test_real_pairs(norman_path):
    adata = ad.read_h5ad(norman_path)
    split_pairs(adata, *LABELS, 2, 1.0)
    assert (adata.obs.query("perturbation == 'control'")["split"] == "test").sum() == 20
    assert parts_of(adata, "test") - {"control"} == {
        "KLF1+MAP2K6",
        "KLF1+TGFBR2",
        "MAPK1+TGFBR2",
        "MAP2K3+MAP2K6",
        "MAP2K3+SLC38A2",
    }
