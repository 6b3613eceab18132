"""Reading of YAML that may be damaged, with one kind of error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focaldet._checks import printable
from focaldet._extras import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["parse_yaml"]


def parse_yaml(
    text: str,
    *,
    purpose: str,
    source: str,
    error: type[Exception],
    loader: Callable[[Any], Any] = lambda yaml: yaml.SafeLoader,
) -> Any:
    """Parse a text with a safe loader.

    Args:
        text: The YAML.
        purpose: What PyYAML is needed for, for the message if it is not installed.
        source: What the text is called in messages.
        error: The class of the error for a text that cannot be parsed.
        loader: Returns the loader, given PyYAML. It must be a safe one.

    Raises:
        ImportError: If PyYAML is not installed.
    """
    yaml = import_extra("yaml", purpose=purpose, install="pyyaml")
    try:
        return yaml.load(text, loader(yaml))
    # PyYAML passes on all kinds of errors for values such as "!!timestamp x".
    except (
        yaml.YAMLError,
        RecursionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as caught:
        reason = "it is nested too deeply"
        if not isinstance(caught, RecursionError):
            reason = printable(" ".join(str(caught).split()))
        raise error(f"Cannot read {source} as YAML ({reason}).") from caught
