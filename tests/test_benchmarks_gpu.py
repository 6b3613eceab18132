"""The benchmark of a GPU runs on a CPU, so that it works the first time where there is a GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from tests.benchmarks import gpu, gpu_detector
from tests.benchmarks.gpu_timing import Row, Section, Setting, compare, run_section

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = Setting(torch.device("cpu"), small=True)
MS = r"\d+\.\d\d ms"


def rows_of(*sections: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run sections, and return the rows that they print, without titles."""
    status = gpu.main(["--device", "cpu", "--small", "--only", *sections])
    printed = capsys.readouterr().out
    assert status == 0, printed
    titles = {section.title for section in gpu.SECTIONS.values()}
    return [line for line in printed.splitlines()[1:] if line and line not in titles]


def fail(error: Exception) -> str:
    raise error


def test_a_section_prints_its_rows(capsys):
    rows = rows_of("loss-memory", capsys=capsys)
    assert [row.split()[0] for row in rows] == ["float32", "bfloat16", "float16"]


def test_times_are_relative_to_torchvision_and_detections_are_equal():
    row = gpu_detector.detection_row(CPU, "float32", 1, ["optimised", "graph"])
    times = rf"torchvision {MS}   optimised {MS} \(.*x\)   graph {MS} \(.*x\)"
    pattern = rf"{times}   graph: 100.0% shared, .*"
    assert re.fullmatch(pattern, row), row


def test_a_training_step_restores_the_memory_format_and_drops_gradients():
    row = gpu_detector.training_row(CPU, "float32", 2, torch.channels_last)
    assert re.fullmatch(rf"torchvision {MS}   focaldet {MS} \(.*x\)", row), row
    for model in gpu_detector.models(CPU).values():
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.is_contiguous() for parameter in model.parameters())


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
