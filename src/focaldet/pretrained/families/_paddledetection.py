"""PaddleDetection RetinaNets: the ``.pdparams`` files of its model zoo and of its training.

Folded into the weights: anchors whose ratio varies fastest. Set in the config: P6 from P5, anchors centred
on the corners of cells, boxes that are not clipped, the best 1000 anchors of a level and the best 1000
predictions of a class before suppression, and OpenCV's resizing by a factor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._block_letters import BLOCK, block_index
from focaldet.pretrained.families._conversion import (
    class_names_of,
    depth_of_head,
    num_classes_of,
    p6_source_of,
    rename,
    reorder_anchors,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "PaddleDetection"

_CHARACTERISTIC = (
    "backbone.conv1.conv1.conv.weight",
    "neck.fpn_inner_res5_sum.weight",
    "head.retina_cls.weight",
    "head.retina_reg.weight",
)
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.conv1\.conv1\.conv\.weight", r"backbone.conv1.weight"),
        (rf"backbone\.conv1\.conv1\.norm\.{_NORM}", r"backbone.bn1.\1"),
        *(
            row
            for stage in (2, 3, 4, 5)
            for place, letter in enumerate("abc", start=1)
            for row in (
                (
                    rf"backbone\.res{stage}\.(\d+)\.branch2{letter}\.conv\.weight",
                    rf"backbone.layer{stage - 1}.\1.conv{place}.weight",
                ),
                (
                    rf"backbone\.res{stage}\.(\d+)\.branch2{letter}\.norm\.{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.bn{place}.\2",
                ),
            )
        ),
        *(
            row
            for stage in (2, 3, 4, 5)
            for row in (
                (
                    rf"backbone\.res{stage}\.(\d+)\.short\.conv\.weight",
                    rf"backbone.layer{stage - 1}.\1.downsample.0.weight",
                ),
                (
                    rf"backbone\.res{stage}\.(\d+)\.short\.norm\.{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.downsample.1.\2",
                ),
            )
        ),
        (r"neck\.fpn_inner_res3_sum_lateral\.(weight|bias)", r"fpn.lateral.0.\1"),
        (r"neck\.fpn_inner_res4_sum_lateral\.(weight|bias)", r"fpn.lateral.1.\1"),
        (r"neck\.fpn_inner_res5_sum\.(weight|bias)", r"fpn.lateral.2.\1"),
        *(
            (rf"neck\.fpn_res{level}_sum\.(weight|bias)", rf"fpn.output.{index}.\1")
            for index, level in enumerate((3, 4, 5))
        ),
        (r"neck\.fpn_6\.(weight|bias)", r"fpn.p6.\1"),
        (r"neck\.fpn_7\.(weight|bias)", r"fpn.p7.\1"),
        *(
            (
                rf"head\.conv_feat\.fcos_head_{theirs}_tower_conv_(\d)\.conv\.(weight|bias)",
                rf"head.{ours}_tower.\1.conv.\2",
            )
            for theirs, ours in (("cls", "class"), ("reg", "box"))
        ),
        (r"head\.retina_cls\.(weight|bias)", r"head.class_logits.\1"),
        (r"head\.retina_reg\.(weight|bias)", r"head.box_deltas.\1"),
    )
)
_NOTHING = re.compile(r"(?!)")
_BLOCK_KEY = re.compile(rf"backbone\.res([2-5])\.res\1({BLOCK})\.(.*)")
_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}

# In PaddleDetection the ratio varies fastest, in focaldet the scale.
_ORDER = (0, 3, 6, 1, 4, 7, 2, 5, 8)


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a PaddleDetection RetinaNet.

    The file contains nothing but the weights, so everything else is assumed to be as in the model zoo.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = _renamed(file)
    num_classes = num_classes_of(renamed, NAME)
    config = RetinaNetConfig(
        num_classes=num_classes,
        class_names=class_names_of(num_classes),
        backbone=resnet_of(renamed, NAME),
        fpn_channels=len(renamed["fpn.p7.weight"]),
        p6_from=p6_source_of(renamed),
        head_depth=depth_of_head(renamed),
        anchor_offset=0.0,
        box_loss="l1",
        pre_nms_top_k_of="anchors",
        pre_nms_top_k_per_class=1000,
        clip_to=None,
        uniform_rescale=True,
        size_rounding="round_half_even",
        resize_by="factor",
        round_pixels=True,
    )
    assumed = (
        *("stride_in_1x1", "p7_relu", "anchor_sizes", "octave_scales", "aspect_ratios"),
        *("score_threshold", "nms_threshold", "max_detections", "min_size", "max_size"),
        *("image_mean", "image_std"),
    )
    return SuggestedConfig(config, assumed)


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a PaddleDetection RetinaNet.

    Args:
        file: The weights.
        config: The configuration to use.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = _renamed(file)
    num_classes_of(renamed, NAME)
    reorder_anchors(renamed, _ORDER)
    return with_norm_of(renamed, config)


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in file.tensors.items():
        found = _BLOCK_KEY.fullmatch(key)
        index = block_index(found[2]) if found else None
        name = (
            key if found is None or index is None else f"backbone.res{found[1]}.{index}.{found[3]}"
        )
        head, _, last = name.rpartition(".")
        name = f"{head}.{_STATISTICS.get(last, last)}"
        if name in tensors:
            raise CheckpointError(f"Two tensors of this {NAME} RetinaNet are called {name!r}.")
        tensors[name] = value
    return rename(tensors, NAME, _RENAMES, _NOTHING)
