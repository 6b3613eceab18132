"""Find the state dict within the contents of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_state_dict"]

# Entries under which training scripts save the state dict, from the outermost to the innermost.
_CONTAINERS = ("model", "state_dict", "blobs")


def find_state_dict(contents: object) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state dict in a file's contents and the other entries, or None if there is none.

    >>> find_state_dict({"state_dict": {"w": torch.tensor(1)}, "epoch": 3})
    ({'w': tensor(1)}, {'epoch': 3})
    """
    extras: dict[str, Any] = {}
    for container in _CONTAINERS:
        if isinstance(contents, dict) and isinstance(contents.get(container), dict):
            extras |= {key: value for key, value in contents.items() if key != container}
            contents = contents[container]
    if not isinstance(contents, dict) or not contents:
        return None
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in contents.items()):
        return None
    return dict(contents), extras
