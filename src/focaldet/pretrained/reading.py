"""Tensors out of files that may be damaged, or made to do harm: no code in them is ever run."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import must_be

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["read_tensors"]

_WRAPPERS = ("model", "state_dict")  # under which training scripts keep the state dict


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, on the CPU.

    Args:
        path: a ``.safetensors`` file, or a ``torch.save`` file that holds a state dict, alone or as
            "model" or "state_dict" of a dictionary.

    Raises:
        ImportError: a safetensors file without the package safetensors.
        ValueError: a damaged file, one that would run code, or one that holds no state dict.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles of other making
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):  # no name of anything to import: not even such a pickle
            raise ValueError(_damaged(path, error)) from error
        remedy = (
            "It was not opened. Save its state dict alone: torch.save(model.state_dict(), path)."
        )
        got = f"{str(path)!r}, which holds objects that only running its code would restore"
        raise ValueError(must_be("source", "a file of plain tensors", got, remedy)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(_damaged(path, error)) from error
    tensors = _state_dict_in(content)
    if tensors is None:
        got = f"{str(path)!r} holding a {type(content).__name__}"
        raise ValueError(must_be("source", "a file with a state dict", got))
    return tensors


def _state_dict_in(content: Any) -> dict[str, Tensor] | None:
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        return None
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        return None
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    got = f"{str(path)!r} ({reason[0] if reason else type(error).__name__})"
    return must_be("source", "a readable checkpoint", got, "It is damaged or of another kind.")
