"""Divide the images of a dataset into parts that have all classes in the same proportions."""

from __future__ import annotations

import logging
import os
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import check_integer, check_number, printable, shortened
from focaldet.datasets._table import not_finite_or_negative

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable

__all__ = ["split_dataset"]

_FRACTIONS = MappingProxyType({"train": 0.8, "val": 0.2})
_FIRST = ("train", "val")  # the parts that get rare classes before others
_ROUNDING = 1e-6
_SHOWN = 10

_logger = logging.getLogger(__name__)


def split_dataset(
    table: AnnotationTable, fractions: Mapping[str, float] = _FRACTIONS, seed: int = 0
) -> dict[str, AnnotationTable]:
    """Divide the images into parts at random, with each class in the same proportions in all parts.

    Every image is in exactly one part, in the order of the table. An image that is listed several
    times is in the same part each time. The images of a class are those with at least one of its
    objects; crowds and boxes that are not finite or have a negative size do not count. Images without
    objects are divided like those of a class.

    The rarest class is divided first, because common classes leave more choice later. A class with at
    least as many images as there are parts is then in every part, and a class with fewer is in "train",
    "val" and then the largest other parts, as far as its images go. That is not always possible if
    images contain several classes; the log lists the classes that are not in every part. The sizes of
    the parts are close to the fractions, but need not be the nearest whole numbers.

    Args:
        table: The annotations.
        fractions: The fraction of the images in each part, by the name of the part. They sum to 1.
        seed: Seed of the random choice. The same table, fractions and seed give the same parts.

    Returns:
        The table of each part, in the order of ``fractions``.

    Raises:
        ValueError: If a fraction is not in (0, 1], they do not sum to 1, or there are fewer images than
            parts.
        TypeError: If a fraction is not a number, or the seed is not an integer.

    >>> import torch
    >>> from focaldet import Detections
    >>> from focaldet.datasets import AnnotationTable
    >>> cat = Detections(
    ...     boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0]]),
    ...     scores=torch.tensor([1.0]),
    ...     labels=torch.tensor([0]),
    ...     image_size=(10, 10),
    ...     class_names=("cat",),
    ... )
    >>> table = AnnotationTable.from_detections(cat.with_source(f"{i}.jpg") for i in range(10))
    >>> {name: len(part) for name, part in split_dataset(table).items()}
    {'train': 8, 'val': 2}

    References:
        Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011,
        algorithm 1. Here, each class also gets room for at least one image in each part that should
        have it, and single images are moved at the end where a part still lacks a class.

    .. versionadded:: 0.3.0
    """
    _check_fractions(fractions)
    check_integer("seed", seed)
    groups = _same_files(table)
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < len(fractions):
        raise ValueError(
            f"table has {count} different images, which is too few for {len(fractions)} parts: "
            f"{', '.join(map(repr, fractions))}."
        )
    if count < len(groups):
        _logger.warning(
            "Images that are listed more than once and stay together: %d.", len(groups) - count
        )
    has = _classes_of_groups(table, groups, count)
    parts = _Parts(has, np.array(list(fractions.values()), np.float64), _rank(fractions))
    parts.fill(np.random.default_rng(seed).permutation(count))
    parts.repair()
    part_of_image = parts.assigned[groups]
    _tell_of_missing_classes(table, parts, list(fractions))
    return {
        name: table.select(np.flatnonzero(part_of_image == part))
        for part, name in enumerate(fractions)
    }


