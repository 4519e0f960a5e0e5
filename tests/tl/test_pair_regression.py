from __future__ import annotations

import numpy as np
import pytest

from scvi_sams.tl.pair_statistics import regress_pair


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 4, 50))


def test_additive(parts):
    found = regress_pair(*parts, parts.sum(0))
    for name, value in {
        "coefficient_1": 1,
        "coefficient_2": 1,
        "magnitude": np.sqrt(2),
        "dominance": 0,
        "fit": 1,
        "similarity": 1,
        "interaction_score": 0,
        "deviation": 0,
        "relative_deviation": 0,
    }.items():
        np.testing.assert_allclose(getattr(found, name), np.full(4, value), atol=1e-12)


def test_brute_force(parts):
    """Ridge regression of the deviation, row by row, by its augmented least squares problem."""
    rng = np.random.default_rng(1)
    pair = rng.normal(size=(4, 50)) + 0.7 * parts[0] - 0.2 * parts[1]
    found = regress_pair(*parts, pair)
    for row in range(4):
        a, b, y = parts[0, row], parts[1, row], pair[row]
        ridge = np.sqrt(0.01 * (a @ a + b @ b))
        design = np.vstack([np.column_stack([a, b]), ridge * np.eye(2)])
        target = np.concatenate([y - a - b, np.zeros(2)])
        c = 1 + np.linalg.lstsq(design, target, rcond=None)[0]
        np.testing.assert_allclose([found.coefficient_1[row], found.coefficient_2[row]], c)
        assert found.magnitude[row] == pytest.approx(np.linalg.norm(c))
        assert found.dominance[row] == pytest.approx(abs(np.log10(abs(c[0] / c[1]))))
        rest = y - c[0] * a - c[1] * b
        larger = max(y @ y, (a + b) @ (a + b))
        assert found.fit[row] == pytest.approx(1 - rest @ rest / larger)
        cosine = y @ (a + b) / np.linalg.norm(y) / np.linalg.norm(a + b)
        assert found.similarity[row] == pytest.approx(cosine)
        score = (y - a - b) @ (a + b) / ((a + b) @ (a + b))
        assert found.interaction_score[row] == pytest.approx(score)
        assert found.relative_deviation[row] == pytest.approx(
            np.linalg.norm(y - a - b) / np.sqrt(larger)
        )


def test_coefficients_of_distinct_parts(parts):
    c1, c2 = np.array([[2.0, 0.5, 1.0, 0.0], [2.0, 0.5, 0.1, 1.0]])
    found = regress_pair(*parts, c1[:, None] * parts[0] + c2[:, None] * parts[1])
    np.testing.assert_allclose(found.coefficient_1, c1, atol=0.05)
    np.testing.assert_allclose(found.coefficient_2, c2, atol=0.05)


def test_parts_alike_share_the_deviation(parts):
    """Two of the same: which of them deviates cannot be known."""
    found = regress_pair(parts[0], parts[0], 1.5 * parts[0])
    np.testing.assert_allclose(found.coefficient_1, found.coefficient_2)
    np.testing.assert_allclose(found.coefficient_1, 0.75, atol=0.01)
    np.testing.assert_allclose(found.dominance, 0, atol=1e-12)


def test_part_without_effect_stays_additive(parts):
    found = regress_pair(parts[0], np.zeros_like(parts[0]), 0.5 * parts[0])
    np.testing.assert_allclose(found.coefficient_1, 0.5, atol=0.01)
    np.testing.assert_allclose(found.coefficient_2, 1)


def test_nothing_at_all():
    found = regress_pair(np.zeros(3), np.zeros(3), np.zeros(3))
    assert found.coefficient_1 == found.coefficient_2 == found.fit == found.similarity == 1
    assert found.interaction_score == found.relative_deviation == 0


def test_parts_that_cancel(parts):
    """No direction of the sum: the score stays bounded."""
    found = regress_pair(parts[0], -parts[0], parts[1])
    assert np.isfinite(found.interaction_score).all()
    assert (np.abs(found.interaction_score) < 1e-9).all()
    np.testing.assert_allclose(found.relative_deviation, 1)
