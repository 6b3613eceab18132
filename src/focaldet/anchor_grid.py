"""The anchors of a feature pyramid, with the grid of cells they belong to."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from focaldet._checks import check_boxes
from focaldet.boxes import as_xyxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["AnchorGrid", "Windows"]

# By the anchors of the first level; an entry disappears with them.
_GRIDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _CachedGrid(NamedTuple):
    grid: AnchorGrid
    levels: list[tuple[weakref.ref[Tensor], int]]  # with the version, which counts changes in place


def grid_of(anchors: Sequence[Tensor], grid_sizes: Sequence[tuple[int, int]]) -> AnchorGrid:
    """Return the grid of some anchors, built once for as long as these tensors are the same.

    The tensors that an ``AnchorGenerator`` keeps for images of one size have one grid.
    """
    if torch.compiler.is_compiling() or not anchors or any(a.is_inference() for a in anchors):
        return AnchorGrid(anchors, grid_sizes)
    cached: _CachedGrid | None = _GRIDS.get(anchors[0])  # type: ignore[no-untyped-call]
    if (
        cached is not None
        and cached.grid.grid_sizes == tuple(grid_sizes)
        and len(cached.levels) == len(anchors)
        and all(
            level() is given and version == given._version  # noqa: SLF001 (no public equivalent)
            for given, (level, version) in zip(anchors, cached.levels, strict=True)
        )
    ):
        return cached.grid
    with torch.inference_mode(mode=False):  # for a later training step
        grid = AnchorGrid(anchors, grid_sizes)
    levels = [(weakref.ref(level), level._version) for level in anchors]  # noqa: SLF001
    _GRIDS[anchors[0]] = _CachedGrid(grid, levels)
    return grid


class AnchorGrid:
    """Anchors of all pyramid levels, with the grid of cells they belong to.

    :class:`~focaldet.matching.Matcher` uses it to find the cells whose anchors can overlap a box
    enough, and :class:`~focaldet.matching.ATSSAssigner` to choose candidates level by level. Anchors
    may be off the grid: the offset is measured, and the search is widened by it.

    Args:
        anchors: One ``[H * W * A, 4]`` tensor per level, xyxy, in the order of ``AnchorGenerator``.
        grid_sizes: ``(height, width)`` of each level in cells, each at least 1.

    Attributes:
        anchors: ``[R, 4]``, the anchors of all levels, in order.
        grid_sizes: ``(height, width)`` of each level, in cells.
        num_anchors: Number of anchors of each level, ``H * W * A``.

    Raises:
        ValueError: If there is not one grid size per level, or a level's anchors do not fill the
            cells of its grid.
        TypeError: If the anchors are not floating-point.

    >>> from focaldet.anchors import AnchorGenerator
    >>> sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    >>> grid = AnchorGrid(AnchorGenerator()(sizes), sizes)
    >>> grid.num_anchors
    (151200, 37800, 9450, 2457, 693)
    >>> box = torch.tensor([[100.0, 100.0, 200.0, 300.0]])
    >>> grid.windows(box, torch.tensor([0.5])).num_anchors()  # of 201,600
    tensor([29])
    """

    # In the shapes below, N is the sum of A over the levels: one row per anchor of a cell.

    def __init__(self, anchors: Sequence[Tensor], grid_sizes: Sequence[tuple[int, int]]) -> None:
        if not anchors:
            raise ValueError("anchors is empty; pass one tensor per pyramid level.")
        if len(anchors) != len(grid_sizes):
            raise ValueError(
                f"grid_sizes must have one (height, width) per level of anchors, but there are "
                f"{len(grid_sizes)} sizes and {len(anchors)} levels."
            )
        anchors = [as_xyxy(level, f"anchors[{i}]").detach() for i, level in enumerate(anchors)]
        for i, (level, (height, width)) in enumerate(zip(anchors, grid_sizes, strict=True)):
            check_boxes(f"anchors[{i}]", level)
            if height < 1 or width < 1:
                raise ValueError(f"grid_sizes[{i}] must be at least (1, 1), got {height, width}.")
            if not len(level) or len(level) % (height * width):
                raise ValueError(
                    f"anchors[{i}] must have the same number of anchors in each cell of its "
                    f"{height}x{width} grid (shape [{height * width} * A, 4]), got "
                    f"{list(level.shape)}."
                )
        self.anchors = torch.cat(anchors)
        self.grid_sizes = tuple((int(height), int(width)) for height, width in grid_sizes)
        self.num_anchors = tuple(map(len, anchors))

    @functools.cached_property
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _layout(self) -> _Layout:
        """The cells, which are measured when they are first needed."""
        levels = []
        start = 0
        for level, size in zip(
            torch.split(self.anchors, list(self.num_anchors)), self.grid_sizes, strict=True
        ):
            levels.append(_lay_out(level, *size, start))
            start += len(level)
        return _Layout(*(torch.cat(column) for column in zip(*levels, strict=True)))

    @property
    def strides(self) -> Tensor:
        """Distance between neighbouring cells of each level: ``[L, 2]``, (x, y) in pixels.

        It is measured from the anchors. A level that is one cell wide or high has no distance to
        measure in that direction, which gives NaN.

        .. versionadded:: 0.3.0
        """
        per_cell = (
            count // (height * width)
            for count, (height, width) in zip(self.num_anchors, self.grid_sizes, strict=True)
        )
        levels = torch.split(self._layout.spacing, list(per_cell))
        return torch.stack([level[0] for level in levels])

    def nearest(self, boxes: Tensor) -> Tensor:
        """Return the index of the anchor in the nearest cell, for each anchor of a cell: ``[G, N]``.

        Apart from rounding, no anchor of the same size and shape overlaps the box more.

        Args:
            boxes: ``[G, 4]``, xyxy.
        """
        grid = self._layout
        from_first_GN2 = _centres(as_xyxy(boxes))[:, None] - _centres(grid.corners)
        cells_GN2 = (from_first_GN2 / grid.strides).round_().nan_to_num_(nan=0.0)
        return grid.index_of(_clamp(cells_GN2, grid.sizes - 1))

    def windows(self, boxes: Tensor, iou_G: Tensor) -> Windows:
        """Return the cells of all anchors whose IoU with a box is positive and at least ``iou_G``.

        The cells whose anchor overlaps a box by a given length form a range of columns in x and a
        range of rows in y. Rounding loses nothing: each range is widened by the distance of the
        anchors from the grid and by 16 units in the last place.

        Args:
            boxes: ``[G, 4]``, xyxy.
            iou_G: ``[G]`` in [0, 1], in the rounding of ``box_iou``.
        """
        boxes, grid = as_xyxy(boxes), self._layout
        box_G4 = boxes.to(torch.promote_types(boxes.dtype, grid.corners.dtype))
        unit = torch.finfo(box_G4.dtype).eps
        slack_GN1 = grid.slack + (16 * unit * box_G4.abs().amax(dim=1))[:, None, None]
        need_GN2 = self._needed_overlap(boxes, iou_G.to(box_G4.dtype), slack_GN1)
        low_GN2 = box_G4[:, None, :2] + need_GN2 - grid.corners[:, 2:] - slack_GN1
        high_GN2 = box_G4[:, None, 2:] - need_GN2 - grid.corners[:, :2] + slack_GN1
        # NaN comes from anchors without a grid. It widens a range to the whole level.
        first_GN2 = (low_GN2 / grid.strides).ceil_().nan_to_num_(nan=0.0)
        last_GN2 = (high_GN2 / grid.strides).floor_().nan_to_num_(nan=torch.inf)
        first_GN2 = _clamp(first_GN2, grid.sizes)
        counts_GN2 = (_clamp(last_GN2 + 1, grid.sizes) - first_GN2).clamp_(min=0)
        counts_GN2[need_GN2.isinf()] = 0
        return Windows(grid.index_of(first_GN2), counts_GN2, grid.steps)

    def _needed_overlap(self, boxes: Tensor, iou_G: Tensor, slack_GN1: Tensor) -> Tensor:
        """Return the smallest overlap in x and y that an IoU of ``iou_G`` needs, or infinity.

        An IoU of t needs an intersection of t / (1 + t) times the sum of both areas. Divided by the
        smaller height, that is the overlap needed in x, and likewise in y. Because ``box_iou``
        rounds, t is reduced by 64 units in the last place, and is 0 where it or the intersection is
        close to underflow.
        """
        infos = torch.finfo(boxes.dtype), torch.finfo(self.anchors.dtype)
        unit, tiny = max(info.eps for info in infos), max(info.tiny for info in infos)
        size_G2 = boxes[:, 2:].to(slack_GN1.dtype) - boxes[:, :2].to(slack_GN1.dtype)
        area_G = size_G2.prod(dim=1)
        iou_G = iou_G * (1 - 64 * unit)
        iou_G = torch.where((iou_G > tiny) & (iou_G * area_G > tiny), iou_G, 0.0)
        corners_N4 = self._layout.corners
        size_N2 = corners_N4[:, 2:] - corners_N4[:, :2]
        area_GN = (size_N2 - 2 * slack_GN1).clamp_(min=0).prod(dim=-1)
        common_GN2 = torch.minimum(size_G2[:, None], size_N2 + 2 * slack_GN1)
        need_GN = (iou_G / (1 + iou_G))[:, None] * (area_G[:, None] + area_GN)
        void_G = (size_G2 <= 0).any(dim=1) | ~area_G.isfinite()  # box_iou of these boxes is 0
        never_GN = (need_GN > common_GN2.prod(dim=-1)) | void_G[:, None]
        return torch.where(
            never_GN[:, :, None], torch.inf, need_GN[:, :, None] / common_GN2.flip(-1)
        )


class _Layout(NamedTuple):
    """The cells of an :class:`AnchorGrid`, one row per anchor of a cell."""

    corners: Tensor  # the anchors of the first cell of each level
    spacing: Tensor  # between cells, NaN where there is only one
    slack: Tensor  # distance of the anchors from the grid, at most
    sizes: Tensor  # number of columns and rows
    first: Tensor  # index of the first anchor
    steps: Tensor  # difference in index to the next column and row

    @property
    def strides(self) -> Tensor:
        return self.spacing.nan_to_num(nan=1.0)

    def index_of(self, cells_GN2: Tensor) -> Tensor:
        return self.first + (cells_GN2 * self.steps).sum(dim=-1)


class Windows(NamedTuple):
    """Ranges of cells, one for each box and each anchor of a cell.

    Args:
        first: ``[G, N]``, the index of the first anchor.
        counts: ``[G, N, 2]``, the number of columns and rows, 0 or more.
        steps: ``[N, 2]``, the difference in index to the same anchor of the next column and row.
    """

    first: Tensor
    counts: Tensor
    steps: Tensor

    def num_anchors(self) -> Tensor:
        """Return the number of anchors in the windows of each box: ``[G]``."""
        return self.counts.prod(dim=-1).sum(dim=-1)

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the pairs of box and anchor in the windows of boxes ``start`` to ``stop - 1``.

        Returns:
            The boxes ``[P]``, in increasing order, and the anchors ``[P]``, both as indices.
        """
        counts = self.counts[start:stop]
        box, kind = (counts.prod(dim=-1) > 0).nonzero(as_tuple=True)
        first = self.first[start:stop][box, kind]
        (columns, rows), (next_column, next_row) = counts[box, kind].T, self.steps[kind].T
        window, row = _count_off(rows)
        first_of_row = first[window] + row * next_row[window]
        line, column = _count_off(columns[window])
        window = window[line]
        return box[window] + start, first_of_row[line] + column * next_column[window]


