"""The checkpoint of a run is checked before the run is resumed from it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from focaldet.training import RetinaNetModule, TrainingError, train
from tests.helpers.tiny_training import read_data, smallest_detector, tiny_options, write_data

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OPTIONS: dict[str, Any] = {"batch_size": 1, "checkpoint_every": 1, "ema_decay": 0.9}


class CrashError(Exception):
    """A crash in the middle of an epoch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("run") / "data", 2)


@pytest.fixture(scope="module")
def crashed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crashed")
    crash(data, folder, CrashError("crash"))
    return folder


@pytest.fixture
def folder(crashed: Path, tmp_path: Path) -> Path:
    """Return the folder of a run that crashed after its first update."""
    return shutil.copytree(crashed, tmp_path / "run")


def run(data: Path, folder: Path, *, resume: bool = False, **options: Any) -> None:
    torch.manual_seed(0)
    images = read_data(data)
    settings = tiny_options(**OPTIONS, **options)
    train(smallest_detector(), images, images, folder=folder, options=settings, resume=resume)


def crash(data: Path, folder: Path, error: Exception, *, step: int = 1, **options: Any) -> None:
    """Run, or resume, until an error in the middle of an epoch."""
    original_step = RetinaNetModule.training_step

    def training_step(self: RetinaNetModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            raise error
        return original_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetinaNetModule, "training_step", training_step)
        with pytest.raises(type(error), match=str(error)):
            run(data, folder, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_sound_checkpoint_passes_all_checks(data: Path, tmp_path: Path, optimizer: Any) -> None:
    crash(data, tmp_path / "resumed", CrashError("crash"), optimizer=optimizer)
    run(data, tmp_path / "resumed", resume=True, optimizer=optimizer)
    run(data, tmp_path / "whole", optimizer=optimizer)
    files = [load_file(tmp_path / name / "last/model.safetensors") for name in ("resumed", "whole")]
    for key, value in files[0].items():
        assert torch.equal(value, files[1][key]), key


def group(state: Any) -> Any:
    return state["optimizer_states"][0]["param_groups"][0]


def momentum(state: Any) -> Any:
    return state["optimizer_states"][0]["state"][0]


def schedule(state: Any) -> Any:
    return state["lr_schedulers"][0]


def progress(state: Any) -> Any:
    return state["loops"]["fit_loop"]["epoch_progress"]["current"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: progress(s).update(processed=-(10**9)), "processed.* is -1000000000"),
        (lambda s: progress(s).update(completed="1"), "completed.* is '1'"),
        (lambda s: group(s).update(lr=-0.1), "lr of the optimizer is -0.1"),
        (lambda s: group(s).update(momentum="0.9"), "momentum of the optimizer is '0.9'"),
        (lambda s: group(s).update(nesterov=0.0), "nesterov of the optimizer is 0.0"),
        (lambda s: group(s).pop("weight_decay"), "weight_decay"),
        (lambda s: momentum(s).update(momentum_buffer=3), "'a number'.* instead of .*'a tensor'"),
        (lambda s: momentum(s).update(momentum_buffer=torch.ones(7)), r"\[7\] for a parameter of"),
        (lambda s: momentum(s).update(more=torch.ones(())), "'more': 'a scalar tensor'"),
        (lambda s: schedule(s).update(base_lrs=[-1.0]), r"base_lrs of the schedule is \[-1.0\]"),
        (lambda s: schedule(s).update(last_epoch=None), "last_epoch of the schedule is None"),
        (lambda s: schedule(s).update(step=1), "the schedule has .*step"),
        (
            lambda s: s["callbacks"]["BestModel"].update(best="x", epoch=1),
            "highest value so far is 'x'",
        ),
        (lambda s: s["callbacks"]["AverageWeights"].update(latest_update_step=-1), "latest_update"),
        (lambda s: s["DetectionDataModule"].update(given=-3), "given of the position .* is -3"),
        (lambda s: s["DetectionDataModule"].pop("epoch"), "epoch"),
        (lambda s: s["DetectionDataModule"].update(skipped=[7]), r"skipped images are \[7\]"),
        (lambda s: s["state_dict"].popitem(), "Missing key"),
    ],
)
def test_values_that_cannot_be_right_are_named(
    data: Path, folder: Path, change: Callable[[Any], object], message: str
) -> None:
    change_checkpoint(folder, change)
    with pytest.raises(TrainingError, match=rf"Cannot resume from '.*last\.ckpt': .*{message}"):
        run(data, folder, resume=True)


def change_checkpoint(folder: Path, change: Callable[[Any], object]) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    change(state)
    torch.save(state, last)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(epoch=-1),
        lambda state: state.update(global_step=2**70),
        lambda state: state.pop("loops"),
        lambda state: state.update(callbacks=None),
    ],
    ids=["epoch", "step", "loops", "callbacks"],
)
def test_other_files_of_torch_are_not_checkpoints_of_a_run(
    data: Path, folder: Path, change: Callable[[Any], object]
) -> None:
    change_checkpoint(folder, change)
    with pytest.raises(TrainingError, match="it is damaged or not a checkpoint"):
        run(data, folder, resume=True)


def test_errors_after_resuming_are_not_taken_for_damage(data: Path, folder: Path) -> None:
    crash(data, folder, RuntimeError("of the network"), resume=True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"epoch,step,train/loss\n0,1,2.5\n0,x,2.5\n", 4),
        (b"epoch,step,train/loss\n0,1,2.5,3.5\n", 3),
        (b"epoch,step,train/loss\n0\n", 3),
        (b"epoch,step,train/loss\n0,-1,2.5\n", 3),
        (b"epoch,loss\n0,2.5\n", 3),
        (b"\xff\xfe\x00", 1),
    ],
)
def test_damaged_metrics_are_named(data: Path, folder: Path, content: bytes, line: int) -> None:
    (folder / "metrics.csv").write_bytes(content)
    message = rf"Cannot read '.*metrics\.csv': it is damaged near line {line} .*move it away"
    with pytest.raises(TrainingError, match=message):
        run(data, folder, resume=True)
    (folder / "metrics.csv").unlink()
    run(data, folder, resume=True)
