"""The files next to a checkpoint: the texts that may describe it, and which file of a folder it is."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from focaldet._checks import shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CONVENTIONAL",
    "MAX_TEXT_SIZE",
    "checkpoint_among",
    "describing_files",
    "file_within",
    "is_checkpoint_name",
    "texts_beside",
]

_logger = logging.getLogger(__name__)

MAX_TEXT_SIZE = 1 << 20  # bytes
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".pkl", ".ckpt", ".h5", ".hdf5", ".pdparams")
CONVENTIONAL = ("model.safetensors", "model.pth", "pytorch_model.bin", "model_final.pth")
"""The names of a model's file, of which the first is preferred if a folder has several."""

_TEXT_SUFFIXES = (".json", ".yaml", ".yml")
_CONFIGS = ("config.json", "config.yaml", "config.yml")


def is_checkpoint_name(name: str) -> bool:
    """Return whether a name has the suffix of a checkpoint.

    >>> is_checkpoint_name("model_final.pth"), is_checkpoint_name("README.md")
    (True, False)
    """
    return name.lower().endswith(_SUFFIXES)


def checkpoint_among(names: Iterable[str], where: str) -> str | None:
    """Return the checkpoint among the names of the files of a folder, or None if there is none.

    Raises:
        CheckpointError: If there are several, and none has a name that a model usually has.
    """
    found = sorted(name for name in names if is_checkpoint_name(name))
    for name in CONVENTIONAL:
        if name in found:
            if len(found) > 1:
                others = ", ".join(other for other in found if other != name)
                _logger.info("Loading %s of %s; the other checkpoints: %s.", name, where, others)
            return name
    if len(found) > 1:
        listed = ", ".join(map(shortened, found[:8])) + (", …" if len(found) > 8 else "")
        raise CheckpointError(
            f"{where!r} contains {len(found)} checkpoints: {listed}. Choose one with file_name=."
        )
    return found[0] if found else None


def describing_files(checkpoint: str, names: Iterable[str]) -> list[str]:
    """Return the names of the files that may describe a checkpoint in the same folder.

    >>> describing_files("owls.pth", ["config.json", "owls.yaml", "README.md", "owls.pth"])
    ['config.json', 'owls.yaml']
    """
    names = sorted(names)
    stem = PurePosixPath(checkpoint).stem
    wanted = {*_CONFIGS, *(f"{stem}{suffix}" for suffix in _TEXT_SUFFIXES)}
    yaml_files = [name for name in names if name.lower().endswith((".yaml", ".yml"))]
    if len(yaml_files) == 1 and sum(map(is_checkpoint_name, names)) == 1:
        wanted |= {yaml_files[0]}
    return [name for name in names if name in wanted]


def texts_beside(checkpoint: Path) -> dict[str, str]:
    """Return the texts of the files that may describe a checkpoint, by name.

    They are in its folder, except for the ``config.json`` of a run, which is in the folder above that
    of its checkpoints and is called ``../config.json`` here.
    """
    folder = checkpoint.parent
    names = [path.name for path in folder.iterdir() if path.is_file()]
    files = {name: folder / name for name in describing_files(checkpoint.name, names)}
    of_run = folder / ".." / "config.json"
    if folder.resolve().name == "checkpoints" and of_run.is_file():
        files["../config.json"] = of_run
    texts = {name: _text_of(path) for name, path in files.items() if path != checkpoint}
    return {name: text for name, text in texts.items() if text is not None}


def _text_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_SIZE + 1)
        if len(data) <= MAX_TEXT_SIZE:
            return data.decode("utf-8")
        reason = f"it has more than {MAX_TEXT_SIZE} bytes"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except OSError as error:
        reason = str(error)
    _logger.warning("Ignored %s next to the checkpoint: %s.", path.name, reason)
    return None


def file_within(folder: Path, file_name: str) -> Path:
    """Return a file of a folder by its name, or by its path within the folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path leads out of the folder.
    """
    within = Path(file_name)
    path = folder / within
    if within.is_absolute() or ".." in within.parts:
        raise ValueError(f"file_name must be within the folder, got {shortened(file_name)}.")
    if not path.is_file():
        raise FileNotFoundError(f"No file {file_name!r} in {str(folder)!r} (file_name).")
    return path