def _count_off(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each index i ``counts[i]`` times, and number its repetitions from 0.

    >>> _count_off(torch.tensor([2, 3]))
    (tensor([0, 0, 1, 1, 1]), tensor([0, 1, 0, 1, 2]))
    """
    owner = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - starts[owner]


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _clamp(cells: Tensor, last_N2: Tensor) -> Tensor:
    """Clamp cell numbers to 0 to ``last``."""
    return torch.minimum(cells.clamp_(min=0), last_N2).long()


def _lay_out(level: Tensor, height: int, width: int, start: int) -> tuple[Tensor, ...]:
    """Return what an :class:`AnchorGrid` stores of a level, one row per anchor of a cell."""
    level = level.to(torch.promote_types(level.dtype, torch.float32))
    cells_HWA4 = level.reshape(height, width, -1, 4)
    corners_A4 = cells_HWA4[0, 0]
    intervals = level.new_tensor([max(1, width - 1), max(1, height - 1)])
    steps_2 = (cells_HWA4[-1, -1, 0] - corners_A4[0])[:2] / intervals
    measured_2 = (steps_2 > 0) & steps_2.isfinite()
    strides_2 = torch.where(measured_2, steps_2, 1.0)
    x, y = (
        torch.arange(count, device=level.device, dtype=level.dtype)[:, None, None]
        for count in (width, height)
    )
    x_WA2 = corners_A4[:, 0::2] + x * strides_2[0]
    y_HA2 = corners_A4[:, 1::2] + y * strides_2[1]
    off = torch.maximum(
        (cells_HWA4[..., 0::2] - x_WA2).abs_().amax(),
        (cells_HWA4[..., 1::2] - y_HA2[:, None]).abs_().amax(),
    )
    magnitude = torch.maximum(x_WA2.abs().amax(), y_HA2.abs().amax())
    slack = (off + 16 * torch.finfo(level.dtype).eps * magnitude).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    per_cell = len(corners_A4)
    return (
        corners_A4,
        torch.where(measured_2, steps_2, torch.nan).expand(per_cell, 2),
        slack.expand(per_cell, 1),
        level.new_tensor([width, height]).expand(per_cell, 2),
        torch.arange(start, start + per_cell, device=level.device),
        torch.tensor([per_cell, per_cell * width], device=level.device).expand(per_cell, 2),
    )
