"""Fuzz the readers of Pascal VOC, YOLO and CSV annotations.

Run ``python -m tests.fuzz.fuzz_annotations --seconds 300``.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from focaldet.datasets import check_dataset, read_annotations, read_csv
from focaldet.errors import AnnotationError, UnreadableImageError
from tests.fuzz.mutations import mutate_bytes, mutate_text, run_main
from tests.helpers.annotation_files import (
    VOC_SIZE,
    voc_object,
    write_photo,
    write_text,
    write_voc_folder,
    write_yolo_folder,
)

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "read_changed_file"]

ALLOWED = (AnnotationError, UnreadableImageError, FileNotFoundError)
"""The documented errors of files."""

YAML = """path: .
train: images/train
val: lists/val.txt
nc: 2
names: {0: cat, 1: 'dog'}
kpt_shape: [0, 0]
"""
LINES = """0 0.5 0.5 0.4 0.4
1 0.1 0.1 0.3 0.1 0.3 0.3 0.1 0.3
0 0.25 0.25 0.5 0.75 0.375 1 0.125 0.5
1 0.5 0.5 0.4 0.4 0.35 0.35 2 0.6 0.6 1
"""
ROWS = 'images/train/a.png,1,2,3,4,cat\nimages/train/b.png,,,,,\n"images/train/a.png",1.5,2,3,4,"dog"\n'
XML_HEAD = '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE annotation [<!ENTITY e "cat">]>'


class Dataset(NamedTuple):
    """The files of one dataset in three formats.

    Attributes:
        root: The folder of all of them.
        files: The path of each file that is changed, relative to it, and its right content.
    """

    root: Path
    files: dict[str, str]


@functools.cache
def dataset() -> Dataset:
    """Write the right files, once."""
    root = Path(tempfile.mkdtemp(prefix="focaldet-fuzz-"))
    write_yolo_folder(root, LINES, YAML)
    write_photo(root / "images" / "train" / "b.png")
    write_text(root / "labels" / "train" / "b.txt", "")
    write_text(root / "lists" / "val.txt", "../images/train/a.png\n../images/train/b.png\n")
    write_text(root / "t.csv", ROWS)
    write_text(root / "classes.csv", "cat,0\ndog,1\n")
    voc = write_voc_folder(root / "voc", a="", b=voc_object("dog", (1, 2, 3, 4)))
    objects = voc_object("&e;", (1, 2, 3, 4), "<difficult>0</difficult>") * 2
    write_text(
        voc / "Annotations" / "a.xml", f"{XML_HEAD}<annotation>{VOC_SIZE}{objects}</annotation>"
    )
    write_photo(voc / "JPEGImages" / "a.png")
    changed = (
        *("data.yaml", "labels/train/a.txt", "lists/val.txt", "t.csv", "classes.csv"),
        *("voc/Annotations/a.xml", "voc/ImageSets/Main/all.txt"),
    )
    return Dataset(root, {name: (root / name).read_text(encoding="utf-8") for name in changed})


def read_changed_file(rng: random.Random) -> None:
    """Change one file, read the datasets that contain it, and put the file back."""
    root, files = dataset()
    name = rng.choice(list(files))
    path = root / name
    text = files[name]
    change = mutate_text(text, rng) if rng.random() < 0.7 else mutate_bytes(text.encode(), rng)
    path.write_bytes(change)
    problems: list[Exception] = []
    report = problems.append if rng.random() < 0.5 else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if name.startswith("voc"):
                table = read_annotations(root / "voc", split="all", report=report)
            elif name.endswith(".csv"):
                table = read_csv(root / "t.csv", class_names=root / "classes.csv", report=report)
            else:
                split = rng.choice(("train", "val"))
                try:
                    table = read_annotations(root / "data.yaml", split=split, report=report)
                except ValueError as error:
                    if not str(error).startswith("Unknown split"):
                        raise
                    return
        printed = str(check_dataset(table, images="none", problems=problems))
        if not all(one.isprintable() or one == "\n" for one in printed):
            raise AssertionError("the report contains control characters")
    except ALLOWED as error:
        if not str(error).isprintable():
            raise AssertionError(f"the error contains control characters: {error!r}") from error
        raise
    finally:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    logging.getLogger("focaldet").setLevel(
        logging.ERROR
    )  # images without objects are counted there
    sys.exit(run_main("the readers of annotations", read_changed_file, ALLOWED))
