"""Atomic file writes: write a temporary file, then rename it."""

from __future__ import annotations

import contextlib
import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["atomic_write", "atomic_write_text", "is_leftover"]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.part")


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``, and rename it to ``target`` on a clean exit.

    If the block raises, the temporary file is removed and ``target`` keeps its old content. The
    temporary name is random, so that two processes can write the same target, and the file has the
    permissions of any new file.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, with a final newline, in one atomic step."""
    with atomic_write(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Return whether a path is named like a temporary file, which a killed process leaves behind.

    >>> from pathlib import Path
    >>> is_leftover(Path("run/.last.ckpt.0123456789abcdef.part"))
    True
    """
    return _TEMPORARY.fullmatch(path.name) is not None
