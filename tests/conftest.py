"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from focaldet import RetinaNet, RetinaNetConfig
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)  # pytest-xdist uses the cores
collect_ignore = ["benchmarks", "helpers"]  # which have no tests, and take seconds to import
# Hypothesis draws new examples on every local run, but always the same ones in CI, where a rare failure
# would block unrelated changes.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("desk", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["msgspec", "standard library"])
def json_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read COCO files with msgspec, and as if it were not installed."""
    if request.param == "msgspec":
        pytest.importorskip("msgspec")
    else:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    return str(request.param)


@pytest.fixture
def coco_photos() -> list[Path]:
    folder = SHARED / "data" / "coco_sample" / "val2017"
    if not folder.is_dir():
        pytest.skip("the folder of COCO photos is not available next to this checkout")
    return sorted(folder.glob("*.jpg"))


@pytest.fixture
def tiny_config() -> RetinaNetConfig:
    """A detector that runs in milliseconds."""
    return RetinaNetConfig(
        num_classes=3,
        class_names=("cat", "dog", "owl"),
        backbone="resnet18",
        backbone_norm="batch",
        fpn_channels=32,
        head_depth=1,
        min_size=64,
        max_size=96,
        score_threshold=0.005,
    )


@pytest.fixture
def tiny_model(tiny_config: RetinaNetConfig) -> RetinaNet:
    return RetinaNet.from_config(tiny_config).eval()
