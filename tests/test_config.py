from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from focaldet import RetinaNetConfig

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
