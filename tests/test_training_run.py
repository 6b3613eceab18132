"""What a training run writes, and how it fails."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError

from focaldet import RetinaNet
from focaldet.training import (
    RetinaNetModule,
    TrainingError,
    _before_training,
    _nonfinite,
    draw_curves,
    train,
)
from focaldet.training._metrics_file import read_metrics
from tests.helpers import tiny_training
from tests.helpers.tiny_training import (
    read_data,
    smallest_detector,
    tiny_detector,
    tiny_options,
    write_data,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data" / "train", 8)
    write_data(tmp_path / "data" / "val", 3, seed=1)
    return tmp_path / "data"


def messages_of_training(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines without those of the readers, which count images without objects."""
    return [one.getMessage() for one in caplog.records if one.name == "focaldet.training"]


def test_a_run_writes_everything_to_one_folder(
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "run"
    summary = tiny_training.run(
        data,
        folder,
        model=tiny_detector(),
        pictures=2,
        ema_decay=0.5,
        accumulate=2,
        precision="bf16-mixed",
    )
    assert {path.name for path in folder.iterdir()} == {
        *("best", "last", "checkpoints", "pictures", "tensorboard"),
        *("config.json", "run.json", "metrics.csv", "curves.png"),
    }
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert summary.epochs == 2
    assert summary.best_ap is not None
    assert summary.best_ap >= 0
    for name in ("best", "last"):
        found = RetinaNet.from_pretrained(folder / name).predict(data / "val" / "0.png")
        assert found[0].class_names == ("square", "circle")
    assert json.loads((folder / "run.json").read_text())["options"]["precision"] == "bf16-mixed"
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/lr", "val/loss", "val/AP", "val/AP75"} <= set(rows[0].split(","))
    sheets = sorted(path.name for path in (folder / "pictures").iterdir())
    assert sheets == ["epoch_001.png", "epoch_002.png"]
    with Image.open(folder / "pictures" / sheets[0]) as sheet:
        assert sheet.width == 2 * 64 + 3 * 8  # ground truth and detections
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 1000
    assert any((folder / "tensorboard").glob("events*"))
    assert capfd.readouterr() == ("", "")  # only the log lines below, and no progress bar
    first, *epochs, last = messages_of_training(caplog)
    assert first == (
        "Optimizer: sgd, lr 0.005 (0.01 x 8/16 images per update), step schedule over 2 updates"
    )
    for number, line in enumerate(epochs, start=1):
        number_ = r"\d+\.\d{3}"
        assert re.fullmatch(
            rf"Epoch {number}/2: loss {number_}, validation loss {number_}, AP {number_}, "
            rf"AP50 {number_}, AP75 {number_}, AP per class \(square {number_}, circle {number_}\), "
            r"\d+ s",
            line,
        )
    assert re.fullmatch(rf"Finished; best AP .* in epoch \d, saved to '{folder / 'best'}'\.", last)


def test_log_lines_are_printed_if_logging_is_not_configured(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    tiny_training.run(data, tmp_path / "run", epochs=1)
    lines = [line for line in capfd.readouterr().err.splitlines() if "no objects" not in line]
    assert [line.split()[0] for line in lines] == ["Optimizer:", "Epoch", "Finished;"]
    assert not logging.getLogger("focaldet.training").handlers


def test_a_run_without_validation_saves_its_last_model(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_data = read_data(data / "train" / "annotations.json")
    summary = train(
        tiny_detector(), train_data, folder=tmp_path / "run", options=tiny_options(epochs=1)
    )
    assert summary == (tmp_path / "run", None, None, 1)
    assert caplog.messages[-1] == f"Finished; saved the model to '{tmp_path / 'run' / 'last'}'."
    assert not (tmp_path / "run" / "best").exists()
    RetinaNet.from_pretrained(tmp_path / "run" / "last")


def test_each_epoch_has_at_least_one_row_of_losses(data: Path, tmp_path: Path) -> None:
    tiny_training.run(data, tmp_path / "run", log_every=50)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows if "train/lr" in row] == [(0, 1), (1, 3)]


def test_a_folder_in_use_raises_and_is_left_alone(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_training.run(data, folder, epochs=1)
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(FileExistsError, match=r"folder '.*run' already holds a run.*resume"):
        tiny_training.run(data, folder)
    assert (folder / "metrics.csv").read_bytes() == before
    with pytest.raises(FileExistsError, match=r"folder '.*data' is not empty.*new or empty"):
        tiny_training.run(data, data)
    with pytest.raises(FileExistsError, match=r"folder '.*data' holds other files, but no run"):
        tiny_training.run(data, data, resume=True)
    with pytest.raises(NotADirectoryError, match=r"folder '.*metrics\.csv' is a file"):
        tiny_training.run(data, folder / "metrics.csv")


def test_resuming_without_a_checkpoint_starts_a_new_run(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tiny_training.run(data, tmp_path / "run", epochs=1, resume=True).epochs == 1
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert messages_of_training(caplog)[0] == f"No checkpoint at '{last}'; starting a new run."


def test_a_finished_run_can_be_resumed_for_more_epochs(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_training.run(data, tmp_path / "run", epochs=1)
    assert tiny_training.run(data, tmp_path / "run", epochs=2, resume=True).epochs == 2
    assert "Resuming with epochs=2 (was 1)." in caplog.text
    config = tiny_detector().config.replace(focal_gamma=1.0)
    train_data = read_data(data / "train" / "annotations.json")
    with pytest.raises(ValueError, match=r"model.*run'.*focal_gamma=1\.0 \(was 2\.0\)"):
        train(RetinaNet.from_config(config), train_data, folder=tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    tiny_training.run(data, tmp_path / "run", epochs=1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    for damaged in (b"no checkpoint", content[: len(content) // 2], b""):
        last.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"resume from '.*last\.ckpt': it is damaged"):
            tiny_training.run(data, tmp_path / "run", epochs=3, resume=True)


def test_a_dataset_with_other_classes_than_the_model_raises(data: Path, tmp_path: Path) -> None:
    train_data = read_data(data / "train" / "annotations.json")
    for change, message in (
        ({"num_classes": 3, "class_names": None}, "train_data has 2 classes.*num_classes=3"),
        ({"class_names": ("circle", "square")}, r"train_data.*'square', 'circle'.*model.*'circle'"),
    ):
        model = RetinaNet.from_config(tiny_detector().config.replace(**change))
        with pytest.raises(ValueError, match=message):
            train(model, train_data, folder=tmp_path / "run")


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Run an action at the start of a training step."""
    original_step = RetinaNetModule.training_step

    def broken(self: RetinaNetModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            action(self)
        return original_step(self, batch, batch_idx)

    monkeypatch.setattr(RetinaNetModule, "training_step", broken)


def test_a_nonfinite_loss_stops_the_run_and_saves_the_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(module: RetinaNetModule) -> None:
        with torch.no_grad():
            module.model.head.class_logits.weight.fill_(1e38)

    break_at(monkeypatch, 1, explode)
    message = (
        r"training loss is (nan|inf) in step 1 \(epoch 1, images \d+, \d+, \d+, \d+\)\. The images "
        r"and the weights are finite\. Likely causes: a learning rate that is too high \(currently "
        r"0\.0025\), a warm-up .*, no gradient clipping.*saved to .*nonfinite_step_1\.pt"
    )
    with pytest.raises(TrainingError, match=message):
        tiny_training.run(data, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "nonfinite_step_1.pt", weights_only=True)
    model = smallest_detector()
    model.load_state_dict(kept["state_dict"])
    losses = model.train()(kept["images"], kept["targets"]).losses
    assert losses is not None
    assert not torch.isfinite(torch.stack(list(losses.values())).sum())
    assert len(kept["image_ids"]) == 4


class FakeEvent:
    """An event of a GPU that is always ready."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nonfinite_loss_on_a_gpu_stops_the_run_before_the_weights_change(
    accumulate: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(module: RetinaNetModule) -> None:
        with torch.no_grad():
            module.model.head.class_logits.weight.fill_(1e38)

    # As on a GPU, the loss is read after the backward pass.
    monkeypatch.setattr(_nonfinite, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    break_at(monkeypatch, 1, explode)
    with pytest.raises(
        TrainingError, match=r"training loss is (nan|inf) in step 1 .*weights are fin"
    ):
        tiny_training.run(data, tmp_path / "run", accumulate=accumulate, batch_size=2)
    kept = torch.load(tmp_path / "run" / "nonfinite_step_1.pt", weights_only=True)
    assert len(kept["images"]) == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_nonfinite_weights_are_detected_and_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(module: RetinaNetModule) -> None:
        weight = next(module.parameters())
        weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[no-untyped-call]

    break_at(monkeypatch, 2, spoil)
    with pytest.raises(TrainingError, match="weights already contain NaN.*stem"):
        tiny_training.run(data, tmp_path / "a")  # the next loss reveals it
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    break_at(monkeypatch, 1, spoil)
    with pytest.raises(TrainingError, match="weights contain NaN or infinity after step 2"):
        train(  # without validation, only saving a checkpoint reveals it
            tiny_detector(),
            read_data(data / "train" / "annotations.json"),
            folder=tmp_path / "b",
            options=tiny_options(),
        )
    assert not last.exists()


def fill_disk(error: Exception) -> Any:
    """Return a function that writes part of a file and then fails."""

    def write(_: Any, path: Any, **__: Any) -> None:
        Path(path).write_bytes(b"part")
        raise error

    return write


FULL_DISK_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(error, id=name, marks=() if name == "disk" else pytest.mark.slow)
        for error, name in zip(
            FULL_DISK_ERRORS, ("disk", "quota", "torch", "safetensors"), strict=True
        )
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = tmp_path / "run"
    tiny_training.run(data, folder, epochs=1)
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    monkeypatch.setattr(torch, "save", fill_disk(error))
    with pytest.raises(TrainingError, match="No space left in .*run'.*last.ckpt', which is comp"):
        tiny_training.run(data, folder, resume=True)
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(TrainingError, match="No space left.*no checkpoint had been written"):
        tiny_training.run(data, tmp_path / "new")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(safetensors.torch, "save_file", id="best"),
        pytest.param(Image.Image, "save", id="pictures"),
        pytest.param(csv.DictWriter, "writerows", id="metrics"),
        pytest.param(Figure, "savefig", id="curves"),
    ],
)
def test_a_full_disk_is_recognised_wherever_it_is_met(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str
) -> None:
    error = FULL_DISK_ERRORS[-1] if name == "save_file" else FULL_DISK_ERRORS[0]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(target, name, fail)
    with pytest.raises(TrainingError, match=r"No space left in .*run'\. Free some space"):
        tiny_training.run(data, tmp_path / "run", epochs=1, pictures=1)
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_run_on_a_disk_that_is_really_full(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the check before the first step, as if another program filled the disk afterwards.
    monkeypatch.setattr(_before_training, "_check_space", lambda *_, **__: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=24m", "none", str(disk)]
    if not mount or not unmount or subprocess.run([mount, *options], check=False).returncode:
        pytest.skip("mounting a tmpfs requires Linux and root")
    try:
        with pytest.raises(TrainingError, match=r"No space left in .*disk/run'\. Free some space"):
            tiny_training.run(data, disk / "run", model=tiny_detector(), checkpoint_every=1)
        checkpoints = [path for path in disk.rglob("*") if path.name.endswith((".ckpt", ".part"))]
        assert all(torch.load(path, weights_only=True) for path in checkpoints)
    finally:
        subprocess.run([unmount, "-l", str(disk)], check=True)


def test_a_missing_image_in_mid_epoch_is_named(data: Path, tmp_path: Path) -> None:
    (data / "train" / "5.png").unlink()
    with pytest.raises(TrainingError, match=r"5\.png.*image 6"):
        tiny_training.run(data, tmp_path / "run", check_images=False)


@pytest.mark.skipif(sys.platform != "linux", reason="kills a forked worker")
def test_a_killed_worker_is_reported_with_the_likely_cause(data: Path, tmp_path: Path) -> None:
    def kill(image: Any, target: Any) -> Any:
        if target["image_id"] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return image.float() / 255, target

    with pytest.raises(
        TrainingError, match=r"worker was killed.*out of memory \(DataLoader worker"
    ):
        train(
            tiny_detector(),
            read_data(data / "train" / "annotations.json", kill),
            folder=tmp_path / "run",
            options=tiny_options(workers=1),
        )


def test_other_errors_are_raised_unchanged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("something else"), PermissionError(errno.EACCES, "forbidden")):

        def fail(_: Any, error: Exception = error) -> None:
            raise error

        break_at(monkeypatch, 0, fail)
        with pytest.raises(type(error), match="something else|forbidden"):
            tiny_training.run(data, tmp_path / type(error).__name__)


def test_drawing_curves_of_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv' \(metrics\)"):
        draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
