"""Find which objects of a dataset the anchors of a model can reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from focaldet._assembly import build_anchor_generator, build_preprocess
from focaldet.datasets._anchor_fit import Objects, best_anchor_ious, fit_anchors
from focaldet.datasets.checks._anchor_reach import AnchorReach, SuggestedAnchors
from focaldet.datasets.checks._boxes import has_area, size_bins
from focaldet.datasets.checks._report import Finding
from focaldet.transforms import resized_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from focaldet.config import RetinaNetConfig
    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.checks._anchor_reach import Shares

    Floats = npt.NDArray[np.float64]
    Rows = npt.NDArray[np.int64]

__all__ = ["measure_anchor_reach", "objects_at_input"]

_BINS = ("small", "medium", "large")
_MIN_GAIN = 0.001  # of the share reached; other anchors are not suggested for less


def measure_anchor_reach(
    table: AnnotationTable,
    sizes: npt.NDArray[np.int32],
    config: RetinaNetConfig,
    strides: Sequence[int],
) -> tuple[list[Finding], AnchorReach]:
    """Find the objects that no anchor reaches, and anchors that reach more.

    Args:
        table: The annotations.
        sizes: ``[I, 2]``, ``(height, width)`` of the images, 0 where unknown.
        config: The configuration of the model.
        strides: Strides of the maps of the model's backbone.
    """
    objects, rows = objects_at_input(table, sizes, config)
    bins = size_bins(table, rows)
    ious = best_anchor_ious(objects, build_anchor_generator(config, strides))
    reached = ious >= config.positive_threshold
    reach = AnchorReach(
        iou_threshold=config.positive_threshold,
        min_size=config.min_size,
        max_size=config.max_size if config.keep_ratio else config.min_size,
        objects={
            "all": len(rows),
            **{name: int((bins == place).sum()) for place, name in enumerate(_BINS)},
        },
        reachable=_reachable(reached, bins),
        suggestion=_suggestion(objects, reached, bins, config, strides),
    )
    return list(_unreached(table, objects, rows, ious, config.positive_threshold)), reach


def objects_at_input(
    table: AnnotationTable, sizes: npt.NDArray[np.int32], config: RetinaNetConfig
) -> tuple[Objects, Rows]:
    """Return the objects that training uses, clipped and resized, and their rows in the table."""
    unique, place = np.unique(sizes, axis=0, return_inverse=True)
    resized, padded = _input_sizes(unique, config)
    image_place = place.reshape(-1)[table.image_indices]
    bounds = np.tile(unique[image_place][:, ::-1], 2)
    boxes = np.clip(table.boxes, 0, bounds)  # no area where the size is unknown
    (rows,) = (has_area(table.boxes) & has_area(boxes) & ~table.crowd).nonzero()
    boxes, image_place, bounds = boxes[rows], image_place[rows], bounds[rows]
    scale = np.tile(resized[image_place][:, ::-1], 2) / bounds
    return Objects(boxes * scale, padded[image_place]), rows


def _input_sizes(
    sizes: npt.NDArray[np.int32], config: RetinaNetConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the sizes of the images after the model's resizing, and after its padding."""
    preprocess = build_preprocess(config)
    resized = np.array(
        [
            resized_size(
                (height, width),
                preprocess.min_size,
                preprocess.max_size,
                rounding=preprocess.size_rounding,
                keep_ratio=preprocess.keep_ratio,
            )
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
    if reached_then.mean() - reached.mean() < _MIN_GAIN:
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
            f"{sides[place, 0]:.4g}x{sides[place, 1]:.4g} after resizing"
        )
        yield Finding(
            kind="anchor-unreached",
            message=message,
            file=table.file_names[index],
            image_id=int(table.image_ids[index]),
            annotation_id=int(table.annotation_ids[row]),
        )
