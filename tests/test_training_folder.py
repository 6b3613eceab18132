"""The folder of a run belongs to one process at a time, and says what the run was."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from focaldet import RetinaNetConfig
from focaldet.datasets import DetectionDataset
from focaldet.training import (
    AtomicCheckpointIO,
    RetinaNetModule,
    TrainingError,
    TrainingOptions,
    train,
)
from focaldet.training._lock import LOCK_NAME, locked_folder
from focaldet.training._resuming import check_checkpoint
from focaldet.training._run_folder import prepare_folder
from tests.helpers import tiny_training
from tests.helpers.tiny_training import read_data, tiny_detector, tiny_options, write_data

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "linux":
    pytest.skip("relies on fork and flock", allow_module_level=True)

import fcntl  # only on Unix

_FORK = multiprocessing.get_context("fork")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data" / "train", 4)
    write_data(tmp_path / "data" / "val", 3, seed=1)
    return tmp_path / "data"


def prepare(folder: Path, data: DetectionDataset, **changes: Any) -> None:
    config = tiny_detector().config
    with locked_folder(folder) as locked:
        prepare_folder(
            folder, config, tiny_options(**changes), {"train": data}, resume=True, locked=locked
        )


def test_only_one_of_several_simultaneous_starts_gets_a_folder(tmp_path: Path) -> None:
    starts = 8
    together = threading.Barrier(starts)
    done = threading.Barrier(starts)
    for attempt in range(20):
        results: list[str] = []

        def start(folder: Path, results: list[str] = results) -> None:
            together.wait()
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked_folder(folder))
                    results.append("started")
                except TrainingError as error:
                    results.append(str(error))
                done.wait()

        threads = [
            threading.Thread(target=start, args=(tmp_path / str(attempt) / "run",))
            for _ in range(starts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count("started") == 1
        assert sum("is in use by another run" in result for result in results) == starts - 1


def test_a_run_in_progress_cannot_be_started_or_resumed(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked_folder(folder) as locked:
        assert locked
        message = rf"folder '.*run' is in use by another run \(process {os.getpid()} on .*another"
        for resume in (False, True):
            with pytest.raises(TrainingError, match=message):
                tiny_training.run(data, folder, resume=resume)
    assert not list(folder.iterdir())


def _hold(folder: Path, ready: Any) -> None:
    with locked_folder(folder):
        child = _FORK.Process(target=signal.pause)  # such as a worker that outlives its parent
        child.start()
        ready.send(child.pid)
        signal.pause()


def test_a_killed_process_does_not_hold_the_lock_even_if_its_workers_live(tmp_path: Path) -> None:
    receive, send = _FORK.Pipe()
    process = _FORK.Process(target=_hold, args=(tmp_path / "run", send))
    process.start()
    worker = receive.recv()
    process.kill()
    process.join()
    try:
        with locked_folder(tmp_path / "run") as locked:
            assert locked
            assert (tmp_path / "run" / LOCK_NAME).read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked_folder(tmp_path / "run") as locked:
        assert not locked
    assert "No locks available" in caplog.text


def test_leftovers_of_a_killed_run_are_removed_and_counted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    folder = tmp_path / "run"
    kept = [folder / "checkpoints" / "last.ckpt.part", folder / ".notes.part"]
    left = [
        folder / ".metrics.csv.0123456789abcdef.part",
        folder / "checkpoints" / ".last.ckpt.0123456789abcdef.part",
        folder / "best" / ".tmpN6Fd16",
    ]
    train_data = read_data(data / "train" / "annotations.json")
    prepare(folder, train_data)
    for path in (*kept, *left):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 500_000)
    prepare(folder, train_data)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
    assert (
        f"Removed 3 incomplete files (1.5 MB) that a killed run left in '{folder}'." in caplog.text
    )


def test_a_run_that_was_killed_before_it_was_described_can_be_started_again(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.json.0123456789abcdef.part").touch()
    (folder / LOCK_NAME).touch()
    prepare(folder, read_data(data / "train" / "annotations.json"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "run.json"}


def test_resuming_with_different_data_is_reported(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    prepare(folder, read_data(data / "train" / "annotations.json"))
    prepare(folder, read_data(data / "train" / "annotations.json"))
    assert "Resuming with different" not in caplog.text
    table = read_data(data / "train" / "annotations.json").table
    renamed = [f"new_{name}" for name in table.file_names]
    prepare(folder, DetectionDataset(dataclasses.replace(table, file_names=renamed)))
    assert caplog.messages[-1] == "Resuming with different train_data: different file names."
    prepare(folder, read_data(data / "val" / "annotations.json"))
    assert "different train_data: 3 images (was 4), " in caplog.messages[-1]


def test_resuming_with_a_different_optimizer_raises(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_data = read_data(data / "train" / "annotations.json")
    prepare(folder, train_data)
    prepare(folder, train_data, optimizer="adamw")  # fine, as there is no checkpoint yet
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    for change, message in (
        (
            {"optimizer": "sgd"},
            r"optimizer='sgd', but the run in '.*run' .* optimizer='adamw'.*Resu",
        ),
        (
            {"optimizer": "adamw", "decay_norm_and_bias": False},
            "decay_norm_and_bias=False, but.*True",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(folder, train_data, **change)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"options": 3}', b"[" * 99999]
)
def test_a_damaged_description_is_named(
    data: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    train_data = read_data(data / "train" / "annotations.json")
    prepare(tmp_path / "run", train_data)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(
        TrainingError, match=rf"Cannot resume.*run': its {name} is damaged.*another"
    ):
        prepare(tmp_path / "run", train_data)


def test_runs_of_older_versions_without_a_description_of_the_data_can_be_resumed(
    data: Path, tmp_path: Path
) -> None:
    train_data = read_data(data / "train" / "annotations.json")
    prepare(tmp_path / "run", train_data)
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["data"]
    path.write_text(json.dumps(content))
    prepare(tmp_path / "run", train_data)
    assert "data" in json.loads(path.read_text())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02cos\nsystem\n."])
def test_a_damaged_checkpoint_does_not_show_advice_to_trust_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    error = (
        r"Cannot resume from '.*last\.ckpt': it is damaged.*Start a new run in another folder\.$"
    )
    reader = AtomicCheckpointIO()
    for read in (check_checkpoint, reader.load_checkpoint):
        with pytest.raises(TrainingError, match=error) as raised:
            read(path)
        assert raised.value.__suppress_context__  # torch's error, which gives that advice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"crowd": True}, r"None of \d+ objects in 4 .*\(\d+ crowd or difficult\)", id="crowds"
        ),
        pytest.param(
            {"boxes": np.nan}, r"learned from \(\d+ not finite or without area\)", id="dropped"
        ),
        pytest.param({}, r"There are no objects in 4 images\. Check that the annot", id="none"),
    ],
)
@pytest.mark.filterwarnings("ignore:Dropped")
def test_data_without_objects_raises_before_anything_is_written(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = read_data(data / "train" / "annotations.json")
    table = good.table
    if change:
        [(name, value)] = change.items()
        table = dataclasses.replace(table, **{name: np.full_like(getattr(table, name), value)})
    else:
        fields = ("boxes", "labels", "areas", "crowd", "annotation_ids", "image_indices")
        empty = {name: getattr(table, name)[:0] for name in fields}
        table = dataclasses.replace(table, **empty)
    bad = DetectionDataset(table)
    assert (bad.num_objects, good.num_objects) == (0, len(good.table.boxes))
    for name, parts in (("train_data", (bad, None)), ("val_data", (good, bad))):
        with pytest.raises(ValueError, match=f"{name} from '.*json' cannot be used.*{message}"):
            train(tiny_detector(), *parts, folder=tmp_path / "run", options=tiny_options())
    assert not (tmp_path / "run").exists()


def description(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return content


def test_the_description_of_a_run_holds_what_repeats_it_and_how_it_ended(
    data: Path, tmp_path: Path
) -> None:
    train_data = read_data(data / "train" / "annotations.json", tiny_training.darken)
    val_data = read_data(data / "val" / "annotations.json")
    options = tiny_options(epochs=1)
    recipe = {"name": "small_data", "reasons": ["few images"]}
    folder = tmp_path / "run"
    model = tiny_detector()
    summary = train(model, train_data, val_data, folder=folder, options=options, recipe=recipe)
    content = description(folder)
    assert content["status"] == "finished"
    result = {"best_ap": summary.best_ap, "best_epoch": 1, "epochs": 1, "stopped_early": False}
    assert content["result"] == result
    assert content["recipe"] == recipe
    assert RetinaNetConfig.from_json(json.dumps(content["config"])) == model.config
    assert TrainingOptions(**content["options"]) == options
    assert content["data"]["train"]["source"] == str(data / "train" / "annotations.json")
    assert content["data"]["val"]["image_folder"] == str(data / "val")
    assert content["transforms"] == {"train": "tests.helpers.tiny_training.darken", "val": None}
    assert content["resize_images"] is False
    assert content["started"] <= content["ended"]
    prepare(folder, train_data)  # as when it is resumed without the recipe
    assert description(folder)["recipe"] == recipe
    with pytest.raises(TypeError, match="recipe must hold values that JSON can express.*object"):
        train(model, train_data, folder=tmp_path / "other", recipe={"x": object()})


def test_the_description_of_a_run_says_why_it_failed_or_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetinaNetModule, "training_step", RetinaNetModule.training_step)
    tiny_training.send_signal(signal.SIGTERM, 0, whole_group=False)
    with pytest.raises(SystemExit):
        tiny_training.run(data, tmp_path / "stopped", epochs=1)
    assert description(tmp_path / "stopped")["status"] == "stopped"

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RetinaNetModule, "training_step", fail)
    with pytest.raises(TrainingError):
        tiny_training.run(data, tmp_path / "failed", epochs=1)
    content = description(tmp_path / "failed")
    assert content["status"] == "failed"
    assert content["error"].startswith("TrainingError: No space left in ")
    assert content["error"].count("No space left") == 1
    result = {"best_ap": None, "best_epoch": None, "epochs": 0, "stopped_early": False}
    assert content["result"] == result
