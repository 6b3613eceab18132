"""Load a checkpoint from any source: find it, read it, and convert it to a config and tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from focaldet._checks import check_names, shortened
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import Checkpoint, SuggestedConfig
from focaldet.pretrained._folder import is_own_folder, load_folder, model_of_run, no_checkpoint_in
from focaldet.pretrained._neighbours import (
    CONVENTIONAL,
    checkpoint_among,
    file_within,
    texts_beside,
)
from focaldet.pretrained._other_classes import for_other_classes, without_background
from focaldet.pretrained._published import PUBLISHED
from focaldet.pretrained._reading import read_weight_sets
from focaldet.pretrained._recognition import recognise
from focaldet.pretrained._sources import locate
from focaldet.pretrained.families import _focaldet, _torchvision

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from focaldet.pretrained._checkpoint import CheckpointFile, Family

__all__ = ["convert", "load_checkpoint"]

_COCO_CHANNELS = 91  # of torchvision's heads
_logger = logging.getLogger(__name__)


def load_checkpoint(
    source: str | os.PathLike[str],
    config: RetinaNetConfig | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    drop_background: bool = False,
    file_name: str | None = None,
    **changes: Any,
) -> Checkpoint:
    """Load a checkpoint in any supported format.

    A file is recognised by the names of its tensors, whatever dictionaries contain them and whatever
    prefix they share (``module.``, ``model.``, …). What a file of another project does not say about
    the model is logged as a warning (logger ``focaldet``), unless it is given here or the file is a
    published one.

    Args:
        source: A folder that ``RetinaNet.save_pretrained`` wrote; the folder of a run, whose best
            model is loaded, or else its last, and the log says which; the checkpoint of a run; a file
            of a supported project (:mod:`focaldet.pretrained.families`) or a folder with one; a
            published name (:func:`list`); or a repository on the Hugging Face Hub.
        config: The configuration to use. None uses the one that the checkpoint contains or suggests.
        num_classes: The number of classes, to detect other classes than the checkpoint does. See
            :func:`for_other_classes`.
        class_names: The names of those classes, or of the checkpoint's own if it does not name them.
        weights: Which weights to load if a file contains several sets, such as "ema": the keys of the
            dictionaries that contain them, joined with dots, or a part of that. None loads the ones
            that are not an average, and logs a warning that lists the others.
        drop_background: Whether the first class of the checkpoint is a background that is not
            detected, so that it and its name are dropped.
        file_name: Which file of a folder or repository to load.
        **changes: Fields of :class:`~focaldet.RetinaNetConfig` that replace those of the checkpoint,
            such as ``min_size=600``. The weights must still fit.

    Raises:
        FileNotFoundError: If the source does not exist, or is a folder without a checkpoint.
        DownloadError: If a published file could not be downloaded.
        CheckpointError: If a file is damaged, would run code, is in no supported format, or contains
            several sets of weights and it is not clear which to load.
        ValueError: If the arguments contradict each other.
        TypeError: If a change is not a field of the configuration.

    .. versionchanged:: 0.3.0
        Added ``weights``, ``drop_background``, ``file_name`` and the fields of the configuration.
        Folders of runs are accepted.
    """
    _check_changes(config, changes)
    names = None if class_names is None else check_names("class_names", class_names)
    path = locate(source, file_name)
    if file_name is not None:
        if not path.is_dir():
            raise ValueError(
                f"file_name is for a folder or repository, but {str(path)!r} is a file."
            )
        path = file_within(path, file_name)
    if path.is_dir():
        path = model_of_run(path)
    other_classes = num_classes is not None or names is not None
    request = _Request(config, names, other_classes, weights, drop_background, changes)
    if path.is_dir() and is_own_folder(path):
        checkpoint = _from_own_folder(path, request)
    else:
        published = any(one.name == source for one in PUBLISHED)
        checkpoint = _from_file(_file_of(path), request, published=published)
    checkpoint = checkpoint._replace(source=str(path))
    if drop_background:
        with _explained(path, _focaldet):  # whose keys the converted tensors have
            checkpoint = without_background(checkpoint)
        names = _without_first(names, checkpoint.config.num_classes)
    if other_classes:
        return for_other_classes(checkpoint, config, num_classes=num_classes, class_names=names)
    return checkpoint if config is None else checkpoint._replace(config=config)


class _Request(NamedTuple):
    """What the caller of :func:`load_checkpoint` asks for."""

    config: RetinaNetConfig | None
    class_names: tuple[str, ...] | None
    other_classes: bool
    weights: str | None
    drop_background: bool
    changes: Mapping[str, Any]


def _check_changes(config: RetinaNetConfig | None, changes: Mapping[str, Any]) -> None:
    fields = [field.name for field in dataclasses.fields(RetinaNetConfig)]
    for name in changes:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3)
            question = f" Did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"{name} is neither an argument nor a field of the config.{question}")
    if config is not None and changes:
        raise TypeError(
            f"config= and {', '.join(changes)} cannot be given together. Pass config.replace(...) instead."
        )


def _without_first(names: tuple[str, ...] | None, num_classes: int) -> tuple[str, ...] | None:
    if names is None or len(names) != num_classes + 1:
        return names
    _logger.info("Dropped the first of class_names, %r, with the background.", names[0])
    return names[1:]


def _from_own_folder(folder: Path, request: _Request) -> Checkpoint:
    if request.weights is not None:
        raise ValueError(
            f"weights={shortened(request.weights)} was given, but {str(folder)!r} contains only one set of "
            "weights."
        )
    checkpoint = load_folder(folder)
    return checkpoint._replace(config=checkpoint.config.replace(**request.changes))


def _file_of(path: Path) -> Path:
    """Return the checkpoint in a folder, or the path of a file."""
    if not path.is_dir():
        return path
    name = checkpoint_among((one.name for one in path.iterdir() if one.is_file()), str(path))
    if name is None:
        raise no_checkpoint_in(path)
    return path / name


def _from_file(path: Path, request: _Request, *, published: bool) -> Checkpoint:
    sets = read_weight_sets(path)
    file, family = recognise(sets, path, request.weights, texts_beside(path))
    if request.config is not None and not request.other_classes:
        config = request.config
        if request.drop_background:
            config = config.replace(num_classes=config.num_classes + 1, class_names=None)
        with _explained(path, family):
            return convert(file, family, config)
    with _explained(path, family):
        suggested = _suggested(file, family, request.config)
    config = suggested.config.replace(**request.changes)
    if request.drop_background:
        config = _with_background(config, family, request)
    if request.class_names is not None and "class_names" in suggested.assumed:
        config = config.replace(class_names=None)
    with _explained(path, family):
        checkpoint = convert(file, family, config)
    usual = published or path.name in _PUBLISHED_FILES or family is _focaldet
    if request.config is None and not usual:
        _log_assumed(path, family, config, suggested.assumed, request)
    return checkpoint


_PUBLISHED_FILES = {one.file_name for one in PUBLISHED} - {*CONVENTIONAL}


def _suggested(
    file: CheckpointFile, family: Family, config: RetinaNetConfig | None
) -> SuggestedConfig:
    """Return what a file suggests. Without a config of its own, a focaldet file may have the given one."""
    if family is _focaldet and config is not None and _focaldet.own_config(file) is None:
        num_classes = _focaldet.num_classes_of(file.tensors)
        names = config.class_names if config.num_classes == num_classes else None
        return SuggestedConfig(config.replace(num_classes=num_classes, class_names=names))
    return family.suggest(file)


def _with_background(config: RetinaNetConfig, family: Family, request: _Request) -> RetinaNetConfig:
    """Return the config of a file's head including its background."""
    if family is not _torchvision or config.class_names != COCO_CLASS_NAMES:
        return config
    if not request.other_classes:
        raise ValueError(
            "drop_background=True, but a torchvision head of 91 channels is taken for COCO's, of which only "
            "the 80 classes are kept anyway. If it has 90 classes of your own, pass num_classes=90, too."
        )
    return config.replace(num_classes=_COCO_CHANNELS, class_names=None)


