"""What the converters of several families share: renaming, recognising, and exact folds.

A fold changes weights so that a network computes with another convention, but the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet._checks import must_be
from focaldet.class_names import COCO_CLASS_NAMES

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Literal

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = [
    "CLASS_LAYER",
    "DELTA_LAYER",
    "class_names_of",
    "depth_of_head",
    "fold_bgr_input",
    "fold_delta_scales",
    "num_classes_of",
    "p6_source_of",
    "rename",
    "reorder_anchors",
    "resnet_of",
    "with_norm_of",
]

CLASS_LAYER, DELTA_LAYER = "head.class_logits", "head.box_deltas"
_FIRST_CONV = "backbone.conv1.weight"
_NUM_ANCHORS = 9

# (blocks in each stage, shape of the first block's second convolution) -> builder
_RESNETS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((2, 2, 2, 2), (64, 64)): "resnet18",
    ((3, 4, 6, 3), (64, 64)): "resnet50",
    ((3, 4, 23, 3), (64, 64)): "resnet101",
    ((3, 8, 36, 3), (64, 64)): "resnet152",
    ((3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
    ((3, 4, 23, 3), (128, 4)): "resnext101_32x4d",
    ((3, 4, 23, 3), (256, 8)): "resnext101_32x8d",
    ((3, 4, 23, 3), (256, 4)): "resnext101_64x4d",
}


def rename(
    tensors: Mapping[str, Tensor],
    family: str,
    renames: Iterable[tuple[re.Pattern[str], str]],
    ignored: re.Pattern[str],
) -> dict[str, Tensor]:
    """Give every tensor focaldet's name for it.

    Args:
        tensors: in the family's names.
        family: what a message calls it.
        renames: patterns of whole names, and what becomes of them.
        ignored: pattern of the names of what a detector does not need.

    Raises:
        ValueError: names that are neither.
    """
    renames = tuple(renames)
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in tensors.items():
        matches = ((pattern.fullmatch(key), name) for pattern, name in renames)
        found = next(((match, name) for match, name in matches if match), None)
        if found:
            renamed[found[0].expand(found[1])] = value
        elif not ignored.fullmatch(key):
            unknown.append(key)
    if unknown:
        few = ", ".join(repr(key) for key in sorted(unknown)[:3])
        got = f"{len(unknown)} unknown ({few}{', …' if len(unknown) > 3 else ''})"
        raise ValueError(must_be("source", f"made of the tensors of {family}'s RetinaNet", got))
    return renamed


def resnet_of(renamed: Mapping[str, Tensor], family: str) -> str:
    """Return the name of the ResNet or ResNeXt that a state dict is of.

    Raises:
        ValueError: it is none of those of :data:`focaldet.backbones.BACKBONES`.
    """
    blocks = tuple(
        len({key.split(".")[2] for key in renamed if key.startswith(f"backbone.layer{i}.")})
        for i in range(1, 5)
    )
    second = renamed.get("backbone.layer1.0.conv2.weight", torch.empty(0, 0))
    name = _RESNETS.get((blocks, tuple(second.shape[:2])))
    if name == "resnet50" and "backbone.layer1.0.conv3.weight" not in renamed:
        return "resnet34"  # the same blocks, each of two convolutions
    if name is None:
        got = f"stages of {blocks} blocks"
        raise ValueError(must_be("source", f"a RetinaNet over a ResNet of {family}", got))
    return name


def num_classes_of(renamed: Mapping[str, Tensor], family: str, anchors: int = _NUM_ANCHORS) -> int:
    """Return the number of classes of a head.

    Raises:
        ValueError: a head of another number of anchors than the family's.
    """
    shapes = [
        renamed[f"{layer}.weight"].shape[0] if f"{layer}.weight" in renamed else 0
        for layer in (CLASS_LAYER, DELTA_LAYER)
    ]
    if shapes[1] != 4 * anchors or shapes[0] % anchors or not shapes[0]:
        condition = f"a RetinaNet of {family} with {anchors} anchors per cell"
        got = f"{shapes[0]} class channels and {shapes[1]} box channels"
        raise ValueError(must_be("source", condition, got, "Hand in its parts yourself."))
    return shapes[0] // anchors


def class_names_of(num_classes: int) -> tuple[str, ...] | None:
    """Return COCO's names for a head of 80 classes, which all families have in COCO's order."""
    return COCO_CLASS_NAMES if num_classes == len(COCO_CLASS_NAMES) else None


def depth_of_head(renamed: Mapping[str, Tensor]) -> int:
    """Return how many convolutions a tower has."""
    return sum(key.startswith("head.class_tower.") and key.endswith("weight") for key in renamed)


def p6_source_of(renamed: Mapping[str, Tensor]) -> Literal["c5", "p5"]:
    """Return what P6 is made of, by its number of channels."""
    wanted = renamed["fpn.p6.weight"].shape[1]
    return "c5" if wanted == renamed["fpn.lateral.2.weight"].shape[1] else "p5"


def with_norm_of(renamed: dict[str, Tensor], config: RetinaNetConfig) -> dict[str, Tensor]:
    """Return the tensors with the counters that a BatchNorm has if it trains, at 0."""
    if config.backbone_norm == "frozen":
        return renamed
    norms = [key.removesuffix("running_mean") for key in renamed if key.endswith("running_mean")]
    return renamed | {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}


def fold_bgr_input(renamed: dict[str, Tensor], std: Sequence[float]) -> None:
    """Let a network for blue, green, red in 0-255, less their mean, take red, green, blue in 0-1.

    These are normalised by the same mean, and by ``std``. The first convolution's weights are turned
    round and multiplied by ``255 std``; images are padded after normalisation, so this is exact.
    """
    if len(std) != 3:
        raise ValueError(
            f"config.in_channels is {len(std)}, but this file's network expects blue, green and red. "
            "Load it without config=, save it with save_pretrained, and load that with config=."
        )
    weight = renamed[_FIRST_CONV]
    factor = 255 * torch.tensor(std, dtype=torch.float64, device=weight.device)
    folded = weight.flip(1).double() * factor[:, None, None]
    renamed[_FIRST_CONV] = folded.to(weight.dtype)


def fold_delta_scales(renamed: dict[str, Tensor], scales: Sequence[float]) -> None:
    """Let a box layer give what its family multiplies by ``scales`` (of dx, dy, dw, dh)."""
    for kind in ("weight", "bias"):
        values = renamed[f"{DELTA_LAYER}.{kind}"]
        factor = torch.tensor(scales, dtype=torch.float64, device=values.device)
        factor = factor.repeat(len(values) // len(scales))
        folded = values.double() * factor.view(-1, *[1] * (values.ndim - 1))
        renamed[f"{DELTA_LAYER}.{kind}"] = folded.to(values.dtype)


def reorder_anchors(renamed: dict[str, Tensor], order: Sequence[int]) -> None:
    """Put the channels of a cell's anchors in another order.

    Args:
        renamed: changed in place.
        order: for each of our anchors, its place in the family.
    """
    for layer in (CLASS_LAYER, DELTA_LAYER):
        for kind in ("weight", "bias"):
            values = renamed[f"{layer}.{kind}"]
            rows = values.view(len(order), -1, *values.shape[1:])
            renamed[f"{layer}.{kind}"] = rows[list(order)].flatten(0, 1).contiguous()
