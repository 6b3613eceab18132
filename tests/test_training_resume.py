"""A run that is killed and resumed gives the same result as one that is never interrupted."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from focaldet.training import RetinaNetModule
from tests.helpers import tiny_training
from tests.helpers.tiny_training import tiny_detector, write_data

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", 10)
    write_data(folder / "val", 4, seed=1)
    return folder


def killed(
    data: Path, folder: Path, name: str, step: int, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Train in a subprocess that receives a signal, with its workers, in the middle of a step."""
    command = [sys.executable, tiny_training.__file__ or "", str(data), str(folder)]
    command += ["--options", json.dumps(options), "--signal", name, str(step)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        start_new_session=True,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "last" / "model.safetensors")
    return tensors


def steps_in(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return epoch, step, loss and learning rate of each update, leaving out the rows of validations and epochs."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [(row["epoch"], row["step"], row["train/loss"], row["train/lr"]) for row in rows]


def check_resumed(data: Path, folder: Path, name: str, step: int, **options: Any) -> None:
    """Kill a run, resume it, and compare it with an uninterrupted one."""
    process = killed(data, folder / "killed", name, step, **options)
    assert process.returncode == {"SIGKILL": -9, "SIGTERM": 143}[name], process.stderr
    assert not (folder / "killed" / "last").exists()
    model = tiny_detector()  # its BatchNorm has statistics, which belong to the state of a run
    tiny_training.run(data, folder / "killed", model=model, resume=True, **options)
    tiny_training.run(data, folder / "whole", model=tiny_detector(), **options)
    resumed, whole = weights(folder / "killed"), weights(folder / "whole")
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    assert steps_in(folder / "killed") == steps_in(folder / "whole") != []
    assert not list(folder.rglob("*.part"))


def test_a_run_killed_in_mid_epoch_continues_from_the_previous_epochs_end(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_resumed(data, tmp_path, "SIGKILL", 4, backbone_lr_decay=0.5)
    _, _, _, lr = steps_in(tmp_path / "whole")[0]
    assert float(lr) == pytest.approx(0.01 * 4 / 16)  # not that of a stage of the backbone
    assert "last.ckpt' after update 3." in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "step", "every"),
    [
        pytest.param("SIGKILL", 5, None, id="resumes from an epoch's end"),
        pytest.param("SIGKILL", 5, 1, id="resumes from a step"),
        pytest.param("SIGKILL", 1, None, id="starts again"),
        pytest.param("SIGTERM", 3, None, id="SIGTERM within an epoch"),
        pytest.param("SIGTERM", 2, None, id="SIGTERM in an epoch's last step"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_weights_are_bitwise_identical_to_those_of_an_uninterrupted_run(
    data: Path, tmp_path: Path, name: str, step: int, every: int | None, workers: int,
    accumulate: int,
) -> None:  # fmt: skip
    step = step // accumulate
    options = {"workers": workers, "checkpoint_every": every, "accumulate": accumulate}
    check_resumed(data, tmp_path, name, step, ema_decay=0.9, **options)


def interrupted(
    data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int
) -> int:
    """Train in this process and send it a signal in the middle of a step; return the exit status."""
    monkeypatch.setattr(RetinaNetModule, "training_step", RetinaNetModule.training_step)
    tiny_training.send_signal(number, step, whole_group=False)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        tiny_training.run(data, folder)
    assert signal.getsignal(number) == before
    return int(str(ended.value.code))


def test_sigterm_saves_the_state_before_exiting(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert interrupted(data, tmp_path / "run", monkeypatch, signal.SIGTERM, 1) == 143
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    received, saved = caplog.messages[-2:]
    assert received == "Received SIGTERM; stopping after this step."
    assert saved == (
        f"Stopped by SIGTERM; saved the state after update 2 to {str(last)!r}. Resume the run to "
        "continue."
    )
    assert torch.load(last, weights_only=True)["global_step"] == 2


def test_ctrl_c_in_the_last_step_of_an_epoch_skips_its_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert interrupted(data, tmp_path / "run", monkeypatch, signal.SIGINT, 2) == 130
    assert "Stopped by SIGINT" in caplog.text
    assert "Epoch 1/2: loss" in caplog.text
    assert "AP" not in caplog.text
