"""``python -m focaldet.datasets``: check a dataset from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._atomic import atomic_write_text
from focaldet._checks import printable
from focaldet._files import decode_text
from focaldet.config import RetinaNetConfig
from focaldet.datasets import readers
from focaldet.datasets.checks import check_dataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

_NO_ERRORS, _ERRORS, _NOT_CHECKED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a dataset and print the report.

    Returns:
        0 if there are no errors, 1 if there are, 2 if the dataset could not be read.
    """
    args = _parser().parse_args(arguments)
    try:
        config = None if args.config is None else _read_config(args.config)
        problems: list[Exception] = []
        report = check_dataset(
            readers.read_annotations(
                args.path, args.images, split=args.split, report=problems.append
            ),
            problems=problems,
            config=config,
            images=args.read,
            workers=args.workers,
            progress=_progress() if sys.stderr.isatty() else None,
        )
        if args.json is not None:
            atomic_write_text(args.json, report.to_json())
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return _NOT_CHECKED
    sys.stdout.write(f"{report}\n")
    return _NO_ERRORS if report.ok else _ERRORS


def _parser() -> argparse.ArgumentParser:
    layouts = "; ".join(f"{reader.NAME}: {reader.LAYOUT}" for reader in readers.READERS)
    taking_images = ", ".join(
        reader.NAME for reader in readers.READERS if "images" in reader.OPTIONS
    )
    parser = argparse.ArgumentParser(
        prog="python -m focaldet.datasets",
        description="Check the images, boxes and categories of a dataset and, with --config, which "
        "objects the anchors of a model can reach. The files of the dataset are not changed.",
        epilog="The exit status is 0 if there are no errors (there may be warnings), 1 if there are "
        "errors, and 2 if the dataset could not be read.",
    )
    parser.add_argument("path", type=Path, help=f"annotations ({layouts})")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help=f"folder of the images, if it is not found automatically ({taking_images})",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split to check, e.g. train, if there are several"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.json of a model, or the folder that contains it; also checks the anchors",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all findings to a JSON file"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads for reading images (default: one per CPU core, at most 8)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--headers-only",
        dest="read",
        action="store_const",
        const="headers",
        help="read only the sizes of the images; faster, but does not find truncated images",
    )
    group.add_argument(
        "--no-images", dest="read", action="store_const", const="none", help="do not open any image"
    )
    parser.set_defaults(read="decode")
    return parser


def _read_config(path: Path) -> RetinaNetConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"No such file: {str(file)!r} (--config). Pass a config.json or the folder that "
            "contains it."
        )
    return RetinaNetConfig.from_json(decode_text(file.read_bytes()))


def _progress() -> Callable[[int, int], object]:
    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\rRead {done:,} of {total:,} images" + "\n" * (done == total))
        sys.stderr.flush()

    return show


if __name__ == "__main__":
    sys.exit(main())
