"""The formats of results files, each written one image at a time."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from focaldet._atomic import atomic_write
from focaldet._checks import check_choice, check_names
from focaldet._extras import import_extra
from focaldet.detections import Detections

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "FORMATS",
    "CocoIds",
    "ResultsFormat",
    "ResultsSummary",
    "check_format",
    "from_record",
    "to_record",
    "write_records",
    "write_results",
]

ResultsFormat: TypeAlias = Literal["json", "jsonl", "coco", "parquet"]
"""The name of a format; see :func:`write_results`."""

FORMATS: dict[ResultsFormat, str] = {
    "json": "detections.json",
    "jsonl": "detections.jsonl",
    "coco": "results.json",
    "parquet": "detections.parquet",
}
"""The file that each format becomes in a folder."""

_ROWS = 1000  # images in a row group of a Parquet file

Record: TypeAlias = "dict[str, Any] | None"
"""What :meth:`Detections.to_dict` returns, or None for an image that was skipped."""


@dataclass(frozen=True, kw_only=True)
class ResultsSummary:
    """What has been written.

    Attributes:
        num_images: The images with detections, also if nothing was found in them.
        num_skipped: The images that could not be read and were skipped.
        num_detections: The detections of all images.
        files: The files that were written.

    .. versionadded:: 0.3.0
    """

    num_images: int
    num_skipped: int
    num_detections: int
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class CocoIds:
    """The ids of a COCO results file.

    Attributes:
        image_ids: One id per image. None numbers the images from 1.
        category_ids: One id per label. None uses the labels.
        class_names: One name per label, or None.
    """

    image_ids: Sequence[int] | None = None
    category_ids: Sequence[int] | None = None
    class_names: Sequence[str] | None = None


class _Writer(Protocol):
    """Writes the images one by one."""

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Write the detections of an image, ``index`` being its place among all images."""

    def close(self) -> None:
        """Write what comes after the last image."""


class _JsonLines:
    """An object per line."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def add(self, _: int, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Do nothing, because nothing follows the last line."""


class _JsonList:
    """A list of objects, in the layout of ``json.dump(..., indent=indent)``."""

    def __init__(self, file: IO[str], indent: int | None = None) -> None:
        self._file, self._indent = file, indent
        self._empty = True

    def add(self, _: int, record: dict[str, Any]) -> None:
        self.write(record)

    def write(self, value: object) -> None:
        text = json.dumps(value, indent=self._indent)
        between = ", " if not self._empty else ""
        if self._indent is not None:
            margin = "\n" + " " * self._indent
            text = margin + text.replace("\n", margin)  # a string has no line break in JSON
            between = between.strip()
        self._file.write(f"{'[' if self._empty else between}{text}")
        self._empty = False

    def close(self) -> None:
        end = "\n" if self._indent is not None and not self._empty else ""
        self._file.write(f"{'[' if self._empty else ''}{end}]\n")


class _CocoResults:
    """The entries of a COCO results file, and a file that says which image has which id."""

    def __init__(self, file: IO[str], images: IO[str] | None, ids: CocoIds) -> None:
        self._entries = _JsonList(file)
        self._images, self._ids = images, ids
        if images is not None:
            images.write('{"images": ')
            self._descriptions = _JsonList(images)

    def add(self, index: int, record: dict[str, Any]) -> None:
        ids = self._ids.image_ids
        image_id = index + 1 if ids is None else int(ids[index])
        for entry in from_record(record).to_coco(image_id, self._ids.category_ids):
            self._entries.write(entry)
        if self._images is not None:
            height, width = record["image_size"]
            description = {"id": image_id, "file_name": record["source"]}
            self._descriptions.write({**description, "height": height, "width": width})

    def close(self) -> None:
        self._entries.close()
        if self._images is not None:
            self._descriptions.close()
            categories = list(starmap(self._category, enumerate(self._ids.class_names or ())))
            self._images.write(f', "annotations": [], "categories": {json.dumps(categories)}}}\n')

    def _category(self, label: int, name: str) -> dict[str, Any]:
        ids = self._ids.category_ids
        return {"id": label if ids is None else ids[label], "name": name}


class _Parquet:
    """A row per image."""

    def __init__(self, path: Path) -> None:
        arrow, parquet = _import_pyarrow()
        self._table, text, number = arrow.Table, arrow.string(), arrow.float32()
        columns = {
            "source": text,
            "height": arrow.int32(),
            "width": arrow.int32(),
            "boxes": arrow.list_(arrow.list_(number)),
            "scores": arrow.list_(number),
            "labels": arrow.list_(arrow.int64()),
            "label_names": arrow.list_(text),
        }
        self._schema = arrow.schema(list(columns.items()))
        self._file = parquet.ParquetWriter(str(path), self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, _: int, record: dict[str, Any]) -> None:
        height, width = record["image_size"]
        self._rows.append({**record, "height": height, "width": width})
        if len(self._rows) == _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


