"""Find a checkpoint by path, published name or Hub repository, and download it if necessary."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.errors import DownloadError
from focaldet.pretrained._downloads import fetch
from focaldet.pretrained._hub import download_repository, is_repository
from focaldet.pretrained._published import PUBLISHED, suggestions

if TYPE_CHECKING:
    import os

__all__ = ["locate"]

_FILE_SUFFIXES = (
    *(".pth", ".pt", ".ckpt", ".bin", ".pkl", ".zip", ".safetensors", ".h5", ".hdf5", ".pdparams"),
)


def locate(source: str | os.PathLike[str], file_name: str | None = None) -> Path:
    """Return the path of a checkpoint, downloading it first if necessary.

    A path object must exist. A string is looked up in this order:

    1. a folder or file that exists;
    2. a published name; a string that begins with a family's name, or nearly so, is not looked up
       further;
    3. a repository on the Hugging Face Hub, ``"user/repo"`` or ``"user/repo@revision"``.

    Args:
        source: The source.
        file_name: Which file of a repository to download. None downloads its only checkpoint.

    Raises:
        FileNotFoundError: If the source is none of these. Similar published names are suggested.
        DownloadError: If a published file could not be downloaded.
        ImportError: If the source may be a repository, but huggingface_hub is not installed.
    """
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str):
        raise FileNotFoundError(f"No such file or folder: {str(path)!r} (source).")
    for weights in PUBLISHED:
        if weights.name == source:
            if weights.hub is None:
                return fetch(weights)
            return _fetch_from_hub(source, weights.hub, file_name)
    if is_repository(source) and not _resembles_file_or_family(source):
        try:
            return download_repository(source, file_name)
        except OSError as error:
            raise FileNotFoundError(
                f"No such file, folder or published name: {source!r}. It could not be loaded from the "
                f"Hugging Face Hub either: {error}. {_published_names(source)}"
            ) from error
    raise FileNotFoundError(
        f"No such file, folder, published name or Hub repository: {source!r}. "
        f"{_published_names(source)}"
    )


def _fetch_from_hub(name: str, repository: str, file_name: str | None) -> Path:
    """Return the folder of a published checkpoint that is a repository on the Hub."""
    try:
        return download_repository(repository, file_name)
    except OSError as error:
        raise DownloadError(
            f"Could not download {name!r} from the Hugging Face Hub repository {repository!r}: {error}."
        ) from error


def _resembles_file_or_family(source: str) -> bool:
    families = {weights.family for weights in PUBLISHED}
    near = difflib.get_close_matches(source.partition("/")[0].lower(), families, cutoff=0.8)
    return bool(near) or Path(source).suffix.lower() in _FILE_SUFFIXES


def _published_names(source: str) -> str:
    near = suggestions(source)
    question = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{question}`focaldet models` or focaldet.pretrained.list() shows the published names."
