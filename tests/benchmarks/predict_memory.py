"""Resident memory while ``predict`` reads many files, which should not grow after the first thousand.

A small detector predicts the photos of a folder again and again, and prints a line every thousand files.

    python -m tests.benchmarks.predict_memory FOLDER [--files 10000]
"""

from __future__ import annotations

import argparse
import itertools
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from focaldet import RetinaNet, RetinaNetConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    config = RetinaNetConfig(
        num_classes=3,
        backbone="resnet18",
        backbone_norm="batch",
        fpn_channels=32,
        head_depth=1,
        min_size=64,
        max_size=96,
    )
    model = RetinaNet.from_config(config)
    photos = sorted(options.folder.iterdir())
    print(f"torch {torch.__version__}, {len(photos)} photos, batches of {options.batch_size}")

    def files() -> Iterator[Path]:
        for count, path in enumerate(itertools.islice(itertools.cycle(photos), options.files)):
            if count % 1000 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{count:6d} files: peak {peak:.0f} MiB", flush=True)
            yield path

    found = model.predict(files(), batch_size=options.batch_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(found):6d} files: peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
