"""`focaldet train`: from a dataset to a run, with what was chosen said and changes made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.backbones import build_backbone
from focaldet.cli import main
from focaldet.training import list_runs, read_run
from tests.helpers.run_folders import write_run
from tests.helpers.tiny_training import tiny_detector, write_data

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = (
    "--fpn-channels", "64", "--head-depth", "1", "--min-size", "48", "--max-size", "64",
    "--epochs", "1", "--workers", "0", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, with the environment restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    monkeypatch.setenv("FOCALDET_HOME", str(tmp_path / "cache"))
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "shapes", 5)


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def test_nothing_but_the_data_is_needed(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def fake(model: RetinaNet, *datasets: Any, **given: Any) -> None:
        seen.update(given, model=model, datasets=datasets)

    monkeypatch.setattr("focaldet.training.train", fake)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "focaldet._assembly.pretrained.fetch", lambda _published: data.parent / "weights.pth"
    )
    torch.save(build_backbone("mobilenet_v2").state_dict(), data.parent / "weights.pth")
    assert train(data) == 0
    assert seen["folder"] == Path("runs/annotations")
    assert seen["options"].accelerator == "cpu"
    assert [len(one) for one in seen["datasets"]] == [4, 1]
    assert seen["model"].config.backbone == "mobilenet_v2"
    printed = capsys.readouterr().out
    assert "Data: 4 images for training, 1 for validation; classes: 2." in printed
    assert "Recipe 'small_data', because the data has only 4 images" in printed
    assert "Output: runs/annotations" in printed


def test_a_run_is_made_resumed_and_repeated_with_a_change(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = ("--val-fraction", "0", "--backbone-weights", "none", "--output", "a", *TINY)
    assert train(data, *scratch) == 0
    run = read_run("a")
    assert run.recipe is not None
    assert run.recipe["name"] == "small_data"
    assert run.options["epochs"] == 1
    assert run.config["backbone_norm"] == "batch"
    assert "focaldet predict a" in capsys.readouterr().out

    assert train(data, *scratch) == 2
    assert "already holds a run" in capsys.readouterr().err

    changed = ("--device", "cpu", "--workers", "0")
    assert train("--output", "a", "--resume", "--epochs", "2", *changed) == 0
    assert read_run("a").options["epochs"] == 2

    assert train("--like", "a", "--lr", "0.02", "--epochs", "1", "--output", "b", *changed) == 0
    assert list_runs(".").differences == {"epochs": (2, 1), "lr": (0.001, 0.02)}
    assert "Model and options of the run in 'a'." in capsys.readouterr().out


def test_a_detector_is_fine_tuned(data: Path) -> None:
    tiny_detector().save_pretrained("start")
    data.write_text(data.read_text().replace("circle", "ball"))
    few = ("--epochs", "1", "--workers", "0", "--device", "cpu", "--val-fraction", "0")
    assert train(data, "--start", "start", "--min-size", "48", "--output", "a", *few) == 0
    config = RetinaNet.from_pretrained("a/last").config
    assert config.class_names == ("square", "ball")
    assert (config.min_size, config.max_size, config.head_depth) == (48, 64, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DATA is required"),
        (["data", "--resume"], "--resume needs --output"),
        (["--like", "a", "--start", "b"], "--like takes the model and the options of a run"),
        (["none.json"], "none.json"),
        (["DATA", "--val-fraction", "1"], "--val-fraction must be at least 0 and less than 1"),
        (["DATA", "--device", "cuda:1"], "cuda:1 cannot be used"),
        (["--like", "none"], "No such folder: 'none'"),
        (["--like", "old"], "does not say which data it was trained on. Pass DATA"),
        (
            ["DATA", "--output", "run", "--resume", "--start", "x"],
            "--start cannot be given to resume",
        ),
        (["DATA", "--backbone", "resnet5O"], "did you mean 'resnet50'"),
    ],
)
def test_mistakes_are_one_line(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(Path("old"), data={})
    write_run(Path("run"))
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert train(*given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")


def test_weights_that_cannot_be_downloaded_say_what_to_do(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr("focaldet.pretrained._downloads.urlopen", fail)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    assert train(data, *TINY) == 2
    printed = capsys.readouterr().err
    assert "download https://download.pytorch.org/models/mobilenet_v2-b0353104.pth" in printed
    assert "Or pass --backbone-weights" in printed


def test_ranks_of_torchrun_need_an_output(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert train(data) == 2
    assert "--output is required" in capsys.readouterr().err


def test_a_new_folder_is_found_for_each_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def fake(*_: Any, folder: Path, **__: Any) -> None:
        folders.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.setattr("focaldet.training.train", fake)
    for _ in range(2):
        assert train(data, "--backbone-weights", "none", *TINY) == 0
    assert folders == [Path("runs/annotations"), Path("runs/annotations-2")]


def test_options_reach_the_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("focaldet.training.train", lambda *_, **given: seen.update(given))
    given = (
        "--patience", 3, "--freeze", "backbone", "fpn", "--sampler", "repeat_factor", "--clip", 5,
        "--no-norm-decay", "--ema", 0.9, "--warmup", 7, "--val-fraction", 0.4, "--seed", 3,
        "--class-weights", "square=2", "circle=0.5", "--no-image-check",
        "--backbone-lr-decay", 0.7, "--mosaic", 0.25,
    )  # fmt: skip
    assert train(data, "--backbone-weights", "none", *given, *TINY) == 0
    options = seen["options"]
    assert (options.patience, options.freeze) == (3, ("backbone", "fpn"))
    assert (options.sampler, options.clip_norm, options.ema_decay) == ("repeat_factor", 5, 0.9)
    assert (options.warmup_steps, options.seed) == (7, 3)
    assert options.backbone_lr_decay == 0.7
    assert seen["recipe"]["transform_options"]["mosaic"] == 0.25
    assert (options.class_weights, options.check_images) == ({"square": 2, "circle": 0.5}, False)
    assert options.decay_norm_and_bias is False
    assert seen["recipe"]["data"]["val_fraction"] == 0.4
    json.dumps(seen["recipe"])


def test_the_help_names_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for group in ("data:", "where to start:", "model:", "training:", "machine:", "output:"):
        assert f"\n{group}\n" in printed
