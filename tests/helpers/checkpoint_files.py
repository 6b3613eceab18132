"""Checkpoint files in every format in which one may come, and an object that runs code if unpickled."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "FILE_FORMATS",
    "WRAPPERS",
    "Bomb",
    "foreign",
    "prefixed",
    "thin",
    "write_checkpoint",
]

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


@contextlib.contextmanager
def foreign(*names: str, base: type = object) -> Iterator[list[Any]]:
    """Make classes that are pickled under the full names of classes that are not installed.

    Args:
        *names: The full names, such as "mmengine.logging.history_buffer.HistoryBuffer".
        base: The base class of each.
    """
    classes = []
    with pytest.MonkeyPatch.context() as patch:
        for full_name in names:
            module_name, _, name = full_name.rpartition(".")

            def mean(self: Any) -> Any:
                return self

            mean.__module__, mean.__qualname__ = module_name, f"{name}.mean"
            made = type(name, (base,), {"__module__": module_name, "mean": mean})
            parts = module_name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parent not in sys.modules:
                    patch.setitem(sys.modules, parent, types.ModuleType(parent))
            patch.setattr(sys.modules[module_name], name, made, raising=False)
            classes.append(made)
        yield classes


def thin(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return tensors of any shapes that take no space in a file: each repeats a number of its own."""
    return {
        key: torch.full((1,) * len(shape), number / 1000, dtype=torch.float16).expand(*shape)
        if len(shape)
        else torch.tensor(number)
        for number, (key, shape) in enumerate(shapes.items(), start=1)
    }


WRAPPERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "DistributedDataParallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled, in a module": lambda state: prefixed("net._orig_mod.", state),
    "DistributedDataParallel of compiled": lambda state: prefixed("module._orig_mod.", state),
    "a module of one's own": lambda state: {"net": prefixed("some.other.detector.", state)},
    "Lightning": lambda state: {
        "state_dict": prefixed("model.", state),
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1},
    },
    "torchvision's reference training": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        "lr_scheduler": {"last_epoch": 3},
        "args": argparse.Namespace(data_path="coco", lr=0.02),
        "epoch": 3,
    },
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "deep": lambda state: {"run": {"checkpoint": {"weights": {"teacher": state}}}},
    "AveragedModel": lambda state: {
        "n_averaged": torch.tensor(7),
        **prefixed("module.", state),
    },
    "flat with other values": lambda state: {**state, "epoch": 3, "best": {"AP": 0.4}},
}
"""What training code wraps a state dict in."""


def prefixed(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with a prefix before each key."""
    return {prefix + key: value for key, value in state.items()}
