"""Workers that read images end with the run, however the run ends."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import _utils

from focaldet.training import DetectionDataModule, RetinaNetModule, TrainingError, train
from tests.helpers import tiny_training
from tests.helpers.tiny_training import read_data, tiny_detector, tiny_options, write_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="relies on forked workers")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data" / "train", 12)
    write_data(tmp_path / "data" / "val", 6, seed=1)
    return tmp_path / "data"


@pytest.mark.parametrize("part", ["train", "val"])
def test_no_worker_is_left_after_an_unreadable_image(data: Path, tmp_path: Path, part: str) -> None:
    (data / part / "4.png").write_bytes(b"not an image")
    with pytest.raises(TrainingError, match="image 5") as kept:
        tiny_training.run(data, tmp_path / "run", workers=2, epochs=1)
    assert kept.value.__traceback__ is not None  # it keeps torch's iterator alive
    assert multiprocessing.active_children() == []


def test_no_worker_is_left_after_an_error_in_the_main_process(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert multiprocessing.active_children()
        raise RuntimeError("something else")

    monkeypatch.setattr(RetinaNetModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        tiny_training.run(data, tmp_path / "run", workers=2, epochs=1)
    assert multiprocessing.active_children() == []


def test_a_worker_that_does_not_return_is_killed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def block(image: Any, target: Any) -> Any:
        if target["image_id"] > 4:
            threading.Event().wait()
        return image.float() / 255, target

    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    val_data = read_data(data / "val" / "annotations.json", block)
    module = DetectionDataModule(val_data, val_data, batch_size=1, workers=1)
    batches = iter(module.val_dataloader())
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    module.teardown()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_keeps_an_error_or_an_iterator_ends_at_once(data: Path) -> None:
    (data / "train" / "4.png").write_bytes(b"not an image")
    command = [sys.executable, "-m", "tests.test_training_workers", str(data)]
    root = Path(__file__).parents[1]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=root, check=False, timeout=280
    )
    ended = time.time()
    assert process.returncode == 0, process.stderr
    error, done = process.stdout.splitlines()
    assert "image 5" in error
    assert ended - float(done) < 60  # before, five minutes


def main(data: Path) -> None:
    """Keep a failed run's error, and an iterator that has not ended, until Python exits."""
    torch.set_num_threads(1)
    module = DetectionDataModule(read_data(data / "val" / "annotations.json"), workers=1)
    kept: list[Any] = [iter(module.train_dataloader())]
    next(kept[0])
    try:
        train(
            tiny_detector(),
            read_data(data / "train" / "annotations.json"),
            folder=data / "run",
            options=tiny_options(workers=1),
        )
    except TrainingError as error:
        kept.append(error)
        sys.stdout.write(f"{error}\n")
    globals()["kept"] = kept
    sys.stdout.write(f"{time.time()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
