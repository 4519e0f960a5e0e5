"""Names beside points, as in the plot of pairs."""

from __future__ import annotations

from itertools import combinations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from scvi_sams import pl


def _drawn(points, names, crowd=(), **subplots):
    """Plot named points among others that have no name."""
    figure, axes = plt.subplots(squeeze=False, layout="constrained", **subplots)
    for other in axes.ravel()[1:]:
        other.set(ylabel="which narrows\nthe others", xlim=(0, 1e7))
    x, y = np.vstack([points, np.reshape(crowd, (-1, 2))]).T
    deviates = (np.arange(len(x)) < len(names)).astype(float)[None]
    unnamed = [f"unnamed {number}" for number in range(len(x) - len(names))]
    table = ad.AnnData(
        deviates,
        obs=pd.DataFrame(index=["A+B"]),
        var=pd.DataFrame(index=[*names, *unnamed]),
        layers={"additive": x[None], "effect": y[None], "lower": deviates, "upper": deviates},
    )
    return pl.pair_vs_additive_effects(table, n_labels=len(names), ax=axes[0, 0])


def test_names_cover_neither_names_nor_points_and_stay_inside(name_boxes):
    points = np.random.default_rng(0).uniform(0.4, 0.6, size=(12, 2))
    points = np.vstack([points, [[0, 0], [1, 1], [0, 1]]])
    names = [f"gene_{number}" for number in range(15)]
    ax = _drawn(points, names, nrows=1, ncols=3, figsize=(12, 4))
    boxes = list(name_boxes(ax).values())
    assert len(boxes) >= 12
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    pixels = ax.transData.transform(points)
    assert not any(box.contains(*point) for box in boxes for point in pixels)
    frame = ax.get_window_extent()
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)
    assert all(frame.containsy(box.y0) and frame.containsy(box.y1) for box in boxes)


def test_names_without_room_are_left_out_and_the_first_is_not(name_boxes):
    names = [f"a long name {number}" for number in range(60)]
    placed = name_boxes(_drawn(np.full((60, 2), 0.5), names, figsize=(2.4, 2.4)))
    assert "a long name 0" in placed
    assert 1 <= len(placed) < 60


def test_a_name_goes_where_it_covers_nothing(name_boxes):
    point = np.array([[0.5, 0.2]])
    crowd = np.array([0.5, 0.0]) + np.random.default_rng(0).uniform(
        [0.01, 0], [0.4, 0.4], size=(500, 2)
    )
    ax = _drawn(point, ["gene"], crowd)
    box = name_boxes(ax)["gene"]
    assert not any(box.contains(*each) for each in ax.transData.transform(crowd))
    alone = _drawn(point, ["gene"], [[0.9, 0.4]])
    assert name_boxes(alone)["gene"].x0 > box.x1  # by itself it stands at the right


def test_names_are_placed_anew_for_another_size(tmp_path, name_boxes):
    ax = _drawn([[0.2, 0.4], [0.8, 0.5]], ["A", "B"])
    before = name_boxes(ax)["B"].x0
    (labels,) = (artist for artist in ax.artists if hasattr(artist, "boxes"))
    ax.figure.savefig(tmp_path / "large.png", dpi=2 * ax.figure.dpi)
    assert labels.boxes["B"].x0 > 1.8 * before
    ax.figure.savefig(tmp_path / "vector.pdf")
    assert set(labels.boxes) == {"A", "B"}


def test_no_names_are_drawn_at_all(name_boxes):
    assert name_boxes(_drawn(np.array([[0.5, 0.2]]), [])) == {}
