"""focaldet's own form of a checkpoint: a directory of ``config.json`` and the tensors."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from focaldet._atomic import atomic_write
from focaldet._checks import must_be
from focaldet.config import RetinaNetConfig
from focaldet.pretrained._checkpoint import Checkpoint
from focaldet.pretrained._reading import read_tensors

if TYPE_CHECKING:
    import os

__all__ = ["load", "save"]

_CONFIG = "config.json"
_SAFE, _TORCH = "model.safetensors", "model.pth"


def save(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` (``model.pth`` without that package).

    Each file is written aside and renamed, so that a failure leaves what was there before.

    Args:
        checkpoint: what to write.
        folder: made if it does not exist; files of these names in it are replaced.
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
        shutil.copymode(config_file, tensor_file)  # safetensors' are for the owner alone
    (folder / (_TORCH if name == _SAFE else _SAFE)).unlink(missing_ok=True)  # would be stale


def _safetensors_installed() -> bool:
    return importlib.util.find_spec("safetensors") is not None


def load(folder: Path, config: RetinaNetConfig | None = None) -> Checkpoint:
    """Read what :func:`save` wrote, with its own config or another.

    Raises:
        FileNotFoundError: ``config.json`` or the tensors are missing.
        ValueError: a damaged file, or a configuration that does not hold.
    """
    if not (folder / _CONFIG).is_file():
        got = f"{str(folder)!r} without {_CONFIG}"
        raise FileNotFoundError(must_be("source", "a directory written by save_pretrained", got))
    for name in (_SAFE, _TORCH):
        if (folder / name).is_file():
            written = _read_config(folder / _CONFIG)
            return Checkpoint(config or written, read_tensors(folder / name))
    inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
    remedy = f"Models are in its {' and '.join(map(repr, inside))}: give one." if inside else ""
    got = f"{str(folder)!r} with neither"
    condition = f"a directory with {_SAFE} or {_TORCH}"
    raise FileNotFoundError(must_be("source", condition, got, remedy))


def _read_config(path: Path) -> RetinaNetConfig:
    try:
        return RetinaNetConfig.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of which UnicodeDecodeError is one
        raise ValueError(f"{str(path)!r}: {error}") from error
