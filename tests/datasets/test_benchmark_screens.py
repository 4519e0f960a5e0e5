from __future__ import annotations

import pytest

from scvi_sams._exceptions import ScreenError
from scvi_sams.datasets import BENCHMARK_SCREENS, benchmark_screen


def test_variants_differ_from_the_default_as_documented():
    default = dict(BENCHMARK_SCREENS["default"])
    assert BENCHMARK_SCREENS["weak"] == default | {"effect_size": default["effect_size"] / 2}
    assert BENCHMARK_SCREENS["shallow"]["library_size"] == 1_500
    assert BENCHMARK_SCREENS["small"]["mask_probability"] > default["mask_probability"]


def test_default_has_no_batch_effect():
    assert BENCHMARK_SCREENS["default"]["n_batches"] == 1


def test_small():
    screen = benchmark_screen("small", seed=1)
    assert screen.shape == (6_000, 500)
    assert screen.uns["truth"]["mask"].shape == (60, 10)
    assert screen.obs["replicate"].nunique() == 1


def test_unknown_variant_lists_the_known():
    with pytest.raises(ScreenError, match=r"'huge'.*'default', 'weak', 'shallow', 'small'"):
        benchmark_screen("huge")
