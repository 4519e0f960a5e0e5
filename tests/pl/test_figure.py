from __future__ import annotations

from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from scvi_sams import pl

# What remains of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
_SIGHT = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
_RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def _linear(color):
    rgb = np.asarray(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(color, sight):
    linear = np.clip(np.asarray(_SIGHT[sight]) @ _linear(color), 0, 1)
    ratio = _RGB_TO_XYZ @ linear / [0.95047, 1.0, 1.08883]
    root = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def _contrast(color):
    """Contrast with a white page, as the Web Content Accessibility Guidelines have it."""
    return 1.05 / (_RGB_TO_XYZ[1] @ _linear(color) + 0.05)


@pytest.fixture
def categories():
    """Colours of eight categories and of those beyond."""
    rows = [f"P{row}" for row in range(9)]
    ax = pl.mask_heatmap(
        pd.DataFrame(np.eye(9), index=rows), pathways=dict(zip(rows, rows, strict=True))
    )
    patches = ax.images[0].colorbar.ax.get_legend().get_patches()
    assert len(patches) == 9
    return [patch.get_facecolor() for patch in patches]


@pytest.fixture
def counts():
    """Colours of the number of effects in a hexagon, from few to many."""
    effects = ad.AnnData(np.random.default_rng(0).normal(size=(20, 200)))
    colors = pl.model_vs_observed_effects(effects, effects).collections[0].cmap
    return [color[:3] for color in colors(np.linspace(0, 1, 50))]


@pytest.mark.parametrize("sight", list(_SIGHT))
def test_colours_of_categories_differ_for_every_eye(sight, categories):
    colors = [_lab(color, sight) for color in categories]
    nearest = min(np.linalg.norm(a - b) for a, b in combinations(colors, 2))
    assert nearest > 15  # about 2 can just be told apart side by side


def test_colours_show_on_a_white_page(categories, counts):
    assert min(map(_contrast, categories[:8])) > 2
    assert min(map(_contrast, counts)) > 1.8


def test_more_is_darker_throughout(counts):
    light = [_lab(color, "full")[0] for color in counts]
    assert (np.diff(light) < 0).all()
