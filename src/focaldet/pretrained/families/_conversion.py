"""Functions that the converters of several families share.

They rename tensors, recognise an architecture by its shapes, and fold differences into the weights. A
fold changes the weights so that the network follows focaldet's conventions and computes exactly the
same results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Literal

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = [
    "CLASS_LAYER",
    "DELTA_LAYER",
    "NUM_ANCHORS",
    "OTHER_ANCHORS",
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
OTHER_ANCHORS = "For other anchors, pass config= with their octave_scales and aspect_ratios."
_FIRST_CONV = "backbone.conv1.weight"
NUM_ANCHORS = 9

# (blocks per stage, first two dimensions of the first block's second convolution) -> backbone
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
    """Rename a family's tensors to focaldet's key names.

    Args:
        tensors: The tensors by the family's key names.
        family: The family's name, for messages.
        renames: Patterns that match whole keys, each with the template of the new key.
        ignored: The pattern of keys that a detector does not need.

    Raises:
        CheckpointError: If a key matches no pattern.
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
        some = ", ".join(repr(key) for key in sorted(unknown)[:3])
        raise CheckpointError(
            f"{len(unknown)} unknown tensor{'s' * (len(unknown) != 1)} in a RetinaNet of {family}: {some}"
            f"{', …' if len(unknown) > 3 else '.'} Remove what does not belong to the detector."
        )
    return renamed


def resnet_of(renamed: Mapping[str, Tensor], family: str) -> str:
    """Return the name of a state dict's ResNet or ResNeXt.

    Raises:
        CheckpointError: If it is not one of :data:`focaldet.backbones.BACKBONES`.
    """
    blocks = tuple(
        len({key.split(".")[2] for key in renamed if key.startswith(f"backbone.layer{i}.")})
        for i in range(1, 5)
    )
    second = renamed.get("backbone.layer1.0.conv2.weight", torch.empty(0, 0))
    name = _RESNETS.get((blocks, tuple(second.shape[:2])))
    if name == "resnet50" and "backbone.layer1.0.conv3.weight" not in renamed:
        return "resnet34"  # the same number of blocks, but of two convolutions each
    if name is None:
        raise CheckpointError(
            f"The backbone of this {family} RetinaNet is not a known ResNet or ResNeXt: its stages have "
            f"{', '.join(map(str, blocks))} blocks{_width(second)}. To load it, pass your own module as "
            "backbone= and config= with backbone='custom'."
        )
    return name


def _width(second: Tensor) -> str:
    """Describe the convolution that tells ResNets with as many blocks apart."""
    if second.ndim != 4:
        return ""
    return f", and their 3x3 convolutions begin with {second.shape[0]} channels"


def num_classes_of(
    renamed: Mapping[str, Tensor], family: str, anchors: int = NUM_ANCHORS, *, remedy: str = ""
) -> int:
    """Return the number of classes of a head.

    Args:
        renamed: The tensors by focaldet's key names.
        family: The family's name, for messages.
        anchors: The number of anchors per cell that the head should have.
        remedy: What to do about other anchors, for the message.

    Raises:
        CheckpointError: If the head has a different number of anchors.
    """
    shapes = [
        renamed[f"{layer}.weight"].shape[0] if f"{layer}.weight" in renamed else 0
        for layer in (CLASS_LAYER, DELTA_LAYER)
    ]
    if shapes[1] != 4 * anchors or shapes[0] % anchors or not shapes[0]:
        raise CheckpointError(
            f"The head of this {family} RetinaNet does not have {anchors} anchors per cell: it has "
            f"{shapes[0]} class channels and {shapes[1]} box channels. {remedy}".rstrip()
        )
    return shapes[0] // anchors


def class_names_of(num_classes: int) -> tuple[str, ...] | None:
    """Return COCO's class names for 80 classes, which all families have in COCO's order."""
    return COCO_CLASS_NAMES if num_classes == len(COCO_CLASS_NAMES) else None


def depth_of_head(renamed: Mapping[str, Tensor]) -> int:
    """Return the number of convolutions of a tower."""
    return sum(
        key.startswith("head.class_tower.") and key.endswith("conv.weight") for key in renamed
    )


def p6_source_of(renamed: Mapping[str, Tensor]) -> Literal["c5", "p5"]:
    """Return which level P6 is computed from, by its number of input channels."""
    channels = renamed["fpn.p6.weight"].shape[1]
    return "c5" if channels == renamed["fpn.lateral.2.weight"].shape[1] else "p5"


def with_norm_of(renamed: dict[str, Tensor], config: RetinaNetConfig) -> dict[str, Tensor]:
    """Return the tensors, with batch counters of 0 if the config's BatchNorm trains."""
    if config.backbone_norm == "frozen":
        return renamed
    norms = [key.removesuffix("running_mean") for key in renamed if key.endswith("running_mean")]
    return renamed | {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}


def fold_bgr_input(renamed: dict[str, Tensor], std: Sequence[float]) -> None:
    """Make a network trained on BGR images in [0, 255] minus their mean take RGB in [0, 1].

    The RGB images are normalised with the same mean and with ``std``, so the input channels of the
    first convolution are reversed and multiplied by ``255 * std``. Images are padded after they are
    normalised, so this is exact.

    Args:
        renamed: The tensors by focaldet's key names, changed in place.
        std: The standard deviation of each RGB channel, for values in [0, 1].
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
    """Multiply the output of the box layer by ``scales`` (of dx, dy, dw, dh), as its family does."""
    for kind in ("weight", "bias"):
        values = renamed[f"{DELTA_LAYER}.{kind}"]
        factor = torch.tensor(scales, dtype=torch.float64, device=values.device)
        factor = factor.repeat(len(values) // len(scales))
        folded = values.double() * factor.view(-1, *[1] * (values.ndim - 1))
        renamed[f"{DELTA_LAYER}.{kind}"] = folded.to(values.dtype)


def reorder_anchors(renamed: dict[str, Tensor], order: Sequence[int]) -> None:
    """Reorder the output channels of the head by anchor.

    Args:
        renamed: The tensors by focaldet's key names, changed in place.
        order: For each of focaldet's anchors of a cell, its index in the family's order.
    """
    for layer in (CLASS_LAYER, DELTA_LAYER):
        for kind in ("weight", "bias"):
            values = renamed[f"{layer}.{kind}"]
            rows = values.view(len(order), -1, *values.shape[1:])
            renamed[f"{layer}.{kind}"] = rows[list(order)].flatten(0, 1).contiguous()
