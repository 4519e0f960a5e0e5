"""Names beside points, none of them over another."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib.artist import Artist, allow_rasterization
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

from scvi_sams.pl._figure import LABEL_SIZE, literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.backend_bases import RendererBase
    from numpy.typing import NDArray

_RADII = (6.0, 12.0, 20.0, 30.0, 42.0)  # points from the point to its name
_DIRECTIONS = 16
_HALF_POINT = 2.5  # points; half of what a marker takes
_INSET = 2.0  # points between a name and the frame of the axes
_LINE_FROM = 10.0  # points; a name further away has a line to its point


class PointLabels(Artist):
    """Names beside points, the first names at the best places.

    Places are found when the figure is drawn, as only then are its size and layout known. A name
    stays inside the axes and covers no other name and no named point, or is left out; of the
    places that remain it goes to the one that covers the least of the rest, and of those to the
    nearest.

    Parameters
    ----------
    x, y
        Points to name, in data coordinates, shape ``(n_names,)``.
    names
        Their names.
    avoid
        What names should not cover if they can help it, as points in data coordinates, shape
        ``(n_points, 2)``.

    Attributes
    ----------
    boxes
        Boxes in pixels of the names last drawn, by name.
    """

    def __init__(
        self,
        x: NDArray[np.floating],
        y: NDArray[np.floating],
        names: Iterable[str],
        avoid: NDArray[np.floating],
    ) -> None:
        super().__init__()
        self._points = np.column_stack([x, y])
        self._names = list(names)
        self._avoid = avoid
        self.boxes: dict[str, Bbox] = {}
        self.set_zorder(6)
        # Names must not push the axes that they are placed in.
        self.set_in_layout(False)

    @allow_rasterization
    def draw(self, renderer: RendererBase) -> None:
        """Place the names and draw them."""
        self.boxes = {}
        if not self.get_visible() or self.axes is None:
            return
        point = cast("float", renderer.points_to_pixels(1.0))
        targets = self.axes.transData.transform(self._points)
        obstacles = self.axes.transData.transform(self._avoid)
        frame = self.axes.get_window_extent(renderer).padded(-_INSET * point)
        taken = [Bbox([target, target]).padded(_HALF_POINT * point) for target in targets]
        for name, target in zip(self._names, targets, strict=True):
            text = Text(text=literal(name), ha="center", va="center", fontsize=LABEL_SIZE)
            text.set_figure(self.axes.figure)
            size = np.array(text.get_window_extent(renderer).size)
            free = [
                box
                for box in _places(target, size, point)
                if (box.p0 >= frame.p0).all()
                and (box.p1 <= frame.p1).all()
                and not any(box.overlaps(other) for other in taken)
            ]
            if not free:
                continue
            box = min(free, key=lambda box: _covered(box, obstacles, _HALF_POINT * point / 2))
            taken.append(box)
            self.boxes[name] = box
            end = np.clip(target, box.p0, box.p1)
            if np.hypot(*(end - target)) > _LINE_FROM * point:
                line = Line2D(*np.transpose([target, end]), color="0.5", linewidth=0.5)
                line.set_transform(IdentityTransform())
                line.set_figure(self.axes.figure)
                line.draw(renderer)
            text.set_transform(IdentityTransform())
            text.set_position(tuple((box.p0 + box.p1) / 2))
            text.draw(renderer)


def _places(target: NDArray[np.float64], size: NDArray[np.float64], point: float) -> list[Bbox]:
    """Where a name of this size in pixels may stand, the best places first."""
    angles = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    # Beside a point rather than above it, as names are wide.
    angles = angles[np.argsort(np.abs(np.sin(angles)).round(9), kind="stable")]
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    centers = [
        target + way * (radius * point + size / 2) for radius in _RADII for way in directions
    ]
    return [Bbox([center - size / 2, center + size / 2]) for center in centers]


def _covered(box: Bbox, obstacles: NDArray[np.float64], margin: float) -> int:
    """How many points lie in a box or next to it."""
    inside = (obstacles > box.p0 - margin) & (obstacles < box.p1 + margin)
    return int(inside.all(axis=1).sum())
