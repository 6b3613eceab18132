"""Checks before the first step of a run: of the images, the data, the model and the disk."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pytorch_lightning.utilities import rank_zero_only

from focaldet._checks import printable, shortened
from focaldet.datasets._anchor_fit import Objects, best_anchor_ious
from focaldet.datasets.checks._anchors import objects_at_input
from focaldet.errors import TrainingError, UnreadableImageError
from focaldet.images import read_image_size
from focaldet.matching import Matcher
from focaldet.training._data_module import read_first_image
from focaldet.training._logging import LOG
from focaldet.training._repeat_factor import objects_of
from focaldet.training._skipped import check_share_skipped

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from focaldet.datasets import DetectionDataset
    from focaldet.retinanet import RetinaNet
    from focaldet.training._options import TrainingOptions

__all__ = ["check_before_training"]

_MAX_THREADS = 8
_CHUNK = 64  # images per task of a thread
_SECONDS = 10  # between log lines about the progress
_NAMED = 3  # images or classes that a message names
_ANCHOR_SAMPLE = 10_000  # objects whose anchors are measured
_MIN_REACHED = 0.5  # share of objects that anchors reach; less is worth a warning
_STATES = {"sgd": 1, "adamw": 2}  # tensors that the optimizer keeps per parameter


@rank_zero_only
def check_before_training(
    model: RetinaNet, data: Mapping[str, DetectionDataset], options: TrainingOptions, folder: Path
) -> None:
    """Check what can make a run fail later, and warn about what makes it learn badly.

    Args:
        model: The model to train, with its frozen parts.
        data: Training dataset as "train" and validation dataset, if any, as "val".
        options: Settings of the run.
        folder: Folder of the run, which exists.

    Raises:
        TrainingError: If image files are missing or unreadable or have a different size from the
            annotated one, the first image or target does not fit the model after its transform, or
            the disk has no space for the checkpoints.
    """
    _check_space(model, options, folder, validates="val" in data)
    for part, dataset in data.items():
        _report_classes_without_objects(part, dataset)
    _report_anchors(model, data["train"])
    if options.check_images:
        for part, dataset in data.items():
            _check_images(part, dataset, skip=options.on_error == "skip")
    for part, dataset in data.items():
        _check_channels(model, part, read_first_image(dataset, options.seed))


def _check_space(
    model: RetinaNet, options: TrainingOptions, folder: Path, *, validates: bool
) -> None:
    """Raise if the disk has no space for the checkpoints and models of a run.

    Each is written next to the previous one, which it then replaces, so there are two at times.
    """
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = weights + _STATES[options.optimizer] * trained
    if options.ema_decay is not None:
        checkpoint += weights
    needed = 2 * checkpoint + (3 if validates else 1) * weights
    existing = [folder / "checkpoints" / "last.ckpt"]
    existing += [folder / name / "model.safetensors" for name in ("best", "last")]
    needed -= sum(path.stat().st_size for path in existing if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"The run needs about {_size(needed)} of disk space in {str(folder)!r}, but only "
            f"{_size(free)} are free. A checkpoint has {_size(checkpoint)}, and a model "
            f"{_size(weights)}; two of each exist while one replaces the other. Free some space, or "
            "choose a folder on a different disk."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _report_classes_without_objects(part: str, data: DetectionDataset) -> None:
    _, labels = objects_of(data)
    counts = np.bincount(labels, minlength=data.num_classes)
    missing = [data.class_names[label] for label in np.flatnonzero(counts == 0)]
    if not missing:
        return
    effect = "The model cannot learn them" if part == "train" else "The AP does not count them"
    LOG.warning(
        "%d of %d classes have no objects in %s_data: %s. %s.",
        len(missing),
        data.num_classes,
        part,
        printable(shortened(missing)),
        effect,
    )


def _report_anchors(model: RetinaNet, data: DetectionDataset) -> None:
    """Warn if many objects are too large, too small or too narrow for the anchors."""
    assigner = getattr(model.criterion, "assigner", None)
    if not isinstance(assigner, Matcher):
        return
    objects, _ = objects_at_input(data.table, data.sizes, model.config)
    step = -(-len(objects.boxes) // _ANCHOR_SAMPLE) or 1
    sample = Objects(objects.boxes[::step], objects.padded_sizes[::step])
    ious = best_anchor_ious(sample, model.anchor_generator)
    reached = float((ious >= assigner.positive_threshold).mean()) if len(ious) else 1.0
    if reached < _MIN_REACHED:
        config = model.config
        LOG.warning(
            "The anchors reach only %.0f %% of the training objects (with an IoU of %g) at the input "
            "size of the model, min_size=%d and max_size=%d. Choose other anchor_sizes or sizes; the "
            "dataset checker suggests anchors.",
            100 * reached,
            assigner.positive_threshold,
            config.min_size,
            config.max_size,
        )


def _check_channels(model: RetinaNet, part: str, image: Tensor | None) -> None:
    channels = model.config.in_channels
    if image is not None and image.shape[0] != channels:
        raise TrainingError(
            f"The first image of {part}_data has {image.shape[0]} channels after its transform, but "
            f"the model has in_channels={channels}. Change the transform, or build a model for these "
            "channels."
        )


class _Scan(NamedTuple):
    """The image files of a dataset that cannot be used, with the reasons.

    Attributes:
        unreadable: Files that are missing or unreadable.
        misfits: Files whose size differs from the annotated one.
    """

    unreadable: list[str]
    misfits: list[str]


def _check_images(part: str, data: DetectionDataset, *, skip: bool) -> None:
    """Open every image file at its header."""
    scan = _scan(part, data)
    if scan.unreadable and skip:
        check_share_skipped(len(scan.unreadable), len(data), scan.unreadable[-1])
        LOG.warning(
            "%d of %d images of %s_data cannot be read and will be skipped.",
            len(scan.unreadable),
            len(data),
            part,
        )
    faults = ([] if skip else scan.unreadable) + scan.misfits
    if faults:
        shown = " ".join(faults[:_NAMED])
        more = f" And {len(faults) - _NAMED} more." if len(faults) > _NAMED else ""
        remedy = "Correct the files or their annotations"
        if scan.unreadable and not skip:
            remedy += ", or continue without those that cannot be read with on_error='skip'"
        raise TrainingError(
            f"{len(faults)} of {len(data)} images of {part}_data cannot be used. {shown}{more} "
            f"{remedy}. The dataset checker lists all faults."
        )


def _scan(part: str, data: DetectionDataset) -> _Scan:
    scan = _Scan([], [])
    last_line = time.monotonic()
    with ThreadPoolExecutor(min(_MAX_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        starts = range(0, len(data), _CHUNK)
        for start, found in zip(
            starts, pool.map(lambda start: _scan_chunk(data, start), starts), strict=True
        ):
            scan.unreadable.extend(found.unreadable)
            scan.misfits.extend(found.misfits)
            if time.monotonic() - last_line > _SECONDS:
                last_line = time.monotonic()
                done = min(start + _CHUNK, len(data))
                LOG.info("Checked %d of %d image files of %s_data.", done, len(data), part)
    return scan


def _scan_chunk(data: DetectionDataset, start: int) -> _Scan:
    scan = _Scan([], [])
    for index in range(start, min(start + _CHUNK, len(data))):
        path = data.table.image_path(index)
        name = f"image {data.image_ids[index]}"
        try:
            size = read_image_size(path, name)
        except FileNotFoundError as error:
            scan.unreadable.append(f"{error} {data.table.describe_folder()}")
        except (OSError, UnreadableImageError) as error:
            scan.unreadable.append(str(error))
        else:
            if size != tuple(data.sizes[index].tolist()):
                scan.misfits.append(_misfit(name, path, size, data.sizes[index]))
    return scan


def _misfit(name: str, path: Path, size: tuple[int, int], annotated: Any) -> str:
    height, width = annotated.tolist()
    return (
        f"{name} is annotated as {width}x{height}, but {str(path)!r} is {size[1]}x{size[0]} (width x "
        "height)."
    )
