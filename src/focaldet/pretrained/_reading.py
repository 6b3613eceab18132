"""Read tensors from files that may be damaged or malicious, without running any code in them."""

from __future__ import annotations

import io
import pickle
import re
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import torch

from focaldet._checks import existing_file, shortened
from focaldet._extras import import_extra
from focaldet.errors import CheckpointError
from focaldet.pretrained._budget import (
    check_archive_size,
    check_contents,
    check_pickle,
    check_tensor_sizes,
)
from focaldet.pretrained._checkpoint import CheckpointFile
from focaldet.pretrained._hdf5 import is_hdf5, read_hdf5
from focaldet.pretrained._state_dict import WeightSet, choose, find_weight_sets
from focaldet.pretrained._tensor_values import unsupported_kind
from focaldet.pretrained._unpickling import UnsafePickleError, admitted_names, unpickle_arrays

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


__all__ = ["check_tensors", "read_checkpoint", "read_tensors", "read_weight_sets"]


def read_tensors(path: str | os.PathLike[str], *, weights: str | None = None) -> dict[str, Tensor]:
    """Read the state dict in a file, without running any code in it.

    Args:
        path: A ``.safetensors`` file; a ``torch.save`` file with a state dict, either alone or within
            dictionaries; a zip archive of one such file; a ``.pkl`` or ``.pdparams`` file of NumPy
            arrays; or an HDF5 file of Keras (``.h5``).
        weights: Which state dict to read if there are several: the keys of the dictionaries that
            contain it, joined with dots, or a part of that. None reads the one that is called "model"
            or "state_dict", not an average.

    Returns:
        The tensors by the file's own key names, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, would run code, contains no state dict, or contains
            several and it is not clear which to read.
        ImportError: If a ``.safetensors`` file is given and safetensors is not installed.

    .. versionadded:: 0.3.0
    """
    return dict(read_checkpoint(path, weights=weights).tensors)


def read_checkpoint(path: str | os.PathLike[str], *, weights: str | None = None) -> CheckpointFile:
    """Read a state dict in a file, and the other entries of the file.

    See :func:`read_tensors` for the arguments, the formats and the errors.
    """
    sets = read_weight_sets(path)
    path = existing_file("path", path)
    most = max(len(one.tensors) for one in sets)
    sets = [one for one in sets if 2 * len(one.tensors) > most]  # without those of optimisers
    try:
        one = sets[choose([one.path for one in sets], weights)]
    except CheckpointError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}. {error}") from error
    check_tensors(one.tensors, path)
    return CheckpointFile(one.tensors, one.extras, path.name)


def read_weight_sets(path: str | os.PathLike[str]) -> list[WeightSet]:
    """Read all sets of weights in a file. At least one is returned.

    See :func:`read_tensors` for the formats and the errors.
    """
    path = existing_file("path", path)
    if path.suffix.lower() == ".safetensors":
        return _sets_in(_read_safetensors(path), path)
    try:
        if is_hdf5(path):
            tensors, described = read_hdf5(path)
            return [WeightSet((), tensors, ({**described, **tensors},))]
        pickled = path.suffix.lower() in _PICKLE_SUFFIXES
        contents = _read_pickle(path) if pickled else _read_torch(path)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{str(path)!r} was not opened: it asks for {error}, but a {path.suffix} file may only "
            f"contain NumPy arrays. {_SAVE_STATE_DICT}"
        ) from error
    except pickle.UnpicklingError as error:
        name = _IMPORTED.search(str(error))
        if name is None and not _CALLED.search(str(error)):
            raise _damaged(path, error) from error
        asked_for = "a call of an unknown function" if name is None else name[1]
        raise CheckpointError(
            f"{str(path)!r} was not opened: it asks for {asked_for}, which could run code. "
            f"{_SAVE_STATE_DICT}"
        ) from error
    except _TorchScriptError as error:
        raise CheckpointError(
            f"{str(path)!r} was not opened: it is a TorchScript archive, which consists of code. Save the "
            "state dict of the model that it was made from: torch.save(model.state_dict(), path)."
        ) from error
    except _BROKEN as error:
        raise _damaged(path, error) from error
    return _sets_in(contents, path)


