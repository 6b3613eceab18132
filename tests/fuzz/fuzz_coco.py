"""Fuzz COCO files: annotations, results, and the cache next to annotations.

Annotations are read with and without msgspec, and both must give the same table or the same error.

    python -m tests.fuzz.fuzz_coco --seconds 300
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from focaldet.datasets import AnnotationTable, read_coco
from focaldet.datasets._cache import cache_path
from focaldet.errors import AnnotationError
from focaldet.evaluation import evaluate_coco
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_text, run_main
from tests.helpers.coco_files import coco_content, coco_file

if TYPE_CHECKING:
    import random

__all__ = ["attempt"]

_RESULTS = [
    {"image_id": 10, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5},
    {"image_id": 30, "category_id": 2, "bbox": [10.5, 0, 4, 8.0], "score": 1},
]


def attempt(rng: random.Random) -> None:
    """Damage a file of a random kind and read it. Any error that gets out is a fault."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy must not warn of overflow
        warnings.simplefilter("ignore", UserWarning)
        kind = rng.choice((_read_annotations, _read_annotations, _read_results, _read_cache))
        kind(Path(folder), rng)


def _read_annotations(folder: Path, rng: random.Random) -> None:
    path = folder / "instances_some.json"
    content = coco_content()
    changed = _mutated_file(content, path, rng)
    outcomes = []
    for without_msgspec in (False, True):
        modules = {"msgspec": None} if without_msgspec else {}
        with mock.patch.dict(sys.modules, modules):
            outcomes.append(_outcome(path))
    if outcomes[0] != outcomes[1]:
        raise AssertionError(f"with msgspec: {outcomes[0]}; without: {outcomes[1]}")
    for given in (path, changed) if isinstance(changed, dict) else (path,):
        with contextlib.suppress(AnnotationError):
            evaluate_coco(given, [])


def _outcome(path: Path) -> str:
    try:
        table = read_coco(path)
    except AnnotationError as error:
        if not str(error).isprintable():
            raise AssertionError(f"the error contains control characters: {error!r}") from error
        return str(error)
    evaluate_coco(table, [])
    return _text(table)


def _read_results(folder: Path, rng: random.Random) -> None:
    path = folder / "results.json"
    changed = _mutated_file(_RESULTS, path, rng)
    for given in (path, changed) if isinstance(changed, list) else (path,):
        try:
            evaluate_coco(coco_content(), given)
        except AnnotationError:
            pass
        except ValueError as error:  # documented for ids that the annotations do not have
            if "not in the annotations" not in str(error):
                raise


def _read_cache(folder: Path, rng: random.Random) -> None:
    path = coco_file(folder)
    with mock.patch("focaldet.datasets.readers._coco._CACHED_FROM", 0):
        expected = _text(read_coco(path))
        cache = cache_path(path)
        if rng.random() < 0.6:
            cache.write_bytes(mutate_bytes(cache.read_bytes(), rng))
            if _text(read_coco(path)) != expected:
                raise AssertionError("a damaged cache changed the table")
            return
        _rewrite(cache, rng)
        table = read_coco(path)
        _text(table)
        evaluate_coco(table, [])


def _rewrite(cache: Path, rng: random.Random) -> None:
    """Change values of the cache, and write it as an intact archive."""
    with np.load(cache) as file:
        arrays = dict(file)
    name = rng.choice(sorted(arrays))
    array = arrays[name].copy()
    kind = rng.choice(("byte", "swap", "cut", "type", "remove", "metadata"))
    if kind == "byte":
        content = bytearray(array.tobytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        arrays[name] = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
    elif kind == "swap":
        other = rng.choice(sorted(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif kind == "cut":
        arrays[name] = array[: rng.randrange(len(array))]
    elif kind == "type":
        arrays[name] = array.astype(rng.choice((">i8", "f4", "u1", "U5", "M8[s]", "c16", "?")))
    elif kind == "remove":
        del arrays[name]
    else:
        metadata = mutate_json(json.loads(arrays["metadata"].tobytes()), rng)
        arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with cache.open("wb") as file:
        np.savez(file, **arrays)


def _mutated_file(content: Any, path: Path, rng: random.Random) -> Any:
    """Write damaged content, and return it unless only the text of the file is damaged."""
    if rng.random() < 0.7:
        changed = mutate_json(content, rng)
        path.write_text(json.dumps(changed), encoding="utf-8")
        return copy.deepcopy(changed)
    path.write_bytes(mutate_text(json.dumps(content), rng))
    return None


def _text(table: AnnotationTable) -> str:
    """Return everything in a table as text, to compare tables."""
    values = {name: getattr(table, name) for name in AnnotationTable.__dataclass_fields__}
    values["file_names"] = list(table.file_names)
    return repr({n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in values.items()})


if __name__ == "__main__":
    sys.exit(run_main("COCO files", attempt, allowed=()))
