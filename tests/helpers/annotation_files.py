"""Small annotation files and images for tests of the readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "VOC_SIZE",
    "voc_object",
    "write_photo",
    "write_text",
    "write_voc_folder",
    "write_yolo_folder",
]

VOC_SIZE = "<size><width>40</width><height>20</height><depth>3</depth></size>"


def write_text(path: Path, text: str) -> Path:
    """Write a text file and the folders above it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_photo(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> Path:
    """Write a black image of this ``(width, height)``, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def write_yolo_folder(
    root: Path, label: str = "", yaml: str = "train: images/train\nnames: [cat, dog]\n"
) -> Path:
    """Write a YOLO dataset of one 40x20 image, and return the path of its ``data.yaml``."""
    write_photo(root / "images" / "train" / "a.png")
    write_text(root / "labels" / "train" / "a.txt", label)
    return write_text(root / "data.yaml", yaml)


def voc_object(name: str, box: tuple[float | str, ...], extra: str = "") -> str:
    """Return the XML of an object. A box of fewer than four numbers lacks the last corners."""
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{name}</name>{extra}<bndbox>{inside}</bndbox></object>"


def write_voc_folder(root: Path, **annotations: str) -> Path:
    """Write a Pascal VOC dataset with these XML contents, all in the split "all"."""
    (root / "JPEGImages").mkdir(parents=True)
    for name, inside in annotations.items():
        write_text(root / "Annotations" / f"{name}.xml", f"<annotation>{inside}</annotation>")
    write_text(root / "ImageSets" / "Main" / "all.txt", "\n".join(annotations) + "\n\n")
    return root
