"""Fuzz HDF5 files of Keras.

``python -m tests.fuzz.fuzz_hdf5 --seconds 300`` runs it for long.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from focaldet.errors import CheckpointError
from focaldet.pretrained import load_checkpoint
from tests.fuzz.mutations import mutate_bytes, mutate_json, run_main
from tests.helpers.reference_keras import model_config

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "attempt"]

# CheckpointError is a ValueError, but any other ValueError is a failure.
ALLOWED: tuple[type[Exception], ...] = (CheckpointError,)

_LAYERS = {
    "conv1/conv1/kernel:0": (7, 7, 3, 4),
    "bn_conv1/bn_conv1/gamma:0": (4,),
    "C5_reduced/C5_reduced/kernel:0": (1, 1, 4, 4),
    "regression_submodel/pyramid_regression/kernel:0": (3, 3, 2, 36),
    "classification_submodel/pyramid_classification/kernel:0": (3, 3, 2, 18),
}


@functools.cache
def _config() -> object:
    return model_config(converted=True)


def _written(text: str, folder: Path) -> bytes:
    """Return an HDF5 file of a few weights."""
    import h5py

    path = folder / "written.h5"
    with h5py.File(path, "w") as root:
        root.attrs["model_config"] = text
        weights = root.create_group("model_weights")
        for name, shape in _LAYERS.items():
            weights.create_dataset(name, data=np.ones(shape, np.float32))
    data = path.read_bytes()
    path.unlink()
    return data


def attempt(rng: random.Random) -> None:
    """Damage a file, or what it says about its layers, and load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = _config()
        if rng.random() < 0.3:
            described = mutate_json(described, rng)
        data = _written(json.dumps(described), folder)
        if rng.random() < 0.8:
            data = mutate_bytes(data, rng)
        path = folder / "x.h5"
        path.write_bytes(data)
        load_checkpoint(path)


if __name__ == "__main__":
    sys.exit(run_main("hdf5", attempt, ALLOWED))
