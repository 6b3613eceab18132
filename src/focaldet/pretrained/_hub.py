"""The Hugging Face Hub: repositories that hold what ``save_pretrained`` writes.

huggingface_hub's mixin must be a base class, and that package is optional here; so its functions
are called instead, which obey the same environment (``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_HOME``,
``HF_ENDPOINT``).
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import focaldet
from focaldet.pretrained import _directory

if TYPE_CHECKING:
    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import Checkpoint

__all__ = ["download_repository", "is_repository", "model_card", "push"]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
_FILES = ("config.json", "model.safetensors")
_CARD = "README.md"


def is_repository(name: str) -> bool:
    """Say whether a name reads as a repository's, with or without a revision.

    >>> [is_repository(name) for name in ("me/owls", "me/owls@v1", "owls", "./owls", "a/b/c")]
    [True, True, False, False, False]
    """
    return _REPOSITORY.fullmatch(name) is not None


def download_repository(name: str) -> Path:
    """Return the folder of a repository's files in the Hub's own cache, after fetching what is new.

    Without a network, or with ``HF_HUB_OFFLINE=1``, the files in the cache are taken.

    Args:
        name: "user/repo", or "user/repo@revision" with a branch, tag or commit.

    Raises:
        FileNotFoundError: what the Hub says, such as no repository, or no network and no cached file.
        ImportError: huggingface_hub is not installed.
    """
    library = _huggingface_hub(f"{name!r} is no file or folder here, and as a Hub repository")
    repository, _, revision = name.partition("@")
    try:
        folder = library.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(_FILES),
            library_name="focaldet",
            library_version=focaldet.__version__,
        )
    except (OSError, ValueError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise FileNotFoundError(lines[0].removeprefix("Got: ").rstrip(".")) from error
    return Path(folder)


def push(
    checkpoint: Checkpoint, repository: str, *, private: bool | None, commit_message: str
) -> str:
    """Upload a checkpoint, with a model card if the repository has none.

    Args:
        checkpoint: what to upload, as ``config.json`` and ``model.safetensors``.
        repository: "user/repo"; made if it does not exist.
        private: of a repository that is made; None takes the account's default.
        commit_message: first line of the commit.

    Returns:
        The commit's URL.

    Raises:
        ImportError: huggingface_hub or safetensors is not installed.
    """
    api = _huggingface_hub("uploading").HfApi(
        library_name="focaldet", library_version=focaldet.__version__
    )
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        _directory.save(checkpoint, folder)
        if not api.file_exists(repository, _CARD):
            card = model_card(checkpoint.config, repository)
            (Path(folder) / _CARD).write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=commit_message
        )
    return str(commit.commit_url)


def _huggingface_hub(what: str) -> Any:
    if importlib.util.find_spec("safetensors") is None:  # no pickles on the Hub
        raise ImportError(_missing(what, "safetensors"))
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(_missing(what, "huggingface_hub")) from error
    return huggingface_hub


def _missing(what: str, package: str) -> str:
    return f"{what} needs {package}: pip install 'focaldet[hub]'"


def model_card(config: RetinaNetConfig, repository: str) -> str:
    """Return a README.md: what the model is, its classes, and how to load it."""
    names = config.class_names
    classes = f"{config.num_classes}" + (f": {', '.join(names)}" if names else ", without names")
    return f"""\
---
library_name: focaldet
pipeline_tag: object-detection
tags:
- retinanet
- focal-loss
---

# {repository.partition("/")[2]}

A [RetinaNet](https://arxiv.org/abs/1708.02002), saved by focaldet {focaldet.__version__}.

| | |
|---|---|
| backbone | {config.backbone} |
| input | RGB, shorter side {config.min_size} pixels, longer side at most {config.max_size} |
| anchors | {len(config.octave_scales) * len(config.aspect_ratios)} per cell |
| classes | {classes} |

```python
from focaldet import RetinaNet

model = RetinaNet.from_pretrained("{repository}")
[found] = model.predict("photo.jpg", score_threshold=0.5)
found.draw().save("drawn.png")
```
"""
