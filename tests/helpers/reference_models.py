"""A RetinaNet in plain functions over a state dict, which the references of all projects share.

It is written from the published facts of each project and shares no code with focaldet, so that the
converters can be compared with it. What differs between projects (key names, strides, ReLU before P7,
...) is passed in by the modules ``reference_<project>``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import nms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

State = dict[str, Any]
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Names(NamedTuple):
    """The key names of a project's network. ``{}`` stand for stage, block and layer."""

    stem: str
    stem_norm: str
    conv: str
    norm: str
    shortcut: str
    shortcut_norm: str
    laterals: tuple[str, str, str]  # of C3, C4, C5
    outputs: tuple[str, str, str]
    p6: str
    p7: str
    class_tower: tuple[str, str, str, str]
    box_tower: tuple[str, str, str, str]
    classes: str
    boxes: str
    first_stage: int = 1  # the number of the ResNet's first stage


class Body(NamedTuple):
    """A ResNet: its depth, its groups, the width of a group, and where its strides are."""

    depth: int
    groups: int = 1
    width: int = 64
    stride_in_1x1: bool = False

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50


class Maps(NamedTuple):
    """The outputs of the head, one tensor per level."""

    logits: list[Tensor]  # [A * K, H, W]
    deltas: list[Tensor]  # [A * 4, H, W]


class Prepared(NamedTuple):
    """An image as a project preprocesses it."""

    tensor: Tensor  # [1, 3, H, W], the input of the project's network
    size: tuple[int, int]  # without padding
    normalised: Tensor  # the same in RGB, minus the mean and divided by the standard deviation


class Found(NamedTuple):
    """Detections."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Reference(Protocol):
    """A project's way from an image to detections."""

    min_size: int
    max_size: int
    min_share: float  # of detections that still agree if some pixels differ by one level

    def prepare(self, image: np.ndarray[Any, Any]) -> Prepared: ...
    def network(self, tensor: Tensor) -> Maps: ...
    def detect(self, maps: Maps, prepared: Prepared, original: tuple[int, int]) -> Found: ...


# --- State dicts ---------------------------------------------------------------------------------


def layout(names: Names, body: Body, *, classes: int = 80, channels: int = 32) -> dict[str, Any]:
    """Return the shape of every tensor of a project's state dict."""
    shapes: dict[str, Any] = {f"{names.stem}.weight": (64, 3, 7, 7)}
    shapes |= _norm_layout(names.stem_norm, 64)
    inside, widths = 64, []
    for stage, count in enumerate(BLOCKS[body.depth], start=names.first_stage):
        planes = 64 * 2 ** (stage - names.first_stage)
        middle = planes * body.width // 64 * body.groups
        outside = 4 * planes if body.bottleneck else planes
        for block in range(count):
            if body.bottleneck:
                convs = [
                    (middle, inside, 1, 1),
                    (middle, middle // body.groups, 3, 3),
                    (outside, middle, 1, 1),
                ]
            else:
                convs = [(planes, inside, 3, 3), (planes, planes, 3, 3)]
            for layer, shape in enumerate(convs, start=1):
                shapes[names.conv.format(stage, block, layer) + ".weight"] = shape
                shapes |= _norm_layout(names.norm.format(stage, block, layer), shape[0])
            if block == 0 and (inside != outside or stage > names.first_stage):
                shapes[names.shortcut.format(stage, block) + ".weight"] = (outside, inside, 1, 1)
                shapes |= _norm_layout(names.shortcut_norm.format(stage, block), outside)
            inside = outside
        widths.append(outside)
    return shapes | pyramid_layout(names, widths[1:], classes, channels)


def pyramid_layout(names: Names, widths: Sequence[int], classes: int, channels: int) -> State:
    convs: dict[str, tuple[int, int, int]] = {}
    for lateral, output, width in zip(names.laterals, names.outputs, widths, strict=True):
        convs[lateral], convs[output] = (channels, width, 1), (channels, channels, 3)
    convs[names.p6], convs[names.p7] = (channels, widths[-1], 3), (channels, channels, 3)
    for name in (*names.class_tower, *names.box_tower):
        convs[name] = (channels, channels, 3)
    convs[names.classes], convs[names.boxes] = (9 * classes, channels, 3), (36, channels, 3)
    shapes: State = {}
    for name, (out, into, kernel) in convs.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, kernel, kernel), (out,)
    return shapes