def _log_assumed(
    path: Path,
    family: Family,
    config: RetinaNetConfig,
    assumed: Sequence[str],
    request: _Request,
) -> None:
    """Say once what a file does not tell, and that it can be given."""
    given = {*request.changes, *(("class_names",) if request.other_classes else ())}
    fields = [name for name in assumed if name not in given]
    if config.class_names is not None:
        classes = f"the classes {shortened(list(config.class_names))}"
    elif request.class_names is not None:
        classes = f"{config.num_classes} classes"
    else:
        classes = f"{config.num_classes} classes without names (pass class_names=)"
    log = _logger.warning if fields else _logger.info
    values = ", ".join(f"{name}={shortened(getattr(config, name), 60)}" for name in fields)
    log(
        "Loaded %s as a RetinaNet of %s with the backbone %s and %s.%s",
        path.name,
        family.NAME,
        config.backbone,
        classes,
        f" The file does not say these, so they are assumed: {values}. If the training differed, pass them "
        "as arguments."
        if fields
        else "",
    )


@contextlib.contextmanager
def _explained(path: Path, family: Family) -> Iterator[None]:
    """Turn what a converter raises about a file into an error that names the file."""
    try:
        yield
    except KeyError as error:  # a key that the family's files always have
        raise CheckpointError(
            f"Cannot load {str(path)!r}: it looks like a RetinaNet of {family.NAME}, but has no tensor "
            f"for focaldet's {error}."
        ) from error
    except (IndexError, RuntimeError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"Cannot load {str(path)!r}: it has the keys of a RetinaNet of {family.NAME}, but not its "
            "shapes."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}. {error}") from error


def convert(
    file: CheckpointFile, family: Family, config: RetinaNetConfig | None = None
) -> Checkpoint:
    """Convert a file of a family, with the given config or the one that the file suggests."""
    if config is None:
        config = family.suggest(file).config
    return Checkpoint(config, family.convert(file, config))
