"""Tensors out of files that may be damaged, or made to do harm: no code in them is ever run."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import torch

from focaldet._checks import must_be
from focaldet.pretrained._checkpoint import CheckpointFile
from focaldet.pretrained._unpickling import RefusedError, unpickle_arrays

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

__all__ = ["read_checkpoint", "read_tensors"]

_WRAPPERS = ("model", "state_dict")  # under which training scripts keep the state dict
_GREATEST_MEMBER = 2**33  # bytes; no published RetinaNet has a sixteenth of it


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, on the CPU: what :func:`read_checkpoint` says, without the rest."""
    return dict(read_checkpoint(path).tensors)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read a state dict and what else lies in the file, on the CPU.

    Args:
        path: a ``.safetensors`` file; a ``torch.save`` file that holds a state dict, alone or as
            "model" or "state_dict" of a dictionary; a zip archive of one such file; or a ``.pkl`` file
            of NumPy arrays.

    Raises:
        ImportError: a safetensors file without the package safetensors.
        ValueError: a damaged file, one that would run code, or one that holds no state dict.
    """
    if path.suffix.lower() == ".safetensors":
        return CheckpointFile(_read_safetensors(path), {}, path.name)
    try:
        content = _read_pickle(path) if path.suffix.lower() == ".pkl" else _read_torch(path)
    except RefusedError as error:
        got = f"{str(path)!r}, which asks for {error}"
        raise ValueError(must_be("source", "a pickle of NumPy arrays", got, _NOT_OPENED)) from error
    except pickle.UnpicklingError as error:
        name = _IMPORTED.search(str(error))
        if name is None:  # not even a pickle of such objects
            raise ValueError(_damaged(path, error)) from error
        remedy = f"{_NOT_OPENED} Save its state dict alone: torch.save(model.state_dict(), path)."
        got = f"{str(path)!r}, which asks for {name[1]}: only running its code would restore it"
        raise ValueError(must_be("source", "a file of plain tensors", got, remedy)) from error
    except _BROKEN as error:
        raise ValueError(_damaged(path, error)) from error
    found = _state_dict_in(content)
    if found is None:
        got = f"{str(path)!r} holding a {type(content).__name__}"
        raise ValueError(must_be("source", "a file with a state dict", got))
    return CheckpointFile(*found, path.name)


_NOT_OPENED = "It was not opened."
_IMPORTED = re.compile(r"GLOBAL ([\w.]*\w)")  # in torch's message
_OPERAND = re.compile(r"Unsupported operand \d+")  # likewise
_LONG_ENOUGH = 200  # letters of a message that may repeat a damaged file's bytes
_BEGINNINGS = {
    b"<": "a web page, it seems",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
    b"": "empty",
}
_BROKEN = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AssertionError),
    *(AttributeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, struct.error),
)


def _read_pickle(path: Path) -> Any:
    return unpickle_arrays(path.read_bytes())


def _read_torch(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        return _load(path)
    with zipfile.ZipFile(path) as archive:
        members = _checked_members(archive)
        if any(PurePosixPath(name).name == "data.pkl" for name in members):
            return _load(path)  # torch.save's own archive
        inner = [name for name in members if name.endswith((".pth", ".pt"))]
        if len(inner) != 1:
            raise ValueError(f"a zip archive with {len(inner)} files of weights")
        return _load(io.BytesIO(archive.read(inner[0])))


def _checked_members(archive: zipfile.ZipFile) -> list[str]:
    names = archive.namelist()
    for info in archive.infolist():
        name = info.filename
        odd = name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/")
        if odd or names.count(name) > 1 or info.flag_bits & 1 or info.file_size > _GREATEST_MEMBER:
            raise ValueError(f"a zip archive with an unsafe member {name!r}")
    return names


def _load(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about pickles of other making
        return torch.load(file, map_location="cpu", weights_only=True)


def _state_dict_in(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state dict in a file's content, and the entries beside it."""
    extras: dict[str, Any] = {}
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            extras |= {key: value for key, value in content.items() if key != wrapper}
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        return None
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        return None
    return dict(content), extras


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except (safetensors.SafetensorError, *_BROKEN) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: BaseException) -> str:
    got = f"{str(path)!r} ({_reason(path, error)})"
    return must_be("source", "a readable checkpoint", got, "It is damaged or of another kind.")


def _reason(path: Path, error: BaseException) -> str:
    """Say why a file could not be read, but never repeat torch's advice to trust it."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64).lstrip()
    except OSError:
        beginning = b"?"
    for known, kind in _BEGINNINGS.items():
        if beginning.startswith(known) if known else not beginning:
            return kind
    text = str(error).strip()
    if "weights_only" in text:
        operand = _OPERAND.search(text)
        return f"not as torch.save writes it{f': {operand[0]}' if operand else ''}"
    return text.splitlines()[0][:_LONG_ENOUGH] if text else type(error).__name__
