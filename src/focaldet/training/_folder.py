"""A run's folder: claimed, or found to be the one to resume."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_only

import focaldet
from focaldet._atomic import atomic_write_text
from focaldet._checks import must_be
from focaldet.config import RetinaNetConfig
from focaldet.errors import TrainingError

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.training._options import TrainingOptions

__all__ = ["prepare", "step_of"]

_LOG = logging.getLogger("focaldet.training")


@rank_zero_only
def prepare(
    folder: Path, config: RetinaNetConfig, options: TrainingOptions, *, resume: bool
) -> None:
    """Make the folder, or see that it can be resumed; write what describes the run."""
    run = folder / "run.json"
    if folder.exists() and any(folder.iterdir()) and not (resume and run.is_file()):
        holds = "another run" if run.is_file() else "other files"
        remedy = "Choose another" + (", or resume." if run.is_file() else ".")
        condition = "a new or empty folder" + (" or that of a run" if resume else "")
        got = f"{str(folder)!r}, which holds {holds}"
        raise FileExistsError(must_be("folder", condition, got, remedy))
    values = dataclasses.asdict(options)
    if resume and run.is_file():
        _compare(folder, config, values)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "focaldet": focaldet.__version__,
        "torch": torch.__version__,
        "pytorch_lightning": importlib.metadata.version("pytorch-lightning"),
    }
    content = {"options": values, "versions": versions, "command": sys.argv}
    for path, text in (
        (folder / "config.json", config.to_json()),
        (run, json.dumps(content, indent=2)),
    ):
        atomic_write_text(path, text)


def _compare(folder: Path, config: RetinaNetConfig, values: dict[str, Any]) -> None:
    """Refuse to resume with another model, and say which options have changed."""
    before = RetinaNetConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    changed = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(before, field.name) != getattr(config, field.name)
    ]
    if changed:
        condition = f"the one of the run in {str(folder)!r}"
        raise ValueError(must_be("model", condition, f"one with another {', '.join(changed)}"))
    options = json.loads((folder / "run.json").read_text(encoding="utf-8"))["options"]
    for name, value in values.items():
        if name in options and options[name] != value:
            _LOG.info("Resuming with %s %s instead of %s.", name, value, options[name])


def step_of(last: Path) -> int | None:
    """Return the updates that a checkpoint has behind it, or None if there is no checkpoint."""
    if not last.is_file():
        _say(f"There is no checkpoint {str(last)!r} yet: the run begins anew.")
        return None
    try:
        state = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        step = int(state["global_step"])
    except (RuntimeError, OSError, KeyError, ValueError, EOFError) as error:
        raise TrainingError(f"The checkpoint {str(last)!r} is damaged: {error}") from error
    _say(f"Resuming from {str(last)!r} after update {step}.")
    return step


@rank_zero_only
def _say(line: str) -> None:
    _LOG.info(line)
