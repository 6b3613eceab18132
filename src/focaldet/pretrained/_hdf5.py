"""Read arrays from the HDF5 files that Keras writes.

The HDF5 library is written in C and follows what a file says: a damaged one can keep it busy for ever.
Keras uses a small part of the format, which is read here in Python, with every address and length checked:
version 0 of the format, as h5py writes it by default; groups; and arrays of numbers that are stored in one
piece. Anything else is an error that names it, such as links, compression, or data in other files.

References:
    The HDF Group, HDF5 File Format Specification, version 3.0.
"""

from __future__ import annotations

import math
import mmap
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from focaldet._checks import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

__all__ = ["is_hdf5", "read_hdf5"]

_SUFFIXES = (".h5", ".hdf5")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_WEIGHTS = "model_weights"  # of a whole model; a file of weights alone has the layers at the top
_OPTIMISER = "optimizer_weights"
_ATTRIBUTES = ("model_config", "keras_version", "backend")
_MAX_OBJECTS = 20_000
_MAX_DEPTH = 16
_MAX_DIMENSIONS = 8
_NOWHERE = 2**64 - 1  # the address of what is not in the file
_SAVE_AGAIN = "Save the model again with Keras, or with h5py's default options."

# Types of the messages in an object's header.
_DATASPACE, _LINK_INFO, _DATATYPE, _LINK, _EXTERNAL, _LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
_FILTERS, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x0B, 0x0C, 0x10, 0x11

_FIXED_POINT, _FLOATING_POINT, _STRING, _VARIABLE_LENGTH = 0, 1, 3, 9
_INTEGERS = {  # by size in bytes and whether it is signed
    (1, False): torch.uint8,
    (1, True): torch.int8,
    (2, True): torch.int16,
    (4, True): torch.int32,
    (8, True): torch.int64,
}
# By the size in bytes and the fields of IEEE 754: precision, place and size of exponent and mantissa.
_FLOATS = {
    (2, (0, 16, 10, 5, 0, 10, 15)): torch.float16,
    (4, (0, 32, 23, 8, 0, 23, 127)): torch.float32,
    (8, (0, 64, 52, 11, 0, 52, 1023)): torch.float64,
}


def is_hdf5(path: Path) -> bool:
    """Whether a file is an HDF5 file, by its suffix or its first bytes."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def read_hdf5(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights in a file of Keras.

    Args:
        path: The file. Its optimiser's weights are not read.

    Returns:
        The arrays by their path in the file, without the group of the weights; and the texts that
        describe the model, such as its configuration.

    Raises:
        ValueError: If the file is damaged, uses more of HDF5 than Keras does, or says that it contains
            more than its size allows.
    """
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).read()


class _Message(NamedTuple):
    """A message in the header of an object: one of its properties."""

    kind: int
    data: bytes


