"""The public names and their imports, from the checkout or an installed wheel."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import focaldet

HEAVY = ("torchvision", "pycocotools", "numpy", "PIL", "torch._dynamo", "triton", "safetensors")
LIGHT = ["FocalLoss", "SoftmaxFocalLoss", "sigmoid_focal_loss", "AnchorGenerator", "FPN"]
LIGHT += ["RetinaNetHead", "Detections", "RetinaNetConfig"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def modules_after(code: str) -> set[str]:
    done = run(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", focaldet.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(focaldet, name) is not None
    assert name in dir(focaldet)


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'focaldet' has no attribute 'YOLO'"):
        focaldet.YOLO  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    assert "torch" not in modules_after("import focaldet")


def test_the_light_parts_import_little_more_than_torch() -> None:
    parts = modules_after(
        f"from focaldet import {', '.join(LIGHT)}\nfrom focaldet.transforms import Preprocess"
    )
    extra = parts - modules_after("import torch")
    foreign = {m for m in extra if not m.startswith("focaldet")}
    assert not {m for m in foreign if m.startswith(HEAVY)}
    assert len(foreign) < 40, sorted(foreign)


BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
"""


def test_with_a_broken_torchvision_the_loss_works_and_the_detector_says_why() -> None:
    works = run(
        BROKEN + "import torch, focaldet\n"
        "print(focaldet.FocalLoss()(torch.zeros(2, 3), torch.tensor([0, -1])).item() > 0)\n"
        "focaldet.AnchorGenerator(), focaldet.FPN((8, 16, 32)), focaldet.RetinaNetHead(8)"
    )
    assert works.stdout.strip() == "True", works.stderr
    fails = run(BROKEN + "from focaldet import RetinaNet")
    last = fails.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torchvision ")
    assert "does not work with torch" in last
    assert "operator torchvision::nms does not exist" in last
    assert "pip install --force-reinstall torch torchvision" in last


def test_the_package_is_marked_as_typed() -> None:
    assert focaldet.__file__ is not None
    assert (Path(focaldet.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "module",
    [
        *("anchor_grid", "anchors", "backbones", "box_coder", "boxes", "class_names", "config"),
        *("criterion", "detections", "errors", "evaluation", "fpn", "heads", "images"),
        *("losses", "matching"),
        *("postprocess", "pretrained", "retinanet", "structures", "transforms", "visualization"),
    ],
)
def test_every_module_lists_what_it_offers(module: str) -> None:
    found = importlib.import_module(f"focaldet.{module}")
    assert found.__all__ == sorted(found.__all__, key=_ruffs_order)
    assert all(hasattr(found, name) for name in found.__all__)


def _ruffs_order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)
