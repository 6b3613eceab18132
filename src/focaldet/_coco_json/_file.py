"""Open a JSON file and parse it without the object outlines, which are most of a COCO file."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import re
from typing import TYPE_CHECKING, Any

from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["decode_quickly", "open_bytes", "parse"]

_BOM = b"\xef\xbb\xbf"

# A polygon is a list of lists of numbers. Nothing that can follow it, a key or a brace, consists of
# these characters, so the last bracket of the run closes the list.
_POLYGONS = re.compile(rb'(?<!\\)"segmentation"\s*:\s*\[[\[\]\s\d.,+\-eE]*\]')


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[memoryview]:
    """Map a file into memory, without its byte order mark, and pause garbage collection.

    Parsing creates millions of small objects, and the garbage collector would search them for cycles
    again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with path.open("rb") as file, contextlib.ExitStack() as stack:
            content: mmap.mmap | bytes
            try:
                content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (ValueError, OSError):  # the file is empty or cannot be mapped
                content = file.read()
            view = stack.enter_context(memoryview(content))
            start = len(_BOM) if bytes(view[: len(_BOM)]) == _BOM else 0
            yield stack.enter_context(view[start:])
    finally:
        if was_enabled:
            gc.enable()


def decode_quickly(data: memoryview, type_name: str) -> Any:
    """Decode JSON into one of the types in ``_structs``; None if that is not possible.

    It is not possible without msgspec, and for files with anything unusual in them. The standard
    library's parser then either reads the file or says what is wrong with it.
    """
    try:
        import msgspec

        from focaldet._coco_json import _structs

        return msgspec.json.decode(data, type=getattr(_structs, type_name))
    except (ImportError, ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


def parse(data: memoryview, path: Path) -> tuple[Any, bool]:
    """Parse JSON with the standard library.

    Returns:
        The content, and whether all of it is valid text. Bytes that are not UTF-8 become U+FFFD;
        :class:`~focaldet._coco_json._rows.Rows` reports them where they are in a field that is read.

    Raises:
        AnnotationError: If the file is not valid JSON.
    """
    encoding = json.detect_encoding(bytes(data[:4]))
    content = _POLYGONS.sub(b'"segmentation":0', data) if encoding == "utf-8" else bytes(data)
    try:
        text, is_valid = content.decode(encoding), True
    except UnicodeDecodeError:
        text, is_valid = content.decode(encoding, "replace"), False
    del content
    try:
        return json.loads(text), is_valid
    except RecursionError as error:
        raise AnnotationError(f"Cannot read {str(path)!r}: it is nested too deeply.") from error
    except ValueError as error:
        raise AnnotationError(
            f"Cannot read {str(path)!r}: it is not valid JSON ({error})."
        ) from error
