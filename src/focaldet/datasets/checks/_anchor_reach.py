"""The part of the report about anchors: how many objects they can reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["AnchorReach", "Shares", "SuggestedAnchors"]

Shares: TypeAlias = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class SuggestedAnchors:
    """Anchors that reach more objects, as fields of a :class:`~focaldet.RetinaNetConfig`.

    Attributes:
        anchor_sizes: Anchor sizes, as many as in the configuration.
        octave_scales: Octave scales, as many as in the configuration.
        aspect_ratios: Aspect ratios, as many as in the configuration.
        reachable: Shares of the objects that these anchors reach, as in :class:`AnchorReach`.
    """

    anchor_sizes: tuple[float, ...]
    octave_scales: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    reachable: Shares


@dataclass(frozen=True, kw_only=True)
class AnchorReach:
    """How many objects the anchors of a configuration can reach.

    Attributes:
        iou_threshold: Minimum IoU of a positive anchor, from the configuration.
        min_size: Short side of the model's input, in pixels.
        max_size: Maximum long side of the model's input, in pixels.
        objects: Number of objects: "all", and "small", "medium" and "large" by COCO's definition.
        reachable: Share of these objects, in [0, 1], that have an anchor of at least this IoU. None if
            there are no objects. It is an upper bound of what the anchors can learn, because an anchor
            is assigned to only one object.
        suggestion: Anchors that reach more objects. None if none were found.
    """

    iou_threshold: float
    min_size: int
    max_size: int
    objects: dict[str, int]
    reachable: Shares
    suggestion: SuggestedAnchors | None

    def __str__(self) -> str:
        head = (
            f"Objects with an anchor at IoU {self.iou_threshold:g} or more "
            f"(model input: {self.min_size} to {self.max_size} pixels)"
        )
        lines = [
            head,
            "  " + " " * 11 + "".join(f"{name:>9}" for name in self.objects),
            "  objects    " + "".join(f"{count:>9,}" for count in self.objects.values()),
            "  reachable  " + _percentages(self.reachable),
        ]
        better = self.suggestion
        if better is None:
            return "\n".join([*lines, "No better anchors were found."])
        lines += [
            "  suggested  " + _percentages(better.reachable),
            "Suggested for a new model, or for one whose head is retrained:",
            f"  anchor_sizes={better.anchor_sizes}",
            f"  octave_scales={_rounded(better.octave_scales)}",
            f"  aspect_ratios={_rounded(better.aspect_ratios)}",
        ]
        return "\n".join(lines)


def _percentages(shares: Shares) -> str:
    """Format shares in percent, rounded down so that 100.0% means every object."""
    texts = [
        "-" if x is None else f"{math.floor(1000 * x + 1e-9) / 10:.1f}%" for x in shares.values()
    ]
    return "".join(f"{text:>9}" for text in texts)


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
