from __future__ import annotations

import numpy as np
import pytest

from scvi_sams.data import Conditions
from scvi_sams.data.tables import log_expression_chunks
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import interaction_residuals, observed_effects
from scvi_sams.tl.pair_calibration import find_measured_pairs, pair_residuals, score_gradient
from scvi_sams.tl.pair_statistics import regress_pair

NAMES = [f"P00{number}" for number in range(1, 7)]


def doses_of(adata) -> np.ndarray:
    labels = adata.obs["perturbation"].astype(str)
    return np.array([[float(n in label) for n in NAMES] for label in labels])


def measured_of(dosage, seed=0, **kwargs):
    names = NAMES if dosage.shape[1] == 6 else [f"{n:02d}" for n in range(dosage.shape[1])]
    return find_measured_pairs(Conditions.from_matrix(dosage, names), seed, **kwargs)


def rows_of(measured):
    """Positions and doses of pairs, a tuple each."""
    return [
        (*members, *doses)
        for members, doses in zip(
            measured.perturbation.tolist(), measured.dose.tolist(), strict=True
        )
    ]


@pytest.fixture(scope="module")
def screen():
    return simulated_screen(
        1_200,
        80,
        n_perturbations=6,
        n_pairs=3,
        n_latent=3,
        control_fraction=0.2,
        pair_fraction=0.4,
    )


def test_pairs_beside_their_parts(screen):
    measured = measured_of(doses_of(screen))
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    assert (labels[measured.group == 0] == "control").all()
    found = []
    for members, groups in zip(measured.perturbation, measured.groups, strict=True):
        parts = [NAMES[member] for member in members]
        for group, label in zip(groups, ["+".join(parts), *parts], strict=True):
            assert set(labels[measured.group == group]) == {label}
            assert measured.n_cells[group] == (labels == label).sum()
        found.append("+".join(parts))
    assert sorted(found) == sorted({label for label in labels if "+" in label})
    assert measured.group.max() + 1 == len(measured.n_cells)


def test_needs_cells_of_all_four_groups(screen):
    dosage = doses_of(screen)
    whole = rows_of(measured_of(dosage))
    assert len(whole) == 3
    first, second = whole[0][:2]
    of_pair = (dosage.sum(1) == 2) & (dosage[:, [first, second]] == 1).all(1)
    alone = (dosage.sum(1) == 1) & (dosage[:, first] == 1)
    for dropped in (of_pair, alone, dosage.sum(1) == 0):
        kept = np.append(np.flatnonzero(~dropped), np.flatnonzero(dropped)[:9])
        assert whole[0] not in rows_of(measured_of(dosage[kept]))
    assert len(rows_of(measured_of(dosage, without={(first, second)}))) == 2


def test_doses_must_agree(screen):
    dosage = doses_of(screen)
    dosage[dosage.sum(1) == 2] *= 0.5
    assert rows_of(measured_of(dosage)) == []


def test_more_than_a_hundred_are_drawn_from():
    n = 16
    rows = [np.zeros(n), *np.eye(n), *(a + b for a, b in zip(*_pairs(n), strict=True))]
    dosage = np.repeat(rows, 10, axis=0)
    found = [rows_of(measured_of(dosage, seed)) for seed in (0, 0, 1)]
    assert [len(pairs) for pairs in found] == [100, 100, 100]
    assert found[0] == found[1]
    assert found[0] != found[2]


def _pairs(n):
    first, second = np.triu_indices(n, 1)
    return np.eye(n)[first], np.eye(n)[second]


def test_against_observed_effects_and_resampled_cells(screen):
    """Deviations are those of the observed effects; errors of scores those of a bootstrap."""
    labels = {"perturbation_key": "perturbation", "control": "control", "layer": "counts"}
    observed = observed_effects(screen, **labels)
    measured = measured_of(doses_of(screen))
    effects, names = [], []
    for first, second in np.array(NAMES)[measured.perturbation]:
        names.append(f"{first}+{second}")
        frame = observed.to_df().astype(float)
        model = [0.9 * frame.loc[name].to_numpy() for name in (first, second, names[-1])]
        effects.append(tuple(model))
    gradients = [score_gradient(*effect) for effect in effects]

    def residuals_of(adata, groups):
        chunks = log_expression_chunks(adata, "counts", None, 1e4)
        return pair_residuals(groups, chunks, effects, gradients)

    found = residuals_of(screen, measured)
    truth = interaction_residuals(observed, names)
    modelled = np.stack([pair - first - second for first, second, pair in effects])
    np.testing.assert_allclose(found.deviation, truth.X - modelled, atol=1e-5)
    np.testing.assert_allclose(found.deviation_error, truth.layers["standard_error"], rtol=1e-4)
    # Effects that are all a ninth larger have the same score, to first order too.
    np.testing.assert_allclose(found.score, 0, atol=1e-4)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(60):
        drawn = np.concatenate(
            [
                rng.choice(np.flatnonzero(measured.group == group), count)
                for group, count in enumerate(measured.n_cells)
            ]
        )
        again = residuals_of(screen[drawn], measured._replace(group=measured.group[drawn]))
        scores.append(again.score)
    np.testing.assert_allclose(np.std(scores, axis=0), found.score_error, rtol=0.35)


def test_score_residual_is_the_difference_of_scores_to_first_order():
    rng = np.random.default_rng(2)
    dosage = np.repeat([[0, 0], [1, 0], [0, 1], [1, 1]], 10, axis=0).astype(float)
    measured = measured_of(dosage)
    effect = tuple(rng.normal(size=(3, 20)))
    gradient = [score_gradient(*effect)]
    moved = [value + 1e-4 * rng.normal(size=20) for value in effect]
    expression = np.repeat([np.zeros(20), *moved], 10, axis=0)
    found = pair_residuals(measured, [(slice(0, 40), expression)], [effect], gradient)
    expected = regress_pair(*moved).interaction_score - regress_pair(*effect).interaction_score
    assert found.score[0] == pytest.approx(expected, rel=1e-2)
    np.testing.assert_allclose(found.score_error, 0, atol=1e-6)
