"""The table of runs: what differs, what AP came of it, and what is said of damaged and old runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from focaldet.cli import main
from focaldet.errors import TrainingError
from focaldet.training import list_runs, read_run, recipe
from tests.helpers.annotation_tables import table_with_photos
from tests.helpers.run_folders import write_old_run, write_run

if TYPE_CHECKING:
    from pathlib import Path


def test_the_table_shows_what_differs_and_the_best_ap(tmp_path: Path) -> None:
    write_run(tmp_path / "a", options={"lr": 0.01}, recipe={"name": "paper"})
    result = {"best_ap": 0.614, "best_epoch": 3, "epochs": 5}
    write_run(
        tmp_path / "group" / "b",
        options={"lr": 0.02},
        config={"head_norm": "group"},
        recipe={"name": "small_data"},
        result=result,
        status="stopped",
    )
    runs = list_runs(tmp_path)
    assert str(runs).splitlines() == [
        "run      status    best AP         epochs  recipe      lr    head_norm",
        "a        finished  50.0 (epoch 7)  12/12   paper       0.01  -",
        "group/b  stopped   61.4 (epoch 3)  5/12    small_data  0.02  group",
    ]
    assert runs.differences == {
        "recipe": ("paper", "small_data"),
        "lr": (0.01, 0.02),
        "head_norm": (None, "group"),
    }


def test_different_data_are_a_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", data={"train": {"source": "other.json"}})
    assert list_runs(tmp_path).differences == {"train data": ("train.json", "other.json")}


def test_an_option_that_old_runs_lack_is_not_a_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "new", options={"added_later": 3, "epochs": 5})
    write_old_run(tmp_path / "old", [0.1], finished=True)
    assert list_runs(tmp_path).differences == {}


def test_old_runs_have_their_best_ap_from_the_metrics(tmp_path: Path) -> None:
    write_old_run(tmp_path / "a", [0.1, 0.3, float("nan"), 0.2], finished=True)
    write_old_run(tmp_path / "b", [], finished=False)
    first, second = list_runs(tmp_path)
    assert (first.status, first.best_ap, first.best_epoch, first.epochs) == ("finished", 0.3, 2, 4)
    assert (second.status, second.best_ap, second.epochs) == ("unknown", None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is damaged (JSONDecodeError"),
        ("[1]", "must hold a JSON object, but holds [1]"),
        ('{"options": [1]}', "'options' must be an object, but is [1]"),
        ('{"result": "good"}', "'result' must be an object, but is 'good'"),
    ],
)
def test_a_damaged_run_is_reported_in_its_row(tmp_path: Path, content: str, message: str) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text(content)
    runs = list_runs(tmp_path)
    assert [run.status for run in runs] == ["finished", "damaged"]
    lines = str(runs).splitlines()
    assert lines[2].split() == ["b", "damaged", "-", "?/?"]
    assert message in lines[-1]
    with pytest.raises(TrainingError, match="damaged|must hold"):
        read_run(tmp_path / "b")


def test_values_of_a_wrong_kind_are_not_shown_as_results(tmp_path: Path) -> None:
    result: dict[str, object] = {"best_ap": "high", "best_epoch": [], "epochs": None}
    write_run(tmp_path / "a", result=result, status="excellent")
    [run] = list_runs(tmp_path)
    assert (run.status, run.best_ap, run.best_epoch, run.epochs) == ("unknown", None, None, None)


def test_damaged_metrics_are_reported(tmp_path: Path) -> None:
    write_old_run(tmp_path / "a", [0.1], finished=True)
    (tmp_path / "a" / "metrics.csv").write_text("epoch,step,val/AP\n0,1\n")
    [run] = list_runs(tmp_path)
    assert run.best_ap is None
    assert "metrics.csv" in run.problem


def test_the_error_of_a_failed_run_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="failed", error="TrainingError: the loss\nis NaN", result=None)
    assert str(list_runs(tmp_path)).splitlines()[-1] == r"a: TrainingError: the loss\nis NaN"


def test_the_table_as_values_can_be_written_as_json(tmp_path: Path) -> None:
    write_run(tmp_path / "a", options={"lr": 0.01})
    write_run(tmp_path / "b", options={"lr": None})
    content = json.loads(json.dumps(list_runs(tmp_path).to_dict()))
    assert content["runs"][0] == {
        "name": "a",
        "status": "finished",
        "best_ap": 0.5,
        "best_epoch": 7,
        "epochs": 12,
        "recipe": None,
        "differences": {"lr": 0.01},
        "problem": "",
    }


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{list_runs(tmp_path)}\n"
    assert main(["runs", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == "a"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "No such folder" in capsys.readouterr().err


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert str(list_runs(tmp_path)) == f"There are no runs in {str(tmp_path)!r}."
    with pytest.raises(FileNotFoundError, match="is not the folder of a run: it has no run.json"):
        read_run(tmp_path)


def test_a_run_is_repeated_with_changes(tmp_path: Path) -> None:
    data = table_with_photos(tmp_path, [[[0, 0, 10, 10], [5, 5, 20, 20]]])
    write_run(
        tmp_path / "run",
        config={"backbone": "resnet34", "min_size": 400, "max_size": 600},
        options={"lr": 0.01, "accelerator": "gpu", "devices": 8, "from_the_future": 1},
        recipe={"name": "paper", "transform_options": {"min_scale": 0.5}},
    )
    chosen = recipe(data=data, like=tmp_path / "run", device="cpu", option_changes={"lr": 0.02})
    assert (chosen.name, chosen.config.backbone) == ("paper", "resnet34")
    assert chosen.config.class_names == ("cat", "dog")
    options = chosen.options
    assert (options.lr, options.accelerator, options.devices) == (0.02, "auto", "auto")
    assert min(chosen.train_transform.transforms[1].min_size) == 200
    assert "does not know its options from_the_future" in str(chosen)
    smaller = recipe(data=data, like=tmp_path / "run", device="cpu", min_size=200).config
    assert (smaller.min_size, smaller.max_size) == (200, 300)


def test_a_run_without_a_transform_says_so(tmp_path: Path) -> None:
    data = table_with_photos(tmp_path, [[[0, 0, 10, 10]]])
    write_run(tmp_path / "run")
    chosen = recipe(data=data, like=tmp_path / "run", device="cpu")
    assert "does not say how its images were transformed" in str(chosen)
