from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from focaldet import RetinaNetConfig
from focaldet.errors import CheckpointError

PRESETS = [
    RetinaNetConfig.paper(),
    RetinaNetConfig.torchvision_v1(),
    RetinaNetConfig.torchvision_v2(3, ("a", "b", "c")),
]


@pytest.mark.parametrize("config", PRESETS)
def test_json_gives_the_same_config_back(config: RetinaNetConfig) -> None:
    again = RetinaNetConfig.from_json(config.to_json())
    assert again == config
    assert all(not isinstance(value, list) for value in dataclasses.astuple(again))
    assert json.loads(config.to_json())["format_version"] == 1


def test_lists_become_tuples_so_that_configs_can_be_keys() -> None:
    config = RetinaNetConfig(num_classes=2, class_names=["a", "b"])  # type: ignore[arg-type]
    assert len({config, config.replace(class_names=("a", "b"))}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", r"config.json must contain one JSON object.*\[\]"),
        ('{"model_type": "bert"}', "no 'num_classes'.*'model_type'"),
        ('{"format_version": 2, "num_classes": 1}', "format_version 2.*reads 1.*Upgrade"),
        ('{"num_classes": 1}', "not written by focaldet: no 'format_version'"),
        ('{"format_version": 1, "num_classes": "3"}', "config.json: num_classes.*integer.*'3'"),
        ('{"format_version": 1, "num_classes": 1, "p6_from": "p4"}', "config.json: .*p6_from 'p4'"),
        ('{"format_version": 1, "num_classes": 1, "depth": 3}', "Unknown field in .*: 'depth'"),
        ('{"format_version": 1, "num_classes": 1, "prior": NaN}', "config.json: prior.*nan"),
        ('{"num_classes": ' + "9" * 5000 + "}", "config.json is not valid JSON.*4300 digits"),
        ("[" * 100_000 + "]" * 100_000, "config.json is nested too deeply"),
    ],
)
def test_errors_name_what_is_wrong_with_the_json(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        RetinaNetConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes.* 0"),
        ({"num_classes": 2, "anchor_sizes": (8, 16)}, r"anchor_sizes.* 5 .*\(8, 16\)"),
        (
            {"num_classes": 2, "levels": (2, 3, 4, 5, 6, 7)},
            r"anchor_sizes must have one entry per level, 6 for .* \(16, 32, 64, 128, 256, 512\)",
        ),
        (
            {"num_classes": 2, "levels": (3, 5, 4, 6, 7)},
            r"levels .*consecutive.* \(3, 5, 4, 6, 7\)",
        ),
        (
            {"num_classes": 2, "levels": (3, 4, 6, 7, 8)},
            r"levels .*consecutive.* \(3, 4, 6, 7, 8\)",
        ),
        ({"num_classes": 2, "levels": ()}, r"levels .*consecutive.* \(\)"),
        ({"num_classes": 2, "levels": (6, 7, 8, 9, 10)}, r"levels must begin at 5 or below"),
        ({"num_classes": 2, "levels": (0, 1, 2, 3, 4)}, r"levels\[0\] .*\[1, 10\], got 0"),
        ({"num_classes": 2, "levels": (7, 8, 9, 10, 11)}, r"levels\[4\] .*\[1, 10\], got 11"),
        ({"num_classes": 2, "fpn_channels": None}, r"fpn_channels=None .*above 5.*levels=\(3, 4, "),
        ({"num_classes": 2, "class_names": ("a",)}, "class_names has 1 entry.*num_classes is 2"),
        ({"num_classes": 2, "log_scale_clamp": "below"}, "log_scale_clamp 'below'.*'both' or None"),
        (
            {"num_classes": 2, "head_norm": "layer"},
            "head_norm 'layer'.*'group', 'group_with_bias', 'batch' or None",
        ),
        ({"num_classes": 2, "assigner": "simota"}, "assigner 'simota'.*'iou' or 'atss'"),
        ({"num_classes": 2, "classification_loss": "mse"}, "classification_loss 'mse'.*'focal'"),
        ({"num_classes": 2, "fpn_channels": -1}, "fpn_channels.* -1"),
        ({"num_classes": 2, "head_depth": 10**9}, "head_depth.* 64.* 1000000000"),
        ({"num_classes": 2, "prior": 1.0}, "prior.* 1.0"),
        ({"num_classes": 2, "focal_gamma": float("nan")}, "focal_gamma.* nan"),
        ({"num_classes": 2, "focal_alpha": 1.5}, "focal_alpha.* 1.5"),
        (
            {"num_classes": 2, "anchor_sizes": (8, 16, 32, 64, float("inf"))},
            r"anchor_sizes\[4\].* inf",
        ),
        (
            {"num_classes": 2, "anchor_sizes": (8, 16, 32, 64, 10**5000)},
            r"anchor_sizes\[4\].*<int>",
        ),
        ({"num_classes": 2, "octave_scales": ()}, "octave_scales.* 1 to 100.* 0"),
        ({"num_classes": 2, "box_weights": (1, 1)}, r"box_weights.* 4 .*\(1, 1\)"),
        ({"num_classes": 2, "image_std": (1.0, 0.0, 1.0)}, r"image_std\[1\].* 0.0"),
        ({"num_classes": 2, "max_size": 0}, r"max_size.* 0"),
        ({"num_classes": 2, "negative_threshold": 0.6}, r"negative_threshold.* 0.5\].* 0.6"),
        ({"num_classes": 2, "anchor_mode": "torchvision"}, r"anchor_offset=0.*anchor_offset=0.5"),
        (
            {"num_classes": 2, "anchor_mode": "inclusive_rounded", "anchor_offset": 0.0},
            r"'inclusive_rounded'.*anchor_offset=0.5.*anchor_offset=0.0",
        ),
        (
            {"num_classes": 2, "anchor_mode": "inclusive_rounded", "anchor_plus_one": True},
            "anchor_plus_one=False.*include their last pixel",
        ),
        (
            {"num_classes": 2, "uniform_rescale": True, "keep_ratio": False},
            "uniform_rescale=True .* one factor, but keep_ratio=False",
        ),
        (
            {"num_classes": 2, "head_norm": "group", "fpn_channels": 40},
            r"head_norm='group'.*fpn_channels.* multiple of 32, got 40",
        ),
        (
            {"num_classes": 2, "head_box_norm": "group", "fpn_channels": 40},
            r"head_box_norm='group'.*fpn_channels.* multiple of 32, got 40",
        ),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": "3"}, "num_classes.*integer.*'3'"),
        ({"num_classes": True}, "num_classes.*integer.*True"),
        ({"min_size": 640.5}, "min_size.*integer.*640.5"),
        ({"prior": "low"}, "prior.*number.*'low'"),
        ({"antialias": 1}, "antialias.*True or False.*1"),
        ({"backbone": 50}, "backbone.*string.*50"),
        ({"class_names": "cat"}, r"class_names.*sequence.*'cat'.*\('cat',\)"),
        ({"class_names": 3}, "class_names.*sequence.* 3"),
        ({"class_names": ("cat", 3)}, r"class_names\[1\].*string.* 3"),
        ({"focal_alpha": (0.25, 0.75)}, r"focal_alpha.*number.*\(0.25, 0.75\)"),
        ({"anchor_sizes": 32}, "anchor_sizes.*list.* 32"),
        ({"image_mean": (0.5, None, 0.5)}, r"image_mean\[1\].*number.*None"),
    ],
)
def test_errors_name_fields_of_the_wrong_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RetinaNetConfig(**{"num_classes": 2, **options})


