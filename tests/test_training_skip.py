"""Training continues without image files that are missing or unreadable, if it is asked to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet.training import DetectionDataModule, TrainingError, TrainingOptions, _data_module
from tests.helpers import tiny_training
from tests.helpers.tiny_training import darken, read_data, write_data

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets import DetectionDataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data" / "train", 12)
    write_data(tmp_path / "data" / "val", 3, seed=1)
    return tmp_path / "data"


def damage(folder: Path, *numbers: int) -> None:
    """Delete the first file and truncate the others."""
    (folder / f"{numbers[0]}.png").unlink()
    for number in numbers[1:]:
        path = folder / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])


def batches(data: DetectionDataset, epoch: int = 0, **options: Any) -> list[Any]:
    module = DetectionDataModule(data, batch_size=4, on_error="skip", **options)
    loader: Any = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def test_skipped_images_are_replaced_logged_once_and_counted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(data / "train", 2, 5)
    damage(data / "val", 1)
    summary = tiny_training.run(data, tmp_path / "run", on_error="skip", workers=1)
    assert summary.epochs == 2
    lines = [line for line in caplog.messages if line.startswith("Skipping an image: ")]
    assert sorted(re.findall(r"(\w+/\d\.png)'", line)[0] for line in lines) == [
        *("train/2.png", "train/5.png", "val/1.png"),
    ]
    epochs = [line for line in caplog.messages if line.startswith("Epoch")]
    assert len(epochs) == 2
    assert all(", 3 images skipped, " in line for line in epochs)


def test_replacements_do_not_depend_on_the_number_of_workers(data: Path) -> None:
    damage(data / "train", 2, 5, 7)
    train_data = read_data(data / "train" / "annotations.json", darken)
    first, second = batches(train_data, 1, workers=0), batches(train_data, 1, workers=2)
    assert [len(images) for images, _ in first] == [4, 4, 4]
    for (images, targets), (others, other_targets) in zip(first, second, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(images, others, strict=True))
        ids = [target["image_id"] for target in targets]
        assert ids == [target["image_id"] for target in other_targets]
        assert not {3, 6, 8} & set(ids)


def test_replacements_have_the_orientation_of_the_image(data: Path) -> None:
    damage(data / "train", 0, 3)  # upright, as are 6 and 9
    images = [image for group, _ in batches(read_data(data / "train" / "annotations.json"), workers=0)
              for image in group]  # fmt: skip
    assert sum(image.shape[1] > image.shape[2] for image in images) == 4


def test_an_unreadable_validation_image_is_black_and_has_no_objects(data: Path) -> None:
    damage(data / "val", 0)
    val_data = read_data(data / "val" / "annotations.json")
    module = DetectionDataModule(val_data, val_data, batch_size=1, workers=0, on_error="skip")
    loader: Any = module.val_dataloader()
    [image], [target] = next(iter(loader))
    assert image.shape == (3, 64, 48)
    assert image.max() == 0
    assert target["image_id"] == 1
    assert target["boxes"].shape == (0, 4)
    assert len(val_data.table.boxes_of(0).indices(99)) == 3  # the evaluation still counts them
    assert module.num_skipped == 1


def test_too_many_skipped_images_stop_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(data / "train", 2, 5, 7)
    train_data = read_data(data / "train" / "annotations.json")
    monkeypatch.setattr(_data_module, "_MAX_SKIPPED", 2)
    message = r"3 of 12 images cannot be read, more than on_error='skip' allows \(1%, or 2 if.*png"
    with pytest.raises(TrainingError, match=message):
        batches(train_data, workers=0)
    monkeypatch.setattr(_data_module, "_MAX_SKIPPED_SHARE", 0.25)
    assert len(batches(train_data, workers=0)) == 3


def test_a_dataset_without_any_readable_image_stops_the_run(data: Path) -> None:
    damage(data / "val", 0, 1, 2)
    with pytest.raises(TrainingError, match=r"\d\.png.*image \d"):
        batches(read_data(data / "val" / "annotations.json"), workers=0)


def test_other_errors_are_not_skipped(data: Path) -> None:
    def spoil(image: Any, target: Any) -> Any:
        return image.float(), target  # values up to 255

    with pytest.raises(TrainingError, match=r"image \d+.*255"):
        batches(read_data(data / "train" / "annotations.json", spoil), workers=0)


def test_an_unknown_choice_raises(data: Path) -> None:
    with pytest.raises(ValueError, match="on_error 'ignore'; choose 'raise' or 'skip'"):
        TrainingOptions(on_error="ignore")  # type: ignore[arg-type]
    train_data = read_data(data / "train" / "annotations.json")
    with pytest.raises(ValueError, match="on_error 'ignore'; choose 'raise' or 'skip'"):
        DetectionDataModule(train_data, on_error="ignore")  # type: ignore[arg-type]