def _norm_layout(name: str, channels: int) -> State:
    return {
        f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")
    }


def filled(shapes: State, seed: int = 0) -> State:
    """Fill a layout with random weights that keep activations at a normal scale."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            noise *= math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
        elif key.endswith("running_var"):
            noise = 0.8 + 0.8 * torch.rand(shape, generator=generator)
        elif key.removesuffix("weight") + "running_var" in shapes:
            noise = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        else:
            noise *= 0.1
        state[key] = noise
    return state


def calibrate(
    state: State,
    names: Names,
    network: Callable[[State, Tensor], Maps],
    images: Tensor,
    bias: float,
    *,
    deltas: tuple[float, float] = (0.4, 0.4),
) -> None:
    """Scale the last layers so that the logits and most deltas have a normal scale.

    Otherwise scores saturate and their order is arbitrary. Of the anchors of each cell, one gets large
    shifts and sizes, which exercises the clamps, and another one large shifts, which leaves boxes
    empty after clipping.

    Args:
        state: The state dict, changed in place.
        names: The key names of its layers.
        network: A function from the state dict and images to the head's maps.
        images: The images that set the scale.
        bias: The bias of the class layer.
        deltas: The standard deviation of the shifts, and of the log sizes.
    """
    state[f"{names.classes}.bias"].zero_()
    state[f"{names.boxes}.bias"].zero_()
    maps = network(state, images)
    for name, levels in ((names.classes, maps.logits), (names.boxes, maps.deltas)):
        state[f"{name}.weight"] /= torch.cat([level.flatten() for level in levels]).std()
    state[f"{names.classes}.bias"].fill_(bias)
    size = torch.tensor(deltas).repeat_interleave(2).repeat(9)  # dx, dy, dw, dh of each anchor
    size[:4] *= 12
    size[8:10] *= 12
    state[f"{names.boxes}.weight"] *= size[:, None, None, None]
    state[f"{names.boxes}.bias"].normal_(0, 0.05, generator=torch.Generator().manual_seed(1))


# --- The network ---------------------------------------------------------------------------------


def conv(state: State, name: str, x: Tensor, *, stride: int = 1, groups: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    weight = weight.to(x)
    bias = None if bias is None else bias.to(x)
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (  # each [C, 1, 1]
        state[f"{name}.{part}"].to(x)[:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    normed: Tensor = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return normed


def resnet(state: State, names: Names, body: Body, x: Tensor) -> list[Tensor]:
    x = norm(state, names.stem_norm, conv(state, names.stem, x, stride=2)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for stage, count in enumerate(BLOCKS[body.depth], start=names.first_stage):
        for block in range(count):
            stride = 2 if stage > names.first_stage and block == 0 else 1
            strides = (1, stride, 1) if body.bottleneck else (stride, 1)
            if body.stride_in_1x1:
                strides = (stride, 1, 1)
            y = x
            for layer, step in enumerate(strides, start=1):
                groups = body.groups if layer == 2 else 1
                y = conv(
                    state, names.conv.format(stage, block, layer), y, stride=step, groups=groups
                )
                y = norm(state, names.norm.format(stage, block, layer), y)
                y = y.relu() if layer < len(strides) else y
            shortcut = names.shortcut.format(stage, block)
            if f"{shortcut}.weight" in state:
                x = conv(state, shortcut, x, stride=stride)
                x = norm(state, names.shortcut_norm.format(stage, block), x)
            x = (y + x).relu()
        maps.append(x)
    return maps[1:]


def pyramid_and_head(
    state: State, names: Names, features: Sequence[Tensor], *, p7_relu: bool
) -> Maps:
    """Return the head's maps for P3..P7 of one image, with P6 computed from C5."""
    inner = [conv(state, name, c) for name, c in zip(names.laterals, features, strict=True)]
    for level in (1, 0):
        above = inner[level + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
        inner[level] = inner[level] + above
    levels = [conv(state, name, m) for name, m in zip(names.outputs, inner, strict=True)]
    p6 = conv(state, names.p6, features[2], stride=2)
    levels += [p6, conv(state, names.p7, p6.relu() if p7_relu else p6, stride=2)]

    def subnet(tower: Sequence[str], last: str) -> list[Tensor]:
        maps = []
        for level in levels:
            x = level
            for name in tower:
                x = conv(state, name, x).relu()
            maps.append(conv(state, last, x)[0])
        return maps

    return Maps(subnet(names.class_tower, names.classes), subnet(names.box_tower, names.boxes))


# --- Images and boxes ----------------------------------------------------------------------------


def padded(image_HWC: np.ndarray[Any, Any], height: int, width: int) -> Tensor:
    """Pad an image to ``[1, 3, height, width]`` with zeros on the right and at the bottom."""
    canvas = np.zeros((height, width, 3))
    canvas[: image_HWC.shape[0], : image_HWC.shape[1]] = image_HWC
    return torch.from_numpy(canvas).permute(2, 0, 1)[None].contiguous()


def up_to(side: int, divisor: int) -> int:
    return (side + divisor - 1) // divisor * divisor


def bilinear(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Resize ``[H, W, 3]`` bilinearly, with half-pixel centres, repeated edges, no antialiasing."""

    def ends(old: int, new: int) -> tuple[Any, Any, Any]:
        place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    top, bottom, y = ends(image.shape[0], height)
    left, right, x = ends(image.shape[1], width)
    x, y = x[None, :, None], y[:, None, None]
    image = image.astype(np.float64)
    upper = image[top][:, left] * (1 - x) + image[top][:, right] * x
    lower = image[bottom][:, left] * (1 - x) + image[bottom][:, right] * x
    resized: np.ndarray[Any, Any] = upper * (1 - y) + lower * y
    return resized


def rows(level: Tensor, per_anchor: int) -> Tensor:
    """Rearrange a map ``[A * N, H, W]`` to ``[H * W * A, N]``."""
    channels, height, width = level.shape
    cells = level.view(channels // per_anchor, per_anchor, height, width)
    return cells.permute(2, 3, 0, 1).reshape(-1, per_anchor)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, limit: int | None) -> Tensor:
    """Return the indices that NMS per class keeps at an IoU of 0.5, best first."""
    kept = []
    for label in labels.unique():  # type: ignore[no-untyped-call]
        of_class = (labels == label).nonzero()[:, 0]
        kept.append(of_class[nms(boxes[of_class], scores[of_class], 0.5)])
    keep = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
    return keep[scores[keep].argsort(descending=True)][:limit]


def assert_same(ours: Any, theirs: Found, *, boxes: float, scores: float) -> None:
    """Require the same detections. Those of equal score may be in any order.

    NMS runs in float32 in focaldet and in float64 in the reference. So per 500 detections, one may
    differ: its IoU with a better one is 0.5 to float32's precision.
    """
    may_differ = len(theirs.scores) // 500
    assert abs(len(ours) - len(theirs.scores)) <= may_differ
    min_share = 1 - may_differ / max(len(theirs.scores), 1)
    assert share_found(ours, theirs, boxes=boxes, scores=scores) >= min_share
    assert (ours.scores.diff() <= 0).all()


def share_found(ours: Any, theirs: Found, *, boxes: float, scores: float) -> float:
    """Return the share of their detections that are also among ours, within tolerances."""
    free = torch.ones(len(ours), dtype=torch.bool)
    found = 0
    for box, score, label in zip(*theirs, strict=True):
        same = free & (ours.labels == label) & ((ours.scores - score).abs() <= scores)
        same &= (ours.boxes - box).abs().amax(dim=1) <= boxes
        if same.any():
            free[same.nonzero()[0, 0]] = False
            found += 1
    return found / max(len(theirs.scores), 1)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return an image of random soft patches, ``[H, W, 3]`` uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 12, width // 12, 3))
    return bilinear(coarse, height, width).round().astype(np.uint8)
