"""Merge the detections of overlapping windows, so that each object gives one box.

The rule, in this order:

1. A box is *cut* at an inner edge of its window if it ends within a margin of it. The margin is 1% of
   the window's side, at least 2 pixels, and at most a quarter of the overlap. A cut box is dropped if
   another window contains it and cuts it at fewer sides, all of which are cut in its own window too:
   that window sees everything that this one sees of the object, and more. An object that is smaller than the overlap is
   therefore taken from a window that sees it whole.
2. Cut boxes of the same class from two windows are joined if each is cut where the other window
   continues, and if they agree in the region that both windows see: there, their intersection is at
   least half of the smaller one. The best agreement is joined first, and a box is joined with at most
   one of each other window. The joined box encloses its parts and has their highest score.
3. A cut box that was not joined is dropped if three quarters of it are inside a larger box of the
   same class that scores at least as high and is joined or from another window. Boxes of its own
   window are no reason, because there the network has seen both.
4. Non-maximum suppression in each class removes what is left of objects found in two windows.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from focaldet._torchvision import torchvision
from focaldet.boxes import box_area
from focaldet.detections import Detections

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from focaldet._tiles._grid import Window

__all__ = ["WindowDetections", "merge_windows"]

_MARGIN = 0.01  # of the side of a window
_MIN_MARGIN = 2.0  # pixels
_MAX_MARGIN = 0.25  # of the overlap
_AGREEMENT = 0.5  # of the smaller of two parts, in the region that both windows see
_INSIDE = 0.75  # of a cut box, inside a larger one
_CHUNK = 256  # cut boxes that are compared with all boxes at a time


class WindowDetections:
    """The detections in the windows of an image, gathered one window after another.

    The numbers are kept in three arrays. If each window kept small tensors of its own, the allocator
    would place them among the pixels of windows and could not use that memory again for other pixels:
    the process would grow with the image.

    Args:
        first: The detections in the first window.
    """

    def __init__(self, first: Detections) -> None:
        self.first = first
        self.counts: list[int] = []
        self._boxes, self._scores, self._labels = array("d"), array("d"), array("q")
        self.add(first)

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, found: Detections) -> None:
        """Add the detections in the next window, in pixels of the window."""
        self.counts.append(len(found))
        self._boxes.frombytes(found.boxes.detach().double().numpy().tobytes())
        self._scores.frombytes(found.scores.detach().double().numpy().tobytes())
        self._labels.frombytes(found.labels.numpy().tobytes())

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes ``[N, 4]``, scores and labels of all windows."""
        dtype = self.first.boxes.dtype
        boxes = torch.tensor(self._boxes, dtype=torch.float64).view(-1, 4)
        scores = torch.tensor(self._scores, dtype=torch.float64)
        labels = torch.tensor(self._labels, dtype=torch.int64)
        return boxes.to(dtype), scores.to(self.first.scores.dtype), labels


def merge_windows(
    grid: Sequence[Sequence[Window]],
    found: WindowDetections,
    *,
    nms_threshold: float,
    class_agnostic: bool = False,
) -> Detections:
    """Merge the detections of the windows of an image by the rule of this module.

    Args:
        grid: The windows, in rows.
        found: The detections in the windows, row by row.
        nms_threshold: Threshold of the final suppression, in [0, 1].
        class_agnostic: Whether the final suppression ignores the class.

    Returns:
        The detections of the image, best score first.
    """
    merger = _Merger(grid, found)
    merger.drop_views_of_less()
    boxes, scores, labels, windows, compared = merger.joined()
    keep = ~_inside_larger_box(boxes, scores, labels, windows, compared)
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    groups = torch.zeros_like(labels) if class_agnostic else labels
    keep = torchvision.ops.batched_nms(boxes, scores, groups, nms_threshold)
    return Detections(
        boxes[keep],
        scores[keep],
        labels[keep],
        grid[0][0].image_size,
        class_names=found.first.class_names,
        source=found.first.source,
    )


