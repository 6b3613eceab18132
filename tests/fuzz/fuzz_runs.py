"""Damaged run folders: change one of the files that a run is resumed from, and resume it.

Run it with ``python -m tests.fuzz.fuzz_runs --seconds 300``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from focaldet.training import RetinaNetModule, TrainingError, train
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_text, run_main
from tests.helpers.tiny_training import read_data, smallest_detector, tiny_options, write_data

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "attempt"]

ALLOWED: tuple[type[Exception], ...] = (TrainingError,)
_LAST = "checkpoints/last.ckpt"
_FILES = (*[_LAST] * 6, "run.json", "config.json", "metrics.csv")
_OPTIONS = {"epochs": 1, "batch_size": 1, "checkpoint_every": 1, "schedule": "cosine"}
_OPTIMIZERS = ("sgd", "adamw")
_OTHER_RUN = re.compile("model has a different configuration|options has ")
_ADVICE = re.compile("weights_only|trust|safe_globals")


class _CrashError(Exception):
    pass


@functools.cache
def _data() -> Any:
    folder = Path(tempfile.mkdtemp(prefix="focaldet_fuzz_"))
    return read_data(write_data(folder / "data", 2))


def _resume(folder: Path, optimizer: Any, *, resume: bool = True) -> None:
    options = tiny_options(**_OPTIONS, optimizer=optimizer, ema_decay=0.9)
    with mock.patch("matplotlib.figure.Figure.savefig"):  # drawing would take most of the time
        train(smallest_detector(), _data(), folder=folder, options=options, resume=resume)


@functools.cache
def _run(optimizer: str) -> dict[str, bytes]:
    """Return the files of a run that crashed in its second and last step."""
    original_step = RetinaNetModule.training_step

    def step(self: RetinaNetModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 1:
            raise _CrashError
        return original_step(self, batch, batch_idx)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        crashing = mock.patch.object(RetinaNetModule, "training_step", step)
        with crashing, contextlib.suppress(_CrashError):
            _resume(folder, optimizer, resume=False)
        return {file: (folder / file).read_bytes() for file in set(_FILES)}


def attempt(rng: random.Random) -> None:
    """Damage a file of a run that is not finished, and resume the run."""
    optimizer = rng.choice(_OPTIMIZERS)
    files = dict(_run(optimizer))
    damaged = rng.choice(_FILES)
    if damaged == _LAST:
        files[damaged] = _damaged_checkpoint(files[damaged], rng)
    elif damaged.endswith(".json") and rng.random() < 0.7:
        value = mutate_json(json.loads(files[damaged]), rng)
        files[damaged] = json.dumps(value).encode("utf-8", "surrogatepass")
    else:
        files[damaged] = mutate_text(files[damaged].decode(), rng)
    folder = Path(tempfile.mkdtemp(prefix="focaldet_fuzz_"))
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        _resume(folder, optimizer)
    except ValueError as error:
        if type(error) is not ValueError or not _OTHER_RUN.match(str(error)):
            raise
    except TrainingError as error:
        if _ADVICE.search(str(error)):
            raise AssertionError(str(error)) from error
        raise
    finally:
        shutil.rmtree(folder)


def _damaged_checkpoint(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(("bytes", "pickle", "values", "values", "values"))
    if kind == "bytes":
        return mutate_bytes(data, rng)
    if kind == "pickle":  # with a checksum that fits
        written = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(data)) as archive,
            zipfile.ZipFile(written, "w") as changed,
        ):
            for name in archive.namelist():
                content = archive.read(name)
                pickled = name.endswith("data.pkl")
                changed.writestr(name, mutate_bytes(content, rng) if pickled else content)
        return written.getvalue()
    written = io.BytesIO()
    torch.save(mutate_json(torch.load(io.BytesIO(data), weights_only=True), rng), written)
    return written.getvalue()


def main() -> int:
    """Fuzz without the log and the warnings of every run."""
    logging.getLogger("focaldet").addHandler(logging.NullHandler())
    logging.getLogger("focaldet").propagate = False
    warnings.simplefilter("ignore")
    for optimizer in _OPTIMIZERS:  # so that the first input does not take longer than others
        _run(optimizer)
    return run_main("run folders", attempt, ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
