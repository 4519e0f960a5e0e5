from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import pathway_accuracy

NAMES = [f"P{i:02d}" for i in range(60)]
PATHWAYS = {name: f"pathway {i % 3}" for i, name in enumerate(NAMES)}


@pytest.fixture
def mask() -> pd.DataFrame:
    """Each pathway has two latents of its own; one entry in ten is wrong."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.eye(3), 2, axis=1)[np.arange(60) % 3]
    return pd.DataFrame(np.where(rng.random(truth.shape) < 0.1, 1 - truth, truth), index=NAMES)


def test_perfect_masks(mask):
    perfect = pd.DataFrame(np.eye(3)[np.arange(60) % 3], index=NAMES)
    result = pathway_accuracy(perfect, PATHWAYS, n_permutations=19)
    assert result.accuracy == 1
    assert result.p_value == 1 / 20
    assert result.majority_share == pytest.approx(1 / 3)
    assert result.null_mean == pytest.approx(1 / 3, abs=0.05)
    assert (result.n_perturbations, result.n_pathways, result.dropped) == (60, 3, ())
    noisy = pathway_accuracy(mask, PATHWAYS, n_permutations=19)
    assert noisy.null_95 < noisy.accuracy < 1
    assert noisy.p_value == 1 / 20


def test_constant_masks_name_the_majority():
    sizes = {"large": 30, "middle": 20, "small": 10}
    pathways = dict(zip(NAMES, np.repeat(list(sizes), list(sizes.values())), strict=True))
    constant = pd.DataFrame(1.0, index=NAMES, columns=range(4))
    result = pathway_accuracy(constant, pathways, n_permutations=4)
    assert result.accuracy == result.majority_share == result.null_mean == pytest.approx(0.5)
    assert result.null_std == pytest.approx(0)
    assert result.p_value == 1


def test_permuted_masks_are_chance(mask):
    rng = np.random.default_rng(1)
    p_values, accuracies = [], []
    for _ in range(12):
        permuted = mask.iloc[rng.permutation(60)].set_axis(mask.index)
        result = pathway_accuracy(permuted, PATHWAYS, n_permutations=4)
        accuracies.append(result.accuracy)
        p_values.append(result.p_value)
    assert np.mean(accuracies) == pytest.approx(1 / 3, abs=0.06)
    assert np.mean(p_values) == pytest.approx(0.6, abs=0.25)


def test_agrees_with_folds_by_hand(mask):
    names = np.array([PATHWAYS[name] for name in NAMES])
    right = []
    folds = StratifiedKFold(4, shuffle=True, random_state=7)
    for training, test in folds.split(mask, names):
        scaler = StandardScaler().fit(mask.iloc[training])
        classifier = LogisticRegression().fit(
            scaler.transform(mask.iloc[training]), names[training]
        )
        guess = classifier.predict(scaler.transform(mask.iloc[test]))
        right.append(np.mean(guess == names[test]))
    result = pathway_accuracy(mask, PATHWAYS, n_splits=4, n_permutations=1, seed=7)
    assert result.accuracy == pytest.approx(np.mean(right))


def test_seed(mask):
    first, again, other = (
        pathway_accuracy(mask, PATHWAYS, n_permutations=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.null_mean != other.null_mean


def test_only_annotated_perturbations_and_large_pathways(mask):
    annotated = {name: PATHWAYS[name] for name in NAMES[:45]}
    annotated |= dict.fromkeys(NAMES[45:49], "too small")
    annotated |= dict.fromkeys(["not in the table"], "pathway 0")
    series = pd.Series(annotated)
    result = pathway_accuracy(mask.iloc[::-1], series, n_permutations=1)
    assert result.n_perturbations == 45
    assert result.dropped == ("too small",)
    series[NAMES[0]] = None
    assert pathway_accuracy(mask, series, n_permutations=1).n_perturbations == 44


def test_refusals(mask):
    with pytest.raises(ValueError, match="n_splits=1"):
        pathway_accuracy(mask, PATHWAYS, n_splits=1)
    with pytest.raises(ValueError, match="n_permutations=0"):
        pathway_accuracy(mask, PATHWAYS, n_permutations=0)
    with pytest.raises(ScreenError, match="'P00' twice"):
        pathway_accuracy(pd.concat([mask, mask]), PATHWAYS)
    with pytest.raises(ScreenError, match="1 pathways have at least n_splits=5"):
        pathway_accuracy(mask, dict.fromkeys(NAMES, "one"))
    mask.iloc[3, 0] = np.nan
    with pytest.raises(ScreenError, match="'P03'"):
        pathway_accuracy(mask, PATHWAYS)
