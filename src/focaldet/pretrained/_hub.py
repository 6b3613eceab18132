"""Checkpoints on the Hugging Face Hub: those of ``save_pretrained``, and the files of other projects.

huggingface_hub is optional, so its mixin can't be a base class. Its functions are called instead.
They follow the same environment variables: ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_HOME`` and
``HF_ENDPOINT``.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet._extras import import_extra
from focaldet._version import __version__
from focaldet.pretrained._folder import save_checkpoint
from focaldet.pretrained._neighbours import (
    MAX_TEXT_SIZE,
    checkpoint_among,
    describing_files,
    is_checkpoint_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import Checkpoint

__all__ = ["download_repository", "is_repository", "model_card", "push_checkpoint"]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
_CARD = "README.md"


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a repository's, with or without a revision.

    >>> [is_repository(name) for name in ("me/owls", "me/owls@v1", "owls", "./owls", "a/b/c")]
    [True, True, False, False, False]
    """
    return _REPOSITORY.fullmatch(name) is not None


def download_repository(name: str, file_name: str | None = None) -> Path:
    """Download what is new in a repository, and return the folder in the Hub's own cache.

    Only the checkpoint and the files that may describe it are downloaded. Without a network, or with
    ``HF_HUB_OFFLINE=1``, the cached files are used.

    Args:
        name: The repository, ``"user/repo"`` or ``"user/repo@revision"`` with a branch, tag or commit.
        file_name: The checkpoint's path in the repository. None downloads the only one at the top
            level, or the one with a usual name.

    Raises:
        FileNotFoundError: If there is no such repository, or no network and no cached file. The
            message is the first line of the Hub's. Also if the repository has no checkpoint.
        CheckpointError: If it has several, none of which has a usual name.
        ImportError: If huggingface_hub or safetensors is not installed.
    """
    hub = _import_hub(
        f"No such file or folder: {name!r}. Loading it as a repository of the Hugging Face Hub"
    )
    repository, _, revision = name.partition("@")
    files = _files_of(hub, repository, revision or "main")
    needed = _USUAL if files is None else _needed(name, files, file_name)
    try:
        folder = hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=needed,
            library_name="focaldet",
            library_version=__version__,
        )
    except (OSError, ValueError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise FileNotFoundError(lines[0].removeprefix("Got: ").rstrip(".")) from error
    return Path(folder)


# Used if the files cannot be listed: then they are in the cache, or the download says why.
_USUAL = ["config.json", "model.safetensors"]


def _files_of(hub: Any, repository: str, revision: str) -> dict[str, int | None] | None:
    """Return the sizes of a repository's files by their paths, or None without an answer."""
    api = hub.HfApi(library_name="focaldet", library_version=__version__)
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True)
    except (OSError, ValueError):
        return None
    return {one.rfilename: one.size for one in info.siblings or ()}


def _needed(name: str, files: Mapping[str, int | None], file_name: str | None) -> list[str]:
    """Return the paths of a checkpoint in a repository and of the files that may describe it."""
    top = [file for file in files if "/" not in file]
    wanted = checkpoint_among(top, name) if file_name is None else file_name
    if wanted is None or wanted not in files:
        found = ", ".join(sorted(filter(is_checkpoint_name, files))) or "none"
        what = "no checkpoint at the top level" if file_name is None else f"no file {file_name!r}"
        raise FileNotFoundError(f"the repository has {what}; its checkpoints: {found}")
    folder, _, within = wanted.rpartition("/")
    neighbours = {
        file.rpartition("/")[2]: file for file in files if file.rpartition("/")[0] == folder
    }
    texts = [neighbours[text] for text in describing_files(within, neighbours)]
    small = [text for text in texts if text != wanted and (files[text] or 0) <= MAX_TEXT_SIZE]
    return [wanted, *small]


def push_checkpoint(
    checkpoint: Checkpoint, repository: str, *, private: bool | None, commit_message: str
) -> str:
    """Upload a checkpoint to the Hugging Face Hub, with a model card if the repository has none.

    Args:
        checkpoint: The checkpoint to upload, as ``config.json`` and ``model.safetensors``.
        repository: The repository, "user/repo". It is created if it does not exist.
        private: Whether a repository that is created is private. None uses the account's default.
        commit_message: The first line of the commit message.

    Returns:
        The commit's URL.

    Raises:
        ImportError: If huggingface_hub or safetensors is not installed.
    """
    api = _import_hub("Uploading to the Hugging Face Hub").HfApi(
        library_name="focaldet", library_version=__version__
    )
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(checkpoint, folder)
        if not api.file_exists(repository, _CARD):
            card = model_card(checkpoint.config, repository)
            (Path(folder) / _CARD).write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message
        )
    return str(commit.commit_url)


def _import_hub(purpose: str) -> Any:
    # Without safetensors, save_pretrained writes a pickle, and none is uploaded. A repository may have
    # both, of which safetensors is preferred.
    import_extra("safetensors", purpose=purpose, install="focaldet[hub]")
    return import_extra("huggingface_hub", purpose=purpose, install="focaldet[hub]")


def model_card(config: RetinaNetConfig, repository: str) -> str:
    """Return a README.md that says what the model is, what it detects, and how to load it."""
    names = config.class_names
    classes = f"{config.num_classes}" + (f": {', '.join(names)}" if names else ", without names")
    num_bands = len(config.image_mean)
    size = f"shorter side {config.min_size} pixels, longer side at most {config.max_size}"
    if not config.keep_ratio:
        size = f"resized to {config.min_size}x{config.min_size} pixels"
    bands = "RGB" if num_bands == 3 else f"{num_bands} channels"
    return f"""\
---
library_name: focaldet
pipeline_tag: object-detection
tags:
- retinanet
- focal-loss
---

# {repository.partition("/")[2]}

A [RetinaNet](https://arxiv.org/abs/1708.02002), saved by focaldet {__version__}.

| | |
|---|---|
| backbone | {config.backbone} |
| input | {bands}, {size} |
| anchors | {len(config.octave_scales) * len(config.aspect_ratios)} per cell |
| classes | {classes} |

```python
from focaldet import RetinaNet

model = RetinaNet.from_pretrained("{repository}")
[detections] = model.predict("photo.jpg", score_threshold=0.5)
detections.draw().save("drawn.png")
```
"""
