from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import perturbation_discrimination


@pytest.fixture
def observed() -> pd.DataFrame:
    genes = [f"g{i}" for i in range(30)]
    effects = np.random.default_rng(0).normal(size=(12, 30))
    return pd.DataFrame(effects, index=[f"p{i}" for i in range(12)], columns=genes)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
class TestEveryDistance:
    def test_perfect(self, observed, metric):
        shuffled = observed.iloc[::-1, ::-1]
        score = perturbation_discrimination(shuffled, observed, metric)
        assert (score == 1).all()
        assert list(score.index) == list(shuffled.index)

    def test_one_prediction_for_all(self, observed, metric):
        mean = pd.DataFrame([observed.mean()] * 12, index=observed.index)
        score = perturbation_discrimination(mean, observed, metric)
        assert sorted(score) == pytest.approx(list(np.arange(1, 13) / 12))
        assert score.mean() == pytest.approx(13 / 24)

    def test_permuted_is_chance(self, observed, metric):
        rng = np.random.default_rng(1)
        means = []
        for _ in range(30):
            permuted = observed.iloc[rng.permutation(12)].set_axis(observed.index)
            means.append(perturbation_discrimination(permuted, observed, metric).mean())
        assert np.mean(means) == pytest.approx(13 / 24, abs=0.04)

    def test_agrees_with_loops(self, observed, metric):
        predicted = observed + np.random.default_rng(2).normal(scale=3, size=observed.shape)
        score = perturbation_discrimination(predicted, observed, metric)
        distance = {
            "l1": lambda a, b: np.abs(a - b).sum(),
            "l2": lambda a, b: np.sqrt(((a - b) ** 2).sum()),
            "cosine": lambda a, b: 1 - a @ b / np.sqrt((a @ a) * (b @ b)),
        }[metric]
        for name, guess in predicted.iterrows():
            distances = observed.apply(lambda row, guess=guess: distance(guess, row), axis=1)
            rank = (distances < distances[name]).sum()
            assert score[name] == pytest.approx(1 - rank / 12)

    def test_agrees_with_cell_eval(self, observed, metric):
        metrics = pytest.importorskip("cell_eval.metrics")
        from cell_eval._types import PerturbationAnndataPair

        predicted = observed + np.random.default_rng(3).normal(scale=3, size=observed.shape)
        observed, predicted = (
            table.set_axis(["g3", "g4", *table.index[2:]]) for table in (observed, predicted)
        )

        def with_control(table: pd.DataFrame) -> ad.AnnData:
            control = pd.DataFrame(0.0, index=["control"], columns=table.columns)
            adata = ad.AnnData(pd.concat([table, control]))
            adata.obs["target"] = adata.obs_names
            return adata

        pair = PerturbationAnndataPair(
            real=with_control(observed),
            pred=with_control(predicted),
            pert_col="target",
            control_pert="control",
        )
        expected = metrics.discrimination_score(pair, metric=metric)
        score = perturbation_discrimination(predicted, observed, metric)
        assert score.to_dict() == pytest.approx(expected)


def test_ties_share_their_rank(observed):
    same = pd.DataFrame([observed.iloc[0]] * 12, index=observed.index)
    score = perturbation_discrimination(same, same)
    np.testing.assert_allclose(score, 13 / 24)


def test_targets_are_left_out(observed):
    observed = observed.rename(index={"p0": "g1", "p1": "g1+g2", "p2": "other+g2"})
    predicted = pd.DataFrame(0.0, index=observed.index, columns=observed.columns)
    for name, targets in {"g1": ["g1"], "g1+g2": ["g1", "g2"], "other+g2": ["g2"]}.items():
        predicted.loc[name, targets] = observed.loc[name, targets] = 50.0
        told = perturbation_discrimination(
            predicted.loc[[name]], observed, exclude_target_genes=False
        )
        assert told[name] == 1
        honest = perturbation_discrimination(predicted.loc[[name]], observed)
        without = perturbation_discrimination(
            predicted.loc[[name]].drop(columns=targets), observed.drop(columns=targets)
        )
        assert honest[name] == without[name] < 1
    whole = perturbation_discrimination(predicted, observed, combination_delimiter=None)
    assert whole["g1+g2"] == 1  # as one name, it is no gene


def test_fewer_predicted_than_observed(observed):
    noisy = observed + np.random.default_rng(4).normal(scale=3, size=observed.shape)
    few = perturbation_discrimination(noisy.loc[["p5", "p2"]], observed)
    everything = perturbation_discrimination(noisy, observed)
    assert few.to_dict() == everything[["p5", "p2"]].to_dict()


def test_what_could_not_be_predicted_is_nan(observed):
    predicted = observed.copy()
    predicted.loc["p3"] = np.nan
    assert list(perturbation_discrimination(predicted, observed).isna()[:5]) == [0, 0, 0, 1, 0]


def test_no_effect_is_as_far_from_everything_by_its_angle(observed):
    score = perturbation_discrimination(0 * observed, observed, "cosine")
    np.testing.assert_allclose(score, 13 / 24)


def test_amplitude_changes_distances_and_no_angle(observed):
    noisy = observed + np.random.default_rng(5).normal(scale=3, size=observed.shape)
    score, doubled = (
        perturbation_discrimination(table, observed, "cosine") for table in (noisy, 2 * noisy)
    )
    assert (score == doubled).all()
    score, doubled = (
        perturbation_discrimination(table, observed, "l1") for table in (noisy, 0.1 * noisy)
    )
    assert (score != doubled).any()


def test_refusals(observed):
    with pytest.raises(ValueError, match="metric='l3' is unknown; use one of l1, l2, cosine"):
        perturbation_discrimination(observed, observed, "l3")
    with pytest.raises(ScreenError, match="'p11'"):
        perturbation_discrimination(observed, observed.iloc[:11])
    unmeasured = observed.copy()
    unmeasured.loc["p4", "g7"] = np.nan
    with pytest.raises(ScreenError, match="effects of 'p4' are not finite"):
        perturbation_discrimination(observed, unmeasured)
