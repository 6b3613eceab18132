"""What the CPU kernels need for each piece of memory: scratch buffers and the special entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.losses._layout import Piece


def scratch(pieces: Sequence[Piece], count: int) -> dict[int, tuple[Tensor, ...]]:
    """``count`` float32 buffers for pieces of each length; the same memory for all lengths."""
    lengths = {len(piece) for piece in pieces}
    memory = torch.empty(count, max(lengths, default=0), dtype=torch.float32, device="cpu")
    return {length: memory[:, :length].unbind() for length in lengths}


class Blank:
    """Sets the positives and the ignored places of a piece to 0."""

    def __init__(self, positive: Tensor, ignored: Tensor, pieces: Sequence[Piece]) -> None:
        """Take the entries of the positives in any order, and the sorted keys of ignored places."""
        self.shapes = [piece.shape for piece in pieces]
        self.positive = _deal(
            positive.sort().values, [(piece.start, piece.stop) for piece in pieces]
        )
        self.ignored = _deal(ignored, [(piece.first_key, piece.last_key) for piece in pieces])

    def __call__(self, values: Tensor, index: int) -> None:
        """Blank ``values`` of piece ``index``."""
        entries, keys = self.positive[index], self.ignored[index]
        if entries is not None:
            values.index_fill_(0, entries, 0.0)
        if keys is None:
            return
        blocks, classes, inner = self.shapes[index]
        if inner == 1:
            values.view(blocks, classes).index_fill_(0, keys, 0.0)
        elif blocks == 1:
            values.view(classes, inner).index_fill_(1, keys, 0.0)
        else:
            values.view(blocks, classes, inner)[keys // inner, :, keys % inner] = 0.0


def _deal(ordered: Tensor, intervals: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    """The numbers in each interval, counted from its beginning; None where there are none."""
    if len(ordered) == 0:
        return [None] * len(intervals)
    if len(intervals) == 1:  # all there are
        return [ordered - intervals[0][0]]
    bounds = torch.tensor(intervals, dtype=torch.int64, device="cpu")
    ends = torch.searchsorted(ordered, bounds)
    dealt: list[Tensor | None] = []
    for (start, _), (first, last) in zip(intervals, ends.tolist(), strict=True):
        dealt.append(ordered[first:last] - start if last > first else None)
    return dealt
