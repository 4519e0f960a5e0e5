from __future__ import annotations

import numpy as np
import pytest
import sklearn
from scipy.stats import norm

from scvi_sams.evaluation import distribution_distance

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 4))
Y = RNG.normal(loc=0.7, scale=1.5, size=(17, 4))
BANDWIDTHS = [0.5, 2.0]


def energy_distance(x, y, unbiased=False) -> float:
    return distribution_distance(x, y, unbiased=unbiased)


def maximum_mean_discrepancy(x, y, bandwidths, unbiased=False) -> float:
    return distribution_distance(x, y, bandwidths, unbiased)


def _double_sum(x, y, kernel, unbiased=False) -> float:
    """Mean of the kernel within and between, one pair of cells at a time."""

    def mean(a, b, same):
        pairs = [
            kernel(np.sqrt(sum((p - q) ** 2)))
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def _gaussian(distance: float) -> float:
    return float(np.mean([np.exp(-(distance**2) / (2 * width**2)) for width in BANDWIDTHS]))


@pytest.mark.parametrize("unbiased", [False, True])
class TestDoubleSums:
    def test_energy_distance(self, unbiased):
        expected = _double_sum(X, Y, lambda distance: -distance, unbiased)
        assert energy_distance(X, Y, unbiased) == pytest.approx(expected, rel=1e-10)
        assert energy_distance(Y, X, unbiased) == pytest.approx(expected, rel=1e-10)

    def test_maximum_mean_discrepancy(self, unbiased):
        expected = _double_sum(X, Y, _gaussian, unbiased)
        found = maximum_mean_discrepancy(X, Y, BANDWIDTHS, unbiased)
        assert found == pytest.approx(expected, rel=1e-10)

    def test_far_from_the_origin(self, unbiased):
        moved = energy_distance(X + 1e6, Y + 1e6, unbiased)
        assert moved == pytest.approx(energy_distance(X, Y, unbiased), rel=1e-8)

    def test_in_chunks(self, unbiased):
        whole = energy_distance(X, Y, unbiased)
        rows = np.tile(X, (40, 1)), np.tile(Y, (40, 1))
        tiled = energy_distance(*rows)
        with sklearn.config_context(working_memory=1):  # MiB; the distances take several
            assert energy_distance(*rows) == pytest.approx(tiled, rel=1e-12)
        if not unbiased:  # copies of all cells change no mean
            assert tiled == pytest.approx(whole, rel=1e-7)


class TestDefinition:
    def test_the_same_cells(self):
        assert energy_distance(X, X.copy()) == pytest.approx(0, abs=1e-6)
        assert maximum_mean_discrepancy(X, X.copy(), BANDWIDTHS) == pytest.approx(0, abs=1e-12)

    def test_unbiased_is_zero_on_average_and_biased_is_not(self):
        rng = np.random.default_rng(1)
        pairs = [(rng.normal(size=(10, 3)), rng.normal(size=(10, 3))) for _ in range(150)]
        for measure in (
            energy_distance,
            lambda x, y, unbiased: maximum_mean_discrepancy(x, y, [1.0], unbiased),
        ):
            unbiased = np.array([measure(x, y, True) for x, y in pairs])
            biased = np.array([measure(x, y, False) for x, y in pairs])
            error = unbiased.std() / np.sqrt(len(pairs))
            assert abs(unbiased.mean()) < 3 * error
            assert biased.mean() > 10 * error
            assert biased.min() >= 0

    def test_closed_form_of_two_normal_populations(self):
        x = norm.ppf((np.arange(1_500)[:, None] + 0.5) / 1_500)
        y = x + 1.0
        # The difference of two cells is N(1, 2) between the populations and N(0, 2) within.
        sd = np.sqrt(2)
        between = sd * np.sqrt(2 / np.pi) * np.exp(-0.25) + 1 - 2 * norm.cdf(-1 / sd)
        within = 2 / np.sqrt(np.pi)
        expected = 2 * between - 2 * within
        assert energy_distance(x, y) == pytest.approx(expected, rel=0.01)
        expected = (2 - 2 * np.exp(-1 / 6)) / np.sqrt(3)
        assert maximum_mean_discrepancy(x, y, [1.0]) == pytest.approx(expected, rel=0.01)

    def test_sees_spread_that_means_do_not(self):
        rng = np.random.default_rng(3)
        narrow, wide = rng.normal(size=(300, 2)), rng.normal(scale=3, size=(300, 2))
        wide += narrow.mean(axis=0) - wide.mean(axis=0)
        alike = rng.normal(size=(300, 2))
        assert energy_distance(narrow, wide) > 10 * energy_distance(narrow, alike)

    def test_too_few_cells(self):
        assert np.isnan(energy_distance(np.zeros((0, 2)), np.zeros((3, 2))))
        assert np.isnan(energy_distance(np.zeros((1, 2)), np.zeros((3, 2)), unbiased=True))
        assert energy_distance(np.zeros((1, 2)), np.zeros((3, 2))) == 0

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"\(23, 4\) and \(17, 3\)"):
            energy_distance(X, Y[:, :3])
        for bad in ([], [0.0], [1.0, np.nan], [-1.0]):
            with pytest.raises(ValueError, match="give positive numbers"):
                maximum_mean_discrepancy(X, Y, bad)


class TestPertpy:
    """pertpy 1.0 is no dependency: the test runs where it is installed."""

    def test_energy_distance(self):
        pertpy = pytest.importorskip("pertpy")
        expected = pertpy.tl.Distance("edistance")(X, Y)
        assert energy_distance(X, Y) == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("width", BANDWIDTHS)
    def test_maximum_mean_discrepancy(self, width):
        pertpy = pytest.importorskip("pertpy")
        expected = pertpy.tl.Distance("mmd")(X, Y, kernel="rbf", gamma=1 / (2 * width**2))
        found = maximum_mean_discrepancy(X, Y, [width])
        assert found == pytest.approx(expected, rel=1e-10)
