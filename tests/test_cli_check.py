"""``focaldet check``, on small files and on BCCD as published."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.cli import main
from focaldet.datasets import read_voc
from focaldet.datasets.checks import KINDS, check_dataset
from tests.helpers.annotation_files import voc_object, write_text
from tests.helpers.shared import SHARED

VOC = SHARED / "data" / "bccd" / "voc"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A dataset of two images without mistakes."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 80), (len(name), 0, ord(name[0]))).save(tmp_path / name)
    path = tmp_path / "rows.csv"
    path.write_text("a.png,10,10,40,40,cat\nb.png,20,20,90,70,dog\n")
    return path


def test_a_good_dataset_exits_with_0(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(rows)]) == 0
    printed = capsys.readouterr()
    assert "2 images, 2 boxes, 2 classes\nNo problems found." in printed.out
    assert printed.err == ""


def test_errors_exit_with_1_and_are_in_the_json(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rows.parent / "b.png").unlink()
    written = rows.parent / "report.json"
    assert main(["check", str(rows), "--json", str(written)]) == 1
    assert "ERROR image-missing (1)" in capsys.readouterr().out
    assert json.loads(written.read_text())["counts"] == {"image-missing": 1}
    assert main(["check", str(rows), "--no-images"]) == 0


def test_yolo_without_pyyaml_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["check", str(tmp_path), "--split", "train"]) == 2
    assert capsys.readouterr().err == (
        "error: Reading data.yaml requires yaml. Install it with: pip install 'pyyaml'\n"
    )


def test_headers_only_does_not_find_a_truncated_image(rows: Path) -> None:
    Image.effect_noise((100, 80), 50).convert("RGB").save(rows.parent / "cut.jpg")
    content = (rows.parent / "cut.jpg").read_bytes()
    (rows.parent / "cut.jpg").write_bytes(content[: len(content) // 2])
    rows.write_text(rows.read_text() + "cut.jpg,1,1,50,50,cat\n")
    assert main(["check", str(rows), "--headers-only", "--workers", "1"]) == 0
    assert main(["check", str(rows)]) == 1


def test_a_configuration_is_read_from_a_file_or_a_model_folder(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rows.parent / "config.json"
    config.write_text(RetinaNetConfig(num_classes=2, min_size=200).to_json())
    for given in (config, rows.parent):
        assert main(["check", str(rows), "--config", str(given)]) == 0
        assert "(model input: 200 to 1333 pixels)" in capsys.readouterr().out


def test_what_cannot_be_read_exits_with_2_and_one_line(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["nowhere"], "No such file or folder: 'nowhere' (path)."),
        (
            [str(rows), "--config", "nowhere.json"],
            "No such file: 'nowhere.json' (--config).",
        ),
    ):
        assert main(["check", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err == f"error: {message}\n"
        assert printed.out == ""


def test_the_config_of_a_model_in_a_folder_without_config_json_is_read(
    rows: Path, tmp_path: Path, tiny_config: RetinaNetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    RetinaNet.from_config(tiny_config).save_pretrained(tmp_path / "run" / "best")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main(["check", str(rows), "--config", str(tmp_path / "run")]) == 0
    assert "(model input: 64 to 96 pixels)" in capsys.readouterr().out


def test_the_usual_splits_are_checked_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "c"):
        xml = f"<annotation>{voc_object('cat', (1, 1, 5, 5))}</annotation>"
        write_text(tmp_path / "Annotations" / f"{name}.xml", xml)
    (tmp_path / "JPEGImages").mkdir()
    for split, names in (("train", "b"), ("val", "c\nlost"), ("trainval", "b\nc\nlost")):
        write_text(tmp_path / "ImageSets" / "Main" / f"{split}.txt", names)
    written = tmp_path / "report.json"
    arguments = ["check", str(tmp_path), "--no-images", "--json", str(written)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("Split")] == [
        "Split train",
        "Split val",
    ]
    assert list(json.loads(written.read_text())) == ["train", "val"]
    assert main([*arguments, "--split", "train"]) == 0
    assert "counts" in json.loads(written.read_text())


def test_the_old_command_says_its_new_name_and_runs_it(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["datasets", str(rows), "--no-images"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("focaldet.datasets", run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "2 images, 2 boxes, 2 classes" in printed.out
    assert printed.err == (
        "warning: `python -m focaldet.datasets` is now `focaldet check`; the old name will be removed "
        "in focaldet 1.0.\n"
    )


def test_the_page_shows_what_its_example_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "check_dataset.md").read_text(encoding="utf-8")
    code, shown = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    for line, short in zip(printed, shown.splitlines(), strict=True):
        start, dots, rest = short.partition("…")  # the page may shorten long lines
        assert line.startswith(start) if dots else line == start
        assert not rest
    assert all(
        f"| `{kind}` | {severity} | {meaning} |" in page
        for kind, (severity, meaning) in KINDS.items()
    )


@pytest.mark.skipif(not VOC.is_dir(), reason="the BCCD dataset is not available")
def test_the_two_boxes_without_area_in_bccd_are_found() -> None:
    report = check_dataset(read_voc(VOC, "trainval"), images="headers")
    assert report.counts == {"box-no-area": 2}
    assert [(one.file, one.annotation_id, one.message) for one in report.findings] == [
        ("BloodImage_00338.jpg", 12, "x1 y1 x2 y2 = 504 337 504 337, width 0, height 0"),
        ("BloodImage_00343.jpg", 3, "x1 y1 x2 y2 = 181 329 181 329, width 0, height 0"),
    ]
