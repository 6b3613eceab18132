from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from focaldet import RetinaNet, RetinaNetConfig

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
        ("{", "`config.json` must be valid JSON"),
        ("[]", "`config.json` must be a RetinaNet's configuration.*got list"),
        ('{"model_type": "bert"}', "with 'num_classes'; got .*model_type"),
        ('{"format_version": 2, "num_classes": 1}', "`format_version` must be 1; got 2. A newer"),
        ('{"num_classes": 1}', "`format_version` must be 1; got None"),
        (
            '{"format_version": 1, "num_classes": "3"}',
            "of the right types; got .*must be an integer",
        ),
        ('{"format_version": 1, "num_classes": 1, "depth": 3}', r"known fields; got \['depth'\]"),
    ],
)
def test_wrong_json_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "`num_classes` must be >= 1; got 0"),
        (
            {"num_classes": 2, "anchor_sizes": (8, 16)},
            r"`anchor_sizes` must be 5 numbers.*\(8, 16\)",
        ),
        (
            {"num_classes": 2, "class_names": ("a",)},
            "`class_names` must be one name a class.*got 1",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig(**options)


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


def test_a_config_from_before_an_option_has_its_default() -> None:
    old = RetinaNetConfig.from_json(WRITTEN_BY_0_1)
    assert old == RetinaNetConfig(num_classes=2, class_names=("cat", "dog"), backbone="resnet18")


def test_an_unknown_clamp_is_named() -> None:
    config = RetinaNetConfig(num_classes=2, backbone_norm="batch", backbone="resnet18")
    with pytest.raises(ValueError, match="`log_scale_clamp` must be one of .*got 'below'"):
        RetinaNet.from_config(config.replace(log_scale_clamp="below"))
