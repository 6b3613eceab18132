"""Measure how well anchors fit objects, and search for anchors that fit better."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from focaldet._assembly import build_anchor_generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from focaldet.anchors import AnchorGenerator
    from focaldet.config import RetinaNetConfig

    Floats = npt.NDArray[np.float64]

__all__ = ["Objects", "best_anchor_ious", "fit_anchors"]

_CHUNK = 16384  # objects processed at once, which takes a few MB
_SAMPLE = 4000  # objects on which candidates are compared
_SHIFTS = range(-8, 9)  # shifts of the anchor sizes, in quarters of an octave
_TAILS = (0.005, 0.02, 0.05)  # shares of the objects ignored at both ends of their size range
_MIN_STEP = 2 ** (1 / 6)  # minimum ratio of neighbouring sizes


class Objects(NamedTuple):
    """N objects in pixels of the model's input.

    Attributes:
        boxes: ``[N, 4]``, xyxy, each with an area.
        padded_sizes: ``[N, 2]``, ``(height, width)`` of the padded image of each object.
    """

    boxes: Floats
    padded_sizes: npt.NDArray[np.int64]


def best_anchor_ious(objects: Objects, generator: AnchorGenerator) -> Floats:
    """Return the IoU of each object with its best anchor, without creating the anchors.

    The anchors of one shape form a grid. The intersection of two boxes is the product of their
    overlaps in x and y, and neither overlap grows with the distance of the centres. So the best anchor
    of a shape is in the nearest column and row, and one IoU per level and shape is enough.

    Args:
        objects: N objects. Each image is assumed to be alone in its batch.
        generator: The anchor generator. A level has ``ceil(padded side / stride)`` rows and columns.

    Returns:
        ``[N]``, in [0, 1].

    >>> objects = Objects(np.array([[-12.0, -12.0, 20.0, 20.0]]), np.array([[64, 64]]))
    >>> from focaldet import AnchorGenerator
    >>> best_anchor_ious(objects, AnchorGenerator())
    array([1.])
    """
    best = np.zeros(len(objects.boxes))
    for start in range(0, len(best), _CHUNK):
        rows = slice(start, start + _CHUNK)
        boxes, padded_sizes = objects.boxes[rows], objects.padded_sizes[rows, ::-1]
        for level, stride in enumerate(generator.strides):
            cells = generator.cell_anchors(level, torch.float64).numpy()
            centres = (boxes[:, None, :2] + boxes[:, None, 2:] - cells[:, :2] - cells[:, 2:]) / 2
            distances = _to_nearest_cell(centres, padded_sizes[:, None], stride, generator)
            ious = _ious_at(distances, boxes[:, 2:] - boxes[:, :2], cells[:, 2:] - cells[:, :2])
            np.maximum(best[rows], ious.max(1), out=best[rows])
    return best


def _to_nearest_cell(
    centres: Floats, padded_sizes: npt.NDArray[np.int64], stride: int, generator: AnchorGenerator
) -> Floats:
    """Return the distances in x and y of points to the nearest column and row, ``[N, A, 2]``."""
    cells = -(-padded_sizes // stride)
    strides = padded_sizes // cells if generator.mode == "torchvision" else stride
    nearest = np.rint(centres / strides - generator.offset).clip(0, cells - 1)
    distances: Floats = np.abs(centres - (nearest + generator.offset) * strides)
    return distances


def _ious_at(distances: Floats, sides: Floats, anchor_sides: Floats) -> Floats:
    """Return the IoU of N boxes and A anchors with these distances of their centres, ``[N, A]``."""
    sides = sides[:, None]
    shared = np.minimum(sides, anchor_sides)
    shared = np.minimum(shared, (sides + anchor_sides) / 2 - distances).clip(min=0)
    both = shared[..., 0] * shared[..., 1]
    ious: Floats = both / (sides.prod(-1) + anchor_sides.prod(-1) - both)
    return ious


def fit_anchors(
    objects: Objects, config: RetinaNetConfig, strides: Sequence[int]
) -> RetinaNetConfig:
    """Return a configuration with the anchors that fit the objects best among some candidates.

    The numbers of octave scales and aspect ratios do not change. The candidates are the current sizes,
    these sizes shifted by quarters of an octave, and sizes spread over the sizes of the objects. Each
    is combined with the current aspect ratios and with two sets that follow those of the objects. The
    candidate with the largest share of objects with a positive anchor wins, or among equal ones the
    candidate with the highest mean of the best IoUs. The search is deterministic.

    Args:
        objects: At least one object. The search uses an evenly spaced sample of at most 4,000.
        config: The configuration to start from.
        strides: Strides of the maps of the backbone.
    """
    step = -(-len(objects.boxes) // _SAMPLE)
    sample = Objects(objects.boxes[::step], objects.padded_sizes[::step])

    def fit(candidate: RetinaNetConfig) -> tuple[float, float]:
        ious = best_anchor_ious(sample, build_anchor_generator(candidate, strides))
        reached = (ious >= config.positive_threshold).mean()
        return round(float(reached), 3), float(ious.mean())

    sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
    candidates = [
        config.replace(anchor_sizes=sizes, octave_scales=scales, aspect_ratios=ratios)
        for (sizes, scales), ratios in itertools.product(
            _pyramids(sides, config), _ratios(sides, config)
        )
    ]
    return max(candidates, key=fit)


def _pyramids(
    sides: Floats, config: RetinaNetConfig
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Yield candidates for the anchor sizes and octave scales."""
    for shift in _SHIFTS:
        sizes = tuple(_short(size * 2 ** (shift / 4)) for size in config.anchor_sizes)
        yield sizes if shift else config.anchor_sizes, config.octave_scales
    levels, scales = len(config.anchor_sizes), len(config.octave_scales)
    mean_sides = np.sqrt(sides.prod(1))
    for tail in _TAILS:
        low, high = np.quantile(mean_sides, (tail, 1 - tail))
        step = max(float(high / low) ** (1 / max(levels * scales - 1, 1)), _MIN_STEP)
        yield (
            tuple(_short(float(low) * step ** (scales * level)) for level in range(levels)),
            tuple(_short(step**scale) for scale in range(scales)),
        )


def _ratios(sides: Floats, config: RetinaNetConfig) -> Iterator[tuple[float, ...]]:
    """Yield candidates for the aspect ratios: the current ones, quantiles, and k-means centres."""
    yield config.aspect_ratios
    count = len(config.aspect_ratios)
    logs = np.log(sides[:, 1] / sides[:, 0])
    centres = np.quantile(logs, (np.arange(count) + 0.5) / count)
    yield tuple(_short(ratio) for ratio in np.exp(centres).tolist())
    for _ in range(20):
        nearest = np.abs(logs[:, None] - centres).argmin(1)
        centres = np.array(
            [
                logs[nearest == i].mean() if (nearest == i).any() else centres[i]
                for i in range(count)
            ]
        )
    yield tuple(_short(ratio) for ratio in np.exp(centres).tolist())


def _short(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")
