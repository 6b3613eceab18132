"""fizyr/keras-retinanet: the HDF5 files of its training, and those that it converts for inference.

Folded into the weights: BGR images in [0, 255], and kernels whose output channels come last. Set in the
config: boxes encoded by their corners, TensorFlow's padding, strides in the 1x1 convolutions, boxes
clipped to the last pixel, no limit before suppression, and OpenCV's resizing by a factor without padding.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from focaldet._checks import shortened
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._block_letters import BLOCK, block_index
from focaldet.pretrained.families._conversion import (
    OTHER_ANCHORS,
    class_names_of,
    depth_of_head,
    fold_bgr_input,
    num_classes_of,
    rename,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "keras-retinanet"

_SUBMODELS = ("regression_submodel", "classification_submodel")
_CHARACTERISTIC = (
    "conv1/kernel",
    "C5_reduced/kernel",
    "pyramid_regression/kernel",
    "pyramid_classification/kernel",
)
_PIXEL_MEAN = (123.68, 116.779, 103.939)  # red, green, blue
_STRIDES = (8, 16, 32, 64, 128)
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1/weight", r"backbone.conv1.weight"),
        (rf"bn_conv1/{_NORM}", r"backbone.bn1.\1"),
        *(
            row
            for stage in (2, 3, 4, 5)
            for place, letter in enumerate("abc", start=1)
            for row in (
                (
                    rf"res{stage}\.(\d+)_branch2{letter}/weight",
                    rf"backbone.layer{stage - 1}.\1.conv{place}.weight",
                ),
                (
                    rf"bn{stage}\.(\d+)_branch2{letter}/{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.bn{place}.\2",
                ),
            )
        ),
        *(
            row
            for stage in (2, 3, 4, 5)
            for row in (
                (
                    rf"res{stage}\.(\d+)_branch1/weight",
                    rf"backbone.layer{stage - 1}.\1.downsample.0.weight",
                ),
                (
                    rf"bn{stage}\.(\d+)_branch1/{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.downsample.1.\2",
                ),
            )
        ),
        *(
            row
            for index, level in enumerate((3, 4, 5))
            for row in (
                (rf"C{level}_reduced/(weight|bias)", rf"fpn.lateral.{index}.\1"),
                (rf"P{level}/(weight|bias)", rf"fpn.output.{index}.\1"),
            )
        ),
        (r"P6/(weight|bias)", r"fpn.p6.\1"),
        (r"P7/(weight|bias)", r"fpn.p7.\1"),
        (r"pyramid_classification_(\d)/(weight|bias)", r"head.class_tower.\1.conv.\2"),
        (r"pyramid_regression_(\d)/(weight|bias)", r"head.box_tower.\1.conv.\2"),
        (r"pyramid_classification/(weight|bias)", r"head.class_logits.\1"),
        (r"pyramid_regression/(weight|bias)", r"head.box_deltas.\1"),
    )
)
_IGNORED = re.compile(r"anchors_\d/.*")  # the anchors' own variables, which older versions save
_KNOWN = (_IGNORED, *(pattern for pattern, _ in _RENAMES))
_PARTS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
}
_COCO_FILE = "resnet50_coco_best_v2.1.0.h5"  # for images of 800/1333 pixels
# The OpenImages models of 443 and 500 classes that were published with this code.
_SIZES_OF_PUBLISHED = (
    (re.compile(r"retinanet_resnet(50|101)_(500_classes|level_1)_?.*"), (768, 1024)),
    (re.compile(r"retinanet_resnet152_(500_classes|level_1)_?.*"), (600, 800)),
)
_BLOCK_LAYER = re.compile(rf"(res|bn)([2-5])({BLOCK})_(branch.*)")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    known = {"/".join(_layer_and_part(key)) for key in tensors}
    return [key for key in _CHARACTERISTIC if key not in known]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a keras-retinanet model.

    Anchors, the scale of the deltas and the thresholds are read from the description of the layers, if
    the file has one. Files with weights alone do not, and files of training do not have the
    thresholds; keras-retinanet's defaults are assumed for them. No file records the size of images. It
    is known for published files, by their names.

    Args:
        file: The weights by layer, with the description of the layers and the name of the file.

    Raises:
        CheckpointError: If tensors belong to a different model, or a layer has options that focaldet
            has no counterpart for.
    """
    renamed = _renamed(file)
    layers = _Layers(file.extras.get("model_config"))
    options, assumed = layers.options()
    anchors = len(options.get("octave_scales", (1, 2, 3))) * len(
        options.get("aspect_ratios", (1, 2, 3))
    )
    num_classes = num_classes_of(renamed, NAME, anchors, remedy=OTHER_ANCHORS)
    settings: dict[str, Any] = {
        "num_classes": num_classes,
        "class_names": class_names_of(num_classes),
        "backbone": resnet_of(renamed, NAME),
        "stride_in_1x1": True,
        "fpn_channels": len(renamed["fpn.p7.weight"]),
        "strided_padding": "same",
        "head_depth": depth_of_head(renamed),
        "box_encoding": "corners",
        "box_weights": (5.0, 5.0, 5.0, 5.0),
        "log_scale_clamp": None,
        "force_match_floor": None,
        "smooth_l1_beta": 1 / 9,
        "pre_nms_top_k": None,
        "max_detections": 300,
        "clip_to": "last_pixel",
        "uniform_rescale": True,
        "image_mean": tuple(value / 255 for value in _PIXEL_MEAN),
        "image_std": (1 / 255, 1 / 255, 1 / 255),
        "size_divisor": 1,
        "size_rounding": "round_half_even",
        "resize_by": "factor",
    }
    for pattern, (min_size, max_size) in _SIZES_OF_PUBLISHED:
        if pattern.fullmatch(file.name):
            options |= {"min_size": min_size, "max_size": max_size}
    if "min_size" not in options and file.name != _COCO_FILE:
        assumed = (*assumed, "min_size", "max_size")
    return SuggestedConfig(RetinaNetConfig(**settings | options), assumed)


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a keras-retinanet model.

    Args:
        file: The weights by layer.
        config: The configuration to use.

    Raises:
        CheckpointError: If tensors belong to a different model, or the config describes boxes that are
            encoded in another way.
    """
    renamed = _renamed(file)
    if config.box_encoding != "corners":
        raise CheckpointError(
            f"config.box_encoding is {config.box_encoding!r}, but a model of {NAME} encodes boxes by "
            "their corners. Set it to 'corners', or pass num_classes= to start a new box layer."
        )
    fold_bgr_input(renamed, config.image_std)
    return with_norm_of(renamed, config)


def _layer_and_part(key: str) -> tuple[str, str]:
    """Return the layer and the name of a weight, from its path in the file.

    A path is the layer's group, the scope in which the weight was made and the weight, as in
    ``conv1/conv1_1/kernel:0``. The scope may have a number, because a model was loaded twice in one
    program, and matters only for the layers of the two submodels.

    >>> _layer_and_part("bn_conv1/bn_conv1_2/gamma:0")
    ('bn_conv1', 'gamma')
    """
    parts = key.split("/")
    layer = parts[-2] if parts[0] in _SUBMODELS and len(parts) > 2 else parts[0]
    return layer, parts[-1].removesuffix(":0")


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in file.tensors.items():
        layer, part = _layer_and_part(key)
        found = _BLOCK_LAYER.fullmatch(layer)
        if found:
            kind, stage, block, branch = found.groups()
            index = block_index(block)
            layer = layer if index is None else f"{kind}{stage}.{index}_{branch}"
        name = f"{layer}/{_PARTS.get(part, part)}"
        if name in tensors:
            raise CheckpointError(f"Two tensors of this {NAME} model are called {name!r}.")
        if not any(pattern.fullmatch(name) for pattern in _KNOWN):
            name = key  # for the message of the error
        tensors[name] = value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value
    return rename(tensors, NAME, _RENAMES, _IGNORED)


class _Layers:
    """The options of a model's layers, from the JSON text that Keras saves beside the weights."""

    def __init__(self, text: object) -> None:
        self.of_class: dict[str, list[dict[str, Any]]] = {}
        if not isinstance(text, str):
            return
        try:
            for layer in json.loads(text)["config"]["layers"]:
                self.of_class.setdefault(layer["class_name"], []).append(dict(layer["config"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"The model_config of this {NAME} model cannot be read "
                f"({type(error).__name__}: {shortened(str(error))}). Save the weights alone, with "
                "model.save_weights, and pass config= if the model has other anchors."
            ) from error

    def options(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return the fields of the config that the layers decide, and those that none describes."""
        found: dict[str, Any] = {}
        assumed: list[str] = []
        for kind, fields, read in (
            ("Anchors", ("anchor_sizes", "octave_scales", "aspect_ratios"), self._anchors),
            ("FilterDetections", ("score_threshold", "nms_threshold", "max_detections"), self._nms),
            ("RegressBoxes", ("box_weights",), self._deltas),
        ):
            if kind in self.of_class:
                found |= read(self.of_class[kind])
            else:
                assumed += fields
        return found, tuple(assumed)

    @staticmethod
    def _anchors(layers: list[dict[str, Any]]) -> dict[str, Any]:
        by_stride = {_number(layer, "stride"): layer for layer in layers}
        if tuple(sorted(by_stride)) != _STRIDES or len(layers) != len(_STRIDES):
            raise CheckpointError(
                f"This {NAME} model has anchors with the strides {sorted(by_stride)}, but only "
                f"{list(_STRIDES)}, of P3 to P7, are supported."
            )
        shapes = {
            (_numbers(layer, "scales"), _numbers(layer, "ratios")) for layer in by_stride.values()
        }
        if len(shapes) > 1:
            raise CheckpointError(f"The levels of this {NAME} model have different anchors.")
        [(scales, ratios)] = shapes
        sizes = tuple(_number(by_stride[stride], "size") for stride in _STRIDES)
        return {"anchor_sizes": sizes, "octave_scales": scales, "aspect_ratios": ratios}

    @staticmethod
    def _nms(layers: list[dict[str, Any]]) -> dict[str, Any]:
        [layer, *_] = layers
        for name in ("nms", "class_specific_filter"):
            if layer.get(name) is not True:
                raise CheckpointError(
                    f"The layer FilterDetections of this {NAME} model has {name}="
                    f"{shortened(layer.get(name))}, but only True is supported. Convert the model "
                    "again without that option."
                )
        return {
            "score_threshold": _number(layer, "score_threshold"),
            "nms_threshold": _number(layer, "nms_threshold"),
            "max_detections": int(_number(layer, "max_detections")),
        }

    @staticmethod
    def _deltas(layers: list[dict[str, Any]]) -> dict[str, Any]:
        [layer, *_] = layers
        mean, std = _numbers(layer, "mean"), _numbers(layer, "std")
        if any(mean) or len(std) != 4 or min(std) <= 0:
            raise CheckpointError(
                f"The layer RegressBoxes of this {NAME} model has mean={mean} and std={std}, but only "
                "means of 0 and four deviations above 0 are supported."
            )
        return {"box_weights": tuple(1 / value for value in std)}


def _number(layer: Mapping[str, Any], name: str) -> float:
    value = layer.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"The layer {shortened(layer.get('name'))} of this {NAME} model has {name}="
            f"{shortened(value)}, which is not a number."
        )
    return value


def _numbers(layer: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = layer.get(name)
    if not isinstance(values, list) or not values:
        raise CheckpointError(
            f"The layer {shortened(layer.get('name'))} of this {NAME} model has {name}="
            f"{shortened(values)}, which is not a list of numbers."
        )
    return tuple(_number({name: value, "name": layer.get("name")}, name) for value in values)
