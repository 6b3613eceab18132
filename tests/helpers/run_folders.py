"""Folders of runs, as `focaldet.training.train` leaves them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from focaldet import RetinaNetConfig
from focaldet.training import TrainingOptions

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_old_run", "write_run"]


def write_run(
    folder: Path, *, config: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Write the `run.json` of a finished run of 12 epochs, and return its content.

    Args:
        folder: Folder of the run.
        config: Fields of the model's configuration.
        changes: Entries of the file. Those of "options" are added to the defaults.
    """
    options = {**dataclasses.asdict(TrainingOptions()), **changes.pop("options", {})}
    model = RetinaNetConfig(num_classes=2, class_names=("cat", "owl")).replace(**(config or {}))
    content = {
        "status": "finished",
        "options": options,
        "config": json.loads(model.to_json()),
        "data": {"train": {"source": "train.json", "image_folder": "photos", "images": 292}},
        "recipe": None,
        "result": {"best_ap": 0.5, "best_epoch": 7, "epochs": 12},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(content))
    return content


def write_old_run(folder: Path, aps: list[float], *, finished: bool) -> None:
    """Write the files of a run of focaldet 0.2.0, which has no result in `run.json`."""
    folder.mkdir(parents=True)
    options = dataclasses.asdict(TrainingOptions(epochs=5))
    (folder / "run.json").write_text(json.dumps({"options": options}))
    config = RetinaNetConfig(num_classes=2, class_names=("cat", "owl")).to_json()
    (folder / "config.json").write_text(config)
    rows = [f"{epoch},{10 * epoch},{ap}" for epoch, ap in enumerate(aps)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,val/AP", *rows, "5,60,"]))
    if finished:
        (folder / "last").mkdir()
        (folder / "last" / "config.json").write_text(config)
