"""Write TIFF files with tiles or strips, in layouts that Pillow does not write."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["write_tiff"]

_COMPRESSIONS = {"none": 1, "lzw": 5, "jpeg": 7, "deflate": 8}


def write_tiff(
    path: Path,
    pixels: npt.NDArray[Any],
    *,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int | None = None,
    compression: str = "none",
    photometric: int | None = None,
    planar: bool = False,
    big: bool = False,
    order: Literal["<", ">"] = "<",
    predictor: bool = False,
    subsampling: str = "4:2:0",
    extra: Mapping[int, tuple[int, list[int]]] | None = None,
    next_image: npt.NDArray[Any] | None = None,
) -> Path:
    """Write a TIFF file.

    Args:
        path: The file to write.
        pixels: ``[H, W]`` or ``[H, W, C]`` of any number of bits.
        tile: ``(height, width)`` of a tile. None writes strips.
        rows_per_strip: The height of a strip. None writes one strip.
        compression: ``"none"``, ``"deflate"``, ``"jpeg"`` or ``"lzw"``.
        photometric: The meaning of the values. None means grey values or RGB.
        planar: Whether each channel is stored apart.
        big: Whether to write a BigTIFF file.
        order: ``"<"`` or ``">"``, the order of bytes.
        predictor: Whether differences of neighbours are stored.
        subsampling: Of the colours of JPEG.
        extra: More fields: the type (1, 3 or 4) and the values of each tag.
        next_image: A second page, such as a lower level of a pyramid, stored in one strip.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = pixels.shape
    segment = tile or (rows_per_strip or height, width)
    if photometric is None:
        photometric = 1 if channels < 3 else 2
    if compression == "jpeg" and channels == 3 and not planar:
        photometric = 6  # YCbCr
    planes = np.moveaxis(pixels, -1, 0)[..., None] if planar else pixels[None]
    encode = _encoder(compression, order, predictor=predictor, subsampling=subsampling)
    parts = [
        encode(_cut(plane, y, x, segment, padded=tile is not None))
        for plane in planes
        for y in range(0, height, segment[0])
        for x in range(0, width, segment[1])
    ]
    fields: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [pixels.dtype.itemsize * 8] * channels),
        259: (3, [_COMPRESSIONS[compression]]),
        262: (3, [photometric]),
        277: (3, [channels]),
        284: (3, [2 if planar else 1]),
        **({317: (3, [2])} if predictor else {}),
        **(
            {530: (3, [int(part) for part in _SUBSAMPLINGS[subsampling]])}
            if photometric == 6
            else {}
        ),
        **(extra or {}),
    }
    if tile is None:
        fields[278] = (4, [segment[0]])
        places = 273, 279
    else:
        fields |= {322: (4, [tile[1]]), 323: (4, [tile[0]])}
        places = 324, 325
    file = _File(big=big, order=order)
    file.add_image(fields, parts, places)
    if next_image is not None:
        small = next_image.reshape(*next_image.shape[:2], -1)
        again = {256: (4, [small.shape[1]]), 257: (4, [small.shape[0]]), 259: (3, [1])}
        kept = {tag: fields[tag] for tag in (258, 262, 277)} | {278: (4, [small.shape[0]])}
        file.add_image(again | kept, [small.tobytes()], (273, 279))
    path.write_bytes(file.content)
    return path


_SUBSAMPLINGS = {"4:4:4": "11", "4:2:0": "22"}


def _cut(
    plane: npt.NDArray[Any], y: int, x: int, segment: tuple[int, int], *, padded: bool
) -> npt.NDArray[Any]:
    part = plane[y : y + segment[0], x : x + segment[1]]
    if padded:
        missing = [(0, side - have) for side, have in zip(segment, part.shape, strict=False)]
        part = np.pad(part, [*missing, (0, 0)], mode="edge")
    return part


def _encoder(
    compression: str, order: Literal["<", ">"], *, predictor: bool, subsampling: str
) -> Callable[[npt.NDArray[Any]], bytes]:
    def encode(part: npt.NDArray[Any]) -> bytes:
        if compression == "jpeg":
            buffer = io.BytesIO()
            if part.shape[-1] == 1:
                Image.fromarray(part[..., 0]).save(buffer, "JPEG", quality=80)
            else:
                Image.fromarray(part).save(buffer, "JPEG", quality=80, subsampling=subsampling)
            return buffer.getvalue()
        if predictor:
            part = part.copy()
            part[:, 1:] -= part[:, :-1].copy()
        data = part.astype(part.dtype.newbyteorder(order)).tobytes()
        if compression == "deflate":
            return zlib.compress(data)
        return _lzw(data) if compression == "lzw" else data

    return encode


def _lzw(data: bytes) -> bytes:
    """Return a stream of LZW that begins a new table so often that all its codes have 9 bits."""
    codes = [256]
    for start in range(0, len(data), 200):
        codes += [*data[start : start + 200], 256]
    bits = "".join(f"{code:09b}" for code in [*codes[:-1], 257])
    return int(bits.ljust(math.ceil(len(bits) / 8) * 8, "0"), 2).to_bytes(
        math.ceil(len(bits) / 8), "big"
    )


class _File:
    def __init__(self, *, big: bool, order: str) -> None:
        self.big, self.order = big, order
        mark = b"II" if order == "<" else b"MM"
        self.content = bytearray(mark)
        # The place of the first image follows.
        if big:
            self.content += struct.pack(order + "HHHQ", 43, 8, 0, 0)
        else:
            self.content += struct.pack(order + "HI", 42, 0)
        self.link = 8 if big else 4

    def _append(self, data: bytes) -> int:
        self.content += bytes(len(self.content) % 2)
        at = len(self.content)
        self.content += data
        return at

    def add_image(
        self,
        fields: Mapping[int, tuple[int, list[int]]],
        parts: list[bytes],
        places: tuple[int, int],
    ) -> None:
        place = "Q" if self.big else "I"
        kind = 16 if self.big else 4
        offsets = [self._append(part) for part in parts]
        lengths = [len(part) for part in parts]
        every = {**fields, places[0]: (kind, offsets), places[1]: (4, lengths)}
        entries = []
        for tag, (type_, values) in sorted(every.items()):
            letter = {1: "B", 3: "H", 4: "I", 16: "Q"}[type_]
            data = struct.pack(f"{self.order}{len(values)}{letter}", *values)
            room = struct.calcsize(place)
            if len(data) > room:
                data = struct.pack(self.order + place, self._append(data))
            entries.append(
                struct.pack(f"{self.order}HH{place}", tag, type_, len(values))
                + data.ljust(room, b"\0")
            )
        count = struct.pack(self.order + ("Q" if self.big else "H"), len(entries))
        at = self._append(count + b"".join(entries) + bytes(struct.calcsize(place)))
        struct.pack_into(self.order + place, self.content, self.link, at)
        self.link = len(self.content) - struct.calcsize(place)
