"""Read the windows of a TIFF file without decoding all of it.

A TIFF file stores an image as tiles, or as strips of rows, each compressed on its own. The tiles or strips
that a window overlaps are copied, still compressed, into a small TIFF file in memory, which is decoded
as every image is. The pixels are therefore those of the whole image for every compression, layout and
mode, and no package other than Pillow is needed.

References:
    TIFF Revision 6.0, Adobe 1992, sections 2 "TIFF structure", 15 "Tiled images" and 22 "JPEG
    compression"; Adobe Photoshop TIFF Technical Notes, 2002 (compression 7 and 8); the BigTIFF design,
    https://www.awaresystems.be/imaging/tiff/bigtiff.html.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections import OrderedDict
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from focaldet._image_formats import open_image
from focaldet.errors import UnreadableImageError
from focaldet.images import decode_image, turn_to_upright

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from focaldet._tiles._grid import Window

__all__ = ["TiffWindows", "open_tiff"]

_CACHE = 64 * 2**20  # bytes of decoded blocks that are kept, besides those of the last window
_BLOCK_ROWS = 64  # thinner strips are decoded together
_MAX_BLOCK = 2**26  # pixels that are decoded at once; files with larger tiles are read whole

# A damaged or hostile file can claim any size. No compression stores so many pixels in a byte.
_MAX_PIXELS_PER_BYTE = 2**16

# Tags of a file that its small copies have as well, because they change how pixels are decoded.
_DECODING = frozenset(
    {
        *(258, 259, 262, 266, 277, 284),  # bits, compression, colours, bit order, samples, planes
        *(292, 293),  # options of fax compression
        *(317, 320, 332, 334, 338, 339),  # predictor, palette, inks, extra samples, sample format
        *(347, 529, 530, 531, 532),  # tables and colours of JPEG
    }
)
_WIDTH, _HEIGHT = 256, 257
_COMPRESSION, _SAMPLES, _ROWS_PER_STRIP, _PLANES = 259, 277, 278, 284
_BITS = 258
_STRIP_OFFSETS, _STRIP_LENGTHS = 273, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_LENGTHS = 322, 323, 324, 325
_LAYOUT = frozenset({_WIDTH, _HEIGHT, _ROWS_PER_STRIP, _STRIP_OFFSETS, _STRIP_LENGTHS}) | {
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_LENGTHS)
}
_TURN = frozenset({274, 700})  # the orientation, and XMP, which may have it too

# Each turn as a swap of rows and columns, and then flips of the rows and of the columns.
_FLIPS = {
    None: (False, (False, False)),
    Image.Transpose.FLIP_LEFT_RIGHT: (False, (False, True)),
    Image.Transpose.ROTATE_180: (False, (True, True)),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, (True, False)),
    Image.Transpose.TRANSPOSE: (True, (False, False)),
    Image.Transpose.ROTATE_270: (True, (False, True)),
    Image.Transpose.TRANSVERSE: (True, (True, True)),
    Image.Transpose.ROTATE_90: (True, (True, False)),
}

_UNCOMPRESSED, _OLD_JPEG = 1, 6
_SHORT, _LONG, _LONG8 = 3, 4, 16
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
_INTEGERS = {1: "u1", _SHORT: "u2", _LONG: "u4", _LONG8: "u8"}


class _Field(NamedTuple):
    """A tag of a TIFF file: its type, the number of values, and their bytes."""

    kind: int
    number: int
    data: bytes

    def values(self, order: str) -> npt.NDArray[np.int64]:
        """Return the values of a field of integers."""
        if self.kind not in _INTEGERS:
            raise ValueError(f"a number is stored with the type {self.kind}")
        return np.frombuffer(self.data, order + _INTEGERS[self.kind]).astype(np.int64)


_Fields = dict[int, _Field]


class _Layout(NamedTuple):
    """Where the tiles or strips of an image are.

    Attributes:
        size: ``(height, width)`` of the stored image.
        segment: ``(height, width)`` of a tile or strip. Strips are as wide as the image.
        block: ``(height, width)`` of what is decoded at once: a tile, or some strips.
        tiled: Whether these are tiles.
        offsets, lengths: ``[planes, rows, columns]``; the place of each segment, in bytes.
    """

    size: tuple[int, int]
    segment: tuple[int, int]
    block: tuple[int, int]
    tiled: bool
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class TiffWindows:
    """A TIFF file that is read by windows. Close it after use.

    Args:
        file: The open file.
        path: Its path, for messages.
        name: What error messages call the source.
        channels: 1 or 3.
        order: ``"<"`` or ``">"``, the order of the bytes of the file.
        fields: The tags of the first image of the file.
        layout: Where its tiles or strips are.
        turn: What turns the stored pixels upright.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        path: str,
        name: str,
        channels: int,
        order: str,
        fields: _Fields,
        layout: _Layout,
        turn: Image.Transpose | None,
    ) -> None:
        self._file, self._path, self._name, self._channels = file, path, name, channels
        self._order, self._layout = order, layout
        self._fields = {tag: field for tag, field in fields.items() if tag in _DECODING}
        self._swaps, self._flips = _FLIPS[turn]
        self._blocks: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    @property
    def size(self) -> tuple[int, int]:
        """The ``(height, width)`` of the upright image."""
        height, width = self._layout.size
        return (width, height) if self._swaps else (height, width)

    def close(self) -> None:
        """Close the file and free the pixels that are kept."""
        self._blocks.clear()
        self._file.close()

    def read(self, window: Window) -> Tensor:
        """Read the pixels of a window, ``[C, H, W]``, uint8.

        Raises:
            UnreadableImageError: If the file is damaged there.
        """
        spans = [(window.top, window.bottom), (window.left, window.right)]
        for axis, (flip, side) in enumerate(zip(self._flips, self.size, strict=True)):
            if flip:
                start, end = spans[axis]
                spans[axis] = side - end, side - start
        if self._swaps:
            spans.reverse()
        pixels = self._read_stored(*spans)
        if self._swaps:
            pixels = pixels.transpose(1, 2)
        flipped = [axis + 1 for axis, flip in enumerate(self._flips) if flip]
        return (pixels.flip(flipped) if flipped else pixels).contiguous()

    def _read_stored(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        (top, bottom), (left, right) = rows, columns
        height, width = self._layout.block
        pixels = torch.empty((self._channels, bottom - top, right - left), dtype=torch.uint8)
        needed = [
            (row, column)
            for row in range(top // height, (bottom - 1) // height + 1)
            for column in range(left // width, (right - 1) // width + 1)
        ]
        for row, column in needed:
            block = self._read_block(row, column, needed)
            y, x = row * height, column * width
            y1, y2 = max(top, y), min(bottom, y + height)
            x1, x2 = max(left, x), min(right, x + width)
            pixels[:, y1 - top : y2 - top, x1 - left : x2 - left] = block[
                :, y1 - y : y2 - y, x1 - x : x2 - x
            ]
        return pixels

    def _read_block(self, row: int, column: int, needed: Sequence[tuple[int, int]]) -> Tensor:
        key = row, column
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        # Windows of a row overlap the same strips, and neighbours the same tiles.
        kept = sum(block.numel() for block in self._blocks.values())
        for old in [one for one in self._blocks if one not in needed]:
            if kept <= _CACHE:
                break
            kept -= self._blocks.pop(old).numel()
        (height, width), size = self._layout.block, self._layout.size
        y, x = row * height, column * width
        bottom, right = min(y + height, size[0]), min(x + width, size[1])
        what = f"rows {y} to {bottom - 1} and columns {x} to {right - 1} of {self._path!r}"
        try:
            content = _copy_block(self._file, self._order, self._fields, self._layout, key)
        except (OSError, ValueError) as error:
            raise UnreadableImageError(
                f"Cannot read {what} ({self._name}): the file is damaged ({error})."
            ) from error
        self._blocks[key] = block = decode_image(self._name, what, content, self._channels)
        return block


def open_tiff(path: str, name: str, channels: int) -> TiffWindows | None:
    """Open a file to read its windows.

    Args:
        path: The file.
        name: What error messages call the source.
        channels: The number of channels to read.

    Returns:
        The open file, or None if it is to be read whole, or cannot be read: it is not a TIFF file,
        the image is a single compressed strip or is stored in another way that does not allow to
        decode a part of it, or has numbers of 32 bits, whose range must be checked in all pixels.
    """
    if channels not in (1, 3):
        return None
    try:
        file = open(path, "rb")  # noqa: SIM115, PTH123  # closed below or by the caller
    except (OSError, ValueError):  # the reader of whole files explains it
        return None
    windows = None
    try:
        order, fields = _read_fields(file)
        layout = _find_layout(fields, order, file.seek(0, os.SEEK_END))
        if layout is not None:
            turn = _probe(file, order, fields, layout)
            windows = TiffWindows(
                file, path=path, name=name, channels=channels,
                order=order, fields=fields, layout=layout, turn=turn,
            )  # fmt: skip
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        OverflowError,
        struct.error,
        Image.DecompressionBombError,
    ):
        return None
    finally:
        if windows is None:
            file.close()
    return windows


def _read_fields(file: BinaryIO) -> tuple[str, _Fields]:
    """Read the order of the bytes, and the tags of the first image that are needed."""
    length = file.seek(0, os.SEEK_END)
    start = _read(file, 0, 16, length)
    order = {b"II": "<", b"MM": ">"}[start[:2]]
    version = struct.unpack(order + "H", start[2:4])[0]
    big = {42: False, 43: True}[version]
    # The number of tags, one tag, and the place of its values, in the two kinds of files.
    number, entry, place = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    at = struct.unpack(order + place, start[8:16] if big else start[4:8])[0]
    entry_size = struct.calcsize(order + entry)
    number_size = struct.calcsize(order + number)
    count = struct.unpack(order + number, _read(file, at, number_size, length))[0]
    entries = _read(file, at + number_size, count * entry_size, length)
    fields: _Fields = {}
    for tag, kind, values, inline in struct.iter_unpack(order + entry, entries):
        if tag not in _DECODING | _LAYOUT | _TURN or kind not in _SIZES:
            continue
        size = values * _SIZES[kind]
        data = inline[:size]
        if size > len(inline):
            data = _read(file, struct.unpack(order + place, inline)[0], size, length)
        fields.setdefault(tag, _Field(kind, values, data))
    return order, fields


def _read(file: BinaryIO, at: int, size: int, length: int) -> bytes:
    if at + size > length:
        raise ValueError(f"it ends before byte {at + size}")
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"it ends before byte {at + size}")
    return data


def _find_layout(fields: _Fields, order: str, length: int) -> _Layout | None:
    """Return where the tiles or strips are, or None if a part cannot be decoded alone.

    Args:
        fields: The tags of the file.
        order: The order of its bytes.
        length: Its size in bytes.
    """
    numbers = {
        tag: int(fields[tag].values(order)[0])
        for tag in (
            *(_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _PLANES),
            *(_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT),
        )
        if tag in fields
    }
    height, width = numbers[_HEIGHT], numbers[_WIDTH]
    compression, samples = numbers.get(_COMPRESSION, _UNCOMPRESSED), numbers.get(_SAMPLES, 1)
    planes = samples if numbers.get(_PLANES, 1) == 2 else 1
    if height * width > _MAX_PIXELS_PER_BYTE * length:
        return None
    tiled = _TILE_OFFSETS in fields
    if compression == _OLD_JPEG or (tiled and _STRIP_OFFSETS in fields) or min(height, width) < 1:
        return None
    if tiled:
        segment = numbers[_TILE_HEIGHT], numbers[_TILE_WIDTH]
        offsets, lengths = fields[_TILE_OFFSETS], fields[_TILE_LENGTHS]
    else:
        segment = min(numbers.get(_ROWS_PER_STRIP, height), height), width
        offsets, lengths = fields[_STRIP_OFFSETS], fields[_STRIP_LENGTHS]
    if min(segment) < 1:
        return None
    shape = planes, math.ceil(height / segment[0]), math.ceil(width / segment[1])
    # A wrong number of offsets raises here, and the whole file is left to the other reader.
    layout = _Layout(
        (height, width), segment, segment, tiled,
        offsets.values(order).reshape(shape), lengths.values(order).reshape(shape),
    )  # fmt: skip
    if not tiled:
        if compression == _UNCOMPRESSED:
            bits = fields[_BITS].values(order) if _BITS in fields else np.ones(1, np.int64)
            per_pixel = int(bits[0]) * (samples if planes == 1 else 1)
            if int(layout.lengths.sum()) <= length:
                layout = _split_strips(layout, math.ceil(width * per_pixel / 8))
        rows = layout.segment[0]
        layout = layout._replace(block=(rows * math.ceil(_BLOCK_ROWS / rows), width))
    whole = layout.block[0] >= height and layout.block[1] >= width
    return None if whole or math.prod(layout.block) > _MAX_BLOCK else layout


def _split_strips(layout: _Layout, row_bytes: int) -> _Layout:
    """Cut tall strips that are not compressed into strips of one row."""
    height, width = layout.size
    tall = layout.segment[0]
    starts = np.arange(0, height, tall)
    sizes = np.minimum(tall, height - starts) * row_bytes
    if tall <= _BLOCK_ROWS or (layout.lengths[..., 0] != sizes).any():
        return layout
    rows = np.arange(height)
    offsets = layout.offsets[:, rows // tall, 0] + rows % tall * row_bytes
    lengths = np.full_like(offsets, row_bytes)
    return layout._replace(
        segment=(1, width), offsets=offsets[..., None], lengths=lengths[..., None]
    )


def _probe(file: BinaryIO, order: str, fields: _Fields, layout: _Layout) -> Image.Transpose | None:
    """Return what turns the image upright, and raise if it cannot be read by windows."""
    copied = {tag: field for tag, field in fields.items() if tag in _DECODING | _TURN}
    content = _copy_block(file, order, copied, layout, (0, 0))
    with open_image(io.BytesIO(content)) as image:
        if image.format != "TIFF" or image.mode in ("F", "I"):
            raise ValueError(f"{image.format} with mode {image.mode} is read whole")
        return turn_to_upright(image)


def _copy_block(
    file: BinaryIO, order: str, fields: _Fields, layout: _Layout, block: tuple[int, int]
) -> bytes:
    """Return a TIFF file of one block of the image."""
    # The rows and columns of tiles or strips that it consists of.
    per_block = [side // part for side, part in zip(layout.block, layout.segment, strict=True)]
    y, x = (
        slice(index * number, (index + 1) * number)
        for index, number in zip(block, per_block, strict=True)
    )
    length = file.seek(0, os.SEEK_END)
    segments = [
        _read(file, at, size, length)
        for at, size in zip(
            layout.offsets[:, y, x].ravel().tolist(),
            layout.lengths[:, y, x].ravel().tolist(),
            strict=True,
        )
    ]
    height, width = (
        min(side, whole - index * side)
        for side, whole, index in zip(layout.block, layout.size, block, strict=True)
    )
    numbers = {_WIDTH: width, _HEIGHT: height}
    if layout.tiled:
        numbers |= {_TILE_HEIGHT: layout.segment[0], _TILE_WIDTH: layout.segment[1]}
    else:
        numbers[_ROWS_PER_STRIP] = layout.segment[0]
    own = {tag: _long_field(order, [value]) for tag, value in numbers.items()}
    places = (_TILE_OFFSETS, _TILE_LENGTHS) if layout.tiled else (_STRIP_OFFSETS, _STRIP_LENGTHS)
    return _encode(order, fields | own, segments, places)


def _encode(
    order: str, fields: _Fields, segments: Sequence[bytes], places: tuple[int, int]
) -> bytes:
    """Return a TIFF file with some fields and segments.

    Args:
        order: The order of its bytes.
        fields: Its fields, without those of the place of segments.
        segments: The segments.
        places: The tags of the offsets and lengths of segments.
    """
    lengths = [len(segment) for segment in segments]
    fields = fields | {
        places[1]: _long_field(order, lengths),
        places[0]: _long_field(order, lengths),
    }
    start = 8 + 2 + 12 * len(fields) + 4
    start += sum(_padded(len(field.data)) for field in fields.values() if len(field.data) > 4)
    fields[places[0]] = _long_field(order, accumulate(lengths[:-1], initial=start))
    entries, values = [], b""
    at = 8 + 2 + 12 * len(fields) + 4
    for tag, field in sorted(fields.items()):
        inline = field.data.ljust(4, b"\0")
        if len(field.data) > 4:
            inline = struct.pack(order + "I", at + len(values))
            values += field.data.ljust(_padded(len(field.data)), b"\0")
        entries.append(struct.pack(order + "HHI4s", tag, field.kind, field.number, inline))
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(fields))
    return b"".join((head, *entries, bytes(4), values, *segments))


def _padded(size: int) -> int:
    return size + size % 2


def _long_field(order: str, values: Iterable[int]) -> _Field:
    data = np.array(list(values), order + "u4")
    return _Field(_LONG, len(data), data.tobytes())
