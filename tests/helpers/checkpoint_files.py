"""Checkpoint files in every format in which one may come, and an object that runs code if unpickled."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["FILE_FORMATS", "Bomb", "write_checkpoint"]

FILE_FORMATS = [
    "torch",
    "torch old",
    "torch release",
    "torch old release",
    "pickle",
    "pickle as .pth",
]


def write_checkpoint(contents: Any, path: Path, file_format: str) -> Path:
    """Write a checkpoint file and return its path.

    Args:
        contents: The object to write.
        path: The path. Its suffix becomes the format's: ``.zip`` for a release, ``.pkl`` for a
            pickle, and ``.pth`` for "pickle as .pth".
        file_format: One of :data:`FILE_FORMATS`. "old" is torch's format before version 1.6, and a
            "release" is a zip archive of one file.
    """
    if file_format.startswith("pickle"):
        path = path.with_suffix(".pkl" if file_format == "pickle" else ".pth")
        path.write_bytes(pickle.dumps(contents))
        return path
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization="old" not in file_format)
    if file_format.endswith("release"):
        path = path.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("retinanet_rn50fpn.pth", buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())
    return path


class Bomb:
    """Creates a file when unpickled, by a call of a method ("call"), of ``eval`` or of ``open``."""

    def __init__(self, trace: Path, how: str = "call") -> None:
        self.trace, self.how = trace, how

    def __reduce__(self) -> Any:
        if self.how == "call":
            return Path.write_text, (self.trace, "ran")
        if self.how == "eval":
            return eval, (f"open({str(self.trace)!r}, 'w').write('ran')",)
        return io.open, (str(self.trace), "w")
