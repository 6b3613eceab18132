"""What is checked before the first step of a run, and what a failed start leaves behind."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from focaldet import AnchorGenerator
from focaldet.datasets import DetectionDataset
from focaldet.training import RetinaNetModule, TrainingError, TrainingOptions, train
from focaldet.training._before_training import check_before_training
from tests.helpers.tiny_training import read_data, smallest_detector, tiny_options, write_data

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.training import TrainingSummary


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data" / "train", 4)
    write_data(tmp_path / "data" / "val", 3, seed=1)
    return tmp_path / "data"


def read(data: Path) -> dict[str, DetectionDataset]:
    return {part: read_data(data / part / "annotations.json") for part in ("train", "val")}


def check(data: dict[str, DetectionDataset], folder: Path, **changes: Any) -> None:
    check_before_training(smallest_detector(), data, tiny_options(**changes), folder)


def run(data: Path, folder: Path, **changes: Any) -> TrainingSummary:
    return train(
        smallest_detector(),
        read_data(data / "train" / "annotations.json"),
        folder=folder,
        options=tiny_options(epochs=1, **changes),
    )


def test_every_image_file_is_opened_and_all_faults_are_counted(data: Path, tmp_path: Path) -> None:
    check(read(data), tmp_path)
    (data / "val" / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"1 of 3 images of val_data.*1\.png' \(image 2\)"):
        check(read(data), tmp_path)
    (data / "train" / "2.png").write_bytes(b"no image")
    Image.new("RGB", (64, 50)).save(data / "train" / "1.png")
    message = (
        r"2 of 4 images of train_data cannot be used\. .*2\.png.*image 2 is annotated as 64x48, but "
        r"'.*1\.png' is 64x50 \(width x height\)\. Correct the files.*on_error='skip'"
    )
    with pytest.raises(TrainingError, match=message):
        check(read(data), tmp_path)
    check(read(data), tmp_path, check_images=False)


def test_only_a_few_of_many_faults_are_listed(data: Path, tmp_path: Path) -> None:
    for number in range(4):
        (data / "train" / f"{number}.png").unlink()
    with pytest.raises(TrainingError, match=r"4 of 4.*2\.png.*And 1 more\. Correct"):
        check(read(data), tmp_path)


def test_unreadable_images_that_are_skipped_are_counted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "train" / "0.png").unlink()
    check(read(data), tmp_path, on_error="skip")
    assert caplog.messages[-1] == "1 of 4 images of train_data cannot be read and will be skipped."
    write_data(data / "many", 12)
    for number in range(11):
        (data / "many" / f"{number}.png").unlink()
    many = {"train": read_data(data / "many" / "annotations.json")}
    with pytest.raises(TrainingError, match="11 of 12 images cannot be read, more than on_error"):
        check(many, tmp_path, on_error="skip")
    Image.new("RGB", (9, 9)).save(data / "val" / "1.png")
    with pytest.raises(TrainingError, match=r"of val_data.*image 2 is annotated as 64x48.*9x9"):
        check(read(data), tmp_path, on_error="skip")


def test_a_long_check_of_images_shows_its_progress(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    monkeypatch.setattr("focaldet.training._before_training._SECONDS", -1)
    check(read(data), tmp_path)
    assert "Checked 4 of 4 image files of train_data." in caplog.messages


def test_classes_without_objects_are_named(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = read(data)
    table = parts["train"].table
    only_squares = dataclasses.replace(table, labels=np.zeros_like(table.labels))
    check({**parts, "train": DetectionDataset(only_squares)}, tmp_path)
    assert [one for one in caplog.messages if "have no objects in" in one] == [
        "1 of 2 classes have no objects in train_data: ['circle']. The model cannot learn them."
    ]


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("adamw", 4)])
def test_a_disk_without_space_for_the_checkpoints_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, copies: int
) -> None:
    class Usage(NamedTuple):
        free: int

    model = smallest_detector()
    weights = sum(value.nbytes for value in model.state_dict().values())
    # With validation: two checkpoints of weights and optimizer, two models in best/, one in last/.
    needed = 5 * weights + copies * sum(one.nbytes for one in model.parameters())
    free = [needed]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free[-1]))
    check(read(data), tmp_path, optimizer=optimizer)
    free.append(needed - 1)
    with pytest.raises(TrainingError, match=r"needs about \d+\.\d MB.*but only .* MB are free"):
        check(read(data), tmp_path, optimizer=optimizer)
    (tmp_path / "last").mkdir()  # of the run that is resumed, to be replaced
    (tmp_path / "last" / "model.safetensors").write_bytes(b"0")
    check(read(data), tmp_path, optimizer=optimizer)


def test_anchors_that_reach_few_objects_are_reported(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = read(data)
    model = smallest_detector()
    check_before_training(model, parts, tiny_options(), tmp_path)
    assert "The anchors reach only" not in caplog.text
    sizes = (64, 96, 128, 192, 256)  # objects have sides of 14 to 30 pixels
    model.anchor_generator = AnchorGenerator(sizes, octave_scales=(1.0,), aspect_ratios=(1.0,))
    check_before_training(model, parts, tiny_options(), tmp_path)
    assert re.search(
        r"reach only \d % of the training objects \(with an IoU of 0\.5\).*min_size=64 and max_size=64",
        caplog.text,
    )


def test_a_transform_is_tried_on_the_first_image_of_each_dataset(
    data: Path, tmp_path: Path
) -> None:
    def grey(image: Any, target: Any) -> Any:
        return image.float()[:1] / 255, target

    def bright(image: Any, target: Any) -> Any:
        return image.float(), target

    for transform, message in (
        (grey, r"first image of val_data has 1 channels after .* in_channels=3"),
        (bright, r"image 1.*255"),
    ):
        val_data = read_data(data / "val" / "annotations.json", transform)
        with pytest.raises(TrainingError, match=message):
            check({**read(data), "val": val_data}, tmp_path)


def fail_in_step(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(RetinaNetModule, "training_step", fail)


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_the_next(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_in_step(patch, RuntimeError("something"))
        with pytest.raises(RuntimeError, match="something"):
            run(data, folder)
    assert (folder / "run.json").is_file()
    (folder / "nonfinite_step_0.pt").write_bytes(b"evidence")
    assert run(data, folder).epochs == 1
    [line] = [one for one in caplog.messages if one.startswith("Removed")]
    assert line.endswith(f"of a run in '{folder}' that ended before its first checkpoint.")
    assert (folder / "nonfinite_step_0.pt").read_bytes() == b"evidence"
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(data, folder)
    assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "best/model.safetensors", "tensorboard/mine.csv", "pictures/cat.png", "mine/"],
)
def test_a_failed_run_is_kept_if_the_folder_holds_anything_else(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "run"
    fail_in_step(monkeypatch, RuntimeError("something"))
    with pytest.raises(RuntimeError, match="something"):
        run(data, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(data, folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_says_which_batch_did_not_fit_and_what_to_lower(
    data: Path, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    model = smallest_detector()
    model.head.register_forward_pre_hook(fail)
    message = (
        r"Out of memory in a training batch with 4 images of (48x64|64x48), .* \(height x width\) "
        rf"\({str(error)[:20].replace('[', '.').replace(']', '.') or 'MemoryError'}.*\)\. "
        r"Lower batch_size \(now 4; .*\) or min_size and max_size \(now 64 and 64\).*"
        r"precision='bf16-mixed', then start again"
    )
    with pytest.raises(TrainingError, match=message):
        train(
            model,
            read_data(data / "train" / "annotations.json"),
            folder=tmp_path / "run",
            options=TrainingOptions(batch_size=4, workers=0, accelerator="cpu"),
        )
