"""The folder of a run: check that it is empty, or that the run in it can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from focaldet._atomic import atomic_write_text, is_leftover
from focaldet._checks import shortened
from focaldet._version import __version__
from focaldet.config import RetinaNetConfig
from focaldet.errors import TrainingError
from focaldet.training._lock import LOCK_NAME
from focaldet.training._logging import LOG, log_on_rank_zero
from focaldet.training._resuming import check_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets import DetectionDataset
    from focaldet.training._options import TrainingOptions

__all__ = ["prepare_folder", "step_of_checkpoint"]

_SUBFOLDERS = ("", "checkpoints", "pictures", "best", "last")
_MODELS = ("best", "last")
_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_FIXED = ("optimizer", "decay_norm_and_bias")  # options that determine the optimiser's state


@rank_zero_only
def prepare_folder(
    folder: Path,
    config: RetinaNetConfig,
    options: TrainingOptions,
    data: dict[str, DetectionDataset],
    *,
    resume: bool,
    locked: bool,
) -> None:
    """Check that the folder is empty or that its run can be resumed, and describe the run in it.

    Args:
        folder: Folder of the run, which exists.
        config: Configuration of the model.
        options: Settings of the run.
        data: Training dataset as "train" and validation dataset, if any, as "val".
        resume: Whether to resume the run in the folder.
        locked: Whether this process holds the folder's lock, so that files with temporary names are
            left over from a killed process and can be removed.
    """
    run = folder / "run.json"
    values = dataclasses.asdict(options)
    described = {part: _describe(dataset) for part, dataset in data.items()}
    if resume and run.is_file():
        _compare_with_run(folder, config, values, described)
    else:
        _check_empty(folder, resume=resume)
    if locked:
        _remove_leftovers(folder)
    versions = {
        "focaldet": __version__,
        "torch": torch.__version__,
        "pytorch_lightning": importlib.metadata.version("pytorch-lightning"),
    }
    content = {"options": values, "data": described, "versions": versions, "command": sys.argv}
    for path, text in (
        (folder / "config.json", config.to_json()),
        (run, json.dumps(content, indent=2)),
    ):
        atomic_write_text(path, text)


def _describe(data: DetectionDataset) -> dict[str, Any]:
    """Describe a dataset, so that a different one is noticed when the run is resumed."""
    digest = hashlib.sha256()
    for name in data.table.file_names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return {
        "source": str(data.table.source),
        "images": len(data),
        "boxes": len(data.table.boxes),
        "class_names": list(data.class_names),
        "file_names_sha256": digest.hexdigest(),
    }


def _check_empty(folder: Path, *, resume: bool) -> None:
    name = f"folder {str(folder)!r}"
    if all(path.name == LOCK_NAME or is_leftover(path) for path in folder.iterdir()):
        return
    if (folder / "run.json").is_file():
        raise FileExistsError(
            f"{name} already holds a run. Choose a new or empty folder, or resume that run."
        )
    if resume:
        raise FileExistsError(
            f"{name} holds other files, but no run that could be resumed. Choose the folder of a "
            "run, or a new or empty one."
        )
    raise FileExistsError(f"{name} is not empty. Choose a new or empty folder.")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote them."""
    found = [
        path
        for name in _SUBFOLDERS
        if (folder / name).is_dir()
        for path in (folder / name).iterdir()
        if is_leftover(path) or (name in _MODELS and _SAFETENSORS_TEMPORARY.fullmatch(path.name))
    ]
    size = sum(path.stat().st_size for path in found)
    for path in found:
        path.unlink()
    if found:
        LOG.info(
            "Removed %d incomplete files (%.1f MB) that a killed run left in %r.",
            len(found),
            size / 1e6,
            str(folder),
        )


def _compare_with_run(
    folder: Path,
    config: RetinaNetConfig,
    values: dict[str, Any],
    described: dict[str, dict[str, Any]],
) -> None:
    """Raise if the run cannot be resumed, and log which options and data have changed."""
    trained, content = _read_run(folder)
    changed = [
        f"{field.name}={shortened(new)} (was {shortened(old)})"
        for field in dataclasses.fields(config)
        if (new := getattr(config, field.name)) != (old := getattr(trained, field.name))
    ]
    if changed:
        raise ValueError(
            f"model has a different configuration from the run in {str(folder)!r}: "
            f"{', '.join(changed)}. Resume with the model of that run, or choose another folder."
        )
    options = content["options"]
    if (folder / "checkpoints" / "last.ckpt").is_file():
        for name in _FIXED:
            if name in options and options[name] != values[name]:
                raise ValueError(
                    f"options has {name}={values[name]!r}, but the run in {str(folder)!r} was trained "
                    f"with {name}={options[name]!r}, and its checkpoint holds the state of that "
                    "optimizer. Resume with the same value, or start a new run in another folder."
                )
    for name, value in values.items():
        if name in options and options[name] != value:
            LOG.info("Resuming with %s=%s (was %s).", name, value, options[name])
    for part, new in described.items():
        _report_changed_data(part, new, content.get("data", {}).get(part))


def _read_run(folder: Path) -> tuple[RetinaNetConfig, dict[str, Any]]:
    """Return the model and the description of the run in a folder."""
    path = folder / "config.json"
    try:
        config = RetinaNetConfig.from_json(path.read_text(encoding="utf-8"))
        path = folder / "run.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        data = content.get("data", {})  # absent in runs of focaldet 0.2.0
        if not all(isinstance(value, dict) for value in (content["options"], data, *data.values())):
            raise TypeError("a value has a wrong type")  # noqa: TRY301
    except FileNotFoundError:
        raise TrainingError(
            f"Cannot resume the run in {str(folder)!r}: it has no {path.name}."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TrainingError(
            f"Cannot resume the run in {str(folder)!r}: its {path.name} is damaged "
            f"({type(error).__name__}: {shortened(str(error))}). Restore the file, or start a new run "
            "in another folder."
        ) from error
    return config, content


def _report_changed_data(part: str, new: dict[str, Any], old: dict[str, Any] | None) -> None:
    if old is None:
        return
    changes = [
        f"{new[name]} {name} (was {old.get(name)})"
        for name in ("images", "boxes")
        if new[name] != old.get(name)
    ]
    if new["class_names"] != old.get("class_names"):
        changes.append("different class names")
    if new["file_names_sha256"] != old.get("file_names_sha256"):
        changes.append("different file names")
    if changes:
        LOG.warning("Resuming with different %s_data: %s.", part, ", ".join(changes))


def step_of_checkpoint(last: Path) -> int | None:
    """Return the number of updates that led to a checkpoint, or None if it does not exist."""
    if not last.is_file():
        log_on_rank_zero(f"No checkpoint at {str(last)!r}; starting a new run.")
        return None
    step = check_checkpoint(last)
    log_on_rank_zero(f"Resuming from {str(last)!r} after update {step}.")
    return step
