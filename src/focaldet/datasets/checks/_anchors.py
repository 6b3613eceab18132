"""Which objects of a data set a model's anchors can reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from focaldet._assembly import build_anchor_generator, build_preprocess
from focaldet.datasets.checks._anchor_fit import Objects, best_anchor_ious, fit_anchors
from focaldet.datasets.checks._boxes import has_area, size_bins
from focaldet.datasets.checks._report import Finding
from focaldet.transforms import resized_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from focaldet.config import RetinaNetConfig
    from focaldet.datasets._table import AnnotationTable

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]

__all__ = ["AnchorReach", "SuggestedAnchors", "anchor_reach"]

_BINS = ("small", "medium", "large")
_LEAST_GAIN = 0.001  # of the share reached, below which other anchors aren't worth a word

Shares: TypeAlias = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class SuggestedAnchors:
    """Anchors that reach more objects, as fields of a ``RetinaNetConfig``.

    Attributes:
        anchor_sizes: as many as the configuration has.
        octave_scales: as many as the configuration has.
        aspect_ratios: as many as the configuration has.
        reachable: what they reach, as in :class:`AnchorReach`.
    """

    anchor_sizes: tuple[float, ...]
    octave_scales: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    reachable: Shares


@dataclass(frozen=True, kw_only=True)
class AnchorReach:
    """How many objects the anchors of a configuration can reach.

    Attributes:
        iou_threshold: from which an anchor is a positive: the configuration's.
        min_size: of the model's input.
        max_size: of the model's input.
        objects: how many there are: "all", and "small", "medium" and "large" as COCO has it.
        reachable: share in 0-1 of those with an anchor of at least that IoU; None of no objects. An
            upper bound of what the anchors can learn: an anchor goes to one object alone.
        suggestion: anchors that reach more; None if none were found.
    """

    iou_threshold: float
    min_size: int
    max_size: int
    objects: dict[str, int]
    reachable: Shares
    suggestion: SuggestedAnchors | None

    def __str__(self) -> str:
        head = (
            f"Objects that an anchor reaches at IoU {self.iou_threshold:g} "
            f"(input {self.min_size} to {self.max_size} pixels)"
        )
        lines = [
            head,
            "  " + " " * 11 + "".join(f"{name:>9}" for name in self.objects),
            "  objects    " + "".join(f"{count:>9,}" for count in self.objects.values()),
            "  reachable  " + _shares(self.reachable),
        ]
        better = self.suggestion
        if better is None:
            return "\n".join([*lines, "No anchors were found that reach more."])
        lines += [
            "  suggested  " + _shares(better.reachable),
            "Suggested for a new model, or one whose head is trained anew:",
            f"  anchor_sizes={better.anchor_sizes}",
            f"  octave_scales={_rounded(better.octave_scales)}",
            f"  aspect_ratios={_rounded(better.aspect_ratios)}",
        ]
        return "\n".join(lines)


def _shares(shares: Shares) -> str:
    """Write shares in percent, rounded down: 100.0% is every object."""
    texts = [
        "-" if x is None else f"{math.floor(1000 * x + 1e-9) / 10:.1f}%" for x in shares.values()
    ]
    return "".join(f"{text:>9}" for text in texts)


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


def anchor_reach(
    table: AnnotationTable,
    sizes: npt.NDArray[np.int32],
    config: RetinaNetConfig,
    strides: Sequence[int],
) -> tuple[list[Finding], AnchorReach]:
    """Find the objects that no anchor reaches, and anchors that reach more.

    Args:
        table: holds the boxes.
        sizes: ``[I, 2]``, ``(height, width)`` of the images, 0 where they are not known.
        config: of the model.
        strides: of its C3, C4 and C5.
    """
    objects, rows = _objects_at_input(table, sizes, config)
    bins = size_bins(table, rows)
    ious = best_anchor_ious(objects, build_anchor_generator(config, strides))
    reached = ious >= config.positive_threshold
    reach = AnchorReach(
        iou_threshold=config.positive_threshold,
        min_size=config.min_size,
        max_size=config.max_size,
        objects={
            "all": len(rows),
            **{name: int((bins == place).sum()) for place, name in enumerate(_BINS)},
        },
        reachable=_reachable(reached, bins),
        suggestion=_suggestion(objects, reached, bins, config, strides),
    )
    return list(_unreached(table, objects, rows, ious, config.positive_threshold)), reach


def _objects_at_input(
    table: AnnotationTable, sizes: npt.NDArray[np.int32], config: RetinaNetConfig
) -> tuple[Objects, Rows]:
    """Return the objects as training sees them, clipped and resized, and which rows they are."""
    unique, place = np.unique(sizes, axis=0, return_inverse=True)
    resized, padded = _input_sizes(unique, config)
    image_place = place.reshape(-1)[table.image_indices]
    bounds = np.tile(unique[image_place][:, ::-1], 2)
    boxes = np.clip(table.boxes, 0, bounds)  # without area where the size is not known
    (rows,) = (has_area(table.boxes) & has_area(boxes) & ~table.crowd).nonzero()
    boxes, image_place, bounds = boxes[rows], image_place[rows], bounds[rows]
    scale = np.tile(resized[image_place][:, ::-1], 2) / bounds
    return Objects(boxes * scale, padded[image_place]), rows


def _input_sizes(
    sizes: npt.NDArray[np.int32], config: RetinaNetConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what the model's preprocessing makes of images' sizes, and of those of the batch."""
    preprocess = build_preprocess(config)
    low, high, rounding = preprocess.min_size, preprocess.max_size, preprocess.size_rounding
    resized = np.array(
        [
            resized_size((height, width), low, high, rounding=rounding)
            if height > 0 and width > 0
            else (0, 0)
            for height, width in sizes.tolist()
        ],
        np.int64,
    ).reshape(-1, 2)
    divisor = preprocess.size_divisor
    return resized, -(-(resized + preprocess.always_pad) // divisor) * divisor


def _reachable(reached: npt.NDArray[np.bool_], bins: Rows) -> Shares:
    groups = {"all": reached}
    groups |= {name: reached[bins == place] for place, name in enumerate(_BINS)}
    return {name: float(group.mean()) if len(group) else None for name, group in groups.items()}


def _suggestion(
    objects: Objects,
    reached: npt.NDArray[np.bool_],
    bins: Rows,
    config: RetinaNetConfig,
    strides: Sequence[int],
) -> SuggestedAnchors | None:
    if reached.all():
        return None
    fitted = fit_anchors(objects, config, strides)
    ious = best_anchor_ious(objects, build_anchor_generator(fitted, strides))
    reached_then = ious >= config.positive_threshold
    if reached_then.mean() - reached.mean() < _LEAST_GAIN:
        return None
    return SuggestedAnchors(
        anchor_sizes=fitted.anchor_sizes,
        octave_scales=fitted.octave_scales,
        aspect_ratios=fitted.aspect_ratios,
        reachable=_reachable(reached_then, bins),
    )


def _unreached(
    table: AnnotationTable, objects: Objects, rows: Rows, ious: Floats, threshold: float
) -> Iterator[Finding]:
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    for place in (ious < threshold).nonzero()[0].tolist():
        row = int(rows[place])
        index = int(table.image_indices[row])
        width, height = table.boxes[row, 2:] - table.boxes[row, :2]
        message = (
            f"best IoU {ious[place]:.3f}; {width:.4g}x{height:.4g} pixels (width x height), "
            f"{sides[place, 0]:.4g}x{sides[place, 1]:.4g} at the model's input"
        )
        yield Finding(
            kind="anchor-unreached",
            message=message,
            file=table.file_names[index],
            image_id=int(table.image_ids[index]),
            annotation_id=int(table.annotation_ids[row]),
        )
