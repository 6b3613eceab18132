"""Read the text of an MMDetection configuration without running it.

Training writes its configuration into checkpoints as Python source: assignments of literals, of
``dict(...)`` calls, and of earlier names. Only these are evaluated, by walking the syntax tree.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["UNREADABLE", "evaluate"]

_MAX_LENGTH = 2**20  # characters; the largest published configuration has some 10,000
_MAX_STRING = 10_000
_MAX_NUMBER = 1e15
_MAX_DEPTH = 100
_MAX_ENTRIES = 100_000  # copied by "**", in all

# MMDetection 1.x writes the path of the file in front of its contents.
_PATH_LINE = re.compile(r"^[^\s'\"=()#]+\.py\s*$", re.MULTILINE)

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class _Unreadable:
    """Stands for an expression that only running it could evaluate."""

    def __repr__(self) -> str:
        return "an expression"


UNREADABLE = _Unreadable()


def evaluate(text: str) -> dict[str, Any]:
    r"""Return the values of the names that a configuration assigns.

    Args:
        text: The source. If it refers to base files, whose texts precede it, dictionaries that are
            assigned again are merged.

    Returns:
        The values by name, with ``UNREADABLE`` in place of what cannot be evaluated.

    Raises:
        ValueError: If it is not Python source, or is far too long or nested.

    >>> evaluate("a = 2\nb = dict(c=[a, -1.5], d=open('x'))")
    {'a': 2, 'b': {'c': [2, -1.5], 'd': an expression}}
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters")
    try:
        statements = ast.parse(_PATH_LINE.sub("", text)).body
        return _Evaluator().run(statements)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is not Python source") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error


class _Evaluator:
    def __init__(self) -> None:
        self._names: dict[str, Any] = {}
        self._entries = 0

    def run(self, statements: list[ast.stmt]) -> dict[str, Any]:
        for name, node in _assignments(statements):
            value = UNREADABLE if node is None else self._value(node, 0)
            if "_base_" in self._names and name in self._names:
                value = self._merged(self._names[name], value, 0)
            self._names[name] = value
        return self._names

    def _value(self, node: ast.expr | None, depth: int) -> Any:  # noqa: PLR0911
        depth += 1
        if depth > _MAX_DEPTH:
            raise RecursionError
        match node:
            case ast.Constant(value=value):
                return value if isinstance(value, bool | int | float | str | None) else UNREADABLE
            case ast.Name(id=name):
                return self._names.get(name, UNREADABLE)
            case ast.List(elts=entries):
                return [self._value(entry, depth) for entry in entries]
            case ast.Tuple(elts=entries):
                return tuple(self._value(entry, depth) for entry in entries)
            case ast.Dict(keys=keys, values=values):
                return self._dict(zip(keys, values, strict=True), depth)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                pairs = ((k.arg and ast.Constant(k.arg), k.value) for k in keywords)
                return self._dict(pairs, depth)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._value(operand, depth)
                return -value if _is_number(value) else UNREADABLE
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _combined(op, self._value(left, depth), self._value(right, depth))
        return UNREADABLE

    def _dict(self, pairs: Any, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in pairs:
            value = self._value(value_node, depth)
            if key_node is None:  # "**"
                if isinstance(value, dict):
                    self._count(len(value))
                    found |= value
                continue
            key = self._value(key_node, depth)
            if isinstance(key, str):
                found[key] = value
        return found

    def _merged(self, old: Any, new: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise RecursionError
        if not isinstance(old, dict) or not isinstance(new, dict) or new.get("_delete_") is True:
            return new
        self._count(len(old))
        return old | {key: self._merged(old.get(key), new[key], depth + 1) for key in new}

    def _count(self, entries: int) -> None:
        self._entries += entries
        if self._entries > _MAX_ENTRIES:
            raise MemoryError


def _assignments(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield the names that are assigned, with the expression or None if it is of another form."""
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AugAssign(target=ast.Name(id=name)):
                yield name, None


def _combined(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add):
        return left + right if len(left) + len(right) <= _MAX_STRING else UNREADABLE
    if not (_is_number(left) and _is_number(right)) or (isinstance(op, ast.Div) and not right):
        return UNREADABLE
    return _OPERATORS[type(op)](left, right)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
    )
