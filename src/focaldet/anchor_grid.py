"""The grids of cells on which the anchors of a feature pyramid lie, and where on them to look."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from focaldet._checks import check_boxes, must_be

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["AnchorGrid", "Windows"]


class AnchorGrid:
    """The anchors of a feature pyramid, and the grids of cells on which they lie.

    It tells a :class:`~focaldet.matching.Matcher` in which cells the anchors lie that a box can overlap enough. Any
    anchors will do: how far they lie from an even grid is measured, and windows are widened by it.

    Args:
        anchors: ``[H * W * A, 4]`` a level, xyxy, as ``AnchorGenerator`` gives them.
        grid_sizes: ``(height, width)`` of every level, in cells, each at least 1.

    Attributes:
        anchors: ``[R, 4]``, those of all levels, in order.

    Raises:
        ValueError: not one grid a level, or anchors that don't fill the cells of their grid.

    >>> from focaldet.anchors import AnchorGenerator
    >>> sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    >>> grid = AnchorGrid(AnchorGenerator()(sizes), sizes)
    >>> box = torch.tensor([[100.0, 100.0, 200.0, 300.0]])
    >>> grid.windows(box, torch.tensor([0.5])).num_anchors()  # of 201,600
    tensor([29])
    """

    # Shapes below: N is A summed over the levels, so one row for each anchor of one cell.

    @torch.no_grad()
    def __init__(self, anchors: Sequence[Tensor], grid_sizes: Sequence[tuple[int, int]]) -> None:
        if not anchors or len(anchors) != len(grid_sizes):
            condition = f"one (height, width) a level ({len(anchors)} levels of anchors)"
            raise ValueError(must_be("grid_sizes", condition, list(grid_sizes)))
        levels = []
        start = 0
        for i, (level, (height, width)) in enumerate(zip(anchors, grid_sizes, strict=True)):
            check_boxes(f"anchors[{i}]", level)
            if not len(level) or height < 1 or width < 1 or len(level) % (height * width):
                condition = f"[H * W * A, 4] for a grid of {height} x {width} cells"
                raise ValueError(must_be(f"anchors[{i}]", condition, list(level.shape)))
            levels.append(_lay_out(level, height, width, start))
            start += len(level)
        self.anchors = torch.cat(list(anchors))
        columns = [torch.cat(column) for column in zip(*levels, strict=True)]
        self._corners_N4, self._strides_N2, self._slack_N1 = columns[:3]
        self._sizes_N2, self._first_N, self._steps_N2 = columns[3:]

    def nearest(self, boxes: Tensor) -> Tensor:
        """Return, for every anchor of a cell, the index of that whose cell is nearest: ``[G, N]``.

        No other of its kind overlaps the box more, but for rounding.
        """
        from_first_GN2 = _centres(boxes)[:, None] - _centres(self._corners_N4)
        cells_GN2 = (from_first_GN2 / self._strides_N2).round_().nan_to_num_(nan=0.0)
        return self._index(_clamp(cells_GN2, self._sizes_N2 - 1))

    def _index(self, cells_GN2: Tensor) -> Tensor:
        return self._first_N + (cells_GN2 * self._steps_N2).sum(dim=-1)

    def windows(self, boxes: Tensor, iou_G: Tensor) -> Windows:
        """Return where all anchors lie whose IoU with a box is at least ``iou_G`` and above 0.

        The cells whose anchor overlaps a box by some length in x are a range of columns, and those
        that do in y a range of rows. Nothing is lost to rounding: positions have a slack of what
        the anchors are off the grid and of 16 units in the last place.

        Args:
            boxes: ``[G, 4]``, xyxy.
            iou_G: ``[G]`` in [0, 1], as ``box_iou`` would give it.
        """
        corners_N4 = self._corners_N4
        box_G4 = boxes.to(torch.promote_types(boxes.dtype, corners_N4.dtype))
        unit = torch.finfo(box_G4.dtype).eps
        slack_GN1 = self._slack_N1 + (16 * unit * box_G4.abs().amax(dim=1))[:, None, None]
        need_GN2 = self._needed_overlap(boxes, iou_G.to(box_G4.dtype), slack_GN1)
        low_GN2 = box_G4[:, None, :2] + need_GN2 - corners_N4[:, 2:] - slack_GN1
        high_GN2 = box_G4[:, None, 2:] - need_GN2 - corners_N4[:, :2] + slack_GN1
        # NaN, from anchors that are no grid, widens a range to the whole level.
        first_GN2 = (low_GN2 / self._strides_N2).ceil_().nan_to_num_(nan=0.0)
        last_GN2 = (high_GN2 / self._strides_N2).floor_().nan_to_num_(nan=torch.inf)
        first_GN2 = _clamp(first_GN2, self._sizes_N2)
        counts_GN2 = (_clamp(last_GN2 + 1, self._sizes_N2) - first_GN2).clamp_(min=0)
        counts_GN2[need_GN2.isinf()] = 0
        return Windows(self._index(first_GN2), counts_GN2, self._steps_N2)

    def _needed_overlap(self, boxes: Tensor, iou_G: Tensor, slack_GN1: Tensor) -> Tensor:
        """Return the least overlap in x and y that an IoU of ``iou_G`` takes, or infinity.

        An IoU of t takes an intersection of t / (1 + t) times the sum of both areas, and this, over
        the smaller height, is what x needs; likewise y. ``box_iou`` rounds, so t is taken 64 units
        in the last place smaller, and as 0 where it or the intersection is near underflow.
        """
        infos = torch.finfo(boxes.dtype), torch.finfo(self.anchors.dtype)
        unit, tiny = max(info.eps for info in infos), max(info.tiny for info in infos)
        size_G2 = (boxes[:, 2:] - boxes[:, :2]).to(slack_GN1.dtype)
        area_G = size_G2.prod(dim=1)
        iou_G = iou_G * (1 - 64 * unit)
        iou_G = torch.where((iou_G > tiny) & (iou_G * area_G > tiny), iou_G, 0.0)
        size_N2 = self._corners_N4[:, 2:] - self._corners_N4[:, :2]
        area_GN = (size_N2 - 2 * slack_GN1).clamp_(min=0).prod(dim=-1)
        common_GN2 = torch.minimum(size_G2[:, None], size_N2 + 2 * slack_GN1)
        need_GN = (iou_G / (1 + iou_G))[:, None] * (area_G[:, None] + area_GN)
        void_G = (size_G2 <= 0).any(dim=1) | ~area_G.isfinite()  # with these box_iou is 0
        never_GN = (need_GN > common_GN2.prod(dim=-1)) | void_G[:, None]
        return torch.where(
            never_GN[:, :, None], torch.inf, need_GN[:, :, None] / common_GN2.flip(-1)
        )


class Windows(NamedTuple):
    """Ranges of cells, one for each box and each anchor of a cell.

    Args:
        first: ``[G, N]``, the index of the first anchor.
        counts: ``[G, N, 2]``, columns and rows, 0 or more.
        steps: ``[N, 2]``, from an anchor to the same of the next column and row.
    """

    first: Tensor
    counts: Tensor
    steps: Tensor

    def num_anchors(self) -> Tensor:
        """Count the anchors in each box's windows: ``[G]``."""
        return self.counts.prod(dim=-1).sum(dim=-1)

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the pairs in the windows of some boxes: ``[P]`` boxes, in order, and anchors."""
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
    """Return, for ``counts[i]`` places in a row for each i, every place's i and its number in it.

    >>> _count_off(torch.tensor([2, 3]))
    (tensor([0, 0, 1, 1, 1]), tensor([0, 1, 0, 1, 2]))
    """
    owner = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - starts[owner]


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _clamp(cells: Tensor, last_N2: Tensor) -> Tensor:
    """Bring cell numbers into ``0 .. last``."""
    return torch.minimum(cells.clamp_(min=0), last_N2).long()


def _lay_out(level: Tensor, height: int, width: int, start: int) -> tuple[Tensor, ...]:
    """Return a level's columns of an :class:`AnchorGrid`."""
    level = level.to(torch.promote_types(level.dtype, torch.float32))
    cells_HWA4 = level.reshape(height, width, -1, 4)
    corners_A4 = cells_HWA4[0, 0]
    intervals = level.new_tensor([max(1, width - 1), max(1, height - 1)])
    steps_2 = (cells_HWA4[-1, -1, 0] - corners_A4[0])[:2] / intervals
    strides_2 = torch.where((steps_2 > 0) & steps_2.isfinite(), steps_2, 1.0)
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
        strides_2.expand(per_cell, 2),
        slack.expand(per_cell, 1),
        level.new_tensor([width, height]).expand(per_cell, 2),
        torch.arange(start, start + per_cell, device=level.device),
        torch.tensor([per_cell, per_cell * width], device=level.device).expand(per_cell, 2),
    )
