"""The command ``focaldet``: its help, messages, errors and exit statuses, and shared arguments."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from focaldet.cli import _arguments, _main, _messages, _models, main
from focaldet.cli._main import COMMANDS
from focaldet.errors import ExportError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Run: TypeAlias = Callable[[argparse.Namespace], int]


@pytest.fixture
def models_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Return a function that makes ``focaldet models`` run something else."""
    return lambda run: monkeypatch.setattr(_models, "run", run)


def raising(error: BaseException) -> Run:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


def python(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"]])
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from focaldet.cli import main\n"
        f"try:\n    main({arguments})\n"
        "except SystemExit as ended:\n    status = ended.code\n"
        "print(status, 'torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    printed, errors = python(code).communicate()
    assert printed
    assert errors == "0 False False\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples_and_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"focaldet {command}" in shown.split("arguments:")[0].split("\n\n", 1)[1]
    assert max(map(len, shown.splitlines())) <= 80


def test_the_page_lists_every_command_and_exit_status() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `focaldet {name}" not in page] == []
    for status in (_main.OK, _main.FOUND_ERRORS, _main.FAILED, 130, 141):
        assert f"\n| {status} | " in page


def test_a_missing_command_and_an_unknown_one_exit_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, message in (
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["predict", "m", "p.jpg", "--score-threshold", "2"], "between 0 and 1, got '2'"),
        (["predict", "m", "p.jpg", "--batch-size", "no"], "a whole number from 1 on, got 'no'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [OSError, ValueError, ImportError, ExportError, TrainingError, BrokenPipeError],
)
def test_an_error_of_the_library_is_one_line(
    error: type[Exception],
    models_runs: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    models_runs(raising(error("lost")))
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "error: lost\n"


def test_an_error_is_one_line_even_if_its_text_has_several_and_control_characters(
    models_runs: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    models_runs(raising(ValueError("a\n  b\x1b[2J")))
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "error: a b\\x1b[2J\n"


def test_an_unexpected_error_keeps_its_traceback_and_asks_for_a_report(
    models_runs: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    models_runs(raising(KeyError("anchors")))
    assert main(["models"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert "KeyError: 'anchors'\nerror: This is a bug in focaldet." in printed


def test_out_of_memory_says_what_to_lower(
    models_runs: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB."
    models_runs(raising(torch.OutOfMemoryError(text)))
    assert main(["models"]) == 2
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Use a smaller --batch-size, smaller images, or --device cpu.\n"
    )


def test_ctrl_c_exits_with_130_and_without_a_traceback(
    models_runs: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    models_runs(raising(KeyboardInterrupt()))
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


@pytest.mark.parametrize("written", ["'x'", "'x' * 100_000"])
def test_a_closed_pipe_ends_the_command_silently(written: str) -> None:
    process = python(
        "import sys\n"
        "from focaldet.cli import _models, main\n"
        "def run(_):\n"
        f"    sys.stdout.write({written})\n"
        "    return 0\n"
        "_models.run = run\n"
        "sys.exit(main(['models']))",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert errors == ""
    assert process.wait() == 141


def test_warnings_and_log_lines_are_lines_without_a_place_in_the_source(
    models_runs: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        warnings.simplefilter("default")
        warnings.warn("a box\nis empty", UserWarning, stacklevel=1)
        log = logging.getLogger("focaldet.training")
        log.info("epoch %d", 1)
        log.warning("slow")
        log.error("lost")
        log.debug("not shown")
        logging.getLogger("another").warning("not focaldet's")
        return 0

    models_runs(run)
    before = warnings.showwarning, logging.getLogger("focaldet").handlers[:]
    assert main(["models"]) == 0
    assert capsys.readouterr().err == (
        "warning: a box is empty\nepoch 1\nwarning: slow\nerror: lost\n"
    )
    assert (warnings.showwarning, logging.getLogger("focaldet").handlers) == before


def test_a_log_line_with_control_characters_is_escaped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with _messages.messages_on_stderr():
        logging.getLogger("focaldet").warning("read %s\nand stopped", "a\x1b[2J.png")
    assert capsys.readouterr().err == "warning: read a\\x1b[2J.png\nand stopped\n"


def test_a_device_that_is_absent_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _arguments.checked_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"--device toaster cannot be used .*Use --device cpu"):
        _arguments.checked_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda cannot be used on this machine \("):
            _arguments.checked_device("cuda")
        assert _arguments.checked_device(None) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _arguments.checked_device(None) == "cuda"


def test_an_absent_device_is_said_before_the_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="--device toaster"):
        _arguments.load_model(argparse.Namespace(device="toaster", model="nowhere"))


@pytest.mark.parametrize(
    ("splits", "wanted", "chosen"),
    [
        (["test", "train", "val"], None, "val"),
        (["train2017", "val2017"], None, "val2017"),
        (["train", "valid"], None, "valid"),
        (["train", "valid"], "train", "train"),
        (["only"], None, "only"),
    ],
)
def test_the_split_is_the_given_one_or_the_usual_one_which_is_said(
    splits: list[str],
    wanted: str | None,
    chosen: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_splits(tmp_path, splits)
    table = _arguments.read_data(data_options(tmp_path, wanted), prefer="val")
    assert list(table.file_names) == [f"{chosen}.jpg"]
    said = "" if wanted else f"Using the split {chosen!r} of {str(tmp_path)!r}.\n"
    assert capsys.readouterr().err == said


def test_splits_without_a_usual_name_have_to_be_chosen(tmp_path: Path) -> None:
    write_splits(tmp_path, ["first", "second"])
    with pytest.raises(ValueError, match="split is required .* 'first' and 'second'"):
        _arguments.read_data(data_options(tmp_path, None), prefer="val")


def write_splits(folder: Path, names: list[str]) -> None:
    """Write a COCO file for each split, with an image of its name."""
    (folder / "annotations").mkdir()
    for name in names:
        content = {
            "images": [{"id": 1, "file_name": f"{name}.jpg", "width": 9, "height": 9}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25,
                 "iscrowd": 0}
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }  # fmt: skip
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def data_options(data: Path, split: str | None) -> argparse.Namespace:
    return argparse.Namespace(data=data, images=None, split=split, exif="upright")
