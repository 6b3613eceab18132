"""The commands predict, evaluate, show, export, models and completion, on small files."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from focaldet import RetinaNet, RetinaNetConfig, datasets, pretrained
from focaldet.cli import main
from focaldet.datasets import read_annotations, read_coco
from focaldet.evaluation import coco_results, evaluate_coco
from focaldet.export import OPSET
from tests.helpers.tiny_training import write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folder of a run, ``run``, and one of two splits, ``data``."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = RetinaNetConfig(
        num_classes=2,
        class_names=("circle", "square"),  # in the other order than the data
        backbone="resnet18",
        backbone_norm="batch",
        fpn_channels=16,
        head_depth=1,
        min_size=64,
        max_size=64,
        score_threshold=0.0,
        max_detections=20,
    )
    RetinaNet.from_config(config).save_pretrained(folder / "run" / "best")
    (folder / "run" / "run.json").write_text("{}")
    data = folder / "data"
    for split, count in (("train", 3), ("val", 2)):
        path = write_data(data / split, count, seed=count)
        (data / "annotations").mkdir(exist_ok=True)
        content = path.read_text().replace('"file_name": "', f'"file_name": "{split}/')
        (data / "annotations" / f"instances_{split}.json").write_text(content)
        path.unlink()
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))


def written(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_predict_prints_draws_and_writes_what_the_model_predicts(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [files / "data" / "val", files / "data" / "train" / "1.png"]
    arguments = ["predict", str(files / "run"), *map(str, sources), "--score-threshold", "0"]
    assert main([*arguments, "--device", "cpu", "--output", "found"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"Loading the best model of the run {str(files / 'run')!r}.\n"
    assert f"{files / 'data' / 'val' / '0.png'}: 20 objects\n" in printed.out
    assert printed.out.splitlines()[-1] == (
        "Found 60 objects in 3 photos. Wrote detections.json, 3 pictures to found."
    )
    assert written("found") == {"0.png", "1_1.png", "1_2.png", "detections.json"}
    model = RetinaNet.from_pretrained(files / "run")
    paths = [*sorted(sources[0].iterdir()), sources[1]]
    expected = [one.to_dict() for one in model.predict(paths, score_threshold=0)]
    assert json.loads(Path("found/detections.json").read_text()) == expected


@pytest.mark.filterwarnings("default")
def test_predict_without_pictures_and_with_a_damaged_photo(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_text("no photo")
    good = files / "data" / "val" / "0.png"
    arguments = ["predict", str(files / "run"), "bad.png", str(good), "--device", "cpu"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not Path("predictions").exists()
    assert main([*arguments, "--on-error", "skip", "--no-pictures"]) == 0
    printed = capsys.readouterr()
    assert "warning: Skipped an image: Cannot read 'bad.png'" in printed.err
    assert "in 1 photo, skipped 1. Wrote detections.json to predictions." in printed.out
    assert written("predictions") == {"detections.json"}
    [only] = json.loads(Path("predictions/detections.json").read_text())
    assert only["source"] == str(good)
    arguments.remove(str(good))
    assert main([*arguments, "--on-error", "skip"]) == 2
    assert "error: No photo could be read.\n" in capsys.readouterr().err


@pytest.mark.skipif(
    not hasattr(datasets, "write_annotations"), reason="annotations cannot be written yet"
)
@pytest.mark.parametrize("name", ["coco", "yolo", "voc", "csv", "labelme"])
def test_predict_writes_annotations_that_can_be_read_again(
    name: str, files: Path, tmp_path: Path
) -> None:
    arguments = ["predict", str(files / "run"), str(files / "data" / "val"), "--device", "cpu"]
    arguments += ["--score-threshold", "0", "--no-pictures", "--format", name]
    for _ in range(2):  # the second time, files are replaced
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    place = {"coco": "annotations.json", "csv": "annotations.csv"}.get(name, name)
    split = None if name in {"coco", "csv", "labelme"} else "train" if name == "yolo" else "all"
    table = read_annotations(tmp_path / "out" / place, split=split)
    assert (len(table), len(table.boxes)) == (2, 40)
    assert set(table.class_names) <= {"circle", "square"}


def test_mistakes_of_predict_are_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["nowhere", "photo.jpg"], "No such file, folder, published name or Hub repository"),
        ([str(files / "run"), "photo.jpg"], "'photo.jpg'"),
        ([str(files / "run"), "."], "The folder '.' (paths) contains no images"),
        ([str(files / "run"), "photo.jpg", "--device", "toaster"], "--device toaster cannot be"),
    ):
        assert main(["predict", *arguments]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_evaluate_measures_the_val_split(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = files / "data"
    assert main(["evaluate", str(files / "run"), str(data), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert f"Using the split 'val' of {str(data)!r}." in printed.err
    table = read_coco(data / "annotations" / "instances_val.json")
    model = RetinaNet.from_pretrained(files / "run")
    expected = evaluate_coco(table, coco_results(model, table), backend="auto")
    assert printed.out.startswith(f"{expected.table()}\n\n{expected}\nEvaluated 2 images with ")
    assert written("evaluation") == {"results.json", "evaluation.json", "precision_recall.png"}
    assert Path("evaluation/evaluation.json").read_text() == expected.to_json() + "\n"

    again = ["evaluate", "evaluation/results.json", str(data), "--split", "val"]
    assert main([*again, "--output", "again"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == printed.out.splitlines()[:-1]
    assert written("again") == {"evaluation.json", "precision_recall.png"}


def test_evaluate_asks_the_model_for_as_many_detections_as_count(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    predict = RetinaNet.predict

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("max_detections"))
        return predict(*arguments, **options)

    monkeypatch.setattr(RetinaNet, "predict", spy)
    command = ["evaluate", str(files / "run"), str(files / "data"), "--device", "cpu"]
    counts = []
    for arguments in ([], ["--max-detections", "150"]):
        assert main([*command, *arguments]) == 0
        counts.append(len(json.loads(Path("evaluation/results.json").read_text())))
    assert asked == [None, 150]
    assert counts[0] == 2 * 20  # the model's limit
    assert 2 * 20 < counts[1] <= 2 * 150


def test_suppression_is_an_option_of_predict_and_evaluate(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft = RetinaNet.from_pretrained(files / "run", suppression="gaussian")
    photos = str(files / "data" / "val")
    options = ["--device", "cpu", "--suppression", "gaussian"]
    command = ["predict", str(files / "run"), photos, "--score-threshold", "0", "--no-pictures"]
    assert main([*command, *options]) == 0
    found = json.loads(Path("predictions/detections.json").read_text())
    expected = soft.predict(photos, score_threshold=0.0)
    assert [one["scores"] for one in found] == [one.to_dict()["scores"] for one in expected]
    assert main(["evaluate", str(files / "run"), str(files / "data"), *options]) == 0
    entries = json.loads(Path("evaluation/results.json").read_text())
    scores = [score for one in soft.predict(photos) for score in one.to_dict()["scores"]]
    assert [entry["score"] for entry in entries] == scores
    assert main(["evaluate", "evaluation/results.json", str(files / "data"), *options]) == 2
    assert "'evaluation/results.json' is a results file" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_evaluate_and_report_as_one_does(files: Path) -> None:
    pytest.importorskip("matplotlib")
    command = ["evaluate", str(files / "run"), str(files / "data"), "--device", "cpu", "--report"]
    assert main([*command, "--output", "one"]) == 0
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "focaldet", *command, "--output", "two"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "Evaluated 2 images" in printed[0]
    assert printed[1] == ""
    one, two = (
        [json.loads(Path(folder, f"{name}.json").read_text()) for name in ("evaluation", "errors")]
        for folder in ("one", "two")
    )
    assert one == two
    assert one[1]["objects"] > 0
    assert "Confusion matrix" in Path("two/report.html").read_text()


def test_evaluate_without_matplotlib_says_what_is_missing(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Path("results.json").write_text("[]")
    assert main(["evaluate", "results.json", str(files / "data")]) == 0
    printed = capsys.readouterr()
    assert "warning: precision_recall.png was not drawn. " in printed.err
    assert "pip install 'focaldet[plot]'" in printed.err
    assert "Wrote evaluation.json to evaluation.\n" in printed.out


def test_evaluate_of_classes_that_the_data_lack_is_an_error(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = files / "data" / "annotations" / "instances_val.json"
    (tmp_path / "val.json").write_text(annotations.read_text().replace("circle", "ball"))
    arguments = ["evaluate", str(files / "run"), "val.json", "--images", str(files / "data")]
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: The model has classes that are missing from the annotations: circle."


def test_show_draws_the_train_split(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(files / "data")]) == 0
    printed = capsys.readouterr()
    assert "Using the split 'train'" in printed.err
    assert printed.out == "Drew 3 of 3 photos to gallery.png.\n"
    with Image.open("gallery.png") as picture:
        assert picture.width > 3 * 384
    options = ["--split", "val", "--count", "1", "--seed", "3", "--output", "one.jpg"]
    assert main(["show", str(files / "data"), *options, "--class", "square"]) == 0
    assert capsys.readouterr().out == "Drew 1 of 2 photos to one.jpg.\n"
    assert main(["show", str(files / "data"), "--class", "owl"]) == 2
    assert "error: Unknown class 'owl'" in capsys.readouterr().err


def test_export_passes_its_options_on(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def export(model: RetinaNet, path: Path, **options: object) -> str:
        assert isinstance(model, RetinaNet)
        calls.append((path.name, options))
        return "the comparison"

    monkeypatch.setattr("focaldet.export.export_onnx", export)
    monkeypatch.setattr("focaldet.export.export_program", export)
    assert main(["export", str(files / "run"), "a.onnx"]) == 0
    assert capsys.readouterr().out == "the comparison\n"
    shape = ["--maps", "--shape", "1", "64", "96", "--image", "photo.jpg"]
    assert main(["export", str(files / "run"), "a.onnx", *shape, "--opset", "18"]) == 0
    assert main(["export", str(files / "run"), "a.pt2", *shape]) == 0
    usual = {"postprocess": True, "fixed_shape": None, "check_image": None}
    given = {"postprocess": False, "fixed_shape": (1, 64, 96), "check_image": "photo.jpg"}
    onnx = {"precision": "float32", "error_budget": None}
    assert calls == [
        ("a.onnx", usual | onnx),
        ("a.onnx", given | onnx | {"opset": 18}),
        ("a.pt2", given),
    ]
    capsys.readouterr()
    for arguments, message in (
        (["a.bin"], "FILE must end with .onnx or .pt2, got 'a.bin'."),
        (["a.pt2", "--opset", "18"], "--opset is for .onnx files only."),
    ):
        assert main(["export", str(files / "run"), *arguments]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_the_help_of_export_has_the_default_opset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert f"ONNX opset (default: {OPSET})" in capsys.readouterr().out


def test_the_old_command_of_export_says_its_new_name(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(files / "run"), "a.bin"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("focaldet.export", run_name="__main__")
    assert ended.value.code == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: `python -m focaldet.export` is now `focaldet export`; ")
    assert error == "error: FILE must end with .onnx or .pt2, got 'a.bin'."


def test_models_lists_all_or_those_of_a_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out == f"{pretrained.list()}\n"
    assert main(["models", "torchvision"]) == 0
    assert capsys.readouterr().out == f"{pretrained.list('torchvision')}\n"
    assert main(["models", "darknet"]) == 2
    assert "'darknet'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_files(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("predict", "evaluate", "--score-threshold"))
    program = shutil.which(shell)
    if program is not None:
        assert subprocess.run([program, "-n"], input=script, text=True, check=False).returncode == 0


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "error: Shell completion requires shtab. Install it with: pip install 'focaldet[completion]'\n"
    )


def test_completion_marks_paths_in_all_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[str] = []

    def complete(parser: object, shell: str) -> str:
        [commands] = (a for a in parser._actions if a.choices)  # type: ignore[attr-defined]
        for name, subparser in commands.choices.items():
            marked.extend(f"{name} {a.dest}" for a in subparser._actions if hasattr(a, "complete"))
        return shell

    stub = types.SimpleNamespace(FILE="files", complete=complete)
    monkeypatch.setitem(sys.modules, "shtab", stub)
    assert main(["completion", "zsh"]) == 0
    assert {"predict model", "predict sources", "evaluate data", "show output"} <= set(marked)
    assert {"export path", "export image", "check config"} <= set(marked)
    assert "predict device" not in marked
