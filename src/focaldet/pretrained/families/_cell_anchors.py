"""Recognise the sizes and shapes of anchors from the anchors themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from focaldet._checks import shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["anchor_fields", "shapes_of_cell"]

_RELATIVE = 1e-5  # by which equal numbers may differ after float32


def shapes_of_cell(name: str, anchors: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the sizes and the aspect ratios of a cell's anchors, in their order.

    Args:
        name: What messages call the anchors.
        anchors: ``[A, 4]``, xyxy about (0, 0): every ratio (height / width) of the first size, then
            those of the next.

    Raises:
        CheckpointError: If the anchors are not centred, or are not every combination of some sizes and
            ratios.
    """
    shape = list(anchors.shape)
    if len(shape) != 2 or shape[1] != 4 or not shape[0]:
        raise CheckpointError(f"{name} must have the shape [A, 4], got {shape}.")
    corners = anchors.detach().cpu().double()
    sides = corners[:, 2:] - corners[:, :2]
    centred = (corners[:, :2] + corners[:, 2:]).abs() <= _RELATIVE * sides.abs()
    if bool((sides > 0).all() and centred.all() and sides.isfinite().all()):
        sizes, ratios = sides.prod(dim=1).sqrt(), sides[:, 1] / sides[:, 0]
        for num_ratios in range(len(corners), 0, -1):
            if len(corners) % num_ratios:
                continue
            size = sizes.view(-1, num_ratios)
            ratio = ratios.view(-1, num_ratios)
            if _same(size, size[:, :1]) and _same(ratio, ratio[:1]):
                return tuple(size[:, 0].tolist()), tuple(map(_tidied, ratio[0].tolist()))
    raise CheckpointError(
        f"{name} is {shortened(anchors.tolist())}, which is not every combination of some sizes and "
        "aspect ratios about the centre, so no config describes these anchors."
    )


def anchor_fields(
    sizes: Sequence[Sequence[float]], ratios: Sequence[Sequence[float]], source: str
) -> dict[str, Any]:
    """Return the fields of a config for the anchors of all levels.

    Args:
        sizes: The sizes of each level's anchors, each the side of a square with the same area.
        ratios: The aspect ratios of each level's anchors.
        source: Where they are from, for messages.

    Raises:
        CheckpointError: If the levels have different ratios, or sizes that are not the same multiples of
            their first one.
    """
    first = sizes[0]
    if not all(
        len(level) == len(first) and _same_numbers(_multiples(level), _multiples(first))
        for level in sizes
    ) or not all(_same_numbers(level, ratios[0]) for level in ratios):
        raise CheckpointError(
            f"The anchors in {source} have the sizes {shortened(list(sizes))} and the aspect ratios "
            f"{shortened(list(ratios))}. A config needs the same aspect ratios at all levels, and sizes "
            "that are the same multiples of each level's first one."
        )
    octaves = [2 ** (step / len(first)) for step in range(len(first))]
    scales = _multiples(first)
    return {
        "anchor_sizes": tuple(_tidied(level[0]) for level in sizes),
        "octave_scales": tuple(octaves if _same_numbers(scales, octaves) else map(_tidied, scales)),
        "aspect_ratios": tuple(map(_tidied, ratios[0])),
    }


def _multiples(sizes: Sequence[float]) -> list[float]:
    return [size / sizes[0] for size in sizes]


def _same(values: Tensor, others: Tensor) -> bool:
    return bool(((values - others).abs() <= _RELATIVE * others.abs()).all())


def _same_numbers(values: Sequence[float], others: Sequence[float]) -> bool:
    return len(values) == len(others) and all(
        math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(values, others, strict=True)
    )


def _tidied(value: float) -> float:
    """Return the short number that a value stood for before it was stored in float32."""
    short = round(value, 4)
    return short if math.isclose(short, value, rel_tol=1e-6) else value
