"""From what a person names - a path, a published file, a repository - to a path."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import must_be
from focaldet.pretrained._downloads import fetch
from focaldet.pretrained._hub import download_repository, is_repository
from focaldet.pretrained._published import PUBLISHED, suggestions

if TYPE_CHECKING:
    import os

__all__ = ["locate"]

_FILE_SUFFIXES = (".pth", ".pt", ".pkl", ".zip", ".safetensors")


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint, after downloading it if it has to be.

    A string is looked up in this order; anything else is a path:

    1. a folder or file that exists;
    2. a published name; one that begins (nearly) with a family's is not looked for further;
    3. a repository on the Hugging Face Hub, "user/repo" or "user/repo@revision".

    Raises:
        FileNotFoundError: it is none of them; published names that come near are suggested.
        DownloadError: a published file that could not be fetched.
        ImportError: what may be a repository, without the package huggingface_hub.
    """
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str):
        condition = "a folder written by save_pretrained or a checkpoint file"
        got = f"{str(path)!r}, which does not exist"
        raise FileNotFoundError(must_be("source", condition, got))
    for weights in PUBLISHED:
        if weights.name == source:
            return fetch(weights)
    got = f"{source!r}, which does not exist"
    if is_repository(source) and not _means_a_file_or_family(source):
        try:
            return download_repository(source)
        except OSError as error:
            got = f"{source!r}: no such file, and from the Hub: {error}"
            raise FileNotFoundError(_message(source, got)) from error
    raise FileNotFoundError(_message(source, got))


def _means_a_file_or_family(source: str) -> bool:
    families = {weights.family for weights in PUBLISHED}
    near = difflib.get_close_matches(source.partition("/")[0].lower(), families, cutoff=0.8)
    return bool(near) or Path(source).suffix.lower() in _FILE_SUFFIXES


def _message(source: str, got: str) -> str:
    near = suggestions(source)
    remedy = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return must_be(
        "source",
        "a folder or file that exists, a published name, or a Hub repository 'user/repo'",
        got,
        f"{remedy}print(focaldet.pretrained.list()) shows the published names.",
    )
