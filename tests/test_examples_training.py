"""The example scripts do what their help says, and report mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from focaldet import RetinaNet
from focaldet.backbones import build_backbone
from tests.helpers.annotation_files import voc_object, write_text
from tests.helpers.tiny_training import tiny_detector, write_data

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("train_coco", "evaluate_coco", "predict", "finetune_custom")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs a script in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))

    def run(script: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_to_run_the_script(
    script: str, call: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(script, "--help")
    assert ended.value.code == 0
    assert f"examples/{script}.py" in capsys.readouterr().out


def test_train_then_evaluate_then_predict(tmp_path: Path, call: Callable[..., str]) -> None:
    coco = tmp_path / "coco2017"
    (coco / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        path = write_data(coco / f"{split}2017", count)
        path.rename(coco / "annotations" / f"instances_{split}2017.json")
    options = (
        "--data", coco, "--output", "run", "--backbone", "mobilenet_v2", "--backbone-weights",
        save_backbone(tmp_path), "--min-size", 48, "--epochs", 1, "--workers", 0,
        "--accelerator", "cpu",
    )  # fmt: skip
    call("train_coco", *options)
    with pytest.raises(SystemExit, match=r"error: folder 'run' already holds a run"):
        call("train_coco", *options)

    printed = call("evaluate_coco", "run", "--data", coco, "--device", "cpu", "--output", "out")
    assert "square" in printed
    assert "AP50" in printed
    assert {path.name for path in Path("out").iterdir()} == {
        *("results.json", "evaluation.json", "precision_recall.png"),
    }
    annotations = coco / "annotations" / "instances_val2017.json"
    again = call(
        "evaluate_coco", "--results", "out/results.json", "--annotations", annotations,
        "--images", coco / "val2017",
    )  # fmt: skip
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]

    printed = call(
        "predict", "run", coco / "val2017", coco / "train2017" / "0.png", "--score-threshold", 0,
        "--device", "cpu", "--output", "found",
    )  # fmt: skip
    assert "1.png: " in printed
    names = {path.name for path in Path("found").iterdir()}
    assert names == {"0_0.png", "1.png", "0_2.png", "detections.json"}
    assert len(json.loads(Path("found/detections.json").read_text())) == 3


def test_a_folder_with_both_splits_is_trained_on(tmp_path: Path, call: Callable[..., str]) -> None:
    paths = [write_data(tmp_path / part, count) for part, count in (("train", 2), ("val", 1))]
    folder = write_as_voc(paths, tmp_path / "voc")
    printed = call(
        "finetune_custom", folder, folder, "--backbone-weights", save_backbone(tmp_path),
        "--size", 48, "--epochs", 1, "--output", "run",
    )  # fmt: skip
    assert "Training a mobilenet_v2 at 48 pixels for 1 epoch" in printed
    config = RetinaNet.from_pretrained("run/last").config
    assert (config.head_norm, config.box_loss_weight) == ("group", 2.0)
    assert config.class_names is not None
    assert set(config.class_names) == {"square", "circle"}
    printed = call(
        "evaluate_coco", "run", "--annotations", folder, "--split", "val", "--device", "cpu"
    )
    assert "Evaluated 1 image with" in printed


def save_backbone(folder: Path) -> Path:
    """Save the random weights of a MobileNetV2, which take the place of those of ImageNet."""
    path = folder / "weights.pth"
    torch.save(build_backbone("mobilenet_v2").state_dict(), path)
    return path


def write_as_voc(paths: list[Path], folder: Path) -> Path:
    """Write COCO files, train and val, as the splits of a Pascal VOC folder."""
    for path, split in zip(paths, ("train", "val"), strict=True):
        content = json.loads(path.read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        stems = []
        for image in content["images"]:
            stem = f"{split}{image['id']}"
            stems.append(stem)
            voc = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            for box in content["annotations"]:
                if box["image_id"] == image["id"]:
                    x, y, w, h = box["bbox"]
                    voc += voc_object(names[box["category_id"]], (x, y, x + w, y + h))
            xml = f"<annotation><filename>{stem}.png</filename>{voc}</annotation>"
            write_text(folder / "Annotations" / f"{stem}.xml", xml)
            (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
            shutil.copy(path.parent / image["file_name"], folder / "JPEGImages" / f"{stem}.png")
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
    return folder


def test_a_detector_is_fine_tuned_on_other_classes(
    tmp_path: Path, call: Callable[..., str]
) -> None:
    path = write_data(tmp_path / "data", 2)
    tiny_detector().save_pretrained("start")
    path.write_text(path.read_text().replace("circle", "ball"))
    call(
        "finetune_custom", path, path, "--images", path.parent, "--start", "start",
        "--epochs", 1, "--output", "tuned",
    )  # fmt: skip
    assert RetinaNet.from_pretrained("tuned/last").config.class_names == ("square", "ball")


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("train_coco", ["--data", "none", "--output", "x"], "error: .*none"),
        ("evaluate_coco", ["none", "--annotations", "no.json"], "error: .*no.json"),
        ("predict", ["none", "photo.jpg"], "error: .*none"),
        ("finetune_custom", ["no.json", "no.json"], "1"),
        ("predict", ["none", "."], r"error: The folder .* contains no images"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    script: str, args: list[str], message: str, call: Callable[..., str]
) -> None:
    with pytest.raises(SystemExit, match=message):
        call(script, *args)


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("evaluate_coco", ["--annotations", "a.json"]),
        ("evaluate_coco", ["model"]),
    ],
)
def test_missing_arguments_are_named(
    script: str, args: list[str], call: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(script, *args)
    assert ended.value.code == 2
    assert "error: pass either" in capsys.readouterr().err


def test_the_fine_tuning_script_is_short() -> None:
    lines = (EXAMPLES / "finetune_custom.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60


def test_backbone_weights_that_cannot_be_downloaded_say_what_to_do(
    tmp_path: Path,
    call: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setenv("FOCALDET_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("focaldet.pretrained._downloads.urlopen", fail)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    path = write_data(tmp_path / "data", 1)
    with pytest.raises(SystemExit):
        call("finetune_custom", path, path)
    message = (
        r"error: Could not download .*no network in tests.*download https://.*\.pth .* save it as"
    )
    assert re.search(message, capsys.readouterr().err)
