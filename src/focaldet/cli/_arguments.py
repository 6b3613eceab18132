"""Arguments that several subcommands have in common."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.cli._messages import note
from focaldet.cli._ranks import device_of_rank

if TYPE_CHECKING:
    from focaldet.datasets import AnnotationTable
    from focaldet.retinanet import RetinaNet

__all__ = [
    "MODEL_HELP",
    "add_batch_size",
    "add_data",
    "add_device",
    "add_exif",
    "add_model",
    "add_output",
    "add_suppression",
    "checked_device",
    "load_model",
    "named_number",
    "positive",
    "read_data",
    "score",
]

MODEL_HELP = (
    "folder of a training run (its best model is used) or of a saved model, a checkpoint file, a "
    "published name (see `focaldet models`), or a Hugging Face Hub repository, user/repo"
)

# An argument is added to a parser or to one of its groups.
_Arguments = argparse._ActionsContainer  # noqa: SLF001  # what both are


def add_model(parser: _Arguments) -> None:
    """Add the positional argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_data(parser: _Arguments, *, split: str | None = None) -> None:
    """Add the positional argument DATA and the options that say how to read it.

    Args:
        parser: The parser or group.
        split: What is used by default if the dataset has several splits, for the help. None says
            nothing about it.
    """
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="dataset: a folder, a COCO .json file, a .csv file, or a YOLO data.yaml",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images (default: looked for near the annotations)",
    )
    default = "" if split is None else f" (default: {split})"
    parser.add_argument(
        "--split",
        metavar="NAME",
        help=f"split to use if the dataset has several, e.g. val{default}",
    )
    add_exif(parser)


def add_exif(parser: _Arguments) -> None:
    """Add the option --exif."""
    parser.add_argument(
        "--exif",
        choices=["upright", "stored", "auto"],
        default="upright",
        help="which pixels the boxes were drawn on where EXIF turns a photo: those of the upright "
        "image, those that the file stores, or, with 'auto', whichever have the annotated size "
        "(default: upright)",
    )


def add_device(parser: _Arguments) -> None:
    """Add the option --device."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ... (default: cuda if available, otherwise cpu)",
    )


def add_batch_size(parser: _Arguments) -> None:
    """Add the option --batch-size of a command that predicts."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images per forward pass (default: 1)",
    )


def add_output(parser: _Arguments, default: str) -> None:
    """Add the option --output, a folder."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(default),
        metavar="FOLDER",
        help=f"folder to write to; files in it are replaced (default: {default})",
    )


def add_suppression(parser: _Arguments) -> None:
    """Add the option --suppression, which :func:`load_model` applies."""
    parser.add_argument(
        "--suppression",
        choices=["hard", "linear", "gaussian"],
        help="what to do about an object that overlaps one of its class with a higher score: remove "
        "it, or lower its score by linear or Gaussian soft-NMS (default: that of the model, usually hard)",
    )


def positive(text: str) -> int:
    """Read a whole number that is at least 1, as the type of an argument."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return value


def score(text: str) -> float:
    """Read a score between 0 and 1, as the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value


def named_number(text: str) -> tuple[str, float]:
    """Read a name and a number, such as ``train=.8``, as the type of an argument."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not equals or not name or math.isnan(value):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, such as train=.8, got {text!r}")
    return name, value


def checked_device(name: str | None) -> str:
    """Return the device to use.

    Raises:
        ValueError: If the device does not exist on this machine.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used on this machine ({reason}). Use --device cpu, or install "
            "a PyTorch build that supports the device."
        ) from error
    return name


def load_model(options: argparse.Namespace) -> RetinaNet:
    """Load the argument MODEL onto the device of --device, with --suppression if there is one.

    Raises:
        ValueError: If the device does not exist, before anything is downloaded, or the checkpoint is
            not a RetinaNet in a supported format.
        FileNotFoundError: If there is no such model.
    """
    device = checked_device(options.device or device_of_rank())
    from focaldet import RetinaNet

    suppression = getattr(options, "suppression", None)
    changes = {} if suppression is None else {"suppression": suppression}
    return RetinaNet.from_pretrained(options.model, **changes).to(device)


def read_data(options: argparse.Namespace, *, prefer: str) -> AnnotationTable:
    """Read the argument DATA: the split of --split, or a usual one, which is said.

    Args:
        options: The options of :func:`add_data`.
        prefer: "train", "val" or "test": the split to use by default if there are several. If the
            dataset does not have it, an error lists its splits, unless there is only one.
    """
    from focaldet.datasets import read_annotations
    from focaldet.datasets.readers import list_splits

    split = options.split
    if split is None:
        names = list_splits(options.data)
        split = next(iter(names.values())) if len(names) == 1 else names.get(prefer)
        if split is not None:
            note(f"Using the split {split!r} of {str(options.data)!r}.")
    return read_annotations(options.data, options.images, split=split, exif=options.exif)