def _import_pyarrow() -> tuple[Any, Any]:
    purpose = "Writing Parquet"
    return (
        import_extra("pyarrow", purpose=purpose, install="pyarrow"),
        import_extra("pyarrow.parquet", purpose=purpose, install="pyarrow"),
    )


def check_format(name: str, value: object) -> None:
    """Raise unless ``value`` is a format that can be written here."""
    check_choice(name, value, FORMATS)
    if value == "parquet":
        _import_pyarrow()


def to_record(found: Detections | None) -> Record:
    """Return what is written of an image."""
    return None if found is None else found.to_dict()


def from_record(record: dict[str, Any], class_names: Sequence[str] | None = None) -> Detections:
    """Return the detections of an image from what :func:`to_record` returned."""
    # The names of the other classes are not in a record, so without class_names its names are left.
    hidden = () if class_names is not None else ("label_names",)
    data = {name: value for name, value in record.items() if name not in hidden}
    return Detections.from_dict(data, class_names=class_names)


@contextlib.contextmanager
def _open_writer(path: Path, name: ResultsFormat, ids: CocoIds) -> Iterator[tuple[_Writer, Path]]:
    """Yield a writer, and the second file if there is one; the files appear on a clean exit."""
    with contextlib.ExitStack() as stack:

        def target(path: Path) -> IO[str]:
            temporary = stack.enter_context(atomic_write(path))
            return stack.enter_context(temporary.open("w", encoding="utf-8"))

        images = path.with_name("images.json") if name == "coco" and ids.image_ids is None else path
        writers: dict[ResultsFormat, Callable[[], _Writer]] = {
            "json": lambda: _JsonList(target(path), indent=1),
            "jsonl": lambda: _JsonLines(target(path)),
            "coco": lambda: _CocoResults(
                target(path), target(images) if images != path else None, ids
            ),
            "parquet": lambda: _Parquet(stack.enter_context(atomic_write(path))),
        }
        writer = writers[name]()
        yield writer, images
        writer.close()


def write_records(
    records: Iterable[Record], path: Path, name: ResultsFormat, ids: CocoIds
) -> ResultsSummary:
    """Write records to a file.

    Raises:
        ValueError: If all images were skipped. Nothing is written.
    """
    images = skipped = count = 0
    with _open_writer(path, name, ids) as (writer, second):
        for index, record in enumerate(records):
            if record is None:
                skipped += 1
                continue
            writer.add(index, record)
            images += 1
            count += len(record["scores"])
        if not images:
            raise ValueError(
                "No photo could be read." if skipped else "There are no images to write."
            )
    files = (path,) if second == path else (path, second)
    return ResultsSummary(num_images=images, num_skipped=skipped, num_detections=count, files=files)


def write_results(
    detections: Iterable[Detections | None],
    path: str | os.PathLike[str],
    format: ResultsFormat,  # noqa: A002  # the usual name
    *,
    class_names: Sequence[str] | None = None,
    image_ids: Sequence[int] | None = None,
    category_ids: Sequence[int] | None = None,
) -> ResultsSummary:
    r"""Write detections to a file as an iterator yields them.

    Only the detections of one image are in memory at a time (of 1,000 images for Parquet). The file
    appears when it is complete. The formats are:

    =========  ======================================================================================
    "json"     A list with an object per image, as :meth:`Detections.to_dict
               <focaldet.Detections.to_dict>` returns it.
    "jsonl"    The same objects, one per line, so that a program can read one at a time.
    "coco"     A COCO results file, with an entry per detection. If ``image_ids`` is None,
               ``images.json`` next to it says which image has which id.
    "parquet"  A table with a row per image: source, height, width, boxes, scores, labels and
               label_names. This requires pyarrow.
    =========  ======================================================================================

    Args:
        detections: The detections of each image. None stands for an image that was skipped; it is
            counted but not written.
        path: The file, which is replaced if it exists.
        format: "json", "jsonl", "coco" or "parquet".
        class_names: The name of every label, for the categories of ``images.json``.
        image_ids: The id of each image in a COCO results file. None numbers all images, including
            skipped ones, from 1.
        category_ids: The category id of each label in a COCO results file. None uses the labels.

    Returns:
        The numbers of images and detections, and the files.

    Raises:
        ValueError: If the format is unknown, or there are no images.
        ImportError: If the format is "parquet" and pyarrow is not installed.

    >>> import tempfile
    >>> found = Detections.empty((48, 64), source="a.jpg")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = write_results([found, None], f"{folder}/found.jsonl", "jsonl")
    ...     text = Path(f"{folder}/found.jsonl").read_text()
    >>> summary.num_images, summary.num_skipped, text.count("\n")
    (1, 1, 1)

    .. versionadded:: 0.3.0
    """
    check_format("format", format)
    if class_names is not None:
        class_names = check_names("class_names", class_names)
    ids = CocoIds(image_ids=image_ids, category_ids=category_ids, class_names=class_names)
    return write_records(map(to_record, detections), Path(path), format, ids)
