"""Limits on what reading a file may cost, in proportion to the file's size.

A few bytes can describe something huge: a pickle can refer to one object many times, store at any memo
index or nest without end, an archive can be compressed a thousandfold, and a view can repeat one number.
Each check here runs before the step that would be expensive, and takes linear time itself.
"""

from __future__ import annotations

import functools
import pickletools
import warnings
from collections import Counter
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Iterable

    from torch import Tensor

__all__ = [
    "TooExpensiveError",
    "check_archive_size",
    "check_contents",
    "check_pickle",
    "check_tensor_sizes",
]

# Each limit is an allowance that small files may use plus a multiple of the file's size.
_FREE_WORK = 1_000_000  # steps
_WORK_PER_BYTE = 20
_FREE_OBJECTS = 100_000
_FREE_BYTES = 1 << 26
_BYTES_PER_BYTE = 20
_MAX_DEPTH = 100


class TooExpensiveError(ValueError):
    """Reading a file would take far more time or memory than its size justifies."""


def check_pickle(file: IO[bytes], size: int, *, strict: bool) -> None:
    """Raise if loading the pickle at the file's position would be too expensive.

    The instructions are followed without creating any object. Only their cost is added up.

    Args:
        file: The file. Afterwards its position is behind the pickle.
        size: The size of the file in bytes.
        strict: Whether an invalid instruction raises, too. Otherwise the check ends there, which is
            right if the reader stops at that instruction as well.

    Raises:
        TooExpensiveError: If the pickle exceeds the budget.
        ValueError: If the pickle is damaged and ``strict`` is set.
    """
    machine = _Machine(size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escape sequences in strings
            for opcode, argument, _position in pickletools.genops(file):
                machine.step(opcode, argument)
    except TooExpensiveError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        if strict:
            raise ValueError(str(error) or type(error).__name__) from error


class _Node:
    """An object of a pickle: the number of steps to visit it and all that it contains."""

    __slots__ = ("depth", "size")

    def __init__(self, size: int, depth: int = 0) -> None:
        self.size, self.depth = size, depth


class _Machine:
    """The stack and the memo of an unpickler, with costs in place of objects."""

    def __init__(self, file_size: int) -> None:
        self.stack: list[_Node] = []
        self.below: list[list[_Node]] = []  # the stacks below each mark
        self.memo: dict[int, _Node] = {}
        self.max_index = max(file_size, 256)
        self.work_left = _FREE_WORK + _WORK_PER_BYTE * file_size

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "POP" and not self.stack:
            self.stack = self.below.pop()
        elif name in _PUT:
            self._put(len(self.memo) if argument is None else int(argument))
        elif name in _GET:
            self.stack.append(self.memo[int(argument)])
        elif name == "GLOBAL" and argument in _UNBOUNDED:
            raise TooExpensiveError(f"it asks for {argument.split()[1]}")
        else:
            self._compute(opcode, argument)

    def _put(self, index: int) -> None:
        if index > self.max_index:
            raise TooExpensiveError(f"it asks for the memo entry {index}")
        self.memo[index] = self.stack[-1]

    def _compute(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        popped, pushed, to_mark = _effect(opcode)
        used: list[_Node] = []
        if to_mark:
            used, self.stack = self.stack, self.below.pop()
        for _ in range(popped):
            used.append(self.stack.pop())
        changed = used.pop() if opcode.name in _CHANGING else None
        size = 1 + sum(node.size for node in used)
        depth = 1 + max((node.depth for node in used), default=-1)
        if isinstance(argument, str | bytes | bytearray):
            size += len(argument) // 16
        self.work_left -= size
        if self.work_left < 0:
            raise TooExpensiveError("its parts refer to each other too often")
        if depth > _MAX_DEPTH:
            raise TooExpensiveError(f"it is nested more than {_MAX_DEPTH} levels deep")
        if changed is not None:
            changed.size += size
            changed.depth = max(changed.depth, depth)
            self.stack.append(changed)
        else:
            self.stack.extend(_Node(size, depth) for _ in range(pushed))


_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_CHANGING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
# Torch lets a pickle call this one, which fills any number of bytes.
_UNBOUNDED = ("builtins bytearray", "__builtin__ bytearray")


@functools.cache
def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, int, bool]:
    """Return how many objects an instruction pops and pushes, and whether it first pops to a mark."""
    names = [item.name for item in opcode.stack_before]
    to_mark = "mark" in names
    popped = names.index("mark") if to_mark else len(names)
    return popped, len(opcode.stack_after), to_mark


def check_archive_size(members: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Raise if the members of a zip archive of ``size`` bytes are too large or have equal names."""
    members = list(members)
    total = sum(member.file_size for member in members)
    if total > _FREE_BYTES + _BYTES_PER_BYTE * size:
        raise TooExpensiveError(f"it unpacks to {total} bytes")
    [(name, count)] = Counter(member.filename for member in members).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(
            f"a zip archive with an unsafe member {name!r}, which occurs {count} times"
        )


def check_contents(contents: object, size: int) -> None:
    """Raise if dictionaries and sequences are nested too deeply, without end, or contain too much.

    An object is counted once for each place that refers to it, because printing or copying visits it
    that often.

    Args:
        contents: What a file of ``size`` bytes contains.
        size: The file's size.
    """
    limit = _FREE_OBJECTS + size
    costs: dict[int, int] = {}  # by id, of what has been visited completely
    open_ids: set[int] = set()
    waiting: list[tuple[object, bool]] = [(contents, False)]
    while waiting:
        value, visited = waiting.pop()
        if visited:
            open_ids.remove(id(value))
            costs[id(value)] = cost = 1 + sum(costs.get(id(part), 1) for part in _parts(value))
            if cost > limit:
                raise TooExpensiveError("its parts refer to each other too often")
        elif id(value) not in costs and (parts := _parts(value)):
            if id(value) in open_ids:
                raise TooExpensiveError("it contains itself")
            open_ids.add(id(value))
            if len(open_ids) > _MAX_DEPTH:
                raise TooExpensiveError(f"it is nested more than {_MAX_DEPTH} levels deep")
            waiting.append((value, True))
            waiting += [(part, False) for part in parts]


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return []


def check_tensor_sizes(tensors: Iterable[Tensor], size: int) -> None:
    """Raise if tensors, written out in full, are far larger than their file of ``size`` bytes.

    A view can repeat a single number any number of times.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if total > _FREE_BYTES + _BYTES_PER_BYTE * size:
        raise TooExpensiveError(f"its tensors have {total} bytes")
