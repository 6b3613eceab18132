"""Fuzz the metadata of exported files: ``python -m tests.fuzz.fuzz_metadata --seconds 300``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from focaldet import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.export import ExportMetadata
from tests.fuzz.mutations import ODD_VALUES, mutate_bytes, mutate_json, run_main

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "attempt"]

ALLOWED = (CheckpointError,)

_METADATA = [
    ExportMetadata(
        config=RetinaNetConfig(num_classes=2, class_names=("cat", "owl")),
        kind="maps",
        strides=(8, 16, 32),
        fixed_shape=shape,
        opset=20,
        focaldet_version="0.3.0",
    ).to_strings()
    for shape in (None, (1, 64, 96))
]
_READ = [
    f"focaldet.{field}"
    for field in (*("format", "version", "kind", "strides", "fixed_shape", "opset"), "config")
]


def attempt(rng: random.Random) -> None:
    """Read metadata with a few damaged fields, and describe what was read."""
    values: dict[str, Any] = dict(rng.choice(_METADATA))
    for key in rng.choices(_READ, weights=[1, 1, 2, 4, 4, 4, 12], k=rng.randint(1, 2)):
        if key in values:
            values[key] = _damaged(values[key], rng)
        if rng.random() < 0.02:
            values.pop(key, None)
    metadata = ExportMetadata.from_strings("x.onnx", values)
    assert ExportMetadata.from_strings("x.onnx", metadata.to_strings()) == metadata
    metadata.check_graph("x.onnx", metadata.inputs, metadata.outputs)


def _damaged(text: str, rng: random.Random) -> str:
    kind = rng.choice(("bytes", "bytes", "json", "json", "json", "nested", "odd"))
    if kind == "nested":
        return rng.choice(("[", '{"a":', "[[{")) * rng.choice((500, 5000, 100_000))
    if kind == "odd":
        return json.dumps(rng.choice(ODD_VALUES))
    if kind == "json":
        try:
            return json.dumps(mutate_json(json.loads(text), rng))
        except (ValueError, RecursionError):  # a plain word, or damaged before
            pass
    return mutate_bytes(text.encode(), rng).decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(run_main("the metadata of exported files", attempt, ALLOWED))