class _Array(NamedTuple):
    """An array: its type, shape and place in the file, or its bytes if they are in its header."""

    dtype: torch.dtype
    big_endian: bool
    shape: tuple[int, ...]
    at: int
    compact: bytes | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Reader:
    """Follows the addresses in a file. All are checked, and the number of objects is bounded."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.count = 0
        self.arrays: dict[str, _Array] = {}

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        root = self._header(self._root_address(), "the file")
        texts = self._texts(root)
        members = dict(self._members(root, ""))
        if _WEIGHTS in members:
            root = self._header(members[_WEIGHTS], _WEIGHTS)
            members = dict(self._members(root, _WEIGHTS))
        members.pop(_OPTIMISER, None)
        for name, address in members.items():
            self._visit(name, address, 1)
        declared = sum(array.num_bytes for array in self.arrays.values())
        if declared > len(self.data):
            raise ValueError(f"its arrays have {declared} bytes, but the file has {len(self.data)}")
        return {name: self._tensor(array) for name, array in self.arrays.items()}, texts

    # --- Bytes ---

    def _take(self, at: int, count: int) -> bytes:
        if at + count > len(self.data):
            raise ValueError(f"it ends before byte {at + count}")
        return self.data[at : at + count]

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack(form, self._take(at, struct.calcsize(form)))

    def _expect(self, signature: bytes, at: int, what: str) -> None:
        if self._take(at, len(signature)) != signature:
            raise ValueError(f"it has no {what} at byte {at}")

    def _root_address(self) -> int:
        self._expect(_SIGNATURE, 0, "beginning of an HDF5 file")
        version, _, _, _, _, offsets, lengths = self._unpack("<7B", 8)
        if version > 1 or (offsets, lengths) != (8, 8):
            raise ValueError(f"it is in version {version} of the HDF5 format, not 0. {_SAVE_AGAIN}")
        at = 24 if version == 0 else 28
        base, _, _, _, _, root = self._unpack("<6Q", at)
        if base:
            raise ValueError("its HDF5 data begin elsewhere than at its first byte")
        return root

    # --- Objects ---

    def _header(self, address: int, name: str) -> list[_Message]:
        """Return the messages of the object at an address."""
        if self._take(address, 4) == b"OHDR":
            raise ValueError(f"{name} is in a newer HDF5 format. {_SAVE_AGAIN}")
        version, _, count, _, size = self._unpack("<BBHII", address)
        if version != 1:
            raise ValueError(f"it has no object at byte {address}")
        messages: list[_Message] = []
        blocks = [(address + 16, size)]
        while blocks and len(messages) < count:
            at, size = blocks.pop(0)
            end = at + size
            while at + 8 <= end and len(messages) < count:
                kind, length, flags = self._unpack("<HHB", at)
                data = self._take(at + 8, length)
                at += 8 + length
                if flags & 2:  # stored elsewhere, such as a named datatype
                    raise ValueError(f"{shortened(name)} shares a part with another object")
                if kind == _CONTINUATION:
                    blocks.append((_number(data, 0, 8), _number(data, 8, 8)))
                messages.append(_Message(kind, data))
        return messages

    def _visit(self, name: str, address: int, depth: int) -> None:
        """Collect the arrays in an object: itself, or what is in it if it is a group."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {_MAX_DEPTH} levels deep")
        header = self._header(address, name)
        kinds = {message.kind for message in header}
        if _DATASPACE in kinds and _LAYOUT in kinds:
            if name in self.arrays:
                raise ValueError(f"it has two arrays called {shortened(name)}")
            self.arrays[name] = _array(name, header)
        elif kinds & {_SYMBOL_TABLE, _LINK_INFO, _LINK}:
            for member, at in self._members(header, name):
                self._visit(f"{name}/{member}", at, depth + 1)
        else:
            raise ValueError(f"{shortened(name)} is neither a group nor an array")

    def _members(self, header: list[_Message], name: str) -> Iterator[tuple[str, int]]:
        """Yield the names of a group's members, with their addresses."""
        for kind, data in header:
            if kind == _SYMBOL_TABLE:
                yield from self._counted(self._symbols(data))
            elif kind == _LINK:
                yield from self._counted(iter([_hard_link(data)]))
            elif kind == _LINK_INFO and _link_heap(data) != _NOWHERE:
                where = shortened(name) if name else "the file"
                raise ValueError(f"{where} lists its members in a newer HDF5 format. {_SAVE_AGAIN}")

    def _counted(self, members: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        for member in members:
            self.count += 1
            if self.count > _MAX_OBJECTS:
                raise ValueError(f"it has more than {_MAX_OBJECTS} groups and arrays")
            yield member

    def _symbols(self, table: bytes) -> Iterator[tuple[str, int]]:
        """Yield the members in a symbol table, which is a tree with names in a heap."""
        heap = _number(table, 8, 8)
        self._expect(b"HEAP", heap, "heap of names")
        size, _, names = self._unpack("<3Q", heap + 8)
        text = self._take(names, size)
        seen = set()
        nodes = [_number(table, 0, 8)]
        while nodes:
            node = nodes.pop()
            if node in seen:
                raise ValueError("a group contains itself")
            seen.add(node)
            if self._take(node, 4) == b"SNOD":
                yield from self._entries(node, text)
                continue
            self._expect(b"TREE\x00", node, "tree of members")
            (entries,) = self._unpack("<H", node + 6)
            # Children alternate with keys.
            nodes += [self._unpack("<Q", node + 32 + 16 * i)[0] for i in reversed(range(entries))]
            if len(nodes) > _MAX_OBJECTS:
                raise ValueError(f"it has more than {_MAX_OBJECTS} groups and arrays")

    def _entries(self, node: int, names: bytes) -> Iterator[tuple[str, int]]:
        (count,) = self._unpack("<H", node + 6)
        for i in range(count):
            name_at, address, cache = self._unpack("<QQI", node + 8 + 40 * i)
            end = names.find(b"\0", name_at)
            if name_at >= len(names) or end < 0:
                raise ValueError("a name is outside its heap")
            name = names[name_at:end].decode("utf-8", errors="replace")
            if cache == 2:
                raise ValueError(f"{shortened(name)} is a link, which is not followed")
            yield name, address

    # --- Values ---

    def _tensor(self, array: _Array) -> Tensor:
        if not array.num_bytes:
            return torch.empty(array.shape, dtype=array.dtype)
        raw = array.compact
        if raw is None:
            raw = self._take(array.at, array.num_bytes)
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if array.big_endian:
            values = values.view(-1, array.dtype.itemsize).flip(1).reshape(-1)
        return values.view(array.dtype).view(array.shape)

    def _texts(self, header: list[_Message]) -> dict[str, str]:
        """Return those attributes of the file that describe the model."""
        found = {}
        for kind, data in header:
            if kind == _ATTRIBUTE:
                name, datatype, value = _attribute(data)
                raw = self._text(datatype, value) if name in _ATTRIBUTES else None
                if raw is not None:
                    found[name] = raw.rstrip(b"\0").decode("utf-8", errors="replace")
        return found

    def _text(self, datatype: bytes, value: bytes) -> bytes | None:
        kind = datatype[0] & 15
        if kind == _STRING:
            return value
        if kind != _VARIABLE_LENGTH or datatype[1] & 15 != 1:
            return None
        length, heap, wanted = struct.unpack("<IQI", value[:16])
        self._expect(b"GCOL", heap, "heap of values")
        (size,) = self._unpack("<Q", heap + 8)
        at, end = heap + 16, min(heap + size, len(self.data))
        while at + 16 <= end:
            index, _, _, count = self._unpack("<HHIQ", at)
            if index == wanted:
                return self._take(at + 16, min(length, count))
            if index == 0:
                break
            at += 16 + -(-count // 8) * 8
        raise ValueError(f"it has no value {wanted} in the heap at byte {heap}")


def _number(data: bytes, at: int, count: int) -> int:
    """Return the unsigned number in a few bytes of a message."""
    if at + count > len(data):
        raise ValueError("a message in a header is too short")
    return int.from_bytes(data[at : at + count], "little")


def _array(name: str, header: list[_Message]) -> _Array:
    """Return the array that a header describes, if Keras could have written it."""
    kinds = {message.kind: message.data for message in header}
    shown = shortened(name)
    if _EXTERNAL in kinds:
        raise ValueError(f"{shown} is stored in another file, which is not opened")
    if _FILTERS in kinds:
        raise ValueError(f"{shown} is compressed or filtered. {_SAVE_AGAIN}")
    dtype, big_endian = _dtype(shown, kinds.get(_DATATYPE, b""))
    array = _Array(dtype, big_endian, _shape(shown, kinds[_DATASPACE]), 0, None)
    layout = kinds[_LAYOUT]
    version, storage = _number(layout, 0, 1), _number(layout, 1, 1)
    if version != 3 or storage > 1:
        raise ValueError(f"{shown} is not stored in one piece. {_SAVE_AGAIN}")
    if storage == 0:
        array = array._replace(compact=layout[4 : 4 + _number(layout, 2, 2)])
        stored = len(array.compact or b"")
    else:
        array = array._replace(at=_number(layout, 2, 8))
        stored = _number(layout, 10, 8)
    if stored != array.num_bytes:
        raise ValueError(f"{shown} has {stored} bytes instead of {array.num_bytes}")
    if array.at == _NOWHERE and array.num_bytes:
        raise ValueError(f"{shown} has no values")
    return array


def _shape(name: str, dataspace: bytes) -> tuple[int, ...]:
    version, dimensions = _number(dataspace, 0, 1), _number(dataspace, 1, 1)
    empty = version == 2 and _number(dataspace, 3, 1) == 2
    if version not in (1, 2) or dimensions > _MAX_DIMENSIONS or empty:
        raise ValueError(f"{name} is not an array of at most {_MAX_DIMENSIONS} dimensions")
    start = 8 if version == 1 else 4
    return tuple(_number(dataspace, start + 8 * i, 8) for i in range(dimensions))


def _dtype(name: str, datatype: bytes) -> tuple[torch.dtype, bool]:
    """Return the dtype of an array, and whether its bytes are in big-endian order."""
    kind, flags, size = (
        _number(datatype, 0, 1) & 15,
        _number(datatype, 1, 1),
        _number(datatype, 4, 4),
    )
    found = None
    if kind == _FIXED_POINT and (_number(datatype, 8, 2), _number(datatype, 10, 2)) == (
        0,
        8 * size,
    ):
        found = _INTEGERS.get((size, bool(flags & 8)))
    elif kind == _FLOATING_POINT and len(datatype) >= 20 and not flags & 64:
        found = _FLOATS.get((size, struct.unpack("<HHBBBBI", datatype[8:20])))
    if found is None:
        raise ValueError(f"{name} does not contain numbers that PyTorch has a dtype for")
    return found, bool(flags & 1)


def _link_heap(info: bytes) -> int:
    """Return the address of the heap in which a group of many members has its links, if it has one."""
    return _number(info, 10 if _number(info, 1, 1) & 1 else 2, 8)


def _hard_link(link: bytes) -> tuple[str, int]:
    """Return the name and the address in a link message.

    Raises:
        ValueError: If the link leads elsewhere than to an object of the same file.
    """
    flags = _number(link, 1, 1)
    at = 2
    kind = 0
    if flags & 8:
        kind = _number(link, at, 1)
        at += 1
    at += 8 * bool(flags & 4) + bool(flags & 16)
    width = 1 << (flags & 3)
    length = _number(link, at, width)
    at += width
    name = link[at : at + length].decode("utf-8", errors="replace")
    if kind:
        raise ValueError(f"{shortened(name)} is a link, which is not followed")
    return name, _number(link, at + length, 8)


def _attribute(data: bytes) -> tuple[str, bytes, bytes]:
    """Return the name, the datatype and the value of an attribute."""
    version = _number(data, 0, 1)
    sizes = [_number(data, at, 2) for at in (2, 4, 6)]  # of name, datatype and dataspace
    at = 9 if version == 3 else 8
    parts = []
    for size in sizes:
        parts.append(data[at : at + size])
        at += -(-size // 8) * 8 if version == 1 else size
    name, datatype, _ = parts
    if len(datatype) < 8:
        raise ValueError("an attribute has no type")
    return name.rstrip(b"\0").decode("utf-8", errors="replace"), datatype, data[at:]
