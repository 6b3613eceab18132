"""What the CPU kernels need for each piece of memory: scratch buffers and the special entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.losses._layout import Layout, Piece, Special


def scratch(pieces: Sequence[Piece], count: int) -> dict[int, tuple[Tensor, ...]]:
    """``count`` float32 buffers for pieces of each length; the same memory for all lengths."""
    lengths = {len(piece) for piece in pieces}
    memory = torch.empty(count, max(lengths, default=0))
    return {length: memory[:, :length].unbind() for length in lengths}


class Marker:
    """Writes to the positive and to the ignored entries of a piece."""

    def __init__(self, layout: Layout, special: Special, pieces: Sequence[Piece]) -> None:
        entries = layout.entry(special.positive, special.classes)
        self.positive = entries if layout.inner == 1 else entries.sort().values
        self.ignored = special.ignored
        self.pieces = pieces
        self.positive_ends = _ends(self.positive, [(p.start, p.stop) for p in pieces])
        self.ignored_ends = _ends(self.ignored, [(p.first_key, p.last_key) for p in pieces])

    def fill(self, values: Tensor, index: int, value: float) -> None:
        """Set the positive and ignored entries of piece ``index``."""
        first, last = self.positive_ends[index]
        if last > first:
            values.index_fill_(0, self.positive[first:last] - self.pieces[index].start, value)

        first, last = self.ignored_ends[index]
        if last > first:
            _fill_places(values, self.pieces[index], self.ignored[first:last], value)


def _fill_places(values: Tensor, piece: Piece, keys: Tensor, value: float) -> None:
    """Set all classes of some places of a piece."""
    keys = keys - piece.first_key
    blocks, classes, inner = piece.shape
    if inner == 1:
        values.view(blocks, classes).index_fill_(0, keys, value)
    elif blocks == 1:
        values.view(classes, inner).index_fill_(1, keys, value)
    else:
        values.view(piece.shape)[keys // inner, :, keys % inner] = value


def _ends(ordered: Tensor, intervals: list[tuple[int, int]]) -> list[list[int]]:
    """Where in ``ordered`` each interval begins and ends."""
    if len(ordered) == 0:
        return [[0, 0]] * len(intervals)
    ends = torch.searchsorted(ordered, torch.tensor(intervals, dtype=torch.int64))
    return ends.tolist()  # type: ignore[no-any-return]
