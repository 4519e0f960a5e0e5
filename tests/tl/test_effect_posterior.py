from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams.tl.error_rates import effect_interval, local_false_sign_rate


def _tables(**columns):
    return [pd.DataFrame({"l0": np.asarray(values, float)}) for values in columns.values()]


@pytest.fixture
def posterior():
    return _tables(
        probability=[0.0, 0.02, 0.3, 0.6, 0.97, 1.0, 0.9],
        mean=[1.0, 2.0, -0.5, 0.3, -2.0, 0.7, 0.0],
        std=[1.0, 0.5, 0.8, 1.0, 0.6, 1.0, 1.0],
    )


@pytest.fixture
def draws(posterior):
    rng = np.random.default_rng(0)
    probability, mean, std = (table.to_numpy() for table in posterior)
    shape = (len(mean), 400_000)
    return (rng.random(shape) < probability) * (mean + std * rng.standard_normal(shape))


def test_false_sign_rate_is_that_of_draws(posterior, draws):
    by_draws = np.minimum((draws <= 0).mean(1), (draws >= 0).mean(1))
    by_formula = local_false_sign_rate(*posterior)["l0"]
    # Where zero is likelier than a sign, the sign is still that of the mean.
    np.testing.assert_allclose(by_formula, by_draws, atol=0.004)


def test_false_sign_rate_of_points():
    one, zero, two = _tables(one=[1.0, 1.0], zero=[0.0, 0.0], mean=[2.0, 0.0])
    np.testing.assert_allclose(local_false_sign_rate(one, two, zero)["l0"], [0.0, 0.5])


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_is_that_of_draws(posterior, draws, level):
    lower, upper = effect_interval(*posterior, level)
    tails = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=1)
    np.testing.assert_allclose(lower["l0"], tails[0], atol=0.03)
    np.testing.assert_allclose(upper["l0"], tails[1], atol=0.03)


def test_interval_of_nothing_and_of_a_point():
    probability, mean, std = _tables(probability=[0.0, 1.0], mean=[5.0, 2.0], std=[1.0, 0.0])
    lower, upper = effect_interval(probability, mean, std)
    assert lower["l0"].tolist() == [0.0, 2.0]
    assert upper["l0"].tolist() == [0.0, 2.0]


def test_interval_wants_a_level(posterior):
    with pytest.raises(ValueError, match="credible_level"):
        effect_interval(*posterior, credible_level=1.0)
