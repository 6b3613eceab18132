"""focaldet's own checkpoints: a folder with ``config.json`` and the tensors."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from focaldet._atomic import atomic_write
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import Checkpoint
from focaldet.pretrained._reading import read_tensors

if TYPE_CHECKING:
    import os

__all__ = ["is_own_folder", "load_folder", "model_of_run", "no_checkpoint_in", "save_checkpoint"]

_logger = logging.getLogger(__name__)
_CONFIG = "config.json"
_RUN, _BEST, _LAST = "run.json", "best", "last"
_SAFE, _TORCH = "model.safetensors", "model.pth"
_MAX_CONFIG_SIZE = 1 << 24  # bytes


def save_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` (``model.pth`` without that package).

    Each file is written under a temporary name and then renamed, so a failure leaves the old files
    in place.

    Args:
        checkpoint: The checkpoint to write.
        folder: The folder, which is created if it does not exist. Files with these names are
            replaced.
    """
    if checkpoint.config.criterion == "custom":
        warnings.warn(
            "config.json cannot describe a custom criterion. Predicting works without it; to train or "
            "to compute losses, pass it again: RetinaNet.from_pretrained(..., criterion=...).",
            UserWarning,
            stacklevel=3,
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}

    def write_tensors(path: Path) -> None:
        if name == _SAFE:
            import safetensors.torch

            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)

    def write_config(path: Path) -> None:
        path.write_text(checkpoint.config.to_json() + "\n", encoding="utf-8")

    name = _SAFE if _safetensors_installed() else _TORCH
    with (
        atomic_write(folder / name) as tensor_file,
        atomic_write(folder / _CONFIG) as config_file,
    ):
        write_tensors(tensor_file)
        write_config(config_file)
        shutil.copymode(config_file, tensor_file)  # safetensors makes its file private to the owner
    # A file in the other format would hold the previous weights.
    (folder / (_TORCH if name == _SAFE else _SAFE)).unlink(missing_ok=True)


def _safetensors_installed() -> bool:
    return importlib.util.find_spec("safetensors") is not None


def model_of_run(folder: Path) -> Path:
    """Return the folder of the best model of a run, or else of its last, and log which it is.

    Any other folder is returned unchanged, also a run that someone has saved a model into.

    Raises:
        FileNotFoundError: If the run has written no model yet.
    """
    if not (folder / _RUN).is_file() or _has_tensors(folder):
        return folder
    for name in (_BEST, _LAST):
        if _has_tensors(folder / name):
            _logger.info("Loading the %s model of the run %r.", name, str(folder))
            return folder / name
    raise FileNotFoundError(
        f"The run in {str(folder)!r} has no model in {_BEST!r} or {_LAST!r} yet. They are written "
        "when an epoch ends."
    )


def _has_tensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_SAFE, _TORCH))


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder has a ``config.json`` that is not that of a different project."""
    path = folder / _CONFIG
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG_SIZE:
        return path.is_file()
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return True  # whose error says what is wrong with it
    return not isinstance(values, dict) or "format_version" in values


def load_folder(folder: Path) -> Checkpoint:
    """Read a folder that :func:`save_checkpoint` wrote.

    Raises:
        FileNotFoundError: If ``config.json`` or the tensors are missing.
        CheckpointError: If a file is damaged or the configuration is invalid.
    """
    for name in (_SAFE, _TORCH):
        if (folder / name).is_file():
            return Checkpoint(_read_config(folder / _CONFIG), read_tensors(folder / name))
    raise no_checkpoint_in(folder)


def no_checkpoint_in(folder: Path) -> FileNotFoundError:
    """Build the error for a folder without a checkpoint."""
    if (folder / _CONFIG).is_file():
        return FileNotFoundError(
            f"No {_SAFE} or {_TORCH} in {str(folder)!r}.{_models_within(folder)}"
        )
    return FileNotFoundError(
        f"No {_CONFIG} in {str(folder)!r}, so it was not written by save_pretrained, and no checkpoint of "
        f"a different project.{_models_within(folder)}"
    )


def _models_within(folder: Path) -> str:
    """Return a sentence that names the models in a folder's subfolders, such as those of a run."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
    if not inside:
        return ""
    return f" Pass one of its subfolders with a model: {', '.join(map(repr, inside))}."


def _read_config(path: Path) -> RetinaNetConfig:
    size = path.stat().st_size
    if size > _MAX_CONFIG_SIZE:
        raise CheckpointError(
            f"Cannot read {str(path)!r}: it has {size} bytes, so it is no config."
        )
    try:
        return RetinaNetConfig.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"Cannot read {str(path)!r}: it is not UTF-8 text ({error})."
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: it is nested too deeply.") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"Cannot read {str(path)!r}. {error}") from error
