"""Memory layout of logits, and the positions of the few entries that are not background.

The memory of dense logits is viewed as ``[blocks, K, inner]``. Contiguous ``[N, K]`` has N blocks
of inner size 1, and contiguous ``[N, K, d1, ...]`` has N blocks of inner size d1 * .... A
channels_last tensor consists of rows again, so its inner size is 1. A *place* has one target and K
entries. Its *key* is its number in that order, ``block * inner + position``. Of the hundreds of
thousands of targets of a dense detector only hundreds are not background, so positives and ignored
places are stored as lists, not as masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from focaldet.losses._arguments import check_indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

BACKGROUND = -1
CHUNK = 131_072
"""Maximum number of entries in a piece. Its few float32 buffers fit in the cache."""


class Special(NamedTuple):
    """The targets that are not background, with keys in increasing order."""

    positive: Tensor  # keys of places with a class
    classes: Tensor  # their classes
    ignored: Tensor  # keys of ignored places

    def within(self, keys: range) -> Special:
        """Return the targets whose keys are in a range."""
        ends = torch.tensor([keys.start, keys.stop], device="cpu")
        p, i = torch.searchsorted(self.positive, ends), torch.searchsorted(self.ignored, ends)
        return Special(
            self.positive[p[0] : p[1]], self.classes[p[0] : p[1]], self.ignored[i[0] : i[1]]
        )


def find_keys(targets: Tensor, ignore_index: int) -> Tensor:
    """Return the keys of the places in flat class indices that may not be background."""
    if ignore_index == BACKGROUND:
        return torch.arange(len(targets), device="cpu")
    return (targets != BACKGROUND).nonzero().view(-1)


def find_special(
    targets: Tensor, num_classes: int, ignore_index: int, keys: Tensor | None = None
) -> Special:
    """Find targets other than background in flat class indices; raise if one is out of range.

    Args:
        targets: Class indices of all places.
        num_classes: Number of classes.
        ignore_index: Index of places to ignore.
        keys: The result of `find_keys`. None computes it.
    """
    if keys is None:
        keys = find_keys(targets, ignore_index)
    values = targets[keys]
    if len(values) == 0:
        return Special(keys, values, keys)
    low, high = values.aminmax()
    if low.item() >= 0 and high.item() < num_classes and not 0 <= ignore_index < num_classes:
        return Special(keys, values, keys[:0])
    kept = values != ignore_index
    positive, ignored = kept.nonzero().view(-1), kept.logical_not().nonzero().view(-1)
    classes = values[positive]
    check_indices(classes, num_classes, ignore_index)
    return Special(keys[positive], classes, keys[ignored])


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous stretch of memory, of shape ``[blocks, classes, inner]``."""

    start: int
    stop: int
    shape: tuple[int, int, int]
    first_class: int
    first_key: int
    last_key: int  # one past the last

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """A view of memory as ``[blocks, K, inner]``."""

    blocks: int
    num_classes: int
    inner: int

    def pieces(self, span: range, size: int = CHUNK) -> Iterator[Piece]:
        """Divide a span of blocks into pieces of at most ``size`` entries."""
        K, D = self.num_classes, self.inner
        if size >= K * D:
            blocks, classes, positions = size // max(K * D, 1), K, D
        else:
            blocks, classes, positions = 1, max(size // D, 1), min(D, size)
        for b in range(span.start, span.stop, blocks):
            b_stop = min(b + blocks, span.stop)
            for k in range(0, K, classes):
                k_stop = min(k + classes, K)
                for d in range(0, D, positions):
                    d_stop = min(d + positions, D)
                    shape = (b_stop - b, k_stop - k, d_stop - d)
                    start = (b * K + k) * D + d
                    stop = start + math.prod(shape)
                    yield Piece(start, stop, shape, k, b * D + d, (b_stop - 1) * D + d_stop)

    def entry(self, keys: Tensor, classes: Tensor) -> Tensor:
        """Return the memory positions of the entries of ``classes`` at the places ``keys``."""
        if self.inner == 1:
            return keys * self.num_classes + classes
        block, position = keys // self.inner, keys % self.inner
        return (block * self.num_classes + classes) * self.inner + position


def memory_of(x: Tensor) -> tuple[Tensor, Layout]:
    """Return ``[N, K, ...]`` logits as flat memory with its layout, copying only if not dense."""
    N, K, *rest = x.shape
    places = math.prod(rest)
    if not x.is_contiguous():
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return last.view(-1), Layout(N * places, K, 1)
        x = x.contiguous()
    return x.view(-1), Layout(N, K, places)


def from_memory(flat: Tensor, like: Tensor) -> Tensor:
    """Undo `memory_of`: view flat memory as a tensor with the shape and strides of ``like``."""
    if like.is_contiguous() or not like.movedim(1, -1).is_contiguous():
        return flat.view(like.shape)
    N, K, *rest = like.shape
    return flat.view(N, *rest, K).movedim(-1, 1)


def in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """Flatten values of the shape of ``like`` in the order in which `memory_of` returns ``like``."""
    if like.is_contiguous() or not like.movedim(1, -1).is_contiguous():
        return values.reshape(-1)
    return values.movedim(1, -1).reshape(-1)


@dataclass(frozen=True, slots=True)
class Level:
    """How the logits of one level are stored on a device, and where its targets are.

    Planes are ``[images * planes, K, positions]``, and rows are ``[images * places, K]``.
    """

    num_classes: int
    images: int
    places: int  # of one image
    start: int = 0  # of its targets among those of all levels of an image
    planes: int = 0  # of one image; 0 for rows

    @property
    def positions(self) -> int:
        """The number of positions in a plane."""
        return self.places // self.planes

    @property
    def shape(self) -> tuple[int, int, int]:
        """The memory as ``[blocks, K, inner]``, where each image has the same number of blocks."""
        if not self.planes:
            return self.images * self.places, self.num_classes, 1
        return self.images * self.planes, self.num_classes, self.positions


def dense(x: Tensor) -> Tensor:
    """Return ``[N, C, ...]`` itself if it is contiguous or channels_last, or a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def stored(x: Tensor) -> Tensor:
    """View `dense` logits as flat memory."""
    return x.view(-1) if x.is_contiguous() else x.movedim(1, -1).view(-1)


def levels_of_maps(maps: Sequence[Tensor], num_classes: int) -> list[Level]:
    """Describe `dense` maps ``[B, A*K, H, W]``, whose targets are ``[B, R]``."""
    levels, start = [], 0
    for m in maps:
        B, C, H, W = m.shape
        anchors = C // num_classes
        places = anchors * H * W
        levels.append(Level(num_classes, B, places, start, anchors if m.is_contiguous() else 0))
        start += places
    return levels


def level_of(logits: Tensor) -> Level:
    """Describe `dense` logits ``[N, K, ...]``, whose targets in memory order are ``[images, R]``."""
    N, K, *rest = logits.shape
    positions = math.prod(rest)
    if positions == 1 or not logits.is_contiguous():
        return Level(K, 1, N * positions)
    return Level(K, N, positions, planes=1)


def by_plane(targets: Tensor, level: Level) -> Tensor:
    """View a level of targets ``[B, R]``, ordered by position and plane, as ``[B, planes, HW]``."""
    part = targets[:, level.start : level.start + level.places]
    return part.reshape(level.images, level.positions, level.planes).transpose(1, 2)
