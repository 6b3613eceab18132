"""Arguments that several subcommands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["add_data", "add_device", "add_model", "checked_device"]

MODEL_HELP = (
    "folder of a training run (its best model is used) or of a saved model, a checkpoint file, a "
    "published name (see `focaldet models`), or a Hugging Face Hub repository, user/repo"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument DATA and the options that say how to read it."""
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
    parser.add_argument(
        "--split", metavar="NAME", help="split to use, e.g. val, if the dataset has several"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ... (default: cuda if available, otherwise cpu)",
    )


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
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used on this machine ({reason}). Use --device cpu, or install "
            "a PyTorch build that supports the device."
        ) from error
    return name
