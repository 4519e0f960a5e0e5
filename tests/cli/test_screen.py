from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_sams
from scvi_sams.cli._screen import condition_labels, held_out_cells


def _categorical(sizes):
    labels = np.repeat(np.arange(len(sizes)) - 1, sizes)  # -1: controls
    labels = np.random.default_rng(0).permutation(labels)
    return pd.Categorical.from_codes(labels, [f"P{code}" for code in range(len(sizes) - 1)])


class TestHeldOutCells:
    def test_every_condition_gives_its_share(self):
        labels = _categorical([1000, 500, 40])
        held_out = held_out_cells(labels, 0.1, np.random.default_rng(0))
        taken = np.bincount(labels.codes + 1, weights=held_out)
        assert (np.abs(taken - [100, 50, 4]) < 1).all()

    def test_the_share_is_right_on_average_where_it_is_no_whole_number(self):
        labels = _categorical([3] * 4000)
        held_out = held_out_cells(labels, 0.25, np.random.default_rng(0))
        assert held_out.mean() == pytest.approx(0.25, abs=0.01)

    @pytest.mark.parametrize("fraction", [0.5, 0.99])
    def test_no_condition_loses_its_last_cell(self, fraction):
        labels = _categorical([5, 1, 1, 2, 3])
        held_out = held_out_cells(labels, fraction, np.random.default_rng(0))
        assert np.bincount(labels.codes[~held_out] + 1, minlength=5).min() >= 1

    def test_nothing_is_held_out_of_nothing(self):
        held_out = held_out_cells(_categorical([9, 9]), 0.0, np.random.default_rng(0))
        assert not held_out.any()


class TestConditionLabels:
    @staticmethod
    def _labels(obs, **setup):
        counts = np.ones((len(obs), 3), dtype=np.float32)
        adata = ad.AnnData(counts, obs=obs.set_axis([f"cell{i}" for i in range(len(obs))]))
        scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="label", control="NT", **setup)
        model = scvi_sams.SAMSVAE(adata, n_latent=2, n_hidden=4)
        args = SimpleNamespace(control=["NT"], combination_delimiter="+")
        labels, doses = condition_labels(model, args)
        names = model.perturbation_names
        return labels, pd.DataFrame(doses.toarray(), labels.categories, names)

    @pytest.mark.filterwarnings("ignore:.*:UserWarning:scvi_sams")
    def test_spellings_of_one_condition_are_one(self):
        obs = pd.DataFrame({"label": ["B+A", "NT", "A", "A+B", "A+NT"]})
        labels, doses = self._labels(obs)
        assert pd.isna(labels).tolist() == [False, True, False, False, False]
        assert labels.dropna().tolist() == ["A+B", "A", "A+B", "A"]
        assert doses.loc["A+B"].tolist() == [1, 1]
        assert doses.loc["A"].tolist() == [1, 0]

    @pytest.mark.filterwarnings("ignore:.*:UserWarning:scvi_sams")
    def test_two_doses_are_two_conditions(self):
        obs = pd.DataFrame({"label": ["A", "A", "NT"], "dose": [1.0, 0.5, 0.0]})
        labels, doses = self._labels(obs, dosage_key="dose")
        assert labels[:2].tolist() == ["A", "A:0.5"]
        assert doses["A"].tolist() == [1.0, 0.5]
