"""``python -m focaldet.datasets``: check a data set from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._atomic import atomic_write_text
from focaldet._checks import must_be
from focaldet.config import RetinaNetConfig
from focaldet.datasets._reading import read_annotations
from focaldet.datasets.checks._check import check_dataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.datasets._table import AnnotationTable

__all__ = ["main"]

_NO_ERRORS, _ERRORS, _NOT_CHECKED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a data set and print what was found.

    Returns:
        0 if there are no errors, 1 if there are, 2 if the data set could not be read.
    """
    asked = _parser().parse_args(arguments)
    try:
        config = None if asked.config is None else _read_config(asked.config)
        report = check_dataset(
            _read(asked.path, asked.images, asked.split),
            config=config,
            images=asked.read,
            workers=asked.workers,
            progress=_progress() if sys.stderr.isatty() else None,
        )
        if asked.json is not None:
            atomic_write_text(asked.json, report.to_json())
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return _NOT_CHECKED
    sys.stdout.write(f"{report}\n")
    return _NO_ERRORS if report.ok else _ERRORS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m focaldet.datasets",
        description="Check a data set: its images, boxes and categories, and, with --config, which "
        "objects a model's anchors can reach. None of its files is changed.",
        epilog="The exit status is 0 without errors (there may be warnings), 1 with errors, and 2 if "
        "the data set could not be read.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="the annotations: a COCO .json, COCO's folder, a folder of Pascal VOC, a YOLO data.yaml or its folder, "
        "or a .csv of path,x1,y1,x2,y2,class",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images, if it isn't found by itself (COCO and CSV)",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="which part, such as train or val (folders and YOLO)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a model's config.json, or the folder it is in: check its anchors too",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every finding to this file as JSON"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that read images (default: one a core)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--headers-only",
        dest="read",
        action="store_const",
        const="headers",
        help="read only the sizes of the images: quicker, but an image that is cut short isn't found",
    )
    how.add_argument(
        "--no-images", dest="read", action="store_const", const="none", help="open no image at all"
    )
    parser.set_defaults(read="decode")
    return parser


def _read(path: Path, images: Path | None, split: str | None) -> AnnotationTable:
    return read_annotations(path, images, split=split)


def _read_config(path: Path) -> RetinaNetConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            must_be("config", "a config.json, or a folder with one", repr(str(path)))
        )
    return RetinaNetConfig.from_json(file.read_text(encoding="utf-8"))


def _progress() -> Callable[[int, int], object]:
    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{done:,} of {total:,} images read" + "\n" * (done == total))
        sys.stderr.flush()

    return show


if __name__ == "__main__":
    sys.exit(main())
