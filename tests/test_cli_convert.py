"""The subcommands that write datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from focaldet.cli import main
from focaldet.datasets import read_coco, read_voc, read_yolo
from tests.helpers.annotation_files import write_photo, write_text

if TYPE_CHECKING:
    from pathlib import Path


def write_dataset(root: Path) -> Path:
    """Write a YOLO dataset of 40x20 images: four in train and one in val."""
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            write_photo(root / "images" / split / f"{split}{number}.png")
            text = f"{number % 2} 0.5 0.5 0.5 0.5\n"
            write_text(root / "labels" / split / f"{split}{number}.txt", text)
    text = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
    return write_text(root / "data.yaml", text).parent


def test_convert_writes_all_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_dataset(tmp_path / "yolo"), tmp_path / "voc"
    assert main(["convert", str(data), str(out), "--format", "voc", "--image-files", "copy"]) == 0
    assert capsys.readouterr().out == (
        "train: 4 images, 4 objects, 2 classes\n"
        f"val: 1 images, 1 objects, 2 classes\nWritten to {out}\n"
    )
    table = read_voc(out, "train", class_names=["cat", "dog"])
    assert table.boxes.tolist() == [[10, 5, 30, 15]] * 4
    assert not table.image_path(0).is_symlink()


def test_convert_writes_one_split_to_a_file(tmp_path: Path) -> None:
    data, out = write_dataset(tmp_path / "yolo"), tmp_path / "val.json"
    arguments = ["convert", str(data), str(out), "--split", "val", "--format", "coco"]
    assert main(arguments) == 0
    assert read_coco(out).image_path(0).resolve() == data / "images" / "val" / "val0.png"
    assert main([*arguments, "--overwrite"]) == 0


def test_split_divides_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_dataset(tmp_path / "yolo"), tmp_path / "out"
    arguments = ["split", str(data), str(out), "--split", "train", "--format", "yolo"]
    assert main([*arguments, "--fractions", "train=.5", "test=.5", "--seed", "3"]) == 0
    first = "train: 2 images, 2 objects, 2 classes\ntest: 2 images, 2 objects, 2 classes\n"
    assert capsys.readouterr().out == f"{first}Written to {out}\n"
    assert sorted(read_yolo(out / "data.yaml", "test").labels.tolist()) == [0, 1]


def test_split_writes_coco_files_by_default(tmp_path: Path) -> None:
    data, out = write_dataset(tmp_path / "yolo"), tmp_path / "out"
    assert main(["split", str(data), str(out), "--split", "train"]) == 0
    train = read_coco(out / "annotations" / "instances_train.json")
    val = read_coco(out / "annotations" / "instances_val.json")
    assert (len(train), len(val)) == (2, 2)  # both classes have two images, one for each part
    assert train.image_path(0).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "{data}", "{out}", "--split", "train", "--fractions", "a=.5"], "must sum to 1"),
        (
            ["split", "{data}", "{out}", "--split", "train", "--fractions", "a=1", "a=1"],
            "--fractions contains a name twice",
        ),
        (["split", "{data}", "{out}"], "split is required"),
        (["convert", "{data}", "{data}", "--split", "val", "--format", "csv"], "is not empty"),
        (["convert", "{data}/no", "{out}", "--format", "csv"], "No such file or folder"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    data = write_dataset(tmp_path / "yolo")
    given = [one.format(data=data, out=tmp_path / "out") for one in arguments]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["train", "train=x", "=1"])
def test_a_fraction_that_is_none_is_explained(
    value: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["split", "data", "out", "--fractions", value])
    assert caught.value.code == 2
    assert f"expected NAME=NUMBER, such as train=.8, got '{value}'" in capsys.readouterr().err
