"""The public names and signatures, held against a file, so that none changes unnoticed.

After a change that is meant, write the file again and mention it in CHANGELOG.md:

    python -m tests.test_api_surface
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from types import FunctionType

SURFACE = Path(__file__).with_name("api_surface.json")
SOURCES = Path(__file__).parents[1] / "src" / "focaldet"


def public_modules() -> list[str]:
    paths = [*SOURCES.glob("*.py"), *SOURCES.glob("*/__init__.py")]
    names = [path.parent.name if path.stem == "__init__" else path.stem for path in paths]
    return sorted(f"focaldet.{n}" for n in names if not n.startswith("_") and n != "focaldet")


def described(value: object) -> object:
    if inspect.isclass(value):
        members = {
            name: "property" if isinstance(member, property) else signature(member)
            for name, member in sorted(vars(value).items())
            if not name.startswith("_")
            and isinstance(member, FunctionType | classmethod | staticmethod | property)
        }
        return {"()": signature(value), **members}
    return signature(value) if callable(value) else type(value).__name__


def signature(value: object) -> str:
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    try:
        return str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return type(value).__name__


def surface() -> dict[str, object]:
    found: dict[str, object] = {}
    for name in public_modules():
        module = importlib.import_module(name)
        found[name] = {item: described(getattr(module, item)) for item in module.__all__}
    return found


def test_the_public_surface_is_the_one_written_down() -> None:
    assert surface() == json.loads(SURFACE.read_text()), (
        "Public signatures changed. If that is meant: python -m tests.test_api_surface"
    )


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
