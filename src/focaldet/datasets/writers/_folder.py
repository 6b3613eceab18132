"""Folders of files that appear all at once: they are written aside and then moved."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from focaldet._checks import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OutputFolder"]

_logger = logging.getLogger(__name__)


class OutputFolder:
    """A folder that is being written.

    Its files are in a temporary folder next to it until :meth:`commit` moves them to their places.

    Args:
        path: The folder, as an absolute path. It may exist.
        staged: The temporary folder.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, staged: Path) -> None:
        self.path = path
        self._staged = staged
        self._images: dict[str, Path] = {}

    @classmethod
    @contextlib.contextmanager
    def staged(cls, path: Path, *, overwrite: bool, count_others: bool) -> Iterator[OutputFolder]:
        """Yield a folder to write to, and move its files to their places on a clean exit.

        Args:
            path: The folder, as an absolute path. It may exist.
            overwrite: Whether to replace files that exist.
            count_others: Whether to count in the log the files that were in the folder and stay.

        Raises:
            FileExistsError: If a file exists and ``overwrite`` is False. Nothing is moved then.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        staged.mkdir()
        try:
            folder = cls(path, staged)
            yield folder
            folder._commit(overwrite=overwrite, count_others=count_others)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8.

        Args:
            name: Path of the file in the folder, with "/".
            text: Its content, whose line ends are kept.
        """
        target = self._staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())

    def make_folder(self, name: str) -> None:
        """Create a folder, which stays empty if nothing is written to it."""
        (self._staged / name).mkdir(parents=True, exist_ok=True)

    def place_image(self, source: Path, name: str, how: Literal["link", "copy"]) -> None:
        """Link or copy an image into the folder. Nothing happens if it is there already.

        Raises:
            OSError: If the file system does not support symbolic links, or a file cannot be copied.
        """
        target = self._staged / name
        final = self.path / name
        if final.exists() and not final.is_symlink() and final.samefile(source):
            return
        if name in self._images:
            return  # splits may share an image
        self._images[name] = source
        target.parent.mkdir(parents=True, exist_ok=True)
        if how == "copy":
            shutil.copyfile(source, target)
            return
        try:
            target.symlink_to(source)
        except OSError as error:
            raise OSError(
                f"Cannot create a symbolic link to {str(source)!r} ({error.strerror or error}). Pass "
                "image_files='copy'."
            ) from error

    def _commit(self, *, overwrite: bool, count_others: bool) -> None:
        if not self.path.exists():
            self._staged.rename(self.path)
            return
        names = _files_in(self._staged)
        existing = [name for name in names if os.path.lexists(self.path / name)]
        if existing and not overwrite:
            raise FileExistsError(
                f"{str(self.path / existing[0])!r} exists already. Choose another path, or pass "
                "overwrite=True."
            )
        self._check_sources_survive(existing)
        others = len(set(_files_in(self.path)).difference(names)) if count_others else 0
        if others:
            _logger.warning("Files that were in %s before and stay there: %d.", self.path, others)
        for folder, subfolders, _ in os.walk(self._staged):
            for subfolder in subfolders:
                inside = Path(folder, subfolder).relative_to(self._staged)
                (self.path / inside).mkdir(parents=True, exist_ok=True)
        for name in names:
            (self._staged / name).replace(self.path / name)

    def _check_sources_survive(self, existing: list[str]) -> None:
        """Raise if a file that would be replaced is an image of the dataset."""
        sources = {source.resolve() for source in self._images.values()}
        for name in existing:
            final = self.path / name
            if not final.is_symlink() and final.resolve() in sources:
                raise FileExistsError(
                    f"{printable(repr(str(final)))} is an image of the dataset, and would be replaced. "
                    "Choose another folder."
                )


def _files_in(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it."""
    return [
        os.path.relpath(Path(inside, file), folder)
        for inside, _, files in os.walk(folder)
        for file in files
    ]
