"""Check the images, boxes and categories of a dataset.

Nothing is changed. If the dataset has several splits, its train, val and test
are checked. With --config, objects that no anchor of a model fits are listed,
too.

Examples:
  focaldet check data
  focaldet check train.json --images photos
  focaldet check data --split train --config runs/a --json report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet.cli._arguments import add_data, positive

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from focaldet import RetinaNetConfig
    from focaldet.datasets import DatasetReport

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "look for mistakes in a dataset"

_NO_ERRORS, _ERRORS = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_data(parser, split="train, val and test")
    parser.epilog = (
        "exit status: 0 if there are no errors (there may be warnings), 1 if there are\n"
        "errors, 2 if the dataset could not be read"
    )
    group = parser.add_argument_group("check")
    group.add_argument(
        "--config",
        metavar="MODEL",
        help="model whose anchors and class names are checked as well: its config.json, or anything that other "
        "commands take as MODEL",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write all findings to a file")
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="threads for reading images (default: one per CPU core, at most 8)",
    )
    read = group.add_mutually_exclusive_group()
    read.add_argument(
        "--headers-only",
        dest="read",
        action="store_const",
        const="headers",
        help="read only the sizes of the images; faster, but does not find truncated images",
    )
    read.add_argument(
        "--no-images", dest="read", action="store_const", const="none", help="do not open any image"
    )
    parser.set_defaults(read="decode")


def run(options: argparse.Namespace) -> int:
    """Check each split and print its report."""
    from focaldet._atomic import atomic_write_text
    from focaldet.datasets.readers import list_splits

    config = None if options.config is None else _read_config(options.config)
    splits: list[str | None] = [options.split]
    if options.split is None:
        splits = [*list_splits(options.data).values()] or [None]
    reports = {}
    for split in splits:
        reports[split] = report = _check(options, split, config)
        sys.stdout.write(f"Split {split}\n" if len(splits) > 1 else "")
        sys.stdout.write(f"{report}\n" + "\n" * (len(splits) > 1 and split != splits[-1]))
        sys.stdout.flush()
    if options.json is not None:
        contents = {split: json.loads(report.to_json()) for split, report in reports.items()}
        content: Any = contents if len(splits) > 1 else contents[splits[0]]
        atomic_write_text(options.json, json.dumps(content, indent=2))
    return _NO_ERRORS if all(report.ok for report in reports.values()) else _ERRORS


def _check(
    options: argparse.Namespace, split: str | None, config: RetinaNetConfig | None
) -> DatasetReport:
    from focaldet.datasets import check_dataset, read_annotations

    problems: list[Exception] = []
    return check_dataset(
        read_annotations(
            options.data,
            options.images,
            split=split,
            exif=options.exif,
            report=problems.append,
        ),
        problems=problems,
        config=config,
        images=options.read,
        workers=options.workers,
        progress=_progress() if sys.stderr.isatty() else None,
    )


def _read_config(source: str) -> RetinaNetConfig:
    """Read a config.json, or load the config of a model."""
    from focaldet import RetinaNetConfig
    from focaldet._files import decode_text

    path = Path(source)
    file = path if path.suffix == ".json" else path / "config.json"
    if file.is_file():
        return RetinaNetConfig.from_json(decode_text(file.read_bytes()))
    if file is path:
        raise FileNotFoundError(f"No such file: {str(path)!r} (--config).")
    from focaldet.pretrained import load_checkpoint

    return load_checkpoint(source).config


def _progress() -> Callable[[int, int], object]:
    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\rRead {done:,} of {total:,} images" + "\n" * (done == total))
        sys.stderr.flush()

    return show
