"""The commands of the tutorials work in the order of the page, and the names in their tables exist.

The code blocks of the pages are run by tests/test_docs.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import focaldet
from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.cli import main
from focaldet.retinanet import RetinaNetOutput
from tests.helpers.annotation_files import voc_object, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
WALK = TUTORIALS / "your_own_photos.md"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
# What replaces the settings of the page, so that the walk takes seconds of training and no download.
TINY = {
    "train": "--backbone-weights none --min-size 64 --max-size 96 --epochs 1 --workers 0 --device cpu",
}


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of a language, except for those that are marked as not run."""
    found = []
    pattern = re.compile(
        rf"(?:^(<!--[^\n]*-->)\n)?^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE
    )
    for mark, block in pattern.findall(text):
        if not NOT_RUN.fullmatch(mark):
            found.append(block)
    return found


def commands_of(page: Path) -> list[list[str]]:
    """Return the commands of the bash blocks of a page as lists of arguments."""
    text = page.read_text(encoding="utf-8")
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    from focaldet.cli._main import build_parser

    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("focaldet has no commands")


def write_cells(root: Path) -> None:
    """Write a Pascal VOC dataset like BCCD: the same folders, splits, classes and one of its names."""
    rng = np.random.default_rng(0)
    colors = {"RBC": (200, 90, 90), "WBC": (110, 60, 190), "Platelets": (60, 90, 220)}
    names = {"train": range(100, 108), "val": range(200, 203), "test": (7, 300)}
    (root / "JPEGImages").mkdir(parents=True)
    for split, numbers in names.items():
        stems = [f"BloodImage_{number:05d}" for number in numbers]
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems) + "\n")
        for stem in stems:
            photo = Image.new("RGB", (96, 72), (220, 200, 200))
            objects = ""
            for i, (name, color) in enumerate(colors.items()):
                x, y = 4 + 31 * i, int(rng.integers(2, 40))
                box = (x, y, x + 24 - 3 * i, y + 26 - 4 * i)
                ImageDraw.Draw(photo).ellipse(box, fill=color)
                objects += voc_object(name, box)
            photo.save(root / "JPEGImages" / f"{stem}.jpg")
            size = "<size><width>96</width><height>72</height><depth>3</depth></size>"
            inside = f"<filename>{stem}.jpg</filename>{size}{objects}"
            write_text(root / "Annotations" / f"{stem}.xml", f"<annotation>{inside}</annotation>")