def _sets_in(contents: object, path: Path) -> list[WeightSet]:
    sets = find_weight_sets(contents)
    if not sets:
        raise CheckpointError(
            f"{str(path)!r} contains no state dict, but {_describe(contents)}. {_SAVE_STATE_DICT}"
        )
    return sets


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless all tensors of a file hold plain numbers, and not far too many for its size."""
    for key, tensor in tensors.items():
        kind = unsupported_kind(tensor)
        if kind:
            raise CheckpointError(
                f"Cannot read {str(path)!r}: {shortened(key)} is {kind}. {_SAVE_PLAIN_TENSORS}"
            )
    try:
        check_tensor_sizes(tensors.values(), path.stat().st_size)
    except ValueError as error:
        raise _damaged(path, error) from error


class _TorchScriptError(Exception):
    """A file is a TorchScript archive."""


_SAVE_PLAIN_TENSORS = "Save dense tensors with values, such as those of model.cpu().state_dict()."
_SAVE_STATE_DICT = "Save the state dict alone: torch.save(model.state_dict(), path)."
_IMPORTED = re.compile(r"GLOBAL ([\w.]*\w)")  # in torch's message
_CALLED = re.compile("call reduce for unrecognized function|Can only (?:create new object|build)")
_OPERAND = re.compile(r"Unsupported operand \d+")  # in torch's message, too
_MAX_DETAIL = 200  # characters of a message that may repeat a damaged file's bytes
_OTHER_CONTENTS = {
    b"<": "it is a web page, perhaps a login or error page",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself with git lfs pull",
    b"": "it is empty",
}
_BROKEN = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AssertionError),
    *(AttributeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, struct.error),
)


_PICKLE_SUFFIXES = (".pkl", ".pdparams")
_PADDLE_NAMES = "StructuredToParameterName@@"  # a table of names, next to the arrays


def _read_pickle(path: Path) -> Any:
    contents = unpickle_arrays(path.read_bytes())
    if path.suffix.lower() == ".pdparams" and isinstance(contents, dict):
        contents.pop(_PADDLE_NAMES, None)
    return contents


def _read_torch(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return _load(file, size)
        with zipfile.ZipFile(file) as archive:
            members = _checked_members(archive, size)
            if any(PurePosixPath(name).name == "data.pkl" for name in members):
                return _load(file, size)  # an archive that torch.save wrote
            inner = [name for name in members if name.endswith((".pth", ".pt"))]
            if len(inner) != 1:
                raise ValueError(
                    f"a zip archive with {len(inner)} .pth or .pt files instead of one"
                )
            data = archive.read(inner[0])
        return _load(io.BytesIO(data), len(data))


def _checked_members(archive: zipfile.ZipFile, size: int) -> list[str]:
    members = archive.infolist()
    check_archive_size(members, size)
    for info in members:
        name = info.filename
        odd = name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/")
        if odd or info.flag_bits & 1:
            raise ValueError(f"a zip archive with an unsafe member {name!r}")
    return [info.filename for info in members]


def _load(file: IO[bytes], size: int) -> Any:
    """Load a file that torch.save wrote, after adding up what its pickles would cost."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = _checked_members(archive, size)
            if any(PurePosixPath(name).name == "constants.pkl" for name in members):
                raise _TorchScriptError
            for name in members:
                if PurePosixPath(name).name == "data.pkl":
                    data = archive.read(name)
                    check_pickle(io.BytesIO(data), len(data), strict=False)
    else:
        file.seek(0)
        for _ in range(_PICKLES_BEFORE_STORAGES):
            check_pickle(file, size, strict=False)
    file.seek(0)
    contents = _load_unchecked(file)
    check_contents(contents, size)
    return contents


_PICKLES_BEFORE_STORAGES = 5  # in torch's format before version 1.6


def _load_unchecked(file: IO[bytes]) -> Any:
    # torch keeps the admitted names for the whole process: what a program has admitted is not replaced,
    # and another thread must not remove them before this file is read.
    with _admitting, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about pickles that others wrote
        taken = {_full_name(one) for one in torch.serialization.get_safe_globals()}
        names: list[Any] = [one for one in admitted_names() if one[1] not in taken]
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location="cpu", weights_only=True)


_admitting = threading.Lock()


def _full_name(admitted: Any) -> str:
    if isinstance(admitted, tuple):
        return str(admitted[1])
    return f"{admitted.__module__}.{admitted.__qualname__}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import_extra("safetensors", purpose=f"Reading {str(path)!r}", install="safetensors")
    import safetensors.torch

    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except (safetensors.SafetensorError, *_BROKEN) as error:
        raise _damaged(path, error) from error


def _describe(contents: object) -> str:
    if isinstance(contents, dict) and contents:
        return f"a dict with the keys {', '.join(map(shortened, list(contents)[:5]))}"
    return "an empty dict" if contents == {} else f"an object of type {type(contents).__name__}"


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    """Build the error for an unreadable file, without repeating torch's advice to trust it."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64).lstrip()
    except OSError:
        beginning = b"?"
    for known, description in _OTHER_CONTENTS.items():
        if beginning.startswith(known) if known else not beginning:
            return CheckpointError(f"Cannot read {str(path)!r}: {description}.")
    text = str(error).strip()
    if "weights_only" in text:
        operand = _OPERAND.search(text)
        detail = f"torch.save did not write it{f': {operand[0]}' if operand else ''}"
    else:
        detail = text.splitlines()[0][:_MAX_DETAIL] if text else type(error).__name__
    return CheckpointError(
        f"Cannot read {str(path)!r}: it is damaged or not a checkpoint ({detail})."
    )
