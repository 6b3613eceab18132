"""The example scripts do what their help says, and report mistakes in one line."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import pytest

from focaldet import RetinaNet
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
    model = ("--backbone", "mobilenet_v2", "--backbone-weights", "none", "--fpn-channels", 16)
    size = ("--min-size", 48, "--max-size", 64, "--anchor-sizes", 8, 16, 32, 64, 128)
    quick = ("--epochs", 1, "--workers", 0, "--accelerator", "cpu", "--multi-scale")
    options = ("--data", coco, "--output", "run", *model, *size, *quick)
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


@pytest.mark.parametrize("name", ["yolo", "voc", "csv"])
def test_datasets_in_other_formats_train(
    name: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    paths = [write_data(tmp_path / part, count) for part, count in (("train", 2), ("val", 1))]
    source = write_as(name, paths, tmp_path / name)
    model = ("--backbone", "mobilenet_v2", "--backbone-weights", "none", "--fpn-channels", 64)
    head = ("--head-norm", "group", "--box-loss", "giou", "--box-loss-weight", 2, "--head-depth", 1)
    size = ("--min-size", 48, "--max-size", 64, "--epochs", 1, "--workers", 0)
    parts = ("--train", source[0], "--val", source[1], "--accelerator", "cpu", "--output", "run")
    call("train_coco", *parts, *model, *head, *size)
    config = RetinaNet.from_pretrained("run/last").config
    assert (config.head_norm, config.box_loss_weight) == ("group", 2.0)
    assert config.class_names is not None
    assert set(config.class_names) == {"square", "circle"}
    part = () if name == "csv" else ("--split", "val")
    printed = call("evaluate_coco", "run", "--annotations", source[1], *part, "--device", "cpu")
    assert "Evaluated 1 image with" in printed


def write_as(name: str, paths: list[Path], folder: Path) -> list[Path]:
    """Write COCO files, train and val, in another format; return the path of each."""
    classes = ("square", "circle")
    sources = []
    for path, split in zip(paths, ("train", "val"), strict=True):
        content = json.loads(path.read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        rows, stems = [], []
        for image in content["images"]:
            stems.append(f"{split}{image['id']}")
            file, width, height = image["file_name"], image["width"], image["height"]
            yolo, voc = "", f"<size><width>{width}</width><height>{height}</height></size>"
            for box in content["annotations"]:
                if box["image_id"] == image["id"]:
                    (x, y, w, h), label = box["bbox"], names[box["category_id"]]
                    rows.append(f"{path.parent / file},{x},{y},{x + w},{y + h},{label}")
                    voc += voc_object(label, (x, y, x + w, y + h))
                    centre = f"{(x + w / 2) / width} {(y + h / 2) / height}"
                    yolo += f"{classes.index(label)} {centre} {w / width} {h / height}\n"
            write_text(folder / "labels" / split / f"{stems[-1]}.txt", yolo)
            xml = f"<annotation><filename>{stems[-1]}.png</filename>{voc}</annotation>"
            write_text(folder / "Annotations" / f"{stems[-1]}.xml", xml)
            for place in (folder / "images" / split, folder / "JPEGImages"):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path.parent / file, place / f"{stems[-1]}.png")
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
        sources.append(write_text(folder / f"{split}.csv", "\n".join(rows)))
    text = "train: images/train\nval: images/val\nnames: [square, circle]\n"
    yaml = write_text(folder / "yolo" / "data.yaml", f"path: ..\n{text}")
    return {"csv": sources, "voc": [folder, folder], "yolo": [yaml, yaml]}[name]


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
        ("train_coco", ["--data", "none", "--output", "x"], "error: .*none.annotations"),
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
        ("train_coco", ["--output", "x"]),
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
    tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    path = write_data(tmp_path / "data", 1)
    message = r"error: Cannot download https.*\.pth \(no route to host\).*--backbone-weights"
    with pytest.raises(SystemExit, match=message):
        call("train_coco", "--train", path, "--backbone", "resnet18", "--output", "run")
