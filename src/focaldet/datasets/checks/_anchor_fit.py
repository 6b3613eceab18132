"""How well anchors fit objects, and anchors that fit them better."""

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

_CHUNK = 16384  # objects at once: a few MB
_SAMPLE = 4000  # objects that candidates are tried on
_SHIFTS = range(-8, 9)  # quarters of an octave by which the pyramid is moved
_TAILS = (0.005, 0.02, 0.05)  # of the objects' sizes, left out at both ends
_LEAST_STEP = 2 ** (1 / 6)  # between neighbouring sizes


class Objects(NamedTuple):
    """N objects in pixels of the model's input.

    Attributes:
        boxes: ``[N, 4]``, xyxy, with area.
        padded_sizes: ``[N, 2]``, ``(height, width)`` of the padded image that each is in.
    """

    boxes: Floats
    padded_sizes: npt.NDArray[np.int64]


def best_anchor_ious(objects: Objects, generator: AnchorGenerator) -> Floats:
    """Return each object's IoU with the best of all anchors, without making the anchors.

    The anchors of one shape lie on a grid. What two boxes share is the product of what they share
    in x and in y, and neither grows with the distance of their centres. So the nearest column
    and the nearest row have the best anchor of that shape, and one IoU a level and shape is enough.

    Args:
        objects: N of them; each image is taken to be alone in its batch.
        generator: of the anchors; a level has ``ceil(padded side / stride)`` rows and columns.

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
    """Return the distances in x and y from points to the nearest column and row, ``[N, A, 2]``."""
    cells = -(-padded_sizes // stride)
    strides = padded_sizes // cells if generator.mode == "torchvision" else stride
    nearest = np.rint(centres / strides - generator.offset).clip(0, cells - 1)
    distances: Floats = np.abs(centres - (nearest + generator.offset) * strides)
    return distances


def _ious_at(distances: Floats, sides: Floats, anchor_sides: Floats) -> Floats:
    """Return the IoU of N boxes and A anchors whose centres are so far apart, ``[N, A]``."""
    sides = sides[:, None]
    shared = np.minimum(sides, anchor_sides)
    shared = np.minimum(shared, (sides + anchor_sides) / 2 - distances).clip(min=0)
    both = shared[..., 0] * shared[..., 1]
    ious: Floats = both / (sides.prod(-1) + anchor_sides.prod(-1) - both)
    return ious


def fit_anchors(
    objects: Objects, config: RetinaNetConfig, strides: Sequence[int]
) -> RetinaNetConfig:
    """Return a configuration whose anchors fit the objects as well as any that were tried.

    As many octave scales and aspect ratios as before. Tried are the sizes as they are, moved by
    quarters of an octave, and spread over the objects' own sizes, each with the aspect ratios as
    they are and two that follow the objects'. The greatest share of objects with a positive anchor
    wins; among equal ones, the greatest mean of the best IoUs. No chance is involved.

    Args:
        objects: at least one; of many, 4,000 evenly picked ones are tried on.
        config: what to start from.
        strides: of C3, C4 and C5.
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
    """Give candidates for the anchor sizes and octave scales."""
    for shift in _SHIFTS:
        sizes = tuple(_short(size * 2 ** (shift / 4)) for size in config.anchor_sizes)
        yield sizes if shift else config.anchor_sizes, config.octave_scales
    levels, scales = len(config.anchor_sizes), len(config.octave_scales)
    mean_sides = np.sqrt(sides.prod(1))
    for tail in _TAILS:
        least, most = np.quantile(mean_sides, (tail, 1 - tail))
        step = max(float(most / least) ** (1 / max(levels * scales - 1, 1)), _LEAST_STEP)
        yield (
            tuple(_short(float(least) * step ** (scales * level)) for level in range(levels)),
            tuple(_short(step**scale) for scale in range(scales)),
        )


def _ratios(sides: Floats, config: RetinaNetConfig) -> Iterator[tuple[float, ...]]:
    """Give candidates for the aspect ratios: as they are, spread evenly, and k-means' centres."""
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
    """Round to three digits, as people write such numbers."""
    return float(f"{value:.3g}")