@pytest.mark.parametrize("preset", ["paper", "torchvision_v1", "torchvision_v2"])
def test_a_single_string_is_not_taken_for_the_names_of_a_preset(preset: str) -> None:
    with pytest.raises(TypeError, match=r"class_names.*'cat'.*\('cat',\)"):
        getattr(RetinaNetConfig, preset)(3, "cat")


def test_a_byte_order_mark_before_the_json_is_skipped() -> None:
    config = RetinaNetConfig(num_classes=2)
    assert RetinaNetConfig.from_json("\ufeff" + config.to_json()) == config


WRITTEN_BY_0_1 = """{
  "format_version": 1, "num_classes": 2, "class_names": ["cat", "dog"], "backbone": "resnet18",
  "backbone_norm": "frozen", "backbone_norm_eps": null, "trainable_stages": 3, "fpn_channels": 256,
  "p6_from": "c5", "p7_relu": true, "head_depth": 4, "head_norm": null, "prior": 0.01,
  "anchor_sizes": [32, 64, 128, 256, 512],
  "octave_scales": [1.0, 1.2599210498948732, 1.5874010519681994],
  "aspect_ratios": [0.5, 1.0, 2.0], "anchor_offset": 0.5, "anchor_mode": "exact",
  "box_weights": [1.0, 1.0, 1.0, 1.0], "positive_threshold": 0.5, "negative_threshold": 0.4,
  "force_match_floor": 0.0, "focal_alpha": 0.25, "focal_gamma": 2.0, "box_loss": "smooth_l1",
  "smooth_l1_beta": 0.11, "box_loss_weight": 1.0, "normalizer": "batch", "score_threshold": 0.05,
  "pre_nms_top_k": 1000, "nms_threshold": 0.5, "max_detections": 100, "class_agnostic_nms": false,
  "min_size": 800, "max_size": 1333, "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225], "size_divisor": 32
}"""


def test_fields_that_an_older_version_did_not_write_have_their_defaults() -> None:
    old = RetinaNetConfig.from_json(WRITTEN_BY_0_1)
    assert old == RetinaNetConfig(num_classes=2, class_names=("cat", "dog"), backbone="resnet18")
