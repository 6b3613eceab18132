"""How logits lie in memory, and where in that memory the few special entries are.

A dense tensor of logits is read as ``[blocks, K, inner]``: contiguous ``[N, K]`` is N blocks of
inner size 1, contiguous ``[N, K, d1, ...]`` is N blocks of inner size d1 * ..., and channels_last
is rows again. A *key* numbers the places that have one target, in that order: ``block * inner +
position``. Of the hundred thousands of targets of a dense detector only hundreds are not
background, so positives and ignored places are lists, not masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from focaldet.losses._arguments import check_indices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

BACKGROUND = -1
CHUNK = 131_072
"""Entries worked on at a time: their few float32 buffers stay in cache."""


class Special(NamedTuple):
    """The targets that are not background: keys in increasing order."""

    positive: Tensor  # keys of the places that show a class
    classes: Tensor  # those classes
    ignored: Tensor  # keys of the places that take no part

    def within(self, keys: range) -> Special:
        """The part of it whose keys lie in a range."""
        ends = torch.tensor([keys.start, keys.stop], device="cpu")
        p, i = torch.searchsorted(self.positive, ends), torch.searchsorted(self.ignored, ends)
        return Special(
            self.positive[p[0] : p[1]], self.classes[p[0] : p[1]], self.ignored[i[0] : i[1]]
        )


def find_special(targets: Tensor, num_classes: int, ignore_index: int) -> Special:
    """Scan flat class indices once; raise if one of them is out of range."""
    if ignore_index == BACKGROUND:
        keys = torch.arange(len(targets), device="cpu")
    else:
        keys = (targets != BACKGROUND).nonzero().view(-1)
    values = targets[keys]
    if len(values) == 0:
        return Special(keys, values, keys)
    low, high = values.aminmax()
    if low.item() >= 0 and high.item() < num_classes and not 0 <= ignore_index < num_classes:
        return Special(keys, values, keys[:0])
    takes_part = values != ignore_index
    positive, ignored = takes_part.nonzero().view(-1), takes_part.logical_not().nonzero().view(-1)
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
    """Memory as ``[blocks, K, inner]``."""

    blocks: int
    num_classes: int
    inner: int

    def pieces(self, span: range, size: int = CHUNK) -> Iterator[Piece]:
        """Cut a span of blocks into pieces of at most ``size`` entries."""
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
        """Where in memory the entries of these classes at these places are."""
        if self.inner == 1:
            return keys * self.num_classes + classes
        block, position = keys // self.inner, keys % self.inner
        return (block * self.num_classes + classes) * self.inner + position


def memory_of(x: Tensor) -> tuple[Tensor, Layout]:
    """``[N, K, ...]`` logits as flat memory and its layout; a copy only if they are not dense."""
    N, K, *rest = x.shape
    places = math.prod(rest)
    if not x.is_contiguous():
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return last.view(-1), Layout(N * places, K, 1)
        x = x.contiguous()
    return x.view(-1), Layout(N, K, places)


def from_memory(flat: Tensor, like: Tensor) -> Tensor:
    """Undo `memory_of`: flat memory as a tensor of the shape and order of ``like``."""
    if like.is_contiguous() or not like.movedim(1, -1).is_contiguous():
        return flat.view(like.shape)
    N, K, *rest = like.shape
    return flat.view(N, *rest, K).movedim(-1, 1)


def in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """Values of the shape of ``like``, flat in the order that `memory_of` gives ``like``."""
    if like.is_contiguous() or not like.movedim(1, -1).is_contiguous():
        return values.reshape(-1)
    return values.movedim(1, -1).reshape(-1)