class _Merger:
    """The boxes of all windows, with the sides at which they are cut."""

    def __init__(self, grid: Sequence[Sequence[Window]], found: WindowDetections) -> None:
        self.grid = grid
        self.windows = [window for row in grid for window in row]
        self.margins = _margins(grid)
        self.rows: list[Tensor] = []  # the rows of each window that are cut and not dropped
        boxes, self.scores, self.labels = found.rows()
        shifted, cuts = [], []
        offset = 0
        for window, part in zip(self.windows, torch.split(boxes, found.counts), strict=True):
            shifted.append(part + part.new_tensor((window.left, window.top) * 2))
            cuts.append(_cut_sides(shifted[-1], window, self.margins))
            self.rows.append(cuts[-1].any(dim=1).nonzero()[:, 0] + offset)
            offset += len(part)
        self.boxes, self.cuts = torch.cat(shifted), torch.cat(cuts)
        self.window_idxs = torch.arange(len(found)).repeat_interleave(torch.tensor(found.counts))
        self.kept = torch.ones(offset, dtype=torch.bool)

    def drop_views_of_less(self) -> None:
        """Drop the cut boxes of which another window sees more."""
        for index, rows in enumerate(self.rows):
            if not len(rows):
                continue
            boxes, cuts = self.boxes[rows], self.cuts[rows]
            less = torch.zeros(len(rows), dtype=torch.bool)
            for other in self._neighbours(index):
                left, top, right, bottom = self.windows[other].edges
                inside = (boxes[:, :2] >= boxes.new_tensor((left, top))).all(dim=1)
                inside &= (boxes[:, 2:] <= boxes.new_tensor((right, bottom))).all(dim=1)
                there = _cut_sides(boxes, self.windows[other], self.margins)
                fewer = (there <= cuts).all(dim=1) & (there < cuts).any(dim=1)
                less |= inside & fewer
            self.kept[rows[less]] = False
            self.rows[index] = rows[~less]

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Join the parts of objects.

        Returns:
            Boxes, scores, labels, the window of each box (-1 for a joined box), and a mask of the cut
            boxes that were not joined.
        """
        parts_of = _Groups()
        for index, rows in enumerate(self.rows):
            for other in self._neighbours(index) if len(rows) else ():
                if other > index and len(self.rows[other]):
                    for one, two in self._matches(index, other):
                        parts_of.join(one, two)
        boxes, windows = self.boxes.clone(), self.window_idxs.clone()
        open_ends = self.cuts.any(dim=1)
        for group in parts_of.groups():
            best = max(group, key=lambda row: float(self.scores[row]))
            boxes[best, :2] = self.boxes[group, :2].amin(dim=0)
            boxes[best, 2:] = self.boxes[group, 2:].amax(dim=0)
            self.kept[group] = False
            self.kept[best] = True
            open_ends[best] = False
            windows[best] = -1
        kept = self.kept
        scores, labels = self.scores[kept], self.labels[kept]
        return boxes[kept], scores, labels, windows[kept], open_ends[kept]

    def _matches(self, index: int, other: int) -> Iterator[tuple[int, int]]:
        """Yield pairs of rows of two windows that are parts of the same object."""
        window, neighbour = self.windows[index], self.windows[other]
        shared = _intersection(window, neighbour)
        rows = self.rows[index][self._cut_towards(index, neighbour)]
        others = self.rows[other][self._cut_towards(other, window)]
        ours = _clipped(self.boxes[rows], shared)[:, None]
        theirs = _clipped(self.boxes[others], shared)[None]
        overlap = _intersection_area(ours, theirs)
        areas, other_areas = box_area(ours), box_area(theirs)
        smaller = torch.minimum(areas, other_areas)
        agree = (smaller > 0) & (overlap >= _AGREEMENT * smaller)
        agree &= self.labels[rows][:, None] == self.labels[others][None]
        iou = overlap / (areas + other_areas - overlap)
        quality = iou * torch.minimum(self.scores[rows][:, None], self.scores[others][None])
        ones, twos = agree.nonzero(as_tuple=True)
        taken: set[int] = set()
        for best in quality[ones, twos].argsort(descending=True, stable=True).tolist():
            pair = int(rows[ones[best]]), int(others[twos[best]])
            if taken.isdisjoint(pair):
                taken.update(pair)
                yield pair

    def _cut_towards(self, index: int, other: Window) -> Tensor:
        """Return which cut boxes of a window are cut at a side where another window continues."""
        left, top, right, bottom = self.windows[index].edges
        beyond = torch.tensor(
            (other.left < left, other.top < top, other.right > right, other.bottom > bottom)
        )
        return (self.cuts[self.rows[index]] & beyond).any(dim=1)

    def _neighbours(self, index: int) -> Iterator[int]:
        """Yield the indices of the other windows that overlap a window."""
        columns = len(self.grid[0])
        row, column = divmod(index, columns)
        window = self.windows[index]
        rows = [i for i, line in enumerate(self.grid) if _overlap(line[0], window, axis=1)]
        across = [j for j, one in enumerate(self.grid[0]) if _overlap(one, window, axis=0)]
        for i in rows:
            for j in across:
                if (i, j) != (row, column):
                    yield i * columns + j


class _Groups:
    """Disjoint sets of rows."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def _root(self, row: int) -> int:
        while (parent := self._parents.setdefault(row, row)) != row:
            row = parent
        return row

    def join(self, one: int, two: int) -> None:
        self._parents[self._root(one)] = self._root(two)

    def groups(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for row in self._parents:
            groups.setdefault(self._root(row), []).append(row)
        return list(groups.values())


def _margins(grid: Sequence[Sequence[Window]]) -> tuple[float, float]:
    """Return how far, in x and y, a box may end from an edge and still count as cut."""
    first = grid[0][0]
    height, width = first.size
    last_column, last_row = grid[0][min(1, len(grid[0]) - 1)], grid[min(1, len(grid) - 1)][0]
    return (
        _margin(width, first.right - last_column.left),
        _margin(height, first.bottom - last_row.top),
    )


def _margin(side: int, overlap: int) -> float:
    return min(max(_MARGIN * side, _MIN_MARGIN), _MAX_MARGIN * overlap)


def _cut_sides(boxes: Tensor, window: Window, margins: tuple[float, float]) -> Tensor:
    """Return ``[N, 4]``: whether each box ends at the left, top, right and bottom inner edge."""
    distance = boxes - boxes.new_tensor(window.edges)
    distance[:, 2:].neg_()
    return (distance <= boxes.new_tensor(margins * 2)) & torch.tensor(window.inner)


def _overlap(window: Window, other: Window, *, axis: int) -> bool:
    """Return whether two windows overlap in x (axis 0) or y (axis 1)."""
    one, two = window.edges, other.edges
    return max(one[axis], two[axis]) < min(one[axis + 2], two[axis + 2])


def _intersection(window: Window, other: Window) -> tuple[int, int, int, int]:
    return (
        max(window.left, other.left),
        max(window.top, other.top),
        min(window.right, other.right),
        min(window.bottom, other.bottom),
    )


def _clipped(boxes: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Clip boxes to a region. A box outside has no area."""
    low, high = boxes.new_tensor(region[:2] * 2), boxes.new_tensor(region[2:] * 2)
    return boxes.clamp(low, high)


def _intersection_area(boxes: Tensor, others: Tensor) -> Tensor:
    inner = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(
        boxes[..., :2], others[..., :2]
    )
    return inner.clamp(min=0).prod(dim=-1)


def _inside_larger_box(
    boxes: Tensor, scores: Tensor, labels: Tensor, windows: Tensor, compared: Tensor
) -> Tensor:
    """Return which boxes in the mask ``compared`` are inside a larger, surer box from elsewhere."""
    areas = box_area(boxes)
    inside = torch.zeros_like(compared)
    for rows in torch.split(compared.nonzero()[:, 0], _CHUNK):
        overlap = _intersection_area(boxes[rows, None], boxes[None])
        larger = areas[None] > areas[rows, None]
        surer = scores[None] >= scores[rows, None]
        same = labels[None] == labels[rows, None]
        much = overlap >= _INSIDE * areas[rows, None]
        elsewhere = windows[None] != windows[rows, None]
        inside[rows] = (larger & surer & same & much & elsewhere).any(dim=1)
    return inside
