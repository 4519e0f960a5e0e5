from __future__ import annotations

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np

from scvi_sams.pl._point_labels import PointLabels


def _drawn(points, names, avoid=None, **subplots):
    figure, axes = plt.subplots(squeeze=False, layout="constrained", **subplots)
    ax = axes[0, 0]
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = np.asarray(points, dtype=float)
    labels = PointLabels(*points.T, names, points if avoid is None else avoid)
    ax.add_artist(labels)
    for other in axes.ravel()[1:]:
        other.set(ylabel="which narrows\nthe others", xlim=(0, 1e7))
    figure.canvas.draw()
    return ax, labels


def test_names_cover_neither_names_nor_points_and_stay_inside():
    points = np.random.default_rng(0).uniform(0.4, 0.6, size=(12, 2))
    points = np.vstack([points, [[0, 0], [1, 1], [0, 1]]])
    names = [f"gene_{number}" for number in range(15)]
    ax, labels = _drawn(points, names, nrows=1, ncols=3, figsize=(12, 4))
    assert len(labels.boxes) >= 12
    boxes = list(labels.boxes.values())
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    pixels = ax.transData.transform(points)
    assert not any(box.contains(*point) for box in boxes for point in pixels)
    frame = ax.get_window_extent()
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)
    assert all(frame.containsy(box.y0) and frame.containsy(box.y1) for box in boxes)


def test_names_without_room_are_left_out_and_the_first_is_not():
    points = np.full((60, 2), 0.5)
    _, labels = _drawn(points, [f"a long name {number}" for number in range(60)], figsize=(2, 2))
    assert "a long name 0" in labels.boxes
    assert 1 <= len(labels.boxes) < 60


def test_a_name_goes_where_it_covers_nothing():
    point = np.array([[0.5, 0.5]])
    crowd = np.array([0.5, 0.3]) + np.random.default_rng(0).uniform(
        [0.01, 0], [0.4, 0.4], size=(500, 2)
    )
    ax, labels = _drawn(point, ["gene"], avoid=crowd)
    box = labels.boxes["gene"]
    assert not any(box.contains(*each) for each in ax.transData.transform(crowd))
    free, _ = _drawn(point, ["gene"]), None
    assert free[1].boxes["gene"].x0 > box.x1  # by itself it stands at the right


def test_names_are_placed_anew_for_another_size(tmp_path):
    ax, labels = _drawn([[0.2, 0.2], [0.8, 0.8]], ["A", "B"])
    before = labels.boxes["B"].x0
    ax.figure.savefig(tmp_path / "large.png", dpi=2 * ax.figure.dpi)
    assert labels.boxes["B"].x0 > 1.8 * before
    ax.figure.savefig(tmp_path / "vector.pdf")
    assert set(labels.boxes) == {"A", "B"}


def test_no_names_are_drawn_at_all():
    _, labels = _drawn(np.empty((0, 2)), [])
    assert labels.boxes == {}
