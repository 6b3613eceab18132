"""Which files of a folder belong to a dataset, and how text files are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["decode_text", "is_hidden", "list_files"]

_LEFT_BEHIND = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})

# A byte order mark says which encoding a file is in. Windows programs write those of UTF-16, too.
_ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def is_hidden(name: str) -> bool:
    """Return whether tools left a file or folder of this name behind, so that it is not data.

    These are names that start with a dot, such as ``.DS_Store``, ``.ipynb_checkpoints`` and the
    ``._a.png`` that macOS writes next to ``a.png``, and ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``
    and ``@eaDir``.

    >>> is_hidden("._a.png"), is_hidden("a.png")
    (True, False)
    """
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def list_files(
    folder: Path, suffixes: Collection[str] = (), *, recursive: bool = False
) -> list[Path]:
    """List the files of a folder in the order of their names, without hidden ones.

    Args:
        folder: The folder. It may itself be hidden or be inside a hidden folder.
        suffixes: Suffixes of the files, in lower case with the dot; those of the files may be in
            upper case. By default, all files are listed.
        recursive: Whether to search the folders inside it as well, and those to which symbolic
            links in it point. Hidden folders are left out.

    Raises:
        OSError: If a folder cannot be read.
    """
    files: list[Path] = []
    waiting, seen = [folder], {folder.resolve()}
    while waiting:
        for entry in waiting.pop().iterdir():
            if is_hidden(entry.name):
                continue
            if not entry.is_dir():
                if not suffixes or entry.suffix.lower() in suffixes:
                    files.append(entry)
            elif recursive and (target := entry.resolve()) not in seen:  # a link may be a loop
                seen.add(target)
                waiting.append(entry)
    return sorted(files)


def decode_text(data: bytes) -> str:
    r"""Decode UTF-8, or what a byte order mark says. The mark is left out.

    Raises:
        ValueError: If the bytes are not valid text. The message says in which line.

    >>> decode_text("cat\n".encode("utf-16"))
    'cat\n'
    """
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise ValueError("it is not valid UTF-16") from error
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ValueError(
            f"line {line} contains the byte 0x{byte:02x}, which is not UTF-8"
        ) from error
