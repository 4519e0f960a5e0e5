"""Names beside points, none of them over another."""

from __future__ import annotations

__all__ = ["PointLabels"]

from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib.artist import Artist, allow_rasterization
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

from scvi_sams.pl._figure import LABEL_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        names: Sequence[str],
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
        pixels = cast("float", renderer.points_to_pixels(1.0))
        points = self.axes.transData.transform(self._points)
        obstacles = self.axes.transData.transform(self._avoid)
        frame = self.axes.get_window_extent(renderer).padded(-_INSET * pixels)
        half = _HALF_POINT * pixels
        taken = [Bbox([point - half, point + half]) for point in points]
        for name, point in zip(self._names, points, strict=True):
            text = Text(text=name, ha="center", va="center", fontsize=LABEL_SIZE)
            text.set_figure(self.axes.figure)
            extent = text.get_window_extent(renderer)
            size = np.array([extent.width, extent.height])
            box = _best_box(point, size, pixels, frame, taken, obstacles)
            if box is None:
                continue
            taken.append(box)
            self.boxes[name] = box
            center = (box.p0 + box.p1) / 2
            end = np.clip(point, box.p0, box.p1)
            if np.hypot(*(end - point)) > _LINE_FROM * pixels:
                line = Line2D(*np.transpose([point, end]), color="0.5", linewidth=0.5)
                line.set_transform(IdentityTransform())
                line.set_figure(self.axes.figure)
                line.draw(renderer)
            text.set_transform(IdentityTransform())
            text.set_position(tuple(center))
            text.draw(renderer)


def _best_box(
    point: NDArray[np.float64],
    size: NDArray[np.float64],
    pixels: float,
    frame: Bbox,
    taken: Sequence[Bbox],
    obstacles: NDArray[np.float64],
) -> Bbox | None:
    """Where a name of this size goes, all in pixels; `pixels` is how many make a point."""
    best, least = None, np.inf
    for offset in _offsets(size, pixels):
        low, high = point + offset - size / 2, point + offset + size / 2
        box = Bbox([low, high])
        inside = (low >= frame.p0).all() and (high <= frame.p1).all()
        if not inside or any(box.overlaps(other) for other in taken):
            continue
        reach = size / 2 + _HALF_POINT * pixels / 2
        covered = (np.abs(obstacles - point - offset) < reach).all(axis=1).sum()
        if covered < least:
            best, least = box, covered
        if covered == 0:
            break
    return best


def _offsets(size: NDArray[np.float64], pixels: float) -> list[NDArray[np.float64]]:
    """From the point to the middle of its name, the best first."""
    angles = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    # Beside a point rather than above it, as names are wide.
    angles = angles[np.argsort(np.abs(np.sin(angles)).round(9), kind="stable")]
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    return [
        direction * (radius * pixels + size / 2) for radius in _RADII for direction in directions
    ]
