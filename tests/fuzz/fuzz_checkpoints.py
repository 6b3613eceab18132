"""Fuzz checkpoints: torch files, old and new, pickles, zip archives, and folders with safetensors.

``python -m tests.fuzz.fuzz_checkpoints --seconds 300`` runs it for long.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from focaldet import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained import Checkpoint, check_fit, load_checkpoint, save_checkpoint
from tests.fuzz.mutations import mutate_bytes, mutate_json, run_main
from tests.helpers.checkpoint_files import FILE_FORMATS, WRAPPERS, prefixed, write_checkpoint

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

__all__ = ["ALLOWED", "attempt", "attempt_in"]

# CheckpointError is a ValueError, but any other ValueError is a failure.
ALLOWED: tuple[type[Exception], ...] = (CheckpointError, FileNotFoundError)

_CONFIG = RetinaNetConfig(
    num_classes=2, backbone="resnet18", fpn_channels=8, head_depth=1, class_names=("a", "b")
)
_ODD_TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: torch.zeros(1).expand(2**40),
    lambda: torch.empty(2, 3, device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.full((2, 2), torch.nan),
    lambda: torch.ones((), dtype=torch.int64),
    lambda: torch.ones(0, 3),
    lambda: torch.ones(2, dtype=torch.complex64),
    lambda: "text",
    lambda: None,
    dict,
)


@functools.cache
def _keys() -> tuple[dict[str, torch.Tensor], ...]:
    """Return state dicts of a family each with few and tiny tensors: enough to be recognised."""
    names = (
        ("backbone.body.conv1.weight", "head.classification_head.cls_logits.weight"),
        ("backbone.bottom_up.stem.conv1.weight", "head.cls_score.weight", "head.bbox_pred.weight"),
        ("conv1.weight", "fpn.P5_1.weight", "classificationModel.output.weight"),
        ("fpn.lateral.0.weight", "fpn.p7.weight"),
        ("w",),
    )
    more = (
        ("head.regression_head.bbox_reg.weight", "head.regression_head.bbox_reg.bias"),
        ("backbone.fpn_lateral3.weight", "head.bbox_pred.bias", "pixel_mean"),
        ("regressionModel.output.weight", "regressionModel.output.bias"),
        ("head.class_logits.weight", "head.box_deltas.weight"),
        ("bn.num_batches_tracked",),
    )
    return tuple(
        {key: torch.ones(36, 2, 1, 1) for key in (*first, *second)}
        for first, second in zip(names, more, strict=True)
    )


@functools.cache
def _folder_files() -> tuple[dict[str, Any], bytes, dict[str, torch.Tensor]]:
    """Return the config, the safetensors file and the state dict of a few weights."""
    state = {
        "a.weight": torch.ones(3, 2, 1, 1),
        "a.bias": torch.ones(3),
        "b.count": torch.tensor(0),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Checkpoint(_CONFIG, state), folder)
        files = Path(folder)
        config = json.loads((files / "config.json").read_text(encoding="utf-8"))
        path = files / "model.safetensors"
        data = path.read_bytes() if path.exists() else b""
    return config, data, state


def attempt(rng: random.Random) -> None:
    """Damage a checkpoint and load it."""
    with tempfile.TemporaryDirectory() as folder:
        attempt_in(Path(folder), rng)


def attempt_in(folder: Path, rng: random.Random) -> None:
    """Damage a checkpoint and load it, in an empty folder."""
    if rng.random() < 0.3:
        _damage_folder(folder, rng)
        source = folder
    else:
        source = _damaged_file(folder, rng)
    checkpoint = load_checkpoint(source)
    check_fit(_folder_files()[2], checkpoint.tensors)


def _damage_folder(folder: Path, rng: random.Random) -> None:
    config, data, state = _folder_files()
    if rng.random() < 0.5:
        config = mutate_json(config, rng)
    text = json.dumps(config).encode()
    if rng.random() < 0.3:
        text = mutate_bytes(text, rng)
    (folder / "config.json").write_bytes(text)
    if data and rng.random() < 0.8:
        length = int.from_bytes(data[:8], "little")
        header, body = data[8 : 8 + length], data[8 + length :]
        if rng.random() < 0.5:
            header = json.dumps(mutate_json(json.loads(header), rng)).encode()
        else:
            header = mutate_bytes(header, rng)
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63, length))
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + body)
    else:
        odd = {rng.choice(list(state)): rng.choice(_ODD_TENSORS)()}
        torch.save(state | odd, folder / "model.pth")


def _damaged_file(folder: Path, rng: random.Random) -> Path:
    tensors: dict[str, Any] = dict(rng.choice(_keys()))
    if rng.random() < 0.3:
        tensors[rng.choice(list(tensors))] = rng.choice(_ODD_TENSORS)()
    file_format = rng.choice(FILE_FORMATS)
    if file_format == "pickle":
        tensors = {key: np.ones((36, 2, 1, 1), dtype="f4") for key in tensors}
    contents: Any = {"model": tensors, "ratios": [1.0], "meta": {"config": "x"}, "epoch": 3}
    if rng.random() < 0.5:
        contents = rng.choice(list(WRAPPERS.values()))(tensors)
        if rng.random() < 0.3:
            contents = {"x": contents, "model_ema": prefixed("module.", tensors)}
    if rng.random() < 0.3:
        contents["ratios"] = mutate_json({"ratios": [0.5, 1.0]}, rng)
    if file_format.startswith("pickle"):
        path = folder / ("x.pkl" if file_format == "pickle" else "x.pth")
        data = pickle.dumps(contents, rng.randint(0, pickle.HIGHEST_PROTOCOL))
        path.write_bytes(data)
    else:
        path = write_checkpoint(contents, folder / "x.pth", file_format)
        data = path.read_bytes()
    if file_format == "torch" and rng.random() < 0.7:
        data = _with_damaged_member(data, rng)
    else:
        data = mutate_bytes(data, rng)
    path.write_bytes(data)
    return path


def _with_damaged_member(data: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with one member damaged and a checksum that fits: torch reads on."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in members if name.endswith("data.pkl")] * 5 + list(members))
    members[name] = mutate_bytes(members[name], rng)
    written = io.BytesIO()
    with zipfile.ZipFile(
        written, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as out:
        for member, content in members.items():
            out.writestr(member, content)
    return written.getvalue()


if __name__ == "__main__":
    sys.exit(run_main("checkpoints", attempt, ALLOWED))
