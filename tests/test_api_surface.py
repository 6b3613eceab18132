"""The public names and signatures are compared with a file, so that none changes unnoticed.

A module inside a package begins with an underscore and is private. What is public is the ``__all__``
of the other modules: those at the top level, and the ``__init__`` of each package. After an
intended change, write the file again and mention the change in CHANGELOG.md:

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


# Old spellings, which warn when they are used.
DEPRECATED = {
    "focaldet.coco",
    "focaldet.datasets.check_anchors",
    "focaldet.datasets.check_report",
}


def modules() -> list[str]:
    """Every module of the package but ``focaldet`` itself, by its dotted name."""
    paths = [path.relative_to(SOURCES.parent).with_suffix("") for path in SOURCES.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return sorted(names - {"focaldet"})


def is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def public_modules() -> list[str]:
    return [name for name in modules() if not is_private(name) and name not in DEPRECATED]


def described(value: object) -> object:
    if inspect.isclass(value):
        own = [vars(base) for base in value.__mro__ if base.__module__.startswith("focaldet")]
        members = {
            name: "property" if isinstance(member, property) else signature(member)
            for name, member in sorted(
                {k: v for part in reversed(own) for k, v in part.items()}.items()
            )
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


def test_modules_inside_packages_are_private() -> None:
    packages = {f"focaldet.{path.parent.name}" for path in SOURCES.glob("*/__init__.py")}
    packages |= {
        f"focaldet.{path.parents[1].name}.{path.parent.name}"
        for path in SOURCES.glob("*/*/__init__.py")
    }
    inside = [name for name in public_modules() if name.count(".") > 1]
    assert set(inside) <= packages


def test_the_public_surface_is_the_one_written_down() -> None:
    assert surface() == json.loads(SURFACE.read_text()), (
        "Public signatures changed. If that is meant: python -m tests.test_api_surface"
    )


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
