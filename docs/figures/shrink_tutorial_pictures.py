"""Make the pictures of the tutorial "Your own photos in fifteen minutes" from what its commands wrote.

    python docs/figures/shrink_tutorial_pictures.py FOLDER

FOLDER is the folder in which the commands of the page were run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parent / "tutorials"
LARGEST = 150_000  # bytes


def shrink(source: Path, target: Path, width: int, top: float = 0.0) -> None:
    """Write a picture, without its upper part, as JPEG in the best quality that is small enough."""
    picture = Image.open(source).convert("RGB")
    picture = picture.crop((0, round(top * picture.height), *picture.size))
    picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    for quality in range(90, 30, -5):
        picture.save(target, "JPEG", quality=quality, optimize=True)
        if target.stat().st_size <= LARGEST:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    TARGET.mkdir(exist_ok=True)
    [last] = sorted((folder / "runs" / "cells" / "pictures").iterdir())[-1:]
    for source, name, width, *top in (
        (folder / "gallery.png", "gallery.jpg", 1184),
        (folder / "runs" / "cells" / "curves.png", "curves.jpg", 900),
        (last, "epoch.jpg", 1000, 0.5),  # the last two of four photos
        (folder / "evaluation" / "precision_recall.png", "precision_recall.jpg", 700),
        (folder / "found" / "BloodImage_00007.png", "found.jpg", 640),
    ):
        shrink(source, TARGET / name, width, *top)


if __name__ == "__main__":
    main()
