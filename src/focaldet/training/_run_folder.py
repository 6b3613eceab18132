"""The folder of a run: check that it is empty, or that the run in it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
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
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from focaldet.datasets import DetectionDataset
    from focaldet.training._options import TrainingOptions

__all__ = ["Outcome", "prepare_folder", "recorded_outcome", "step_of_checkpoint"]

_SUBFOLDERS = ("", "checkpoints", "pictures", "best", "last")
_OWN_SUBFOLDERS = (*_SUBFOLDERS[1:], "tensorboard")
_MODELS = ("best", "last")
_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_BEFORE_CHECKPOINT = re.compile(  # the files of a run that it writes before its first checkpoint
    r"run\.json|config\.json|metrics\.csv|curves\.png|pictures/epoch_\d+\.png"
    r"|tensorboard/events\.out\.tfevents\.[^/]+|tensorboard/hparams\.yaml"
    r"|(best|last)/\.tmp[A-Za-z0-9]{6}"
)
_KEPT = re.compile(rf"{re.escape(LOCK_NAME)}|nonfinite_step_\d+(_rank_\d+)?\.pt")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_FIXED = (
    "optimizer",
    "decay_norm_and_bias",
    "freeze",
    "backbone_lr_decay",
)  # options that determine the optimiser's state


class Outcome:
    """What a run has reached when it ends, in any way."""

    def __init__(self) -> None:
        self._read: Callable[[], dict[str, Any]] | None = None

    def follow(self, read: Callable[[], dict[str, Any]]) -> None:
        """Set the function that returns the result so far, as values for JSON."""
        self._read = read

    def result(self) -> dict[str, Any] | None:
        """Return the result so far, or None if the run has not come far enough to have one."""
        return None if self._read is None else self._read()


@rank_zero_only
def prepare_folder(
    folder: Path,
    config: RetinaNetConfig,
    options: TrainingOptions,
    data: dict[str, DetectionDataset],
    *,
    resume: bool,
    locked: bool,
    resize_images: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
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
        resize_images: Whether the model resizes training images.
        recipe: How the caller has set up the run, as values for JSON. None keeps that of the run to be
            resumed.

    Raises:
        TypeError: If ``recipe`` holds a value that JSON cannot express.
    """
    run = folder / "run.json"
    values = json.loads(json.dumps(dataclasses.asdict(options)))  # as they are read back
    try:
        recipe_text = json.dumps(None if recipe is None else dict(recipe))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"recipe must hold values that JSON can express, got {shortened(recipe)} ({error})."
        ) from error
    described = {part: _describe(dataset) for part, dataset in data.items()}
    described_recipe = json.loads(recipe_text)
    if resume and run.is_file():
        previous = _compare_with_run(folder, config, values, described)
        if recipe is None:
            described_recipe = previous.get("recipe")
    else:
        if locked:
            _clear_run_without_checkpoint(folder)
        _check_empty(folder, resume=resume)
    if locked:
        _remove_leftovers(folder)
    versions = {
        "focaldet": __version__,
        "torch": torch.__version__,
        "pytorch_lightning": importlib.metadata.version("pytorch-lightning"),
    }
    content = {
        "status": "running",
        "started": _now(),
        "options": values,
        "recipe": described_recipe,
        "config": json.loads(config.to_json()),
        "data": described,
        "transforms": {part: _describe_transform(one.transform) for part, one in data.items()},
        "resize_images": resize_images,
        "versions": versions,
        "command": sys.argv,
    }
    for path, text in (
        (folder / "config.json", config.to_json()),
        (run, json.dumps(content, indent=2)),
    ):
        atomic_write_text(path, text)


@contextlib.contextmanager
def recorded_outcome(folder: Path) -> Iterator[Outcome]:
    """Write to ``run.json`` how a run ends: its status, its result, and the error if it fails.

    The status is "running" until then, and stays so if the process is killed. It becomes "finished",
    "stopped" (by a signal, after the state was saved) or "failed".

    Args:
        folder: Folder of the run, which `prepare_folder` has described.

    Yields:
        The outcome, which the caller tells where to find the result.
    """
    outcome = Outcome()
    try:
        yield outcome
    except (SystemExit, KeyboardInterrupt):
        _record(folder, {"status": "stopped", "result": outcome.result()})
        raise
    except Exception as error:
        error_text = f"{type(error).__name__}: {error}"
        _record(folder, {"status": "failed", "error": error_text, "result": outcome.result()})
        raise
    _record(folder, {"status": "finished", "result": outcome.result()})


@rank_zero_only
def _record(folder: Path, changes: dict[str, Any]) -> None:
    """Change values in ``run.json``, or log why that failed, because another error is more important."""
    path = folder / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        atomic_write_text(path, json.dumps({**content, **changes, "ended": _now()}, indent=2))
    except (OSError, ValueError) as error:
        LOG.warning("Cannot write how the run ended to %r (%s).", str(path), error)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _describe_transform(transform: object) -> str | None:
    """Describe a transform in words that do not change from run to run, as far as that is possible."""
    if transform is None:
        return None
    if isinstance(transform, torch.nn.Module) or not hasattr(transform, "__qualname__"):
        return _ADDRESS.sub("", repr(transform))
    return f"{getattr(transform, '__module__', '')}.{transform.__qualname__}"


def _describe(data: DetectionDataset) -> dict[str, Any]:
    """Describe a dataset, so that a different one is noticed when the run is resumed."""
    digest = hashlib.sha256()
    for name in data.table.file_names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return {
        "source": str(data.table.source),
        "image_folder": str(data.table.image_folder),
        "images": len(data),
        "boxes": len(data.table.boxes),
        "class_names": list(data.class_names),
        "file_names_sha256": digest.hexdigest(),
    }


def _clear_run_without_checkpoint(folder: Path) -> None:
    """Remove what a run has written, if it ended before its first checkpoint and nothing else is there.

    Nothing is removed if there is a checkpoint or a model, or any file that no run writes before them.
    The batch of a loss that is not finite (``nonfinite_step_N.pt``) is kept for its reader.
    """
    if not (folder / "run.json").is_file():
        return
    cleared, subfolders = [], []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and name in _OWN_SUBFOLDERS:
            subfolders.append(path)
        elif _BEFORE_CHECKPOINT.fullmatch(name) or is_leftover(path):
            cleared.append(path)
        elif not _KEPT.fullmatch(name):
            return
    size = sum(path.lstat().st_size for path in cleared)
    for path in cleared:
        path.unlink()
    for path in subfolders:
        path.rmdir()
    LOG.info(
        "Removed %d files (%.1f MB) of a run in %r that ended before its first checkpoint.",
        len(cleared),
        size / 1e6,
        str(folder),
    )


def _check_empty(folder: Path, *, resume: bool) -> None:
    name = f"folder {str(folder)!r}"
    ignored = (path.name == LOCK_NAME or is_leftover(path) or _KEPT.fullmatch(path.name)
               for path in folder.iterdir())  # fmt: skip
    if all(ignored):
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
) -> dict[str, Any]:
    """Raise if the run cannot be resumed, and log which options and data have changed.

    Returns:
        The description of the run, from its ``run.json``.
    """
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
    return content


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