@pytest.fixture
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder with the data of the page, and the environment restored afterwards."""
    write_cells(tmp_path / "BCCD_Dataset" / "BCCD")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_the_commands_of_the_walk_have_the_arguments_that_focaldet_knows() -> None:
    commands = commands_of(WALK)
    steps = [words[1] for words in commands]
    for step in ("check", "show", "train", "evaluate", "predict", "export"):
        assert step in steps, f"the page has no `focaldet {step}`"
    for program, name, *arguments in commands:
        assert program == "focaldet"
        subcommands()[name].parse_args(arguments)  # exits if one is unknown


@pytest.mark.parametrize("export", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_desk")
def test_the_walk_works_in_the_order_of_the_page(export: bool) -> None:
    written = [
        "gallery.png",
        "runs/cells/curves.png",
        "evaluation/report.html",
        "found/detections.json",
    ]
    if export:  # takes most of the time; smaller models are exported in test_export
        pytest.importorskip("onnxruntime")
        written.append("cells.onnx")
    for _, name, *arguments in commands_of(WALK):
        words = [name, *arguments, *shlex.split(TINY.get(name, ""))]
        assert (name == "export" and not export) or main(words) == 0, " ".join(words)
    for path in written:
        assert Path(path).is_file(), path
    namespace: dict[str, Any] = {}
    code = PYTHON.findall(WALK.read_text(encoding="utf-8")) if export else []
    assert code or not export
    for block in code:
        exec(block, namespace)  # noqa: S102


def test_the_figure_of_times_is_described_with_the_numbers_of_the_page_on_exports() -> None:
    export = (TUTORIALS.parent / "export.md").read_text(encoding="utf-8")
    page = (TUTORIALS / "deploying_on_a_cpu.md").read_text(encoding="utf-8")
    _, small, large = re.split(
        "MobileNetV2: |ResNet-18: ", page.split(":alt: Bars")[1].split("\n")[0]
    )
    for network, text in (("MobileNetV2", small), ("ResNet-18", large)):
        table = export.split(f"| {network} | AP |")[1].split("\n\n")[0]
        times = re.findall(r"\| ([\d,]+) ms(?: \||,)", table)
        # The figure leaves out bfloat16, which this processor emulates.
        assert re.findall(r"\d+(?=[ ,.])", re.sub("INT8", "", text)) == [
            time for time in times if "," not in time
        ]


# Names in the tables of coming_from.md.

CONFIG = RetinaNetConfig(num_classes=2)
CONFIG_FIELDS = {field.name for field in fields(RetinaNetConfig)}
INSTANCES = {"model": RetinaNet, "detections": Detections, "output": RetinaNetOutput}


def resolve(name: str) -> Any:
    """Find `RetinaNet.predict`, `focaldet.datasets.read_csv`, `model.predict` or `detections.boxes`."""
    first, *rest = name.split(".")
    value: Any = focaldet
    if first != "focaldet":
        value = INSTANCES.get(first) or getattr(focaldet, first)
    while rest and value.__name__.startswith("focaldet"):  # go down into modules
        try:
            value = importlib.import_module(f"{value.__name__}.{rest[0]}")
        except ModuleNotFoundError:
            break
        del rest[0]
    for part in rest:
        if hasattr(value, part):
            value = getattr(value, part)
        else:  # a field without a default is no attribute of its class
            assert part in getattr(value, "__annotations__", {}), f"{name}: no {part}"
            value = None
    return value


def check_name(span: str) -> None:
    """Fail unless a code span of the column "focaldet" exists as it is written."""
    if re.fullmatch(r"[a-z]\d", span):  # columns of a table of detections
        assert span in ("x1", "x2", "y1", "y2")
        return
    if span.startswith("focaldet "):
        _, command, *options = span.split()
        known = subcommands()[command]._option_string_actions
        assert all(option in known for option in options if option.startswith("--")), span
        return
    if assigned := re.fullmatch(r"(\w+)=(.+)", span):
        CONFIG.replace(**{assigned[1]: ast.literal_eval(assigned[2])})
        return
    if re.fullmatch(r"\w+", span):
        assert span in CONFIG_FIELDS, f"{span} is no field of RetinaNetConfig"
        return
    for node in ast.walk(ast.parse(span, mode="eval")):
        if isinstance(node, ast.Call):
            function = resolve(ast.unparse(node.func))
            given: list[Any] = [None] * len(node.args)
            if "self" in (parameters := inspect.signature(function).parameters):
                given = [None, *given]
            keywords = [keyword.arg for keyword in node.keywords]
            assert all(name in parameters for name in keywords), span
            inspect.signature(function).bind_partial(*given, **dict.fromkeys(map(str, keywords)))
        elif isinstance(node, ast.Attribute):
            resolve(ast.unparse(node))


def names_in(text: str) -> list[str]:
    """Return the code spans in the last column of the tables that `<!-- names -->` marks."""
    spans: list[str] = []
    for table in re.findall(r"<!-- names -->\n\n((?:\|.*\n)+)", text):
        for row in table.splitlines()[2:]:
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            assert len(cells) == 2, row
            spans += re.findall(r"`([^`]+)`", cells[1])
    return spans


def test_the_names_of_focaldet_in_the_tables_exist() -> None:
    text = (TUTORIALS / "coming_from.md").read_text(encoding="utf-8")
    names = names_in(text)
    assert text.count("<!-- names -->") == 5
    assert len(names) > 100
    for name in names:
        check_name(name)


@pytest.mark.parametrize(
    "wrong",
    [
        "score_thresh",
        "assigner='other'",
        "focaldet train --image-min-side",
        "RetinaNet.load_model(path)",
        "model.predict(images, patch_size=4)",
        "focaldet.datasets.CocoDataset",
        "detections.pred_boxes",
    ],
)
def test_a_name_that_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises((AssertionError, AttributeError, ValueError)):
        check_name(wrong)
