"""The folder of a run: create it, or check that the run in it can be resumed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pickle
import sys
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from focaldet._atomic import atomic_write_text
from focaldet._checks import shortened
from focaldet._version import __version__
from focaldet.config import RetinaNetConfig
from focaldet.errors import TrainingError
from focaldet.training._logging import LOG, log_on_rank_zero

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.training._options import TrainingOptions

__all__ = ["prepare_folder", "step_of_checkpoint"]

_DAMAGED = (RuntimeError, OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError)


@rank_zero_only
def prepare_folder(
    folder: Path, config: RetinaNetConfig, options: TrainingOptions, *, resume: bool
) -> None:
    """Create the folder, or check that its run can be resumed, and describe the run in it."""
    run = folder / "run.json"
    values = dataclasses.asdict(options)
    if resume and run.is_file():
        _compare_with_run(folder, config, values)
    else:
        _check_new_or_empty(folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "focaldet": __version__,
        "torch": torch.__version__,
        "pytorch_lightning": importlib.metadata.version("pytorch-lightning"),
    }
    content = {"options": values, "versions": versions, "command": sys.argv}
    for path, text in (
        (folder / "config.json", config.to_json()),
        (run, json.dumps(content, indent=2)),
    ):
        atomic_write_text(path, text)


def _check_new_or_empty(folder: Path, *, resume: bool) -> None:
    name = f"folder {str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{name} is a file; choose a new or empty folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if (folder / "run.json").is_file():
        raise FileExistsError(
            f"{name} already holds a run. Choose a new or empty folder, or resume that run."
        )
    if resume:
        raise FileExistsError(
            f"{name} holds other files, but no run that could be resumed. Choose the folder of a "
            "run, or a new or empty one."
        )
    raise FileExistsError(f"{name} is not empty. Choose a new or empty folder.")


def _compare_with_run(folder: Path, config: RetinaNetConfig, values: dict[str, Any]) -> None:
    """Raise if the run trained a different model, and log which options have changed."""
    trained = RetinaNetConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    changed = [
        f"{field.name}={shortened(new)} (was {shortened(old)})"
        for field in dataclasses.fields(config)
        if (new := getattr(config, field.name)) != (old := getattr(trained, field.name))
    ]
    if changed:
        raise ValueError(
            f"model has a different configuration from the run in {str(folder)!r}: "
            f"{', '.join(changed)}. Resume with the model of that run, or choose another folder."
        )
    options = json.loads((folder / "run.json").read_text(encoding="utf-8"))["options"]
    for name, value in values.items():
        if name in options and options[name] != value:
            LOG.info("Resuming with %s=%s (was %s).", name, value, options[name])


def step_of_checkpoint(last: Path) -> int | None:
    """Return the number of updates that led to a checkpoint, or None if it does not exist."""
    if not last.is_file():
        log_on_rank_zero(f"No checkpoint at {str(last)!r}; starting a new run.")
        return None
    try:
        state = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        step = int(state["global_step"])
    except _DAMAGED as error:  # torch's own message would blame how the file was saved
        raise TrainingError(
            f"Cannot resume from {str(last)!r}: it is damaged or not a checkpoint. Start a new run in "
            "another folder."
        ) from error
    log_on_rank_zero(f"Resuming from {str(last)!r} after update {step}.")
    return step
