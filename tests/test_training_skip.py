"""Training continues without image files that are missing or unreadable, if it is asked to."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from focaldet.training import (
    DetectionDataModule,
    RetinaNetModule,
    TrainingError,
    TrainingOptions,
    _skipped,
)
from tests.helpers import tiny_training
from tests.helpers.tiny_training import darken, read_data, write_data

if TYPE_CHECKING:
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


def skipped_files(lines: list[str]) -> list[str]:
    """Return the files that the lines of a log say are skipped, in order of their names."""
    named = [line for line in lines if line.startswith("Skipping an image: ")]
    return sorted(re.findall(r"(\w+/\d\.png)'", line)[0] for line in named)


def counts(lines: list[str]) -> list[str]:
    """Return the number of skipped images of each epoch, as the lines of a log give them."""
    return [number for line in lines for number in re.findall(r"^Epoch .*, (\d+) images sk", line)]


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
    assert skipped_files(caplog.messages) == ["train/2.png", "train/5.png", "val/1.png"]
    assert counts(caplog.messages) == ["3", "3"]


class CrashError(Exception):
    """A crash in the middle of an epoch."""


def crash_at_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original_step = RetinaNetModule.training_step

    def step(self: RetinaNetModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == number:
            raise CrashError
        return original_step(self, batch, batch_idx)

    monkeypatch.setattr(RetinaNetModule, "training_step", step)


def run_and_resume(data: Path, folder: Path, **options: Any) -> None:
    """Train until a crash in the first epoch, then resume."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at_step(2, patch)
        with pytest.raises(CrashError):
            tiny_training.run(data, folder, on_error="skip", checkpoint_every=1, **options)
    tiny_training.run(data, folder, on_error="skip", checkpoint_every=1, resume=True, **options)


def check_same_weights(folder: Path, other: Path) -> None:
    files = [load_file(run / "last" / "model.safetensors") for run in (folder, other)]
    for key, value in files[0].items():
        assert torch.equal(value, files[1][key]), key


def test_a_resumed_epoch_counts_the_images_skipped_before(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(data / "train", 0, 2, 5, 7)  # in the first two of three batches or their replacements
    tiny_training.run(data, tmp_path / "whole", on_error="skip")
    expected = counts(caplog.messages)
    caplog.clear()
    run_and_resume(data, tmp_path / "resumed")
    assert counts(caplog.messages) == expected == ["4", "4"]
    check_same_weights(tmp_path / "whole", tmp_path / "resumed")
    resumed = caplog.messages.index(next(one for one in caplog.messages if "Resuming" in one))
    before, after = caplog.messages[:resumed], caplog.messages[resumed:]
    for lines in (before, after):
        assert len(set(skipped_files(lines))) == len(skipped_files(lines)) > 0


def test_the_limit_counts_anew_after_files_were_repaired(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_skipped, "_MAX_SKIPPED", 2)
    whole = {path: path.read_bytes() for path in (data / "train").glob("*.png")}
    damage(data / "train", *range(6))
    with pytest.raises(TrainingError, match="3 of 12 images cannot be read"):
        tiny_training.run(
            data, tmp_path / "run", on_error="skip", checkpoint_every=1, check_images=False
        )
    for path, content in whole.items():
        path.write_bytes(content)
    damage(data / "train", 7, 8)
    tiny_training.run(data, tmp_path / "run", on_error="skip", checkpoint_every=1, resume=True)


@pytest.mark.slow
def test_two_ranks_count_together_log_each_file_once_and_stop_together(tmp_path: Path) -> None:
    write_data(tmp_path / "train", 12)
    write_data(tmp_path / "val", 5, seed=1)
    damage(tmp_path / "train", 2, 5, 7, 9)
    damage(tmp_path / "val", 0, 1)  # of 5 images, one is validated twice
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", __file__, str(tmp_path)]
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    ranks = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    files = [*(f"train/{i}.png" for i in (2, 5, 7, 9)), "val/0.png", "val/1.png"]
    assert skipped_files(first["whole"]) == files
    assert counts(first["whole"]) == counts(first["resumed"]) == ["6", "6"]
    assert not skipped_files(second["whole"] + second["resumed"])
    check_same_weights(tmp_path / "whole", tmp_path / "resumed")
    assert first["error"] == second["error"]
    assert re.match(r"\d of 12 images cannot be read", first["error"])


def train_on_one_of_two_ranks(folder: Path) -> dict[str, Any]:
    """Train to the end, with an interruption, and on too many unreadable images."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("focaldet").addHandler(handler)
    found: dict[str, Any] = {}
    tiny_training.run(folder, folder / "whole", batch_size=2, on_error="skip")
    found["whole"] = lines.copy()
    lines.clear()
    run_and_resume(folder, folder / "resumed", batch_size=2)
    found["resumed"] = lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_skipped, "_MAX_SKIPPED", 2)
        with pytest.raises(TrainingError) as raised:
            # The check before the first step would stop only the first rank, and torchrun the others.
            tiny_training.run(
                folder, folder / "stopped", batch_size=2, on_error="skip", check_images=False
            )
    found["error"] = str(raised.value)
    return found


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
    monkeypatch.setattr(_skipped, "_MAX_SKIPPED", 2)
    message = r"3 of 12 images cannot be read, more than on_error='skip' allows \(1%, or 2 if.*png"
    with pytest.raises(TrainingError, match=message):
        batches(train_data, workers=0)
    monkeypatch.setattr(_skipped, "_MAX_SKIPPED_SHARE", 0.25)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    text = json.dumps(train_on_one_of_two_ranks(output))
    (output / f"rank_{os.environ['RANK']}.json").write_text(text)