class _Parts:
    """The division of M groups of images, which are not separated, into P parts.

    Args:
        has: ``[M, K + 1]``, bool; whether a group has each class. The last column says that it has none.
        fractions: ``[P]``, the fraction of the images in each part.
        rank: The parts in the order in which they get rare classes.

    Attributes:
        assigned: ``[M]``, the part of each group, -1 before it is assigned.
        required: ``[K + 2, P]``, bool; whether a part should have a class. The last row is for all
            groups: no part should be empty.
    """

    def __init__(
        self, has: npt.NDArray[np.bool], fractions: npt.NDArray[np.float64], rank: list[int]
    ) -> None:
        everything = np.ones((len(has), 1), np.bool_)
        self._has = np.concatenate([has, everything], axis=1)
        self.assigned = np.full(len(has), -1)
        totals = self._has.sum(axis=0)
        self.required = np.zeros((len(totals), len(fractions)), np.bool_)
        for place, part in enumerate(rank):
            self.required[:, part] = totals > place
        # No part should be empty; then come classes that can be in several parts, then the others.
        self._weights = np.where(totals > 1, len(totals), 1)
        self._weights[-1] = len(totals) ** 2
        self._wanted = np.maximum(totals[:, None] * fractions, self.required)
        self._left = totals.copy()

    def fill(self, order: npt.NDArray[np.int64]) -> None:
        """Assign all groups, those of the rarest class first, each class in the given order."""
        labels = range(self._has.shape[1] - 1)
        members = {label: order[self._has[order, label]] for label in labels}
        while True:
            waiting = [label for label in labels if self._left[label] > 0]
            if not waiting:
                return
            rarest = min(waiting, key=self._left.__getitem__)
            for group in members[rarest].tolist():
                if self.assigned[group] < 0:
                    wanted, in_total = self._wanted[rarest], self._wanted[-1]
                    part = max(range(len(wanted)), key=lambda p: (wanted[p], in_total[p]))
                    self._assign(group, part)

    def _assign(self, group: int, part: int) -> None:
        self.assigned[group] = part
        self._wanted[self._has[group], part] -= 1
        self._left[self._has[group]] -= 1

    def repair(self) -> None:
        """Move groups to parts that lack a class, as long as less is lacking afterwards."""
        counts = self.counts()
        while True:
            lacking = np.argwhere(self.required & (counts == 0))
            if not any(self._move(label, part, counts) for label, part in lacking.tolist()):
                return

    def _move(self, label: int, part: int, counts: npt.NDArray[np.int64]) -> bool:
        """Move one group of a class to a part, the one with the largest gain, if there is any."""
        best: tuple[int, int, int] | None = None
        for group in np.flatnonzero(self._has[:, label]).tolist():
            source, own = self.assigned[group], self._has[group]
            weights, required, present = self._weights[own], self.required[own], counts[own]
            lost = int(weights[required[:, source] & (present[:, source] == 1)].sum())
            won = int(weights[required[:, part] & (present[:, part] == 0)].sum())
            candidate = (lost - won, int(own.sum()), group)
            if lost < won and (best is None or candidate < best):
                best = candidate
        if best is None:
            return False
        group = best[2]
        counts[self._has[group], self.assigned[group]] -= 1
        counts[self._has[group], part] += 1
        self.assigned[group] = part
        return True

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many groups of each class are in each part, ``[K + 2, P]``."""
        parts = np.arange(self.required.shape[1])
        return np.stack([self._has[self.assigned == part].sum(axis=0) for part in parts], axis=1)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if not fractions:
        raise ValueError("fractions is empty; pass at least one part, such as {'train': 1.0}.")
    for name, fraction in fractions.items():
        check_number(f"fractions[{name!r}]", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions[{name!r}] must be in (0, 1], got {fraction}.")
    total = sum(fractions.values())
    if abs(total - 1) > _ROUNDING:
        raise ValueError(
            f"fractions must sum to 1, so that every image is in a part, got {shortened(dict(fractions))}, "
            f"which sums to {total:g}."
        )


def _rank(fractions: Mapping[str, float]) -> list[int]:
    """Return the parts in the order in which they get rare classes."""
    names = list(fractions)
    return sorted(
        range(len(names)),
        key=lambda part: (
            _FIRST.index(names[part]) if names[part] in _FIRST else len(_FIRST),
            -fractions[names[part]],
        ),
    )


def _same_files(table: AnnotationTable) -> npt.NDArray[np.int64]:
    """Return a number for each image that is the same for the same file, ``[I]``."""
    numbers: dict[str, int] = {}
    return np.array(
        [
            numbers.setdefault(os.path.normpath(name.replace("\\", "/")), len(numbers))
            for name in table.file_names
        ],
        np.int64,
    )


def _classes_of_groups(
    table: AnnotationTable, groups: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.bool]:
    """Return whether a group has each class, ``[M, K + 1]``. The last column says that it has none."""
    has = np.zeros((count, len(table.class_names) + 1), np.bool_)
    objects = ~table.crowd & (table.labels >= 0) & ~not_finite_or_negative(table.boxes)
    has[groups[table.image_indices[objects]], table.labels[objects]] = True
    has[:, -1] = ~has[:, :-1].any(axis=1)
    return has


def _tell_of_missing_classes(table: AnnotationTable, parts: _Parts, names: list[str]) -> None:
    counts = parts.counts()[: len(table.class_names)]
    missing = [
        f"{printable(table.class_names[label])} ({row.sum()} image{'s' if row.sum() > 1 else ''}) not "
        f"in {' and '.join(names[part] for part in np.flatnonzero(row == 0))}"
        for label, row in enumerate(counts)
        if row.any() and not row.all()
    ]
    if missing:
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        _logger.warning(
            "Classes that are not in every part: %d. %s%s.",
            len(missing),
            "; ".join(missing[:_SHOWN]),
            more,
        )
