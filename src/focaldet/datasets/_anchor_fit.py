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

__all__ = ["Objects", "best_anchor_ious", "fit_anchors", "share_reached"]

_CHUNK = 16384  # objects processed at once, which takes a few MB
_SAMPLE = 4000  # objects on which candidates are compared
_FINAL_SAMPLE = 20_000  # objects on which the best is compared with the current anchors
_SHIFTS = range(-8, 9)  # shifts of the anchor sizes, in quarters of an octave
_COST = 0.01  # of an octave, or of other ratios, in shares of the objects


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


def share_reached(objects: Objects, config: RetinaNetConfig, strides: Sequence[int]) -> float:
    """Return the share of the objects whose best anchor is positive by its IoU, in [0, 1].

    It is the recall that the thresholds of :class:`~focaldet.matching.Matcher` allow, before it gives
    every other object its best anchor and settles which of two objects an anchor belongs to.

    Args:
        objects: At least one object. An evenly spaced sample of at most 20,000 is used.
        config: Its anchors and ``positive_threshold`` are used.
        strides: Strides of the maps of the backbone.
    """
    sample = _evenly_spaced(objects, _FINAL_SAMPLE)
    ious = best_anchor_ious(sample, build_anchor_generator(config, strides))
    return float((ious >= config.positive_threshold).mean())


def fit_anchors(
    objects: Objects, config: RetinaNetConfig, strides: Sequence[int]
) -> RetinaNetConfig:
    """Return a configuration with the anchors that fit the objects best among some candidates.

    The objective is :func:`share_reached`, minus 0.01 for each octave by which the sizes move on
    average and 0.01 for other aspect ratios. A pyramid finds an object best on the level whose stride is
    about a quarter of its size, and with smaller anchors large objects move to levels with few and
    coarse cells. The share does not show that, so a change must bring one object in a hundred per octave.

    The candidates are the current sizes and sizes that double from level to level, both shifted by up
    to two octaves in quarters of an octave. Each is combined with the current aspect ratios and with
    two sets that follow those of the objects. The octave scales and the number of ratios do not change.
    The result is at least as good, by the objective, as the current anchors and those half or twice as
    large. The search is deterministic.

    Args:
        objects: At least one object. Candidates are compared on an evenly spaced sample of at most
            4,000, and the best of them with the current anchors on at most 20,000.
        config: The configuration to start from.
        strides: Strides of the maps of the backbone.
    """

    def score(candidate: RetinaNetConfig, sample: Objects) -> float:
        cost = _COST * _octaves_moved(candidate, config)
        if candidate.aspect_ratios != config.aspect_ratios:
            cost += _COST
        return share_reached(sample, candidate, strides) - cost

    sample = _evenly_spaced(objects, _SAMPLE)
    sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
    candidates = [
        config.replace(anchor_sizes=sizes, aspect_ratios=ratios)
        for sizes, ratios in itertools.product(_pyramids(config), _ratios(sides, config))
    ]
    best = max(candidates, key=lambda candidate: score(candidate, sample))
    halved, doubled = (
        config.replace(anchor_sizes=tuple(factor * size for size in config.anchor_sizes))
        for factor in (0.5, 2.0)
    )
    return max((config, best, halved, doubled), key=lambda candidate: score(candidate, objects))


def _evenly_spaced(objects: Objects, count: int) -> Objects:
    step = -(-len(objects.boxes) // count)
    return Objects(objects.boxes[::step], objects.padded_sizes[::step])


def _octaves_moved(candidate: RetinaNetConfig, config: RetinaNetConfig) -> float:
    """Return by how many octaves the sizes differ, as a mean over levels."""
    moved = np.log2(np.divide(candidate.anchor_sizes, config.anchor_sizes))
    return float(np.abs(moved).mean())


def _pyramids(config: RetinaNetConfig) -> Iterator[tuple[float, ...]]:
    """Yield candidates for the anchor sizes, the current ones first."""
    smallest = config.anchor_sizes[0]
    doubling = tuple(smallest * 2**level for level in range(len(config.anchor_sizes)))
    yield config.anchor_sizes
    for sizes in dict.fromkeys([config.anchor_sizes, doubling]):
        for shift in _SHIFTS:
            if shift or sizes != config.anchor_sizes:
                yield tuple(_short(size * 2 ** (shift / 4)) for size in sizes)


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
