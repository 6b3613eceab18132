"""The benchmark of a GPU runs on a CPU, so that it works the first time where there is a GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.gpu_timing import Row, Section, Setting, compare, run_section

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = Setting(torch.device("cpu"), small=True)


def rows_of(*sections: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run sections, and return the rows that they print, without titles."""
    status = gpu.main(["--device", "cpu", "--small", "--only", *sections])
    printed = capsys.readouterr().out
    assert status == 0, printed
    titles = {section.title for section in gpu.SECTIONS.values()}
    return [line for line in printed.splitlines()[1:] if line and line not in titles]


def fail(error: Exception) -> str:
    raise error


def test_times_of_detection_are_relative_to_torchvision(capsys):
    rows = rows_of("detection", capsys=capsys)
    assert len(rows) == 4
    ms = r"\d+\.\d\d ms"
    for row in rows[:2]:
        assert re.search(rf"torchvision {ms} +plain {ms} \(.*x\) +optimised {ms} \(.*x\)", row)
    exact = [row for row in rows if "float32" in row and "bfloat16" not in row]
    assert len(exact) == 2
    for row in exact:
        assert "100.0% shared" in row


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(capsys):
    rows = rows_of(*gpu.SECTIONS, capsys=capsys)
    assert len(rows) >= 6 + 3 + 1 + 2 + 4 + 4 + 4 + 4
    [waits] = [row for row in rows if "training, 2 images" in row and "fake tensors" in row]
    assert "focaldet 0 " in waits


def test_a_row_that_fails_does_not_stop_the_others(capsys):
    def rows(_: Setting) -> Iterator[Row]:
        yield Row("large", lambda: fail(torch.OutOfMemoryError("too large")))
        yield Row("wrong", lambda: fail(ValueError("no\nsuch size")))
        yield Row("good", lambda: "3 ms")

    assert not run_section(Section("Title", 60, rows), CPU)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["large", "out of memory"],
        ["wrong", "FAILED: ValueError: no such size"],
        ["good", "3 ms"],
    ]


def test_rows_beyond_the_time_of_a_section_are_left_out(capsys):
    def rows(_: Setting) -> Iterator[Row]:
        yield Row("late", lambda: fail(AssertionError("measured")))

    assert run_section(Section("Title", -1, rows), CPU._replace(small=False))
    assert "left out" in capsys.readouterr().out


def test_a_function_that_runs_out_of_memory_is_left_out_of_its_row():
    row = compare({"a": lambda: fail(torch.OutOfMemoryError()), "b": lambda: None}, CPU)
    assert re.fullmatch(r"a out of memory   b \d+\.\d\d ms", row)
