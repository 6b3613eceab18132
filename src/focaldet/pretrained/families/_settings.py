"""The settings of a training run, read from the YAML that Detectron and Detectron2 write.

Nothing in the text is run: where it asks for a Python object, the plain content is kept instead.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from focaldet._checks import shortened
from focaldet._yaml import parse_yaml
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Settings", "read_settings"]

_MAX_LENGTH = 1 << 18  # characters; a dump of all of Detectron2's settings has some 10,000


@dataclass(frozen=True)
class Settings:
    """Nested settings, which are looked up by dotted names such as ``"INPUT.MIN_SIZE_TEST"``.

    Every method returns None if there is no such setting, and raises :class:`CheckpointError` if it is
    of a different type.

    Attributes:
        content: The settings.
        source: Where they are from, for messages.
    """

    content: Mapping[str, Any]
    source: str

    def value(self, name: str) -> Any:
        """Return a setting of any type."""
        found: Any = self.content
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def number(self, name: str) -> float | None:
        """Return a setting that is a finite number."""
        value = self.value(name)
        return None if value is None else self._number(name, value)

    def integer(self, name: str) -> int | None:
        """Return a setting that is an integer."""
        number = self.number(name)
        if number is not None and number != int(number):
            raise self._error(name, "an integer", number)
        return None if number is None else int(number)

    def flag(self, name: str) -> bool | None:
        """Return a setting that is true or false."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return value

    def text(self, name: str) -> str | None:
        """Return a setting that is a text."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self._error(name, "a text", value)
        return value

    def numbers(self, name: str, count: int | None = None) -> tuple[float, ...] | None:
        """Return a setting that is a list of numbers, or the text of one such as "(0.4, 0.5)"."""
        value = self.value(name)
        if isinstance(value, str):
            value = _literal(value)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or count not in (None, len(value)):
            raise self._error(name, f"a list of {f'{count} ' * bool(count)}numbers", value)
        return tuple(self._number(name, entry) for entry in value)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, str):  # YAML takes 1e-3, without a dot, for a text
            try:
                value = float(value)
            except ValueError:
                raise self._error(name, "a number", value) from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(name, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._error(name, "a finite number", value)
        return number

    def _error(self, name: str, wanted: str, value: object) -> CheckpointError:
        return CheckpointError(f"{name} in {self.source} must be {wanted}, got {shortened(value)}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def read_settings(text: str, source: str) -> Settings:
    """Read the YAML of a run's settings.

    Args:
        text: The YAML.
        source: What messages call it, such as ``"config.yaml"``.

    Raises:
        ImportError: If PyYAML is not installed.
        CheckpointError: If the text is too long, or not the YAML of a mapping.
    """
    if len(text) > _MAX_LENGTH:
        raise CheckpointError(
            f"{source} has {len(text):,} characters, too many for the settings of a training run."
        )
    content = parse_yaml(
        text,
        purpose=f"Reading {source}",
        source=source,
        error=CheckpointError,
        loader=_plain_loader,
    )
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} must contain settings, but contains {shortened(content)}.")
    return Settings(content, source)


def _plain_loader(yaml: Any) -> Any:
    """Return a safe loader that keeps the plain content of every tag that it does not know."""

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:
            """Leave merge keys as they are: a few lines of them can stand for any amount of text."""

    def plain(loader: Any, _tag: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            content = loader.construct_mapping(node, deep=True)
            return content.get("dictitems", content)  # a subclass of dict
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    PlainLoader.add_multi_constructor("", plain)
    return PlainLoader
